"""The records of the block section: chunks of drives (wire format, section 4).

A body is a run of records, each a word `value << 9 | flags` and what belongs to it, up to EOS. A chunk is 1 MiB of one
drive; the last one of a drive that is no multiple of it is padded, with what is undefined.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntFlag
from typing import Final, TypeAlias

import attrs

from whimbrel.abc import Parser
from whimbrel.errors import Place, StreamError
from whimbrel.wire.primitives import U64, parse_str8, parse_u64, str8

VERSION_ID: Final = 1

CHUNK: Final = 1 << 20  # bytes
SECTOR: Final = 512
CHUNK_SECTORS: Final = CHUNK // SECTOR

_FLAG_BITS: Final = 9
_FLAGS_MASK: Final = (1 << _FLAG_BITS) - 1


class Flag(IntFlag):
    """The low bits of a record's word."""

    DEVICE_BLOCK = 0x01
    EOS = 0x02
    PROGRESS = 0x04
    ZERO_BLOCK = 0x08


_DATA: Final = int(Flag.DEVICE_BLOCK)
_ZERO: Final = int(Flag.DEVICE_BLOCK | Flag.ZERO_BLOCK)
_PROGRESS: Final = int(Flag.PROGRESS)
_EOS: Final = int(Flag.EOS)

EOS_RECORD: Final = U64.pack(_EOS)


@attrs.frozen
class Chunk:
    """Chunk `number` of drive `device`: it is all zero, or `CHUNK` bytes follow."""

    device: str
    number: int
    zero: bool = False


@attrs.frozen
class Progress:
    """How much of all drives has been sent for the first time, in percent."""

    percent: int


@attrs.frozen
class End:
    """The body ends here."""


Record: TypeAlias = Chunk | Progress | End


def chunk(device: str, number: int, *, zero: bool = False) -> bytes:
    """The head of a chunk's record; behind it come `CHUNK` bytes, or none if it is all zero."""
    return U64.pack(number * CHUNK_SECTORS << _FLAG_BITS | (_ZERO if zero else _DATA)) + str8(device)


def progress(percent: int) -> bytes:
    """The record that tells of progress."""
    return U64.pack(percent << _FLAG_BITS | _PROGRESS)


def parse_record(sizes: Mapping[str, int] | None = None) -> Parser[Record]:
    """The next record, up to the bytes of a chunk. Raises StreamError.

    `sizes` are the drives there may be and their bytes: chunks of others, and such as begin behind the end, are
    refused. Without it any name and any place is taken.
    """
    word = yield from parse_u64()
    value, flags = word >> _FLAG_BITS, word & _FLAGS_MASK
    if flags == _EOS:
        if value:
            raise StreamError(f"the word that ends a block section's body is {word:#x}, expected {_EOS:#x}")
        return End()
    if flags == _PROGRESS:
        if value > 100:
            raise StreamError(f"the block section is {value} per cent through, expected 0 to 100")
        return Progress(value)
    if flags not in (_DATA, _ZERO):
        raise StreamError(f"a block record has flags {flags:#x} (word {word:#x}), expected 0x1, 0x9, 0x4 or 0x2")
    if value % CHUNK_SECTORS:
        raise StreamError(f"a chunk of a drive begins at sector {value}, expected a multiple of {CHUNK_SECTORS}")
    device = yield from parse_str8("a drive")
    if sizes is not None:
        _check(device, value, sizes)
    return Chunk(device, value // CHUNK_SECTORS, flags == _ZERO)


def _check(device: str, sector: int, sizes: Mapping[str, int]) -> None:
    size = sizes.get(device)
    if size is None:
        there = ", ".join(repr(name) for name in sizes) or "none"
        raise StreamError(
            f"a chunk of drive {device!r} came, and there is none to load it into; there are: {there}",
            hint="each drive that the source sends needs one of that name here (--drive NAME=IMAGE)",
        )
    if sector * SECTOR >= size:
        raise StreamError(
            f"a chunk at byte {sector * SECTOR} of drive {device!r} came, which has {size} here",
            hint="the image must be as large as the source's",
            place=Place(block=device),
        )
