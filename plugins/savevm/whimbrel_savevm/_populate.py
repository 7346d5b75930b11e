"""Populates memory ahead of the data, on a thread of its own (`MADV_POPULATE_WRITE`).

Touching fresh memory costs several times as much as copying into it. While a block arrives in order, the pages that
will come next are made ready in the meantime; nothing is populated where nothing arrives, so zero pages cost nothing.
"""

from __future__ import annotations

import threading
from typing import Final

from whimbrel.machine import RamBlock
from whimbrel.wire.ram import PAGE_SIZE

AHEAD: Final = 32 << 20  # bytes made ready beyond what has arrived
STEP: Final = 4 << 20  # bytes made ready in one go; a multiple of a huge page


class Populator:
    """Follows the arriving data with `ahead`; ends with `close`. Its thread exists from the first `ahead` on."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._block: RamBlock | None = None
        self._arrived = 0  # bytes of the block
        self._ready = 0  # bytes of the block
        self._closed = False
        self._thread: threading.Thread | None = None

    def ahead(self, block: RamBlock, page: int) -> None:
        """Pages of `block` have arrived in order up to `page`. Returns at once."""
        arrived = page * PAGE_SIZE
        if block is self._block and arrived + AHEAD // 2 <= self._ready:
            return
        with self._changed:
            if block is not self._block:
                self._block, self._ready = block, arrived
            self._arrived = arrived
            self._ready = max(self._ready, arrived)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="whimbrel-populate", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """End the thread; returns when nothing is populated any more. Twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (step := self._next_step()) is not None:
            block, offset, length = step
            if not block.populate(offset, length):
                return  # this kernel cannot; every page is touched by the loader then

    def _next_step(self) -> tuple[RamBlock, int, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._wanted() > 0)
            if self._closed or self._block is None:
                return None
            offset, length = self._ready, min(STEP - self._ready % STEP, self._wanted())
            self._ready += length
            return self._block, offset, length

    def _wanted(self) -> int:
        if self._block is None:
            return 0
        return min(self._arrived + AHEAD, self._block.size) - self._ready
