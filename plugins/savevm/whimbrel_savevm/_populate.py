"""Populates memory ahead of the data, on a thread of its own (`MADV_POPULATE_WRITE`).

Touching fresh memory costs several times as much as copying into it. While a block arrives in ascending order, the
pages that will come next are made ready in the meantime: as many as have arrived, less those that were passed over,
and `AHEAD` at most. So memory of which most is zero is not filled up, whatever lies scattered in it.
"""

from __future__ import annotations

import threading
from typing import Final

from whimbrel.errors import MigrationError
from whimbrel.machine import RamBlock
from whimbrel.wire.ram import PAGE_SIZE

AHEAD: Final = 32 << 20  # bytes made ready beyond what has arrived, at most
STEP: Final = 4 << 20  # bytes made ready in one go; a multiple of a huge page


class Populator:
    """Follows the arriving data with `arrived`; ends with `close`. Its thread exists from when it is needed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._block: RamBlock | None = None
        self._stop = 0  # the page behind the last that arrived
        self._credit = 0  # pages that may be made ready behind it
        self._ready = 0  # bytes of the block
        self._goal = 0  # bytes of the block
        self._closed = False
        self._failure: OSError | None = None
        self._thread: threading.Thread | None = None

    def arrived(self, block: RamBlock, first: int, stop: int) -> None:
        """The pages of `block` from `first` up to `stop` are here and about to be stored.

        Returns at once. Raises MigrationError if there was no memory for the pages made ready so far.
        """
        with self._changed:
            if self._failure is not None:
                raise MigrationError(
                    f"there is no memory for RAM block {block.name!r}: {self._failure}",
                    hint="make room on this host, or give the machine less RAM at both ends",
                ) from self._failure
            if block is not self._block or first < self._stop:
                self._block, self._credit, self._stop, self._ready = block, 0, first, 0
            passed_over = first - self._stop
            self._credit = min(max(0, self._credit - passed_over) + stop - first, AHEAD // PAGE_SIZE)
            self._stop = stop
            self._ready = max(self._ready, stop * PAGE_SIZE)
            self._goal = min(stop + self._credit, block.pages) * PAGE_SIZE
            if self._wanted():
                self._wake()

    def close(self) -> None:
        """End the thread; returns when nothing is populated any more. Twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _wake(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="whimbrel-populate", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _run(self) -> None:
        while (step := self._next_step()) is not None:
            block, offset, length = step
            try:
                if not block.populate(offset, length):
                    return  # this kernel cannot; every page is touched by the loader then
            except OSError as exc:
                # To write there now would kill the process instead of raising.
                with self._changed:
                    self._failure = exc
                return

    def _next_step(self) -> tuple[RamBlock, int, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._wanted())
            if self._closed or self._block is None:
                return None
            offset = self._ready
            self._ready += STEP - offset % STEP
            return self._block, offset, self._ready - offset

    def _wanted(self) -> bool:
        return self._goal - self._ready >= STEP
