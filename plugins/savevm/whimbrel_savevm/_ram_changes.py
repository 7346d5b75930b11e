"""Gathers changes of pages (XBZRLE records), so that a codec gets many of them at once.

A source that sends changes sends whole pages and zero pages between them, mostly a few records of each; to decode
each few by themselves costs ten times as much. Order counts for the records of one page alone, so the loader asks
before it does anything else to a page whether a change of it waits here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from whimbrel.abc import BoolArray, ByteArray, DeltaCodec, IndexArray
from whimbrel.errors import MigrationError, Place
from whimbrel.machine import RamBlock
from whimbrel.wire import ram as wire

ENOUGH: Final = 1 << 13  # changes that are decoded at once
ENOUGH_BYTES: Final = 1 << 20


class Changes:
    """Changes of one block's pages, each page once, that have not been made yet. One thread."""

    def __init__(self, codec: DeltaCodec) -> None:
        self._codec = codec
        self._block: RamBlock | None = None
        self._waiting: BoolArray = np.zeros(0, np.bool_)  # pages of the block
        self._count = self._bytes = 0
        self._data: list[ByteArray] = []
        self._starts: list[IndexArray] = []
        self._ends: list[IndexArray] = []
        self._pages: list[IndexArray] = []

    def add(self, block: RamBlock, run: wire.Run) -> None:
        """Take the XBZRLE records of `run`, which are in `block` and inside of it. Raises what `apply` does."""
        if block is not self._block:
            self.apply()
            self._block, self._waiting = block, np.zeros(block.pages, np.bool_)
        for part in _apart(run.indices):
            pages, starts, ends = run.indices[part], run.starts[part], run.ends[part]
            if self.concern(block, pages):
                self.apply()
            first, stop = int(starts[0]), int(ends[-1])
            self._data.append(run.data[first:stop].copy())  # the reader's buffer is about to be filled anew
            self._starts.append(starts + (self._bytes - first))
            self._ends.append(ends + (self._bytes - first))
            self._pages.append(pages)
            self._waiting[pages] = True
            self._bytes += stop - first
            self._count += len(pages)
            if self._count >= ENOUGH or self._bytes >= ENOUGH_BYTES:
                self.apply()

    def concern(self, block: RamBlock, pages: IndexArray | slice) -> bool:
        """Whether a change of one of these pages waits here."""
        return self._count > 0 and block is self._block and bool(self._waiting[pages].any())

    def apply(self) -> None:
        """Make all changes that wait. Raises StreamError if one of them is malformed; none has been made then."""
        if not self._count:
            return
        assert self._block is not None, "changes of no block"
        pages = np.concatenate(self._pages)
        data, starts, ends = np.concatenate(self._data), np.concatenate(self._starts), np.concatenate(self._ends)
        self._waiting[pages] = False
        self._count = self._bytes = 0
        for waiting in (self._data, self._starts, self._ends, self._pages):
            waiting.clear()
        try:
            self._codec.decode(data, starts, ends, self._block.view, pages * wire.PAGE_SIZE)
        except MigrationError as exc:
            raise exc.at(Place(block=self._block.name)) from exc.__cause__


def _apart(indices: IndexArray) -> Iterator[slice]:
    """Parts of `indices` in their order, none of which has a page twice; mostly one."""
    if bool((indices[1:] > indices[:-1]).all()):
        yield slice(None)
        return
    order = np.argsort(indices, kind="stable")
    again = indices[order[1:]] == indices[order[:-1]]
    before = np.full(len(indices), -1)  # where the page was last
    before[order[1:][again]] = order[:-1][again]
    start = 0
    while start < len(indices):
        repeats = before[start:] >= start
        stop = start + int(repeats.argmax()) if repeats.any() else len(indices)
        yield slice(start, stop)
        start = stop
