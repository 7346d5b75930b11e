"""What two whimbrels say to each other about who owns a machine, in 32 bytes (wire format, section 11.1).

A word is about one attempt, whose id nobody but the two sides knows. It travels inside of the stream and of the return
path, or alone over a connection made for nothing else, which it begins: its magic tells it from a stream.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import attrs

from whimbrel.abc import Parser
from whimbrel.errors import StreamError

MAGIC: Final = 0x57484D42  # "WHMB"
VERSION: Final = 1
SIZE: Final = 32
ID_SIZE: Final = 16

# PINGs and PONGs of these values are the offer and its acceptance. A QEMU echoes the one and never says the other.
OFFER: Final = 0x77686D31  # "whm1"
ACCEPT: Final = 0x77686D32  # "whm2"
# Within an attempt: whether the destination finds the source at its witness, and the answer if it does.
MEET: Final = 0x77686D33  # "whm3"
MET: Final = 0x77686D34  # "whm4"
# Behind the digest, once the source has let go: the witness decides.
WITNESSED: Final = 0x77686D35  # "whm5"

_WORD: Final = struct.Struct(">IHH16sQ")


class WordKind(IntEnum):
    """The words there are."""

    COMMIT = 1  # source: the machine is yours; run it, and say so
    ABORT = 2  # source: I have taken the machine back; drop it
    DONE = 3  # source: I have heard that it is yours
    RUNNING = 4  # destination: it is mine
    REFUSE = 5  # destination: I do not have it, have not run it and never will
    UNKNOWN = 6  # destination: I have never heard of this attempt, which is no proof of anything


FROM_SOURCE: Final = frozenset({WordKind.COMMIT, WordKind.ABORT, WordKind.DONE})


@attrs.frozen
class Word:
    """One word about the attempt `mid` (16 bytes), in which the source owned the machine in `epoch`."""

    kind: WordKind
    mid: bytes
    epoch: int


def encode(word: Word) -> bytes:
    """A word, `SIZE` bytes."""
    return _WORD.pack(MAGIC, VERSION, word.kind, word.mid, word.epoch)


def decode(data: bytes | memoryview) -> Word:
    """The word that `SIZE` bytes are. Raises StreamError."""
    magic, version, number, mid, epoch = _WORD.unpack(data)
    if magic != MAGIC:
        raise StreamError(f"a word about ownership begins with {magic:#010x}, expected {MAGIC:#010x}")
    if version != VERSION:
        raise StreamError(
            f"a word about ownership has version {version}, this whimbrel speaks {VERSION}",
            hint="use the same version of whimbrel at both ends",
        )
    try:
        kind = WordKind(number)
    except ValueError:
        raise StreamError(f"unknown word about ownership ({number})") from None
    return Word(kind, mid, epoch)


def parse_word() -> Parser[Word]:
    """The next word. Raises StreamError."""
    return decode((yield SIZE))
