"""`xbzrle`: what has changed within pages that the other side has already (wire format, sections 3.2 and 3.3).

A payload is pairs of lengths: bytes that are as before, and bytes that replace, which follow. Batches of pages go
through `_xbzrle_encode` and `_xbzrle_decode`; what an encoder must make of a page is said once more, plainly, by
`encode_page`, which they are held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

import numpy as np

from whimbrel.abc import ByteArray, CodecSpec, DeltaCodec, Encoded, IndexArray
from whimbrel.hookspecs import hookimpl
from whimbrel_codecs._xbzrle_decode import decode
from whimbrel_codecs._xbzrle_encode import encode

__all__ = ["NotEncoded", "XbzrleCodec", "encode_page", "whimbrel_codecs"]

PAGE_SIZE: Final = 4096


@hookimpl
def whimbrel_codecs() -> Sequence[CodecSpec]:
    """Offer `xbzrle`."""
    return [CodecSpec(name="xbzrle", summary="what changed within pages, capability xbzrle", create=XbzrleCodec)]


class XbzrleCodec(DeltaCodec):
    """Changes of pages as XBZRLE payloads. Has no state; any thread."""

    def encode(self, old: ByteArray, new: ByteArray) -> Encoded:
        """Encode pages as `DeltaCodec.encode` says, byte for byte as QEMU does (section 3.3)."""
        return encode(old, new)

    def decode(
        self, data: ByteArray, starts: IndexArray, ends: IndexArray, memory: ByteArray, offsets: IndexArray
    ) -> None:
        """Change the pages as `DeltaCodec.decode` says; an empty payload changes nothing.

        Raises StreamError, which says what is wrong with the first payload that is, and nothing has changed then.
        """
        decode(data, starts, ends, memory, offsets)


class NotEncoded(Enum):
    """Why a page has no payload."""

    UNCHANGED = "unchanged"  # nothing is to be sent
    OVERFLOW = "overflow"  # the page is smaller as it is


def encode_page(old: ByteArray, new: ByteArray) -> bytes | NotEncoded:
    """The payload that changes page `old` into `new` (both of shape (4096,)), byte for byte QEMU's (section 3.3).

    As QEMU does, it gives up on a payload that would just fit if there are unchanged bytes behind it.
    """
    edges = np.flatnonzero(np.diff(old != new, prepend=False, append=False)).tolist()
    if not edges:
        return NotEncoded.UNCHANGED
    parts: list[bytes] = []
    size, at = 0, 0
    for first, stop in zip(edges[::2], edges[1::2], strict=True):
        # QEMU also tests before each length whether 2 bytes are left for it. That never decides: a length and a
        # changed byte at least follow, which do not fit then either.
        parts += [_length_bytes(first - at), _length_bytes(stop - first), new[first:stop].tobytes()]
        size += sum(map(len, parts[-3:]))
        if size > PAGE_SIZE:
            return NotEncoded.OVERFLOW
        at = stop
    if at < PAGE_SIZE and size + 2 > PAGE_SIZE:
        return NotEncoded.OVERFLOW
    return b"".join(parts)


def _length_bytes(length: int) -> bytes:
    return bytes((length,)) if length < 0x80 else bytes((length & 0x7F | 0x80, length >> 7))
