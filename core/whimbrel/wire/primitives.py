"""The few shapes that everything on the wire is made of: big-endian integers and length-prefixed names."""

from __future__ import annotations

import struct
from typing import Final

from whimbrel.abc import Parser
from whimbrel.errors import StreamError

U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")
U64: Final = struct.Struct(">Q")

NAME_MAX: Final = 255  # str8: one length byte


def parse_u8() -> Parser[int]:
    """One byte."""
    data = yield 1
    return data[0]


def parse_u16() -> Parser[int]:
    """Two bytes."""
    data = yield 2
    return int(U16.unpack(data)[0])


def parse_u32() -> Parser[int]:
    """Four bytes."""
    data = yield 4
    return int(U32.unpack(data)[0])


def parse_u64() -> Parser[int]:
    """Eight bytes."""
    data = yield 8
    return int(U64.unpack(data)[0])


def str8(name: str) -> bytes:
    """A name of 1 to 255 ASCII characters behind its length byte. Raises ValueError for any other: it is ours."""
    data = name.encode("ascii")
    if not 1 <= len(data) <= NAME_MAX:
        raise ValueError(f"a name on the wire has 1 to {NAME_MAX} characters, {name!r} has {len(data)}")
    return bytes((len(data),)) + data


def parse_str8(what: str) -> Parser[str]:
    """A name of 1 to 255 printable ASCII characters; `what` says in messages whose name it is."""
    length = yield from parse_u8()
    if length == 0:
        raise StreamError(f"the name of {what} is empty, expected 1 to {NAME_MAX} characters")
    data = yield length
    return checked_name(bytes(data), what)


def checked_name(data: bytes, what: str) -> str:
    """`data` as a name, if it is printable ASCII. Raises StreamError otherwise, and shows no more than one byte of it.

    Where a stream is out of step with its reader, what stands for a name may be a guest's memory.
    """
    if not data.isascii() or not (text := data.decode("ascii")).isprintable():
        at = next(at for at, byte in enumerate(data) if not 0x20 <= byte < 0x7F)
        raise StreamError(f"byte {at} of the name of {what} is {data[at]:#04x}, expected printable ASCII")
    return text
