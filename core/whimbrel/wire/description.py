"""The JSON that describes the device sections, behind the end of a stream (wire format, sections 1.6 and 7.3).

Made by `encode`; passed over by who knows the devices (`parse_and_skip`); found and parsed by who does not. Where the
lengths of the devices are unknown, the description can only be found by its looks: :class:`DescriptionFinder`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

import attrs
import numpy as np

from whimbrel.abc import Parser
from whimbrel.errors import StreamError
from whimbrel.wire.described import DEVICES_MAX, instance_of, name_of, shown
from whimbrel.wire.primitives import U32, parse_u8, parse_u32
from whimbrel.wire.skeleton import Element

TEXT_MAX: Final = 16 << 20
DEPTH_MAX: Final = 64
NODES_MAX: Final = 1 << 20

_PAGE_SIZE_MAX: Final = 1 << 30

_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_HEAD: Final = re.compile(rb'\x00\x06(.{4})\{"', re.DOTALL)  # EOF, the description's type, its length, how it begins
_TEXT_AT: Final = 6  # bytes from the EOF to the text
_NOT_TEXT: Final = re.compile(rb"[^\x20-\x7e]")  # one line of ASCII

# What an opening bracket adds to the depth of JSON, and a closing one takes away.
_STEPS: Final = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


@attrs.frozen
class Description:
    """What a stream says of its devices. `text` is the JSON as it came, `devices` are in the order of their sections.

    Of a device its name, instance and list of fields are checked, and nothing within a field: who follows a
    description checks what he uses (`whimbrel.wire.described`).
    """

    text: bytes = attrs.field(repr=False)
    page_size: int
    devices: tuple[Mapping[str, Any], ...] = attrs.field(repr=False)


@attrs.frozen
class Found:
    """A description in a tail: `eof_offset` is that of the EOF before it, `end` the offset behind its last byte."""

    eof_offset: int
    end: int
    description: Description

    @property
    def text(self) -> bytes:
        """The JSON as it came."""
        return self.description.text


def encode(devices: Sequence[Mapping[str, Any]], *, page_size: int) -> bytes:
    """The description with its type byte and length; one line of ASCII, devices in the order of their sections."""
    text = json.dumps({"page_size": page_size, "devices": list(devices)}, separators=(", ", ": ")).encode("ascii")
    # Readers of files look for the JSON from the end: the first brace behind the last NUL. A length must not have one.
    length = len(text)
    while b"{" in U32.pack(length):
        length += 1
    return frame(text.ljust(length))


def frame(text: bytes) -> bytes:
    """A description's JSON with its type byte and length."""
    return bytes((Element.VMDESCRIPTION,)) + U32.pack(len(text)) + text


def parse_and_skip(limit: int) -> Parser[int]:
    """The description, checked for its length and passed over; returns how many bytes its JSON has.

    A destination knows its devices from its own descriptions and has no use for the sender's. `limit` is in bytes.
    """
    mark = yield from parse_u8()
    if mark != Element.VMDESCRIPTION:
        raise StreamError(f"after the end of the stream only its description (0x06) may come, not {mark:#04x}")
    length = yield from parse_u32()
    if length > limit:
        raise StreamError(
            f"the description is {length} bytes long, at most {limit}",
            hint="[limits] description says how long it may be",
        )
    left = length
    while left:
        step = min(left, 1 << 16)
        yield step
        left -= step
    return length


def parse(text: bytes) -> Description:
    """The description as values. Raises StreamError for what is no JSON, no description, too deep or too much.

    Keys beside `page_size` and `devices` (`configuration`, from QEMU 8.2 on) are passed over. Where a key comes twice
    in one object, as in the elements of a `qtailq`, the last one counts: so do Python's and QEMU's own readers, and two
    readers of one stream must not see two machines.
    """
    text = bytes(text)
    _check_bounds(text)
    try:
        top = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as exc:  # also of numbers with thousands of digits
        raise StreamError(f"the description is no JSON: {exc}") from None
    if not isinstance(top, dict):
        raise StreamError("the description is no JSON object")
    page_size = top.get("page_size")
    if type(page_size) is not int or not 1 <= page_size <= _PAGE_SIZE_MAX:
        raise StreamError(f"the description's page_size is {shown(page_size)}, expected a number of bytes")
    devices = top.get("devices")
    if not isinstance(devices, list):
        raise StreamError(f"the description's devices are {shown(devices)}, expected a list")
    if len(devices) > DEVICES_MAX:
        raise StreamError(f"the description has {len(devices)} devices, at most {DEVICES_MAX}")
    for number, device in enumerate(devices):
        _check_device(device, f"device {number}")
    return Description(text, page_size, tuple(devices))


