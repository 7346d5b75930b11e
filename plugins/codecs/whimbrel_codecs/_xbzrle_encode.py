"""What has changed in many pages, as XBZRLE payloads: byte for byte QEMU's (wire format, section 3.3).

Most of a page is as it was, so it is looked at ever more closely: pages are compared by words of 8 bytes, in groups
that stay in the cache; only of words that differ is it found out which bytes do; from those bytes follow the runs, from
the runs every length and every place in the payloads; and the payloads are written in two strokes, all lengths, then
everything that replaces. No Python runs per page or per run.

Words and bytes are numbered through the whole batch: word w is in page w // 512, byte b in page b // 4096.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import BoolArray, ByteArray, Encoded, IndexArray, Outcome

PAGE_SIZE: Final = 4096

_PAGES: Final = 128  # pages compared at once: both kinds of them stay in the cache
_ENOUGH: Final = 1 << 14  # words that differ and are looked into at once
_WORD: Final = 8
_WORDS: Final = PAGE_SIZE // _WORD
_LONG: Final = 0x80  # from here on a length takes two bytes

# A word adds 12 bytes at the most: every other of its bytes has changed, which is 4 runs of 1 byte and 2 of lengths.
_FITS: Final = PAGE_SIZE // 12  # words that differ and fit into a payload, whatever they are

_Words = npt.NDArray[np.uint64]


@attrs.frozen(eq=False)
class _Differing:
    """Words that differ, in their order: their numbers and what they are now, shape (n,), and which bytes of each do.

    `bytes` is of shape (n, 8), and `bits` of shape (n,) has a bit for each of them, the first byte's being the lowest.
    """

    numbers: IndexArray
    new: _Words
    bytes: BoolArray
    bits: ByteArray


@attrs.frozen(eq=False)
class _Payloads:
    """Payloads of the pages `pages` (shape (n,)), one after the other; empty where a page overflows."""

    pages: IndexArray
    sizes: IndexArray
    overflow: BoolArray
    data: ByteArray


def encode(old: ByteArray, new: ByteArray) -> Encoded:
    """Encode pages as `DeltaCodec.encode` says."""
    count = len(old)
    outcomes = np.full(count, Outcome.UNCHANGED, np.uint8)
    sizes = np.zeros(count, np.intp)
    parts: list[ByteArray] = [np.empty(0, np.uint8)]
    for differing in _compare(old.view(np.uint64), new.view(np.uint64), outcomes):
        payloads = _encode(differing)
        outcomes[payloads.pages] = np.where(payloads.overflow, Outcome.OVERFLOW, Outcome.ENCODED)
        sizes[payloads.pages] = payloads.sizes
        parts.append(payloads.data)
    ends = sizes.cumsum()
    return Encoded(np.concatenate(parts) if len(parts) > 2 else parts[-1], ends - sizes, ends, outcomes)


# ----------------------------------------------------------------------------------------------------------- comparing


def _compare(old: _Words, new: _Words, outcomes: ByteArray) -> Iterator[_Differing]:
    """The words that differ, some pages at a time; without those of pages found to overflow, which are marked so."""
    numbers: list[IndexArray] = []
    before: list[_Words] = []
    after: list[_Words] = []
    found = 0
    room = np.empty((min(_PAGES, len(old)), _WORDS), np.bool_)
    for first in range(0, len(old), _PAGES):
        group = slice(first, min(first + _PAGES, len(old)))
        differs = np.not_equal(old[group], new[group], out=room[: group.stop - first])
        at = np.flatnonzero(differs)
        # Only where more words than fit into a payload lie within one page's length can a page be dense.
        if len(at) > _FITS and int((at[_FITS:] - at[:-_FITS]).min()) < _WORDS:
            dense = _dense(old[group], new[group], differs)
            outcomes[group][dense] = Outcome.OVERFLOW
            differs[dense] = False
            at = np.flatnonzero(differs)
        before.append(old[group].reshape(-1).take(at))
        after.append(new[group].reshape(-1).take(at))
        at += first * _WORDS
        numbers.append(at)
        found += len(at)
        if found >= _ENOUGH or (found and group.stop == len(old)):
            yield _differing(np.concatenate(numbers), np.concatenate(before), np.concatenate(after))
            numbers, before, after, found = [], [], [], 0


def _differing(numbers: IndexArray, before: _Words, after: _Words) -> _Differing:
    changed = (before ^ after).view(np.uint8).reshape(-1, _WORD) != 0
    return _Differing(numbers, after, changed, np.packbits(changed, axis=None, bitorder="little"))


def _dense(old: _Words, new: _Words, differs: BoolArray) -> IndexArray:
    """The pages of a group that are known to overflow by how many bytes have changed and how many runs they make.

    Only pages with many words that differ are looked into; that spares what comes behind the longest lists of words.
    """
    many = np.flatnonzero(_count(differs) > _FITS)
    changed = old[many].view(np.uint8) != new[many].view(np.uint8)
    begins = changed.copy()
    np.greater(changed[:, 1:], changed[:, :-1], out=begins[:, 1:])
    at_least = _count(changed) + 2 * _count(begins)
    return many[at_least > PAGE_SIZE]


def _count(rows: BoolArray) -> IndexArray:
    """How many are true in each row, a multiple of 8; eight at once, by adding them up as bytes of a word."""
    words = rows.view(np.uint64).reshape(len(rows), -1, 64)  # 64 of them do not overflow a byte
    lanes = np.add.reduce(words, axis=2).view(np.uint8)
    counts: IndexArray = np.add.reduce(lanes, axis=1, dtype=np.intp)
    return counts


# ---------------------------------------------------------------------------------------------------------------- runs


def _encode(differing: _Differing) -> _Payloads:
    starts, stops = _runs(differing)
    pages = starts >> 12
    is_first = np.ones(len(pages), np.bool_)  # of its page
    np.not_equal(pages[1:], pages[:-1], out=is_first[1:])
    first = np.flatnonzero(is_first)
    same = starts.copy()
    same[1:] -= stops[:-1]
    same[first] = starts[first] & (PAGE_SIZE - 1)
    counts = stops - starts
    sizes = counts + 2
    sizes += same >= _LONG
    sizes += counts >= _LONG
    totals = np.add.reduceat(sizes, first)
    behind = np.append(first[1:], len(starts))  # of each page's last run
    # QEMU tests before each length whether 2 bytes are left for it, in the end too, before it sees that none follows.
    # Elsewhere that never decides: a length and a changed byte at least follow, which do not fit then either.
    overflow = totals + 2 * (stops[behind - 1] & (PAGE_SIZE - 1) != 0) > PAGE_SIZE
    of_page = pages[first]
    if overflow.any():
        totals[overflow] = 0
        fit = np.repeat(~overflow, behind - first)
        same, counts, sizes = same[fit], counts[fit], sizes[fit]
        differing = _without(differing, of_page[overflow])
    return _Payloads(of_page, totals, overflow, _write(differing, same, counts, sizes))


def _runs(differing: _Differing) -> tuple[IndexArray, IndexArray]:
    """Where runs of bytes that differ start and stop; a run may go on from word to word, and ends with its page."""
    numbers, bits = differing.numbers, differing.bits
    joined = numbers[1:] - numbers[:-1] == 1
    joined &= numbers[1:] & (_WORDS - 1) != 0
    # Whether the byte before each differs too, and the one behind it.
    before: ByteArray = np.left_shift(bits, 1)
    behind: ByteArray = np.right_shift(bits, 1)
    before[1:] |= (bits[:-1] >> 7) * joined
    behind[:-1] |= (bits[1:] << 7) * joined
    start, last = bits & ~before, bits & ~behind
    moved = (numbers - np.arange(len(numbers))) * _WORD  # from the bytes that are here to those of all pages
    return _positions(start, moved), _positions(last, moved) + 1


def _positions(bits: ByteArray, moved: IndexArray) -> IndexArray:
    at = np.flatnonzero(np.unpackbits(bits, bitorder="little").view(np.bool_))
    at += moved.take(at >> 3)
    return at


def _without(differing: _Differing, pages: IndexArray) -> _Differing:
    """All words but those of some pages."""
    fit = np.isin(differing.numbers // _WORDS, pages, invert=True, kind="table")
    return _Differing(differing.numbers[fit], differing.new[fit], differing.bytes[fit], differing.bits[fit])


def _write(differing: _Differing, same: IndexArray, counts: IndexArray, sizes: IndexArray) -> ByteArray:
    """Runs as they stand in payloads: how many bytes are as before, how many replace, and these."""
    stops = sizes.cumsum()
    size = int(stops[-1]) if len(stops) else 0
    data, replaces = np.empty(size, np.uint8), np.ones(size, np.bool_)
    at = stops - sizes
    for lengths in (same, counts):
        long = np.flatnonzero(lengths >= _LONG)
        data[at] = lengths
        replaces[at] = False
        at += 1
        if len(long):
            more = at[long]
            data[more - 1] |= _LONG
            data[more] = lengths[long] >> 7
            replaces[more] = False
            at[long] += 1
    data[replaces] = differing.new.view(np.uint8)[differing.bytes.reshape(-1)]
    return data
