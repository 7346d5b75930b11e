"""The gate that writes of the guest pass through: open while the guest runs, and nobody is inside once it is closed."""

from __future__ import annotations

import threading
from types import TracebackType

from whimbrel.errors import StateError


class Gate:
    """Closed at first. A write passes through it as a context manager; any thread, any number at once."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self._inside = 0

    def open(self) -> None:
        """Let writes through."""
        with self._changed:
            self._open = True

    def close(self) -> None:
        """Refuse writes from now on; returns when none is under way. Twice is fine."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: not self._inside)

    def __enter__(self) -> None:
        with self._changed:
            if not self._open:
                raise StateError("the machine does not run, so nothing may be written to its drives")
            self._inside += 1

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        with self._changed:
            self._inside -= 1
            if not self._inside:
                self._changed.notify_all()
