"""What two ends of an `rdma:` connection say to one another beside one-sided writes (wire format, section 8).

A control message is one SEND: a header of 16 bytes and its data, at most 512 KiB in all. Where a message holds many
records they are one numpy array of them, big-endian as they are on the wire. Nothing here is taken at its word: a count
is held against the length, and a place against the blocks there are, before either is used.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.errors import IncompatibleError, StreamError

VERSION: Final = 1
PRIVATE_SIZE: Final = 8  # bytes of the connection's private data, either way

HEADER_SIZE: Final = 16
MESSAGE_MAX: Final = 512 << 10  # bytes of one SEND, its header included
STREAM_MAX: Final = 32 << 10  # bytes of the stream in one QEMU_FILE
REPEAT_MAX: Final = 4096  # records in one message

CHUNK: Final = 1 << 20  # bytes that are registered at once, counted from the beginning of their block
BLOCKS_MAX: Final = 1 << 14  # a block has 14 bits in a work request's id

RecordArray: TypeAlias = npt.NDArray[Any]

_PIN_ALL: Final = 0x1
_KNOWN: Final = _PIN_ALL
_PRIVATE: Final = struct.Struct(">II")
_HEADER: Final = struct.Struct(">III4x")


class ControlType(IntEnum):
    """What a control message is about."""

    NONE = 0
    ERROR = 1
    READY = 2
    QEMU_FILE = 3
    RAM_BLOCKS_REQUEST = 4
    RAM_BLOCKS_RESULT = 5
    COMPRESS = 6
    REGISTER_REQUEST = 7
    REGISTER_RESULT = 8
    REGISTER_FINISHED = 9
    UNREGISTER_REQUEST = 10
    UNREGISTER_FINISHED = 11


class WorkKind(IntEnum):
    """What a work request is, in its id."""

    NONE = 0
    WRITE = 1
    CONTROL_SEND = 2000
    RECEIVE_READY = 4000
    RECEIVE_DATA = 4001
    RECEIVE_CONTROL = 4002


# One block as RAM_BLOCKS_RESULT tells of it. `offset` is where it begins in the destination's RAM, all blocks in a row.
BLOCK: Final = np.dtype([("address", ">u8"), ("offset", ">u8"), ("length", ">u8"), ("rkey", ">u4"), ("padding", ">u4")])
# `value` is what each byte of the range becomes; `offset` is in the destination's RAM.
COMPRESSED: Final = np.dtype([("value", ">u4"), ("block", ">u4"), ("offset", ">u8"), ("length", ">u8")])
# To register, `where` is an address in the destination's RAM, to unregister a chunk's number; `more` is how many chunks
# behind that one are meant too.
REGISTERED: Final = np.dtype([("where", ">u8"), ("block", ">u4"), ("padding", ">u4"), ("more", ">u8")])
RESULT: Final = np.dtype([("rkey", ">u4"), ("padding", ">u4"), ("address", ">u8")])

_RECORDS: Final = {
    ControlType.RAM_BLOCKS_RESULT: BLOCK,
    ControlType.COMPRESS: COMPRESSED,
    ControlType.REGISTER_REQUEST: REGISTERED,
    ControlType.REGISTER_RESULT: RESULT,
    ControlType.UNREGISTER_REQUEST: REGISTERED,
}


# ------------------------------------------------------------------------------------------------------ the connection


def private_data(*, pin_all: bool) -> bytes:
    """The private data of a connection request, or of the answer to one."""
    return _PRIVATE.pack(VERSION, _PIN_ALL if pin_all else 0)


def parse_private_data(data: bytes | memoryview) -> bool:
    """Read the private data of either end; returns whether all memory is to be pinned. Flags of others mean nothing.

    Raises StreamError if it is too short, IncompatibleError for another version. What is behind it is passed over: a
    provider may pad it.
    """
    if len(data) < PRIVATE_SIZE:
        raise StreamError(f"the private data of the connection is {len(data)} bytes long, expected {PRIVATE_SIZE}")
    version, flags = _PRIVATE.unpack_from(data)
    if version != VERSION:
        raise IncompatibleError(f"the peer speaks version {version} of the RDMA protocol, expected {VERSION}")
    return bool(flags & _KNOWN & _PIN_ALL)


def work_id(kind: int, block: int = 0, chunk: int = 0) -> int:
    """The id of a work request."""
    return kind | block << 16 | chunk << 30


def work_kind(work: int) -> int:
    """The kind in the id of a work request."""
    return work & 0xFFFF


def work_place(work: int) -> tuple[int, int]:
    """The block and the chunk in the id of a work request."""
    return work >> 16 & (BLOCKS_MAX - 1), work >> 30


# ---------------------------------------------------------------------------------------------------- control messages


@attrs.frozen(eq=False)
class Message:
    """A control message. `data` is what follows its header, a view of what was received."""

    kind: ControlType
    repeat: int
    data: memoryview

    def records(self) -> RecordArray:
        """What it holds, one record a row; an array of the kind's dtype, and a view of `data`."""
        return np.frombuffer(self.data, _RECORDS[self.kind])


