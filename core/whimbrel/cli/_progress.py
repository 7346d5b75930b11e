"""Shows a migration while it runs, and tables of how it went.

On a terminal one line is kept up to date; elsewhere there is a line for each round and one for each second in between.
Either goes to standard error.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from whimbrel.cli._monitor import ENDS, counters
from whimbrel.cli._output import console, note
from whimbrel.units import format_rate, format_seconds, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from rich.progress import Progress as RichProgress

    from whimbrel.cli._monitor import Info

EVERY: Final = 1.0  # seconds between two plain lines of one round


class Progress:
    """Shows what it is told; a context manager. One thread. With `quiet` it only remembers.

    `last` is the last information that had counters: when a migration has failed there are none any more.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.last: Info = {}
        self.expected_downtime: int | None = None
        on_a_terminal = sys.stderr is not None and sys.stderr.isatty()  # None: closed by whoever started us
        self._live: _Live | None = _Live() if on_a_terminal and not quiet else None
        self._quiet = quiet
        self._said: tuple[int, float] = (-1, -math.inf)

    def show(self, info: Info) -> None:
        """Show how it stands now."""
        if counters(info):
            self.last = info
        self.expected_downtime = info.get("expected-downtime", self.expected_downtime)
        if info["status"] in ENDS:
            self._end()
        elif self._live is not None:
            self._live.show(info)
        elif not self._quiet:
            self._say(info)

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _say(self, info: Info) -> None:
        now, rounds = time.monotonic(), info.get("rounds", 0)
        if rounds != self._said[0] or now - self._said[1] >= EVERY:
            self._said = rounds, now
            note(summary(info))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._end()


class _Live:
    """One line on a terminal, with a bar, from the first `show` to `stop`; twice is fine."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = BarColumn(bar_width=20), text
        self._rich: RichProgress = Progress(*columns, console=console(error=True), transient=True, auto_refresh=False)
        self._task = self._rich.add_task("", total=None)

    def show(self, info: Info) -> None:
        ram = counters(info)
        total = ram.get("total") or None
        done = total and total - ram.get("remaining", 0)
        self._rich.update(self._task, description=summary(info), total=total, completed=done)
        self._rich.start()
        self._rich.refresh()

    def stop(self) -> None:
        self._rich.stop()


def summary(info: Info) -> str:
    """How a migration stands, in one line."""
    ram = counters(info)
    if not ram:
        return str(info["status"])
    where = f"round {info['rounds'] + 1}" if "rounds" in info else f"pass {ram['dirty-sync-count']}"
    if info["status"] != "active":
        where = str(info["status"])
    parts = [
        where,
        f"{format_size(ram['remaining'])} left",
        f"sends {format_rate(throughput(ram))}",
        f"dirties {format_rate(dirty_rate(ram))}" if ram.get("dirty-pages-rate") else "",
        f"expected downtime {milliseconds(info['expected-downtime'])}" if "expected-downtime" in info else "",
        f"{milliseconds(made['total-time'])} foreseen in all" if (made := info.get("forecast")) else "",
        f"guest throttled by {info['cpu-throttle-percentage']} %" if "cpu-throttle-percentage" in info else "",
        "does not converge" if info.get("stalled") else "",
    ]
    return ", ".join(filter(None, parts))


def report(info: Info, expected_downtime: float | None = None) -> Iterator[tuple[str, str]]:
    """Rows for a table of how a migration stands or went; a row without a value has an empty one."""
    ram = counters(info)
    yield "migration", str(info["status"])
    yield "error", info.get("error-desc", "") if info["status"] == "failed" else ""
    yield "total time", milliseconds(info.get("total-time"))
    yield "downtime", milliseconds(info.get("downtime-exact") or info.get("downtime"))
    split = info.get("downtime-split") or {}
    yield "downtime by cause", ", ".join(f"{cause} {milliseconds(count)}" for cause, count in split.items())
    yield "expected downtime", milliseconds(info.get("expected-downtime", expected_downtime))
    yield "downtime limit", _limit(info.get("switchover") or {})
    yield "foreseen", _foreseen(info)
    yield "rounds", str(info.get("rounds") or ram.get("dirty-sync-count") or "")
    yield "convergence", _convergence(info)
    if ram:
        yield "memory", format_size(ram["total"])
        yield "sent", format_size(ram["transferred"])
        yield "left", format_size(ram["remaining"]) if ram["remaining"] else ""
        yield "pages", f"{ram['normal']} whole, {ram['duplicate']} zero"
        yield "throughput", format_rate(throughput(ram))
        rate = info.get("dirty-rate") or dirty_rate(ram)
        yield "dirty rate", format_rate(rate) if rate else ""
    yield "dirty tracker", info.get("dirty-tracker", "")
    yield "ownership", info.get("ownership", "")


def _limit(switchover: Info) -> str:
    """By how much the downtime was expected to exceed its limit, where it knowingly did."""
    if switchover.get("decision") != "forced":
        return ""
    expected, limit = switchover["expected-downtime"], switchover["downtime-limit"]
    return f"{milliseconds(limit)}, given up after switchover-timeout with {milliseconds(expected)} expected"


def _foreseen(info: Info) -> str:
    """The first forecast once it is known what came, and until then the last."""
    made = info.get("first-forecast" if info["status"] == "completed" else "forecast")
    if not made or info["status"] in ENDS - {"completed"}:
        return ""
    text = f"{milliseconds(made['total-time'])}, downtime {milliseconds(made['downtime'])}"
    return text if info["status"] != "completed" else f"{text} (behind round {made['round']})"


def _convergence(info: Info) -> str:
    if info.get("stalled"):
        return "stalled: what is left does not shrink, and does not fit the limit"
    count = info.get("stalls")
    return f"stalled {'once' if count == 1 else f'{count} times'}" if count else ""


def throughput(ram: Any) -> float:
    """Bytes per second, from the counters of RAM."""
    return float(ram["mbps"]) * 1e6 / 8


def dirty_rate(ram: Any) -> float:
    """Bytes per second that the guest writes anew, from the counters of RAM."""
    return float(ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096))


def milliseconds(count: float | None) -> str:
    """A time in milliseconds for people; empty for None."""
    return "" if count is None else format_seconds(count / 1000)
