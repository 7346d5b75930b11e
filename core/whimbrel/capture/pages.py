"""What came of each page of a block: how often, what its last record was, and whether its bytes are another page's."""

from __future__ import annotations

from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import ByteArray, IndexArray
from whimbrel.wire.ram import PAGE_SIZE, Flag
from whimbrel.wire.ram_batches import Batch

KINDS: Final = (Flag.PAGE, Flag.ZERO, Flag.XBZRLE, Flag.COMPRESS_PAGE)
"""What a record may be of, in the order in which they are counted."""

TIMES_MAX: Final = int(np.iinfo(np.uint16).max)

_AT_ONCE: Final = 64  # pages whose sums are made at once, so that they stay in the cache
_SCANNED: Final = 1 << 20  # pages of which a copy is made at once
_WORDS: Final = PAGE_SIZE // 8
_HALF: Final = np.uint64(32)

_PLACE: Final = np.full(4096, len(KINDS), np.uint8)
_PLACE[[int(flag) for flag in KINDS]] = np.arange(len(KINDS))


@attrs.define
class Kinds:
    """How many of something are of each kind of record: records, pages or bytes."""

    normal: int = 0
    zero: int = 0
    xbzrle: int = 0
    compressed: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.normal + self.zero + self.xbzrle + self.compressed

    def add(self, counts: npt.NDArray[np.generic]) -> None:
        """Add counts in the order of `KINDS`."""
        normal, zero, xbzrle, compressed = (int(count) for count in counts.tolist())
        self.normal += normal
        self.zero += zero
        self.xbzrle += xbzrle
        self.compressed += compressed


def kinds_of(batch: Batch) -> npt.NDArray[np.uint8]:
    """For each record which of `KINDS` it is."""
    return _PLACE[batch.flags]


class PageSums:
    """Makes a 64-bit sum of each page, by which equal contents are found; one thread.

    A page is 512 words, little-endian. Its sum is that of all words times a number of their own, and of their upper
    halves times another, modulo 2**64. Equal sums are taken as equal contents: as the numbers were drawn at random,
    two different pages have the same sum once in 2**33 at the very most, and almost always once in 2**64.
    """

    def __init__(self) -> None:
        # Always the same, so that a stream is counted alike each time. Of a factor only the lower bits meet a word's
        # upper ones: without the second, pages that differ in one upper bit each would often have the same sum.
        dice = np.random.default_rng(0x77686D62)
        self._whole, self._upper = dice.integers(0, 1 << 64, (2, _WORDS), np.uint64) | np.uint64(1)
        self._pages = np.empty((_AT_ONCE, PAGE_SIZE), np.uint8)
        self._halves = np.empty((_AT_ONCE, _WORDS), np.uint64)

    def of(self, data: ByteArray, starts: IndexArray) -> npt.NDArray[np.uint64]:
        """The sums, shape (n,), of the pages that begin at `starts` of `data` (flat) and lie within it."""
        sums = np.empty(len(starts), np.uint64)
        if not len(starts):
            return sums
        windows = np.ndarray((len(data) - PAGE_SIZE + 1, PAGE_SIZE), np.uint8, buffer=data, strides=(1, 1))
        for at in range(0, len(starts), _AT_ONCE):
            chosen = starts[at : at + _AT_ONCE]
            count = len(chosen)
            self._pages[:count] = windows[chosen]
            words = self._pages[:count].view("<u8")
            np.right_shift(words, _HALF, out=self._halves[:count])
            part = sums[at : at + count]
            np.einsum("ij,j->i", words, self._whole, out=part)
            part += np.einsum("ij,j->i", self._halves[:count], self._upper)
        return sums


class PageTable:
    """All pages of one block; one thread. 11 bytes a page, of those that came."""

    def __init__(self, pages: int, sums: PageSums) -> None:
        # Zeros that nobody has touched cost nothing: a block may be large, what counts is what comes.
        self._times = np.zeros(pages, np.uint16)
        self._last = np.zeros(pages, np.uint8)  # 1 + which of KINDS; 0 where nothing came
        self._sums = np.zeros(pages, np.uint64)
        self._sum = sums

    def take(self, batch: Batch) -> None:
        """Note the records of `batch`, whose pages are there, in their order."""
        indices, kinds = batch.indices, kinds_of(batch)
        self._count(indices)
        # Where a page comes twice, numpy keeps the last.
        self._last[indices] = kinds + np.uint8(1)
        whole = kinds == 0
        self._sums[indices[whole]] = self._sum.of(batch.data, batch.starts[whole])

    def _count(self, indices: IndexArray) -> None:
        if np.all(indices[1:] > indices[:-1]):
            before = self._times[indices]
            self._times[indices] = before + (before < TIMES_MAX)
        else:
            pages, counts = np.unique(indices, return_counts=True)
            self._times[pages] = np.minimum(self._times[pages] + counts, TIMES_MAX)

    def last(self) -> Kinds:
        """Of how many pages the last record was of each kind."""
        kinds = Kinds()
        for at in range(0, len(self._last), _SCANNED):
            counts = np.bincount(self._last[at : at + _SCANNED], minlength=len(KINDS) + 1)
            kinds.add(counts[1:])
        return kinds

    def distinct(self) -> int:
        """How many different contents have the pages that came last as they are (`PageSums` says when)."""
        sums = self._sums[self._last == 1]
        sums.sort()  # several times as fast as numpy's `unique`, which hashes
        return int(np.count_nonzero(sums[1:] != sums[:-1])) + min(len(sums), 1)

    def times(self) -> npt.NDArray[np.int64]:
        """How many pages came 0, 1, 2 … times; those that came more than 65535 times are counted there."""
        counts = np.zeros(1, np.int64)
        for at in range(0, len(self._times), _SCANNED):
            more = np.bincount(self._times[at : at + _SCANNED])
            longer, shorter = (more, counts) if len(more) > len(counts) else (counts, more)
            counts = longer.copy()
            counts[: len(shorter)] += shorter
        return counts
