"""The guest of the live runs, for a real QEMU: `writer.S`, which says what it does and where its parameters are.

The bytes are beside the source, as hexadecimal text, so that nobody needs an assembler. To write them anew:

    tests/qemu/guests/assemble ../../../benchmarks/guests/writer 0x7c00 > benchmarks/guests/writer.hex
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.work import LOW, PAGE, Pattern

PARAMETERS: Final = 0x9000
BATCH: Final = 32  # pages
SLACK: Final = 0.05  # seconds' worth of writes that are made up for
CALIBRATION: Final = 0.1  # seconds


def writer() -> bytes:
    """The boot sector."""
    return bytes.fromhex((Path(__file__).parent / "writer.hex").read_text())


class Steering:
    """What a `writer` is told, and tells, through its memory: `memory` is that of the guest, from address 0 on."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._words = memory[PARAMETERS : PARAMETERS + 24].view("<u4")
        self._counts = memory[PARAMETERS + 24 : PARAMETERS + 40].view("<u8")

    def begin(self, pattern: Pattern) -> None:
        """Let a guest that waits begin with its work."""
        period = slack = 0
        if pattern.rate:
            ticks = self._ticks_per_second()
            period, slack = int(ticks * BATCH * PAGE / pattern.rate), int(ticks * SLACK)
        stride = PAGE // pattern.words
        self._words[1:] = [LOW + pattern.working_set, pattern.words, stride, period, slack]
        self._words[0] = 1

    def pages(self) -> int:
        """Pages that the guest has written so far."""
        return int(self._counts[1])

    def _ticks_per_second(self) -> float:
        """How fast the guest's time-stamp counter goes, which it stores a thousand times a second."""
        first, began = self._next_tick()
        pause_until = began + CALIBRATION
        last, ended = first, began
        while ended < pause_until:
            last, ended = self._next_tick()
        return (last - first) / (ended - began)

    def _next_tick(self) -> tuple[int, float]:
        before = int(self._counts[0])
        while (now := int(self._counts[0])) == before:
            time.sleep(0.0001)
        return now, time.perf_counter()
