"""Records of changed pages, as they are written (wire format, section 3.1): many at once, as one run of bytes."""

from __future__ import annotations

from typing import Final

import numpy as np

from whimbrel.abc import ByteArray, IndexArray
from whimbrel.wire.primitives import U64, str8
from whimbrel.wire.ram_words import PAGE_SIZE, WORD, Flag

__all__ = ["CHANGE_HEAD", "change_records"]

CHANGE_HEAD: Final = WORD + 3  # bytes before the payload: the word, the encoding flag, the payload's length
_ENCODING: Final = 1


def change_records(
    indices: IndexArray, data: ByteArray, starts: IndexArray, ends: IndexArray, block: str | None
) -> tuple[bytes, memoryview]:
    """XBZRLE records for page `indices` with payloads `data[starts[i] : ends[i]]`: a head and the rest, to be written.

    All but `data` of shape (n,), n at least 1; no payload is longer than a page. `block` names the block in the first
    record; None continues the block of the record before.
    """
    sizes = ends - starts
    stops = (sizes + CHANGE_HEAD).cumsum()
    heads = np.empty((len(indices), CHANGE_HEAD), np.uint8)
    words = indices.astype(np.uint64) * np.uint64(PAGE_SIZE) | np.uint64(Flag.XBZRLE | Flag.CONTINUE)
    heads[:, :WORD] = words.astype(">u8").view(np.uint8).reshape(-1, WORD)
    heads[:, WORD] = _ENCODING
    heads[:, WORD + 1 :] = sizes.astype(">u2").view(np.uint8).reshape(-1, 2)
    records, is_payload = np.empty(int(stops[-1]), np.uint8), np.ones(int(stops[-1]), np.bool_)
    where = (stops - sizes - CHANGE_HEAD)[:, np.newaxis] + np.arange(CHANGE_HEAD)
    records[where] = heads
    is_payload[where] = False
    records[is_payload] = _joined(data, starts, ends)
    if block is None:
        return b"", records.data
    # The first record's word makes way for one without CONTINUE, followed by the name; the rest stays in place.
    return U64.pack(int(indices[0]) * PAGE_SIZE | Flag.XBZRLE) + str8(block), records.data[WORD:]


def _joined(data: ByteArray, starts: IndexArray, ends: IndexArray) -> ByteArray:
    """The payloads one after the other; most often they lie so."""
    if bool((starts[1:] == ends[:-1]).all()):
        return data[starts[0] : ends[-1]]
    sizes = ends - starts
    before = sizes.cumsum() - sizes
    joined: ByteArray = data[np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))]
    return joined