def header(kind: ControlType, length: int = 0, repeat: int = 1) -> bytes:
    """The header of a message of `length` bytes of data."""
    return _HEADER.pack(length, kind, repeat)


def message(kind: ControlType, records: RecordArray | None = None) -> bytes:
    """A message of records, one or more; or of none, where the kind has no data."""
    if records is None:
        return header(kind)
    data = records.tobytes()
    return header(kind, len(data), 1 if kind is ControlType.RAM_BLOCKS_RESULT else len(records)) + data


def parse_message(data: memoryview) -> Message:
    """Read all that one SEND has brought. Raises StreamError for whatever may not be, but places (`Layout`)."""
    if len(data) < HEADER_SIZE:
        raise StreamError(f"a control message is {len(data)} bytes long, expected a header of {HEADER_SIZE} at least")
    length, number, repeat = _HEADER.unpack_from(data)
    try:
        kind = ControlType(number)
    except ValueError:
        raise StreamError(f"unknown control message {number}") from None
    if len(data) != HEADER_SIZE + length:
        raise StreamError(
            f"{len(data)} bytes came as {kind.name}, whose header says {HEADER_SIZE} + {length}",
        )
    if kind is ControlType.NONE:
        raise StreamError("a control message says NONE, which is none")
    _check_data(kind, length, repeat)
    return Message(kind, repeat, data[HEADER_SIZE:])


def _check_data(kind: ControlType, length: int, repeat: int) -> None:
    if kind is ControlType.QEMU_FILE:  # `repeat` is whatever a QEMU 7.2 had in that place
        if not 0 < length <= STREAM_MAX:
            raise StreamError(f"{length} bytes came as QEMU_FILE, expected 1 to {STREAM_MAX}")
        return
    if repeat > REPEAT_MAX:
        raise StreamError(f"{kind.name} says that it holds {repeat} records, at most {REPEAT_MAX} may be")
    record = _RECORDS.get(kind)
    if record is None:
        if length:
            raise StreamError(f"{kind.name} came with {length} bytes of data, expected none")
        return
    if kind is ControlType.RAM_BLOCKS_RESULT:  # how many they are only its length tells
        if not length or length % record.itemsize:
            raise StreamError(f"{kind.name} has {length} bytes, expected {record.itemsize} for each block")
        return
    if not repeat or length != repeat * record.itemsize:
        raise StreamError(
            f"{kind.name} has {length} bytes and says {repeat} records, expected {record.itemsize} bytes for each"
        )


# -------------------------------------------------------------------------------------------------------------- places


