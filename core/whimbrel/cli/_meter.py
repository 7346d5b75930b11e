"""Shows how far something has come that has a size and no rounds: on a terminal one line, elsewhere one a second."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final

from whimbrel.cli._output import console, note
from whimbrel.units import format_rate, format_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from rich.status import Status

EVERY: Final = 1.0  # seconds


class Meter:
    """Shows what it is told; a context manager. One thread. With `quiet` it says nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._status: Status | None = None
        self._began = self._said = time.monotonic()
        self._first: int | None = None

    def show(self, what: str, count: int) -> None:
        """Show that `what` has come to `count` bytes."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = count, now
        elapsed = now - self._began
        text = f"{what} {format_size(count)}"
        if elapsed > EVERY / 2:
            text += f", {format_rate((count - self._first) / elapsed)}"
        if self._status is not None:
            self._status.update(text)
        elif not self._quiet and now - self._said >= EVERY:
            self._said = now
            note(text)

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr is not None and sys.stderr.isatty():
            self._status = console(error=True).status("")
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()
