"""Shows how far something has come that has a size and no rounds: on a terminal one line, elsewhere one a second."""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from whimbrel.cli._output import console, note
from whimbrel.units import format_rate, format_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from rich.status import Status

EVERY: Final = 1.0  # seconds
SPAN: Final = 3.0  # seconds over which a rate is measured
OFTEN: Final = 0.1  # seconds; what is told more often is not heard


class Meter:
    """Shows what it is told; a context manager. One thread. With `quiet` it says nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._on_a_terminal = False
        self._status: Status | None = None
        self._said = time.monotonic()
        self._what = ""
        self._samples: deque[tuple[float, int]] = deque()

    def show(self, what: str, count: int, total: int | None = None) -> None:
        """Show that `what` has come to `count` bytes, of `total` if that is known. A rate is that of this `what`."""
        now = time.monotonic()
        if what != self._what:
            self._what = what
            self._samples.clear()
        elif now - self._samples[-1][0] < OFTEN:
            return
        rate = self._rate(now, count)
        size = format_size(count) if total is None else f"{format_size(min(count, total))} of {format_size(total)}"
        text = f"{what} {size}" if rate is None else f"{what} {size}, {format_rate(rate)}"
        if self._on_a_terminal:
            self._show(text)
        elif not self._quiet and now - self._said >= EVERY:
            self._said = now
            note(text)

    def pause(self) -> None:
        """Leave the terminal to somebody else, until the next `show`."""
        status, self._status = self._status, None
        if status is not None:
            with suppress(OSError):  # the terminal may be gone
                status.stop()

    def __enter__(self) -> Self:
        self._on_a_terminal = not self._quiet and sys.stderr is not None and sys.stderr.isatty()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.pause()

    def _show(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)
            return
        self._status = console(error=True).status(text)
        with suppress(OSError):
            self._status.start()

    def _rate(self, now: float, count: int) -> float | None:
        """Bytes per second of late, once that can be told."""
        while len(self._samples) > 1 and now - self._samples[0][0] > SPAN:
            self._samples.popleft()
        self._samples.append((now, count))
        then, before = self._samples[0]
        return (count - before) / (now - then) if now - then >= EVERY / 2 else None
