"""Dirty bitmaps: which pages are still to be sent, and arithmetic on sets of pages.

A set of pages is a bool array of shape (pages,), one byte a page, which numpy searches at some 10 GB/s. No function
here runs Python code once per page. Nothing here is thread-safe: a bitmap belongs to the migration thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from whimbrel.abc import BoolArray, DirtyTracker, IndexArray, MemoryRegion

_FEW = 16  # ranges up to this many are set one by one
_SHORT = 64  # pages; longer ranges are set one by one even among many
_WINDOW = 1 << 16  # pages searched at once, at most: 64 KiB stay in the cache


class DirtyBitmap:
    """The dirty pages of one block, clean at first.

    `bits` (bool, shape (pages,)) may be read by anyone; whoever sets bits in it directly calls `recount` afterwards.
    `count` is how many are set, always.
    """

    __slots__ = ("bits", "count", "cursor")

    def __init__(self, pages: int) -> None:
        self.bits: BoolArray = np.zeros(pages, np.bool_)
        self.count = 0
        self.cursor = 0

    def __len__(self) -> int:
        return self.bits.size

    def set_all(self) -> None:
        """Mark every page dirty, and begin at page 0 again."""
        self.bits[:] = True
        self.count, self.cursor = self.bits.size, 0

    def clear_all(self) -> None:
        """Mark every page clean, and begin at page 0 again."""
        self.bits[:] = False
        self.count, self.cursor = 0, 0

    def or_pages(self, pages: IndexArray | BoolArray) -> int:
        """Mark pages dirty, given as indices or as a bool array of shape (pages,); returns how many are new."""
        if pages.dtype == np.bool_:
            np.logical_or(self.bits, pages, out=self.bits)
        else:
            self.bits[pages] = True
        return self.recount()

    def or_ranges(self, starts: IndexArray, ends: IndexArray) -> int:
        """Mark the pages starts[i] to ends[i] - 1 dirty, for all i; ranges may overlap. Returns how many are new."""
        set_ranges(self.bits, starts, ends)
        return self.recount()

    def collect(self, tracker: DirtyTracker, region: MemoryRegion) -> int:
        """Mark dirty what `tracker` saw written in `region` since it was last asked; returns how many are new."""
        new = tracker.collect(region, self.bits)
        self.count += new
        return new

    def recount(self) -> int:
        """Count the set bits after somebody else set some; returns how many more there are than before."""
        before, self.count = self.count, int(np.count_nonzero(self.bits))
        return self.count - before

    def take(self, limit: int, start: int | None = None) -> IndexArray:
        """Take out the next dirty pages: at most `limit` (1 or more), as ascending indices (intp); they are clean then.

        The search begins at page `start`, or else after the last page taken. An empty answer means that there is
        nothing more up to the end; the next search begins at page 0 again. Costs the pages it walks over and the
        pages it takes, not the size of the block.
        """
        if limit < 1:
            raise ValueError(f"a batch has 1 page or more, got {limit}")
        position = self.cursor if start is None else start
        parts: list[IndexArray] = []
        missing, window = min(limit, self.count), limit
        while missing and position < self.bits.size:
            hits = np.flatnonzero(self.bits[position : position + window])
            if hits.size:
                hits = hits[:missing]
                hits += position
                parts.append(hits)
                missing -= hits.size
            position += window
            window = min(4 * window, max(_WINDOW, limit))
        if not parts:
            self.cursor = 0
            return np.empty(0, np.intp)
        taken = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self.bits[taken] = False
        self.count -= taken.size
        self.cursor = int(taken[-1]) + 1
        return taken


def set_ranges(bits: BoolArray, starts: IndexArray, ends: IndexArray) -> None:
    """Set bits[starts[i]:ends[i]] for all i; ranges may overlap and be empty, and must lie inside of `bits`."""
    if starts.size > _FEW:
        lengths = ends - starts
        short = lengths <= _SHORT
        firsts, counts = starts[short], lengths[short]
        # Page k of the concatenation of all short ranges lies at: its range's first page + k - where that range begins.
        skips = np.repeat(firsts - (np.cumsum(counts) - counts), counts)
        bits[np.arange(skips.size) + skips] = True
        starts, ends = starts[~short], ends[~short]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        bits[start:end] = True


def runs(bits: BoolArray) -> tuple[IndexArray, IndexArray]:
    """Find the runs of set bits: their first indices and the indices after their last ones, ascending."""
    edges = np.flatnonzero(np.diff(bits, prepend=False, append=False))
    return edges[::2], edges[1::2]
