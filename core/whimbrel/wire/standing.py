"""What stands at a place of a stream of which only the bytes are known: a section, a command, the end, or nothing such.

Where a device's length is unknown, its end is where something can stand behind it (wire format, sections 1 and 6.1).
Each question can be asked of the bytes that have come so far, and the answer may be that more are needed.
"""

from __future__ import annotations

from collections.abc import Container
from enum import Enum
from typing import Final

import attrs

from whimbrel.errors import StreamError
from whimbrel.wire.commands import Command
from whimbrel.wire.description import TEXT_MAX
from whimbrel.wire.primitives import U16, U32, checked_name
from whimbrel.wire.skeleton import Element, SectionHeader

_HEADER_MAX: Final = 1 + 4 + 1 + 255 + 4 + 4
_ID_MAX: Final = (1 << 20) - 1  # a sender counts its sections from 0 on
_VERSION_MAX: Final = (1 << 31) - 1
_COMMAND_HEAD: Final = 1 + 2 + 2
_DISCARD_MAX: Final = 1 + 1 + 255 + 1 + 12 * 16
_LOOK: Final = max(_HEADER_MAX, _COMMAND_HEAD + _DISCARD_MAX)

# The lengths that a command's payload can have (section 6.1).
_COMMAND_LENGTHS: Final[dict[int, Container[int]]] = {
    Command.OPEN_RETURN_PATH: (0,),
    Command.PING: (4,),
    Command.POSTCOPY_ADVISE: (0, 16),
    Command.POSTCOPY_LISTEN: (0,),
    Command.POSTCOPY_RUN: (0,),
    Command.POSTCOPY_RAM_DISCARD: range(20, _DISCARD_MAX + 1),
    Command.PACKAGED: (4,),
    Command.ENABLE_COLO: (0,),
    Command.POSTCOPY_RESUME: (0,),
    Command.RECV_BITMAP: range(2, 257),
    Command.SWITCHOVER_START: (0,),
}
_HIGH_BYTES: Final = frozenset(number >> 8 for number in _COMMAND_LENGTHS)


class Verdict(Enum):
    """Whether an element stands at a place."""

    NO = "no"
    MAYBE = "as far as its bytes have come"
    LAST = "if no more bytes come"
    YES = "yes"


@attrs.frozen
class Standing:
    """An element at `offset`; `end` is behind what was looked at of it: its head, a command's payload.

    `header` is that of a START or FULL, `section_id` that of any section.
    """

    element: Element
    offset: int
    end: int
    header: SectionHeader | None = None
    section_id: int | None = None


def standing(
    tail: bytes | bytearray, at: int, *, seen: Container[int] = (), started: Container[int] = ()
) -> tuple[Verdict, Standing | None]:
    """What stands at `at`; with YES and LAST comes the element.

    A START or FULL must have a new id (not in `seen`), a name of printable ASCII and a version that is no negative
    number in C; a PART or END an id in `started`; a command a number and a length that there are, and its payload; an
    EOF nothing behind it (LAST), or a description's head.
    """
    data = bytes(tail[at : at + _LOOK])
    if not data:
        return Verdict.MAYBE, None
    match data[0]:
        case Element.SECTION_FULL | Element.SECTION_START:
            return _header(data, at, seen)
        case Element.SECTION_PART | Element.SECTION_END:
            return _part(data, at, started)
        case Element.COMMAND:
            return _command(data, at)
        case Element.EOF:
            return _end(data, at)
    return Verdict.NO, None


def _header(data: bytes, at: int, seen: Container[int]) -> tuple[Verdict, Standing | None]:
    if len(data) < 5:
        return Verdict.MAYBE, None
    section_id = U32.unpack_from(data, 1)[0]
    if section_id in seen or section_id > _ID_MAX:
        return Verdict.NO, None
    if len(data) < 6:
        return Verdict.MAYBE, None
    length = data[5]
    try:
        name = checked_name(data[6 : 6 + length], "a section")
    except StreamError:
        return Verdict.NO, None
    if not length:
        return Verdict.NO, None
    end = 6 + length + 8
    if len(data) < end:
        return Verdict.MAYBE, None
    instance, version = U32.unpack_from(data, end - 8)[0], U32.unpack_from(data, end - 4)[0]
    if version > _VERSION_MAX:
        return Verdict.NO, None
    header = SectionHeader(section_id, name, instance, version)
    return Verdict.YES, Standing(Element(data[0]), at, at + end, header, section_id)


def _part(data: bytes, at: int, started: Container[int]) -> tuple[Verdict, Standing | None]:
    if len(data) < 5:
        return Verdict.MAYBE, None
    section_id = U32.unpack_from(data, 1)[0]
    if section_id not in started:
        return Verdict.NO, None
    return Verdict.YES, Standing(Element(data[0]), at, at + 5, section_id=section_id)


def _command(data: bytes, at: int) -> tuple[Verdict, Standing | None]:
    if len(data) < 3:
        return (Verdict.MAYBE if not data[1:] or data[1] in _HIGH_BYTES else Verdict.NO), None
    lengths = _COMMAND_LENGTHS.get(U16.unpack_from(data, 1)[0])
    if lengths is None:
        return Verdict.NO, None
    if len(data) < _COMMAND_HEAD:
        return Verdict.MAYBE, None
    length = U16.unpack_from(data, 3)[0]
    if length not in lengths:
        return Verdict.NO, None
    end = _COMMAND_HEAD + length
    return (Verdict.YES, Standing(Element.COMMAND, at, at + end)) if len(data) >= end else (Verdict.MAYBE, None)


def _end(data: bytes, at: int) -> tuple[Verdict, Standing | None]:
    end = Standing(Element.EOF, at, at + 1)
    if len(data) == 1:
        return Verdict.LAST, end
    if data[1] != Element.VMDESCRIPTION or not b'{"'.startswith(data[6:8]):
        return Verdict.NO, None
    if len(data) >= 6 and not 2 <= U32.unpack_from(data, 2)[0] <= TEXT_MAX:
        return Verdict.NO, None
    return (Verdict.YES, end) if len(data) >= 8 else (Verdict.MAYBE, None)
