"""The frames of the emulated verbs: what two providers of this package say to one another on their connection.

A frame is a header of 32 bytes, big endian, and `size` bytes behind it::

    u8 kind, u8 flags, u16 zero, u32 word, u64 number, u64 size, u64 count

========= ==================================== ============================================== ======================
kind      `number`, `word`                     behind it                                      `count`
========= ==================================== ============================================== ======================
REQUEST   -                                    private data                                   zero
ACCEPT    -                                    private data                                   zero
REJECT    -                                    private data                                   zero
READY     -                                    nothing                                        zero
SEND      request, immediate                   the message                                    zero
WRITE     request, immediate                   n * (u64 address, u64 length, u32 rkey, u32 0) n
                                               and the bytes of all of them
WROTE     request, immediate                   nothing: the bytes were copied already         bytes
ACK       the last request that was done       nothing                                        zero
NAK       the request that was refused, reason nothing                                        zero
CONTROL   -                                    nothing; a descriptor comes along              words in it
FILE      of a file                            nothing; a descriptor comes along              zero
REGION    rkey, slot                           u64 address, length, file, offset; u32 epoch,  zero
                                               u32 zero
REVOKE    rkey                                 nothing                                        zero
========= ==================================== ============================================== ======================

The first four make the connection. Requests are numbered from 1 by whoever posts them; immediate data counts where the
flag IMMEDIATE is set. CONTROL, FILE, REGION and REVOKE are the shared provider's, which only unix sockets carry.

Everything here comes from a peer: `parse` refuses what cannot be before anything is read on its word.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import attrs

from whimbrel.errors import StreamError
from whimbrel.verbs import MAX_PRIVATE_DATA

__all__ = [
    "HEADER",
    "IMMEDIATE",
    "MAX_BATCH",
    "MAX_FILES",
    "MAX_MESSAGE",
    "MAX_REGIONS",
    "MAX_WRITE",
    "PIECE",
    "REGION",
    "Frame",
    "Kind",
    "Refusal",
    "pack",
    "parse",
]

HEADER: Final = struct.Struct("!BBHIQQQ")
PIECE: Final = struct.Struct("!QQII")
REGION: Final = struct.Struct("!QQQQII")

IMMEDIATE: Final = 1

MAX_MESSAGE: Final = 1 << 20
MAX_BATCH: Final = 1 << 16
MAX_WRITE: Final = 1 << 30
MAX_REGIONS: Final = (1 << 16) - 1
MAX_FILES: Final = 1024


class Kind(IntEnum):
    """What a frame is."""

    REQUEST = 1
    ACCEPT = 2
    REJECT = 3
    READY = 4
    SEND = 5
    WRITE = 6
    WROTE = 7
    ACK = 8
    NAK = 9
    CONTROL = 10
    FILE = 11
    REGION = 12
    REVOKE = 13


class Refusal(IntEnum):
    """Why a request was refused, in a NAK's `word`."""

    RNR = 1
    ACCESS = 2
    LENGTH = 3
    OPERATION = 4


@attrs.frozen
class Frame:
    """A header, checked by itself."""

    kind: Kind
    word: int = 0
    number: int = 0
    size: int = 0
    count: int = 0
    immediate: bool = False

    @property
    def imm_data(self) -> int | None:
        """The immediate data of a request."""
        return self.word if self.immediate else None


_SIZES: Final = {
    Kind.REQUEST: (0, MAX_PRIVATE_DATA),
    Kind.ACCEPT: (0, MAX_PRIVATE_DATA),
    Kind.REJECT: (0, MAX_PRIVATE_DATA),
    Kind.SEND: (0, MAX_MESSAGE),
    Kind.WRITE: (0, MAX_WRITE + MAX_BATCH * PIECE.size),
    Kind.REGION: (REGION.size, REGION.size),
}
_COUNTS: Final = {Kind.WRITE: MAX_BATCH, Kind.WROTE: MAX_WRITE, Kind.CONTROL: MAX_REGIONS + 1}
_IMMEDIATE: Final = frozenset({Kind.SEND, Kind.WRITE, Kind.WROTE})


def pack(frame: Frame) -> bytes:
    """The header's bytes."""
    flags = IMMEDIATE if frame.immediate else 0
    return HEADER.pack(frame.kind, flags, 0, frame.word, frame.number, frame.size, frame.count)


def parse(data: bytes | bytearray | memoryview) -> Frame:
    """Read a header of HEADER.size bytes. Raises StreamError for what no peer of ours would send."""
    number, flags, zero, word, request, size, count = HEADER.unpack(data)
    try:
        kind = Kind(number)
    except ValueError:
        raise StreamError(f"a verbs frame is of kind {number}; expected 1 to {max(Kind)}") from None
    if zero or flags & ~IMMEDIATE or (flags and kind not in _IMMEDIATE):
        raise StreamError(f"a verbs frame {kind.name} has the flags {flags:#x} and {zero:#x}, which it cannot have")
    least, most = _SIZES.get(kind, (0, 0))
    if not least <= size <= most:
        raise StreamError(f"a verbs frame {kind.name} announces {size} bytes; expected {least} to {most}")
    if count > _COUNTS.get(kind, 0):
        raise StreamError(f"a verbs frame {kind.name} announces {count} things; expected 0 to {_COUNTS.get(kind, 0)}")
    if kind is Kind.WRITE and size < count * PIECE.size:
        raise StreamError(f"a verbs frame WRITE of {count} pieces announces {size} bytes, which cannot hold them")
    if kind is Kind.WROTE and not flags:
        raise StreamError("a verbs frame WROTE has no immediate data, and nobody would hear of it")
    return Frame(kind, word, request, size, count, bool(flags))
