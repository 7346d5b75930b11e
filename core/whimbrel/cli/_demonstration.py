"""What `whimbrel demo` does: two child processes, a migration between them under load, and the check at the end.

The children (`whimbrel_examples.roles`) tell ten times a second how many operations they have done; everything that is
said about speed comes from those two numbers, time and count.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

import attrs

from whimbrel.cli._children import ENDED, Child
from whimbrel.cli._output import note
from whimbrel.cli._progress import Progress, report
from whimbrel.errors import ConfigError, WhimbrelError
from whimbrel.units import format_seconds, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

    from whimbrel.cli._children import Event, Inbox

ROLES: Final = "whimbrel_examples.roles"
BEFORE: Final = 1.5  # seconds of work that are measured before the migration
AFTER: Final = 1.0  # and behind it
PATIENCE: Final = 120.0  # seconds for whatever a child does by itself
TERMINATED: Final = 143


@attrs.frozen(kw_only=True)
class Result:
    """How it went: speeds in operations per second, times in milliseconds.

    `problem` is empty if everything is as it should be.
    """

    size: int
    before: float
    during: float
    after: float | None
    migration: Mapping[str, Any]
    expected_downtime: float
    checked: Mapping[str, Any] | None
    problem: str

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "identical": None if self.checked is None else not self.checked["differing"],
            "operations-per-second": {"before": self.before, "during": self.during, "after": self.after},
            "expected-downtime": self.expected_downtime,
            "check": self.checked,
            "migration": dict(self.migration),
            "problem": self.problem,
        }

    def rows(self) -> Iterator[tuple[str, str]]:
        """Rows for a table."""
        yield "operations/s before", f"{self.before:,.0f}"
        yield "operations/s during", f"{self.during:,.0f} ({self.during / self.before:.0%})" if self.before else ""
        yield "operations/s after", "" if self.after is None else f"{self.after:,.0f}"
        told_below = {"error-desc": ""}
        yield from report({**self.migration, **told_below}, self.expected_downtime)
        if self.checked is not None:
            yield "check", self._verdict(self.checked)

    def _verdict(self, checked: Mapping[str, Any]) -> str:
        if not checked["differing"]:
            return f"identical: {checked['bytes']} bytes after {checked['operations']} operations"
        return f"{checked['differing']} of {checked['bytes']} bytes differ, the first at offset {checked['first']}"


def check_size(size: int) -> None:
    """Raise ConfigError for a size that the machine cannot have, or that this system has no memory for twice."""
    from whimbrel_examples import records

    records.check_size(size)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * size > memory:
        raise ConfigError(
            f"two machines of {format_size(size)} do not fit into this system's memory of {format_size(memory)}",
            hint="give it a smaller --size",
        )


def demonstrate(
    *,
    size: int,
    rate: float | None,
    seed: int,
    guest: str,
    transport: str,
    parameters: Mapping[str, object],
    timeout: float,
    quiet: bool,
) -> Result:
    """Do it all, in some seconds; both children have ended on return, whichever way.

    Raises WhimbrelError if a child fails, with what it said.
    """
    inbox: Inbox = SimpleQueue()
    arguments = [ROLES, "--size", str(size), "--seed", str(seed), "--guest", guest]
    arguments += [] if rate is None else ["--rate", str(rate)]
    with ExitStack() as stack:
        stack.enter_context(_terminable())
        incoming = f"{transport}:127.0.0.1:0"
        if transport == "unix":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="whimbrel-"))
            incoming = f"unix:{Path(folder) / 'demo'}"
        with _uninterrupted():
            destination = stack.enter_context(
                Child("destination", [*arguments, "--role", "destination", "--incoming", incoming], inbox)
            )
            source = stack.enter_context(Child("source", [*arguments, "--role", "source"], inbox))
        progress = stack.enter_context(Progress(quiet=quiet))
        return _Demonstration(inbox, source, destination, progress, quiet=quiet).perform(size, parameters, timeout)


class _Late(WhimbrelError):
    """A child takes too long."""


class _Demonstration:
    def __init__(self, inbox: Inbox, source: Child, destination: Child, progress: Progress, *, quiet: bool) -> None:
        self._inbox, self._source, self._destination = inbox, source, destination
        self._progress, self._quiet = progress, quiet
        self._round: Mapping[str, Any] = {}
        self._kept: list[tuple[Child, Event]] = []  # what came before it was waited for

    def perform(self, size: int, parameters: Mapping[str, object], timeout: float) -> Result:
        self._say(f"two processes, {format_size(size)} in each; the source fills its memory")
        uri = self._await(self._destination, "ready")["uri"]
        self._await(self._source, "ready")
        before = self._measure(self._source, BEFORE)
        self._say(f"the source does {before:,.0f} operations a second, and moves to {uri}")
        self._source.tell({"do": "migrate", "uri": uri, "parameters": dict(parameters)})
        began = self._await(self._source, "migrating")
        ended, in_time = self._migrate(timeout)
        migration = ended["migration"]
        during = (ended["operations"] - began["operations"]) / (ended["at"] - began["at"])
        if "total-time" in migration:
            during = (ended["operations"] - began["operations"]) / (migration["total-time"] / 1000)
        result = Result(
            size=size,
            before=before,
            during=during,
            after=None,
            migration={**self._progress.last, **migration},
            expected_downtime=self._round.get("expected_downtime", 0.0) * 1000,
            checked=None,
            problem="" if in_time else self._not_converging(timeout),
        )
        if migration["status"] != "completed":
            return attrs.evolve(result, problem=result.problem or migration.get("error-desc", "the migration failed"))
        return self._check(result)

    def _migrate(self, timeout: float) -> tuple[Event, bool]:
        """Wait for the end of the migration, which is brought about if it does not come in time."""
        try:
            return self._await(self._source, "ended", timeout), True
        except _Late:
            self._source.tell({"do": "cancel"})
            ended = self._await(self._source, "ended")
            return ended, ended["migration"]["status"] == "completed"

    def _check(self, result: Result) -> Result:
        self._await(self._destination, "arrived")
        self._source.close()  # gives its memory back, which the check needs
        after = self._measure(self._destination, AFTER)
        self._destination.tell({"do": "stop"})
        self._await(self._destination, "stopped")
        self._say(f"the destination does {after:,.0f} operations a second; every byte is compared")
        self._destination.tell({"do": "check"})
        checked = self._await(self._destination, "checked")
        problem = f"{checked['differing']} bytes are not what they should be" if checked["differing"] else ""
        return attrs.evolve(result, after=after, checked=checked, problem=problem)

    def _measure(self, child: Child, seconds: float) -> float:
        """Operations per second of a child, over so many seconds."""
        first = last = self._await(child, "tick")
        while last["at"] - first["at"] < seconds:
            last = self._await(child, "tick")
        return float((last["operations"] - first["operations"]) / (last["at"] - first["at"]))

    def _await(self, child: Child, event: str, timeout: float = PATIENCE) -> Event:
        """Wait for an event of a child's, showing what comes meanwhile. Raises _Late, or why a child ended."""
        for kept in self._kept:
            if kept[0] is child and kept[1]["event"] == event:
                self._kept.remove(kept)
                return kept[1]
        until = time.monotonic() + timeout
        while True:
            try:
                speaker, came = self._inbox.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                raise _Late(f"the {child.name} process has not come to {event!r} within {timeout:g} s") from None
            self._show(speaker, came)
            if speaker is child and came["event"] == event:
                return came
            if speaker is child and came["event"] == ENDED:
                raise child.fate()
            if came["event"] not in {"tick", "round"}:
                self._kept.append((speaker, came))

    def _show(self, speaker: Child, came: Event) -> None:
        if came["event"] == "round":
            self._round = came["round"]
        if speaker is self._source and "migration" in came:
            self._progress.show(came["migration"])

    def _not_converging(self, timeout: float) -> str:
        last = self._round
        why = (
            f"the guest writes faster than the link carries: after {last['number']} rounds "
            f"{format_size(last['remaining'])} of {format_size(last['total'])} are dirty again, and sending them would "
            f"stop it for {format_seconds(last['expected_downtime'])}, where {format_seconds(last['downtime_limit'])} "
            "are allowed"
            if last
            else "not even the first round has ended"
        )
        return (
            f"the migration was cancelled because it did not converge within {timeout:g} s: {why}; the machine goes on "
            "where it was; give it a lower --rate, a longer --downtime-limit or a higher --max-bandwidth"
        )

    def _say(self, text: str) -> None:
        if not self._quiet:
            note(text)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end this process in order, as Ctrl-C does."""

    def terminated(_: int, __: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back: a child that is half made is ended by nobody."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])
