"""Messages of the return path, destination to source (wire format, sections 6.2 and 11.2)."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, TypeAlias

import attrs

from whimbrel.abc import Parser
from whimbrel.errors import StreamError
from whimbrel.wire import handover
from whimbrel.wire.handover import Word
from whimbrel.wire.primitives import U16, U32, parse_u16


class MessageType(IntEnum):
    """The messages there are; `LENGTHS` has those that may come here. From 0x7700 on they are whimbrel's."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7
    WORD = 0x7701


LENGTHS: Final = {
    MessageType.SHUT: 4,
    MessageType.PONG: 4,
    MessageType.SWITCHOVER_ACK: 0,
    MessageType.WORD: handover.SIZE,
}


@attrs.frozen
class Shut:
    """The destination's last word: 0 if all went well."""

    value: int


@attrs.frozen
class Pong:
    """The echo of a Ping."""

    value: int


@attrs.frozen
class SwitchoverAck:
    """The destination is ready for the switchover (capability switchover-ack)."""


Message: TypeAlias = Shut | Pong | SwitchoverAck | Word


def encode(message: Message) -> bytes:
    """A message with its head."""
    match message:
        case Shut(value):
            return U16.pack(MessageType.SHUT) + U16.pack(4) + U32.pack(value)
        case Pong(value):
            return U16.pack(MessageType.PONG) + U16.pack(4) + U32.pack(value)
        case SwitchoverAck():
            return U16.pack(MessageType.SWITCHOVER_ACK) + U16.pack(0)
        case Word():
            return U16.pack(MessageType.WORD) + U16.pack(handover.SIZE) + handover.encode(message)


def parse_message() -> Parser[Message]:
    """The next message. Raises StreamError for one that has no place here or the wrong length."""
    number = yield from parse_u16()
    length = yield from parse_u16()
    try:
        kind = MessageType(number)
    except ValueError:
        raise StreamError(f"unknown return-path message {number}") from None
    if kind not in LENGTHS:
        raise StreamError(f"return-path message {kind.name} belongs to postcopy, which is not on")
    if length != LENGTHS[kind]:
        raise StreamError(f"return-path message {kind.name} is {length} bytes long, expected {LENGTHS[kind]}")
    payload = yield length
    if kind is MessageType.SWITCHOVER_ACK:
        return SwitchoverAck()
    if kind is MessageType.WORD:
        return handover.decode(payload)
    value = int(U32.unpack(payload)[0])
    return Shut(value) if kind is MessageType.SHUT else Pong(value)
