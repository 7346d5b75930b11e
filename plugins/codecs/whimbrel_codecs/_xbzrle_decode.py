"""Changes pages as XBZRLE payloads say (wire format, section 3.2): all payloads of a batch, or none of them.

Where a pair of lengths begins is known only when the one before it was read, so payloads are walked in step: the first
pair of all of them, then the second of all that have one, and so on. A step does no more than find the next one; what
the pairs say is then read, checked and copied for all of them at once. No Python runs per payload or per pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import ByteArray, IndexArray
from whimbrel.errors import StreamError

PAGE_SIZE: Final = 4096
LENGTH_MAX: Final = 0x3FFF  # two bytes of seven bits each

_GROUP_BYTES: Final = 1 << 18  # payload walked at once: what belongs to its pairs stays in the cache
_GROUP_PAYLOADS: Final = 1 << 16  # payloads walked at once: as many as 16 bits tell apart
_COPY: Final = 1 << 15  # items copied at once
_WORD: Final = 8
_LONG: Final = 2 * _WORD  # bytes of a run from which on it is copied by words
_SHORT: Final = 64  # bytes of a payload that, by itself, is sooner read as it stands


def decode(data: ByteArray, starts: IndexArray, ends: IndexArray, memory: ByteArray, offsets: IndexArray) -> None:
    """Change pages as `DeltaCodec.decode` says; an empty payload changes nothing.

    Raises StreamError, which says what is wrong with the first payload that is, and nothing has changed then.
    """
    if len(starts) == 1 and ends[0] - starts[0] <= _SHORT and _decode_alone(
        data[starts[0] : ends[0]].tobytes(), memory, int(offsets[0])
    ):  # fmt: skip
        return
    # A pair is looked at before it is known to be whole: what lies behind the data is zeros then.
    padded = np.concatenate([data, np.zeros(_WORD, np.uint8)])
    changes = [_read(padded, starts[group], ends[group], offsets[group]) for group in _groups((ends - starts).cumsum())]
    for change in changes:
        _copy(padded, memory, change)


def _decode_alone(payload: bytes, memory: ByteArray, offset: int) -> bool:
    """Change a page as one short payload says; False for one that is malformed, and nothing has changed then.

    A peer may send changes so that each of them must be made before the next is looked at, and an array for a few
    bytes costs more than the bytes.
    """
    runs, at, reach, end = [], 0, 0, len(payload)
    while at < end:
        first = not at
        same, at = _length(payload, at)
        count, at = _length(payload, at)
        reach += same + count
        if not count or (not same and not first) or at + count > end or reach > PAGE_SIZE:
            return False
        runs.append((offset + reach - count, offset + reach, at))
        at += count
    for begin, stop, source in runs:
        memory[begin:stop] = np.frombuffer(payload, np.uint8, stop - begin, source)
    return True


def _length(payload: bytes, at: int) -> tuple[int, int]:
    """The length at `at`, and where it ends; one that is too large for any page where it is not whole."""
    if at >= len(payload):
        return LENGTH_MAX, at
    byte = payload[at]
    if byte < 0x80:
        return byte, at + 1
    return (byte & 0x7F | payload[at + 1] << 7 if at + 1 < len(payload) else LENGTH_MAX), at + 2


@attrs.frozen(eq=False)
class _Lengths:
    """What two bytes mean where a length begins: tables over both of them, the first in the low bits.

    A second byte with its high bit set makes a length beyond LENGTH_MAX, which is too large for any page.
    """

    size: npt.NDArray[np.int32]  # bytes of the length
    length: npt.NDArray[np.int32]
    skip: npt.NDArray[np.int32]  # both together: from the length to behind as many bytes


@attrs.frozen(eq=False)
class _Changes:
    """Runs of bytes that replace: from where in the data, to where in memory, and how many; shape (n,) each."""

    sources: IndexArray
    targets: IndexArray
    counts: IndexArray


@cache
def _lengths() -> _Lengths:
    both = np.arange(1 << 16, dtype=np.int32)
    first, second = both & 0xFF, both >> 8
    two = first >= 0x80
    length = np.where(two, first & 0x7F | second << 7, first)
    size = np.where(two, 2, 1).astype(np.int32)
    return _Lengths(size, length.astype(np.int32), (size + length).astype(np.int32))


def _groups(behind: IndexArray) -> Iterator[slice]:
    """Payloads in groups of about `_GROUP_BYTES`; `behind` is how many bytes all have up to each one's end."""
    first = before = 0
    while first < len(behind):
        stop = int(behind.searchsorted(before + _GROUP_BYTES)) + 1
        stop = min(stop, first + _GROUP_PAYLOADS, len(behind))
        yield slice(first, stop)
        first, before = stop, int(behind[stop - 1])


