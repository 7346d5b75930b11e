"""The guest of the live runs, for a real QEMU: `writer.S`, which says what it does and where its parameters are.

The bytes are beside the source, as hexadecimal text, so that nobody needs an assembler. To write them anew:

    tests/qemu/guests/assemble ../../../benchmarks/guests/writer 0x7c00 > benchmarks/guests/writer.hex
"""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from benchmarks.work import LOW, PAGE, Pattern

if TYPE_CHECKING:
    from typing_extensions import Buffer

PARAMETERS: Final = 0x9000
TICKS: Final = PARAMETERS + 24
DONE: Final = PARAMETERS + 32
BATCH: Final = 32  # pages
SLACK: Final = 0.05  # seconds' worth of writes that are made up for
CALIBRATION: Final = 0.1  # seconds


def writer() -> bytes:
    """The boot sector."""
    return bytes.fromhex((Path(__file__).parent / "writer.hex").read_text())


class Memory(Protocol):
    """The memory of a guest, by its own addresses."""

    def read(self, address: int, size: int) -> bytes:
        """What is there."""

    def write(self, address: int, data: Buffer) -> None:
        """Put something there."""


class Steering:
    """What a `writer` is told, and tells, through its memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def begin(self, pattern: Pattern) -> None:
        """Let a guest that waits begin with its work."""
        period = slack = 0
        if pattern.rate:
            ticks = self._ticks_per_second()
            period, slack = int(ticks * BATCH * PAGE / pattern.rate), int(ticks * SLACK)
        stride = PAGE // pattern.words
        told = struct.pack("<5I", LOW + pattern.working_set, pattern.words, stride, period, slack)
        self._memory.write(PARAMETERS + 4, told)
        self._memory.write(PARAMETERS, struct.pack("<I", 1))

    def pages(self) -> int:
        """Pages that the guest has written so far."""
        return self._count(DONE)

    def _ticks_per_second(self) -> float:
        """How fast the guest's time-stamp counter goes, which it stores a thousand times a second."""
        first, began = self._next_tick()
        pause_until = began + CALIBRATION
        last, ended = first, began
        while ended < pause_until:
            last, ended = self._next_tick()
        return (last - first) / (ended - began)

    def _next_tick(self) -> tuple[int, float]:
        before = self._count(TICKS)
        while (now := self._count(TICKS)) == before:
            time.sleep(0.0001)
        return now, time.perf_counter()

    def _count(self, address: int) -> int:
        return int.from_bytes(self._memory.read(address, 8), "little")
