"""The JSON that describes the device sections, behind the end of a stream (wire format, sections 1.6 and 7.3)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from whimbrel.abc import Parser
from whimbrel.errors import StreamError
from whimbrel.wire.primitives import U32, parse_u8, parse_u32
from whimbrel.wire.skeleton import Element


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