def _read(padded: ByteArray, starts: IndexArray, ends: IndexArray, offsets: IndexArray) -> _Changes:
    """What some payloads change. Raises StreamError if any of them is malformed."""
    lengths = _lengths()
    pairs = np.ndarray((len(padded) - 1,), "<u2", buffer=padded, strides=(1,))  # both bytes at every position
    at, owner = _walk(pairs, starts, ends)
    first = np.ones(len(at), np.bool_)  # of its payload
    np.not_equal(owner[1:], owner[:-1], out=first[1:])
    both = pairs[at]
    same = lengths.length.take(both)
    middle = at + lengths.size.take(both)
    both = pairs[middle]
    counts = lengths.length.take(both).astype(np.intp)
    sources = middle + lengths.size.take(both)
    # How far the pairs reach into their pages: a sum over all, less what it was before the payload's first.
    both_runs = same + counts
    reach = both_runs.cumsum()
    before = np.empty(len(starts), np.intp)
    before[owner[first]] = reach[first] - both_runs[first]
    reach -= before[owner]
    bad = (sources + counts > ends[owner]) | (reach > PAGE_SIZE) | (counts == 0) | ((same == 0) & ~first)
    if bad.any():
        wrong = int(bad.argmax())
        raise StreamError(
            _whats_wrong(padded[at[wrong] : ends[owner[wrong]]], int(reach[wrong]), first=bool(first[wrong]))
        )
    return _Changes(sources, reach - counts + offsets[owner], counts)


def _walk(
    pairs: npt.NDArray[np.uint16], starts: IndexArray, ends: IndexArray
) -> tuple[IndexArray, npt.NDArray[np.uint16]]:
    """Where the pairs of all payloads begin, and whose they are; payload by payload, in their order.

    Checks nothing, but never leaves the data: a pair takes two bytes at least and begins inside of its payload.
    """
    lengths = _lengths()
    owner = np.flatnonzero(starts < ends).astype(np.uint16)
    at, end = starts[owner], ends[owner]
    steps, owners = [at[:0]], [owner[:0]]
    while len(at):
        steps.append(at)
        owners.append(owner)
        at = at + lengths.size.take(pairs[at])
        at += lengths.skip.take(pairs[at])
        more = at < end
        if not more.all():
            at, end, owner = at[more], end[more], owner[more]
    at, owner = np.concatenate(steps), np.concatenate(owners)
    if len(steps) > 2:
        order = np.argsort(owner, kind="stable")  # of 16 bits each: sorted by counting
        at, owner = at[order], owner[order]
    return at, owner


def _whats_wrong(rest: ByteArray, reach: int, *, first: bool) -> str:
    """What is wrong with a pair that is; `rest` is its payload from there on, `reach` where in the page it ends."""
    lengths, at, length = _lengths(), 0, 0
    for what in ("unchanged", "changed"):
        if len(rest) - at < 2:
            return f"an XBZRLE payload ends where the number of {what} bytes is expected"
        both = int(rest[at]) | int(rest[at + 1]) << 8
        length = int(lengths.length[both])
        if length > LENGTH_MAX:
            return f"a length in an XBZRLE payload is {both & 0xFF:02x} {both >> 8:02x}, expected two bytes of 7 bits"
        if length == 0 and not (what == "unchanged" and first):
            return f"an XBZRLE payload has a run of 0 {what} bytes"
        at += int(lengths.size[both])
    if length > len(rest) - at:
        return f"an XBZRLE payload ends after {len(rest) - at} of {length} changed bytes"
    return f"an XBZRLE payload reaches {reach} bytes into a page of {PAGE_SIZE}"


def _copy(data: ByteArray, memory: ByteArray, changes: _Changes) -> None:
    """Copy runs of bytes. Long ones go by words of 8 bytes, the last of which overlaps the one before."""
    long = changes.counts >= _LONG
    if not long.any():
        _copy_bytes(data, memory, changes)
        return
    _copy_words(data, memory, _some(changes, long))
    if not long.all():
        _copy_bytes(data, memory, _some(changes, ~long))


def _some(changes: _Changes, which: npt.NDArray[np.bool_]) -> _Changes:
    return _Changes(changes.sources[which], changes.targets[which], changes.counts[which])


def _copy_bytes(data: ByteArray, memory: ByteArray, changes: _Changes) -> None:
    for part in _parts(changes.counts):
        counts = changes.counts[part]
        last = counts.cumsum()
        first = last - counts
        item = np.arange(last[-1])
        sources = np.repeat(changes.sources[part] - first, counts)
        sources += item
        item += np.repeat(changes.targets[part] - first, counts)
        memory[item] = data[sources]


def _copy_words(data: ByteArray, memory: ByteArray, changes: _Changes) -> None:
    from_words, to_words = _words_of(data), _words_of(memory)
    words = (changes.counts + (_WORD - 1)) // _WORD
    for part in _parts(words):
        counts = words[part]
        last = counts.cumsum()
        item = np.arange(last[-1])
        item -= np.repeat(last - counts, counts)
        item *= _WORD
        np.minimum(item, np.repeat(changes.counts[part] - _WORD, counts), out=item)
        sources = np.repeat(changes.sources[part], counts)
        sources += item
        item += np.repeat(changes.targets[part], counts)
        to_words[item] = from_words[sources]


def _words_of(flat: ByteArray) -> npt.NDArray[np.uint64]:
    """The 8 bytes from every position of `flat` on, without a copy."""
    return np.ndarray((len(flat) - _WORD + 1,), np.uint64, buffer=flat, strides=(1,))


def _parts(counts: IndexArray) -> Iterator[slice]:
    """Runs in parts of about `_COPY` items, so that what is made for them stays in the cache."""
    behind = counts.cumsum()
    first = before = 0
    while first < len(counts):
        stop = min(int(behind.searchsorted(before + _COPY)) + 1, len(counts))
        yield slice(first, stop)
        first, before = stop, int(behind[stop - 1])