def chunks_of(size: int) -> int:
    """How many chunks a block of `size` bytes has."""
    return -(-size // CHUNK)


@attrs.frozen(eq=False)
class Range:
    """A range of one block, in bytes from its beginning; inside of it."""

    block: int
    start: int
    length: int


class Layout:
    """Where the blocks are in the destination's RAM, all in a row, in the order of the source's list.

    Turns what a peer says of places into ranges; raises StreamError for all that is not inside of a block. `sizes` are
    in bytes.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if len(sizes) > BLOCKS_MAX:
            raise StreamError(f"there are {len(sizes)} RAM blocks, over RDMA there may be {BLOCKS_MAX}")
        self.sizes = tuple(sizes)
        self.offsets = tuple(sum(self.sizes[:number]) for number in range(len(sizes)))

    def told(self, addresses: Sequence[int], rkeys: Sequence[int] | None = None) -> RecordArray:
        """The records of RAM_BLOCKS_RESULT for blocks at `addresses`; with `rkeys` they are registered whole."""
        records = np.zeros(len(self.sizes), BLOCK)
        records["address"], records["offset"], records["length"] = addresses, self.offsets, self.sizes
        if rkeys is not None:
            records["rkey"] = rkeys
        return records

    def check_told(self, records: RecordArray) -> None:
        """Hold the blocks that a peer told of against ours. Raises IncompatibleError."""
        if len(records) != len(self.sizes):
            raise IncompatibleError(f"the destination tells of {len(records)} RAM blocks, expected {len(self.sizes)}")
        for number, (came, size) in enumerate(zip(records["length"].tolist(), self.sizes, strict=True)):
            if came != size:
                raise IncompatibleError(f"RAM block {number} is {came} bytes long at the destination, expected {size}")

    def compressed(self, records: RecordArray) -> list[tuple[Range, int]]:
        """The ranges of a COMPRESS, each with its fill value. Raises StreamError."""
        ranges = []
        for value, block, offset, length, *_ in records.tolist():
            start = offset - self._offset_of(block, "COMPRESS")
            if not 0 <= start < self.sizes[block] or not 0 < length <= self.sizes[block] - start:
                raise StreamError(
                    f"COMPRESS is about {length} bytes at {start:#x} of RAM block {block}, "
                    f"which has {self.sizes[block]:#x}"
                )
            if value > 0xFF:
                raise StreamError(f"COMPRESS fills with {value:#x}, expected the value of a byte")
            ranges.append((Range(block, start, length), value))
        return ranges

    def registered(self, records: RecordArray) -> list[Range]:
        """The ranges of a REGISTER_REQUEST, whole chunks but for the end of a block. Raises StreamError."""
        ranges = []
        for where, block, _, more in records.tolist():
            start = where - self._offset_of(block, "REGISTER_REQUEST")
            if not 0 <= start < self.sizes[block]:
                raise StreamError(
                    f"REGISTER_REQUEST is about byte {start:#x} of RAM block {block}, which has {self.sizes[block]:#x}"
                )
            ranges.append(self._chunks("REGISTER_REQUEST", block, start // CHUNK, more))
        return ranges

    def unregistered(self, records: RecordArray) -> list[Range]:
        """The ranges of an UNREGISTER_REQUEST. Raises StreamError."""
        ranges = []
        for chunk, block, _, more in records.tolist():
            self._offset_of(block, "UNREGISTER_REQUEST")
            ranges.append(self._chunks("UNREGISTER_REQUEST", block, chunk, more))
        return ranges

    def _offset_of(self, block: int, what: str) -> int:
        if block >= len(self.sizes):
            raise StreamError(f"{what} is about RAM block {block}, there are {len(self.sizes)}")
        return self.offsets[block]

    def _chunks(self, what: str, block: int, first: int, more: int) -> Range:
        size = self.sizes[block]
        chunks = chunks_of(size)
        if first >= chunks or more >= chunks - first:
            raise StreamError(f"{what} is about chunk {first} of RAM block {block} and {more} more, it has {chunks}")
        start = first * CHUNK
        return Range(block, start, min(size, (first + more + 1) * CHUNK) - start)