def _check_bounds(text: bytes) -> None:
    """Refuse what would cost too much to parse, without parsing it: Python's parser recurses."""
    if len(text) > TEXT_MAX:
        raise StreamError(f"the description is {len(text)} bytes long, at most {TEXT_MAX}")
    if bad := _NOT_TEXT.search(text):
        raise StreamError(f"byte {bad.start()} of the description is {bad[0][0]:#04x}, expected one line of ASCII")
    bare = np.frombuffer(_STRING.sub(b"", text), np.uint8)
    steps = _STEPS[bare]
    depth = int(np.cumsum(steps, dtype=np.int32).max(initial=0))
    if depth > DEPTH_MAX:
        raise StreamError(f"the description is nested {depth} deep, at most {DEPTH_MAX}")
    # Each value is the first of its list or object, or stands behind a comma.
    nodes = 1 + int(np.count_nonzero(steps == 1)) + int(np.count_nonzero(bare == ord(",")))
    if nodes > NODES_MAX:
        raise StreamError(f"the description has some {nodes} values, at most {NODES_MAX}")


def _refuse_constant(word: str) -> NoReturn:
    raise StreamError(f"the description is no JSON: {word} stands in it")


def _check_device(device: object, path: str) -> None:
    if not isinstance(device, dict):
        raise StreamError(f"{path} of the description is {shown(device)}, expected an object")
    name_of(device, path)
    instance_of(device, path)
    if not isinstance(device.get("fields"), list):
        raise StreamError(f"{path} of the description has no list of fields")


class DescriptionFinder:
    """Looks for the description in a tail that grows, from `start` on; a byte is looked at about once.

    An EOF, the description's type and length, and `{"` may stand in a device's bytes too: it is the description if
    as many bytes as the length says are one. `limit` is in bytes; what claims more is none.
    """

    def __init__(self, start: int = 0, *, limit: int = TEXT_MAX) -> None:
        self._limit = limit
        self._scan = start  # no description begins before here, but for the candidate
        self._candidate: int | None = None
        self._end = 0  # of the candidate
        self._checked = 0  # the candidate's text is text up to here

    @property
    def waiting(self) -> tuple[int, int] | None:
        """Of what may be the description but is not whole: how many bytes have come, and how many it is to have."""
        if self._candidate is None:
            return None
        begin = self._candidate + _TEXT_AT
        return self._checked - begin, self._end - begin

    def feed(self, tail: bytes | bytearray | memoryview, *, at_end: bool = False) -> Found | None:
        """The description, once it is whole in `tail`, which is that of the last call with more bytes behind it.

        None means: not in these bytes, and with `at_end` that one which is not whole is none. What was passed by is
        not looked at again, and no view of `tail` is kept.
        """
        while self._candidate is not None or self._next_candidate(tail):
            stop = min(len(tail), self._end)
            if not _NOT_TEXT.search(tail, self._checked, stop):
                self._checked = stop
                if len(tail) < self._end and not at_end:
                    return None
                if len(tail) >= self._end and (found := self._parsed(tail)):
                    return found
            self._candidate = None
        return None

    def _next_candidate(self, tail: bytes | bytearray | memoryview) -> bool:
        while head := _HEAD.search(tail, self._scan):
            self._scan = head.start() + 1
            length = U32.unpack(head[1])[0]
            if length <= self._limit:
                self._candidate = head.start()
                self._checked = head.start() + _TEXT_AT
                self._end = self._checked + length
                return True
        self._scan = max(self._scan, len(tail) - (_TEXT_AT + 1))
        return False

    def _parsed(self, tail: bytes | bytearray | memoryview) -> Found | None:
        assert self._candidate is not None
        try:
            description = parse(bytes(tail[self._candidate + _TEXT_AT : self._end]))
        except StreamError:
            return None
        return Found(self._candidate, self._end, description)


def find(
    tail: bytes | bytearray | memoryview, start: int = 0, *, limit: int = TEXT_MAX, at_end: bool = True
) -> Found | None:
    """The first whole description in `tail` from `start` on, with the EOF before it, or None.

    Bytes may stand behind it, which no stream has there (`Found.end`). For a tail that grows there is
    :class:`DescriptionFinder`, which does not begin anew. `limit` is in bytes.
    """
    return DescriptionFinder(start, limit=limit).feed(tail, at_end=at_end)
