"""Commands, source to destination, between sections (wire format, section 6.1)."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import attrs

from whimbrel.abc import Parser
from whimbrel.errors import StreamError
from whimbrel.wire.primitives import U16, U32, parse_u16
from whimbrel.wire.skeleton import Element


class Command(IntEnum):
    """The commands there are; `LENGTHS` has those that may come here."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


LENGTHS: Final = {Command.OPEN_RETURN_PATH: 0, Command.PING: 4}


@attrs.frozen
class OpenReturnPath:
    """From here on the destination may answer."""


@attrs.frozen
class Ping:
    """To be echoed in a Pong, once everything before it was loaded."""

    value: int


def encode(command: OpenReturnPath | Ping) -> bytes:
    """A command with its type byte."""
    payload = U32.pack(command.value) if isinstance(command, Ping) else b""
    number = Command.PING if isinstance(command, Ping) else Command.OPEN_RETURN_PATH
    return bytes((Element.COMMAND,)) + U16.pack(number) + U16.pack(len(payload)) + payload


def parse_command() -> Parser[OpenReturnPath | Ping]:
    """What follows the type byte of a command. Raises StreamError for one that has no place here."""
    number = yield from parse_u16()
    length = yield from parse_u16()
    try:
        command = Command(number)
    except ValueError:
        raise StreamError(f"unknown command {number}") from None
    if command not in LENGTHS:
        raise StreamError(
            f"command {command.name} needs postcopy, COLO or a newer switchover, and this machine has none of them",
            hint="switch the capability off at the source",
        )
    if length != LENGTHS[command]:
        raise StreamError(f"command {command.name} is {length} bytes long, expected {LENGTHS[command]}")
    payload = yield length
    return Ping(int(U32.unpack(payload)[0])) if command is Command.PING else OpenReturnPath()
