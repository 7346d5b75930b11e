"""The guest of the live runs, for whimbrel: it does to numpy arrays what `guests/writer.S` does to a QEMU's memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import numpy.typing as npt

import whimbrel
from benchmarks.work import LOW, PAGE, WORDS, Pattern, Work

if TYPE_CHECKING:
    from whimbrel import GuestMemory
    from whimbrel.abc import Guest

Words: TypeAlias = npt.NDArray[np.uint64]

BATCH: Final = 64  # pages written by one step: some tens of microseconds
PAUSE: Final = 0.001  # seconds to rest where nothing is due
SLACK: Final = 0.05  # seconds' worth of writes that are made up for
RAM, COUNT, DRIVE = "ram", "count", "disk0"


class Writer:
    """Writes as a `Pattern` says: `ram` is flat, `count` has one item, the pages written so far."""

    def __init__(self, ram: Words, count: Words, pattern: Pattern) -> None:
        end = (LOW + pattern.working_set) // PAGE
        pages = ram.reshape(-1, WORDS)[LOW // PAGE : end]
        self._changed = pages[:, :: WORDS // pattern.words]
        self._count = count
        self._per_second = pattern.rate / PAGE
        self._asked: float | None = None
        self._due = 0.0
        self._at = 0

    def step(self) -> None:
        """Write a batch of pages, or rest for a moment if none are due."""
        if not len(self._changed) or not self._is_due():
            time.sleep(PAUSE)
            return
        batch = self._changed[self._at : self._at + BATCH]
        batch += np.uint64(1)
        self._count[0] += np.uint64(len(batch))
        self._at = (self._at + BATCH) % len(self._changed)

    def _is_due(self) -> bool:
        if not self._per_second:
            return True
        now = time.monotonic()
        if self._asked is not None:
            most = max(BATCH, SLACK * self._per_second)
            self._due = min(self._due + (now - self._asked) * self._per_second, most)
        self._asked = now
        if self._due < BATCH:
            return False
        self._due -= BATCH
        return True


def machine(work: Work, image: str = "") -> whimbrel.Machine:
    """The machine of either side of `work`, its settings made; `image` is its side's of a drive."""
    settings = whimbrel.Settings()
    pattern = work.pattern
    apart = pattern is not None and pattern.apart
    settings.backends.memory = "memfd" if apart or work.shared else "anonymous"
    settings.parameters.update({
        "max-bandwidth": work.bandwidth,
        "downtime-limit": work.downtime_limit,
        **({"multifd-channels": work.lanes, "multifd-compression": work.compression} if work.lanes else {}),
    })  # fmt: skip
    wanted = {
        "multifd": bool(work.lanes),
        "xbzrle": work.xbzrle,
        "rdma-pin-all": work.pin_all,
        "block": bool(work.source_image),
        "zero-blocks": work.zero_blocks,
    }
    settings.capabilities.update({name: True for name, state in wanted.items() if state})
    built = whimbrel.Machine("bench", settings=settings)
    built.ram.add(RAM, work.size)
    built.ram.add(COUNT, PAGE)
    if image:
        built.drives.add(DRIVE, image)
    if pattern is not None:
        built.guest = _guest(built, pattern)
    return built


def pages_written(built: whimbrel.Machine) -> int:
    """How many pages the guest of a `machine` has written so far."""
    return int(built.ram[COUNT].array(1, np.uint64)[0])


def writer_apart(memory: GuestMemory, *, working_set: int, rate: int, words: int) -> whimbrel.LoopGuest:
    """The workload of a ProcessGuest: what a `Writer` does, in a process of its own."""
    pattern = Pattern(working_set, rate, words)
    return _looping(memory.array(RAM, dtype=np.uint64), memory.array(COUNT, 1, np.uint64), pattern)


def _guest(built: whimbrel.Machine, pattern: Pattern) -> Guest:
    if pattern.apart:
        arguments = {"working_set": pattern.working_set, "rate": pattern.rate, "words": pattern.words}
        return whimbrel.ProcessGuest(writer_apart, arguments=arguments)
    return _looping(built.ram[RAM].array(dtype=np.uint64), built.ram[COUNT].array(1, np.uint64), pattern)


def _looping(ram: Words, count: Words, pattern: Pattern) -> whimbrel.LoopGuest:
    return whimbrel.LoopGuest(Writer(ram, count, pattern).step)
