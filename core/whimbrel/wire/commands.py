"""Commands, source to destination, between sections (wire format, sections 6.1 and 11.2)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, TypeAlias

import attrs

from whimbrel.abc import Parser
from whimbrel.errors import StreamError
from whimbrel.wire.handover import ID_SIZE
from whimbrel.wire.primitives import U16, U32, parse_u16
from whimbrel.wire.skeleton import Element

DIGEST_SIZE: Final = 32  # SHA-256

_ATTEMPT: Final = struct.Struct(f">{ID_SIZE}sQ")
_DIGEST: Final = struct.Struct(f">QQ{DIGEST_SIZE}s")


class Command(IntEnum):
    """The commands there are; `LENGTHS` has those that may come here. From 0x7700 on they are whimbrel's."""

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
    ATTEMPT = 0x7701
    DIGEST = 0x7702


LENGTHS: Final = {
    Command.OPEN_RETURN_PATH: 0,
    Command.PING: 4,
    Command.ATTEMPT: _ATTEMPT.size,
    Command.DIGEST: _DIGEST.size,
}


@attrs.frozen
class OpenReturnPath:
    """From here on the destination may answer."""


@attrs.frozen
class Ping:
    """To be echoed in a Pong, once everything before it was loaded."""

    value: int


@attrs.frozen
class Attempt:
    """Which attempt this is (16 bytes that nobody can guess), and in which epoch the source owns the machine."""

    mid: bytes
    epoch: int


@attrs.frozen
class Digest:
    """What has been sent before it: pages of all kinds, bytes of this stream, and a SHA-256 (`StreamDigest`)."""

    pages: int
    size: int
    sha256: bytes


AnyCommand: TypeAlias = OpenReturnPath | Ping | Attempt | Digest


def encode(command: AnyCommand) -> bytes:
    """A command with its type byte."""
    number, payload = _number_and_payload(command)
    return bytes((Element.COMMAND,)) + U16.pack(number) + U16.pack(len(payload)) + payload


def _number_and_payload(command: AnyCommand) -> tuple[Command, bytes]:
    match command:
        case OpenReturnPath():
            return Command.OPEN_RETURN_PATH, b""
        case Ping(value):
            return Command.PING, U32.pack(value)
        case Attempt(mid, epoch):
            return Command.ATTEMPT, _ATTEMPT.pack(mid, epoch)
        case Digest(pages, size, sha256):
            return Command.DIGEST, _DIGEST.pack(pages, size, sha256)


def parse_command() -> Parser[AnyCommand]:
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
    payload = bytes((yield length))
    match command:
        case Command.PING:
            return Ping(int(U32.unpack(payload)[0]))
        case Command.ATTEMPT:
            return Attempt(*_ATTEMPT.unpack(payload))
        case Command.DIGEST:
            return Digest(*_DIGEST.unpack(payload))
    return OpenReturnPath()
