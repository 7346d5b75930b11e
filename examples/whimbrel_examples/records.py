"""A table of records in migratable memory under a stream of random updates: the machine of `whimbrel demo`.

    whimbrel run whimbrel_examples.records:machine

The rule that makes it checkable: operation number k is a function of the seed and k alone (which record it picks, and
what it adds to each of the record's words), so `replay` can compute at any time, in any process, what the table must
hold after so many operations. Updates add and never overwrite, so an update that is lost anywhere is never covered up
by a later one. All that the machine has to carry besides the table is the number of operations: that is its device.

The updates are made on a thread or, with `guest="process"`, in a process of their own (`workload`), which shares the
machine's RAM and nothing else; so the device looks into RAM then.
"""

from __future__ import annotations

import time
from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import numpy.typing as npt

import whimbrel
from whimbrel import vmstate
from whimbrel.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

Table: TypeAlias = npt.NDArray[np.uint64]

WORDS: Final = 8  # of 8 bytes in a record
RECORD: Final = 8 * WORDS
SIZE: Final = 512 << 20  # bytes
RATE: Final = 40_000  # operations per second
SEED: Final = 1

BATCH: Final = 2048  # operations in one step at most: about a millisecond
PAUSE: Final = 0.001  # seconds to rest where nothing is due
BACKLOG: Final = 0.05  # seconds' worth of operations that are made up for; what is later than that is dropped
_CHUNK: Final = 1 << 16  # words filled at once, so that they stay in the cache

# The constants of SplitMix64 (public domain, Sebastiano Vigna).
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX: Final = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_HALF: Final = np.uint64(32)
_ODD: Final = np.arange(WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_WORD: Final = np.arange(WORDS, dtype=np.int64)


def machine(
    size: int = SIZE,
    seed: int = SEED,
    rate: float = RATE,
    settings: whimbrel.Settings | None = None,
    *,
    guest: str = "thread",
) -> whimbrel.Machine:
    """Build the machine: `size` bytes of records, updated at random `rate` times a second (0 for flat out).

    Source and destination need the same `size`; what the destination has for a seed is replaced by the source's.
    Raises ConfigError for a size that is no whole number of records. Its `Records` are `records_of(machine)`.

    With `guest` "process" the updates are made in a process of their own, and the counters are in RAM as well, in one
    more page; both sides need the same. `[backends] memory` must be one that can be shared then.
    """
    built = whimbrel.Machine("records", settings=settings)
    table = built.ram.array("records", _words(size), "uint64")
    counters = built.ram.array("counters", len(Counter), "uint64") if guest == "process" else None
    records = Records(table, seed=seed, rate=rate, counters=counters)
    built.devices.add("records", records, DESCRIPTION)
    if guest == "process":
        built.guest = whimbrel.ProcessGuest(workload, arguments={"rate": rate})
    else:
        built.guest = whimbrel.LoopGuest(records.step, power_on=records.fill)
    return built


def workload(memory: whimbrel.GuestMemory, rate: float) -> whimbrel.LoopGuest:
    """Build the guest in a process of its own: all that it works on is in the machine's RAM."""
    counters = memory.array("counters", len(Counter), "uint64")
    records = Records(memory.array("records", dtype="uint64"), rate=rate, counters=counters)
    return whimbrel.LoopGuest(records.step, power_on=records.fill)


def records_of(built: whimbrel.Machine) -> Records:
    """The records of a machine that `machine` has built."""
    records = built.devices["records"].obj
    assert isinstance(records, Records)
    return records


class Counter(IntEnum):
    """What the counters of a table are."""

    OPERATIONS = 0
    SEED = 1


class Records:
    """The table, and how many operations it has seen. Used by the guest's thread; read it while the guest is stopped.

    `counters` hold the number of operations and the seed, one of each `Counter`; with an array of the machine's RAM
    they are shared with whoever else has it, and `seed` is theirs if none is given. `clock` and `sleep` are the guest's
    time, in seconds.
    """

    def __init__(
        self,
        table: Table,
        *,
        seed: int | None = None,
        rate: float = RATE,
        counters: Table | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.table, self.rate = table, rate
        if counters is None:
            counters = np.array([0, SEED], np.uint64)
        self._counters = counters
        if seed is not None:
            self.seed = seed
        self._clock, self._sleep = clock, sleep
        self._asked: float | None = None
        self._due = 0.0

    @property
    def operations(self) -> int:
        """How many operations the table has seen."""
        return int(self._counters[Counter.OPERATIONS])

    @operations.setter
    def operations(self, number: int) -> None:
        self._counters[Counter.OPERATIONS] = number

    @property
    def seed(self) -> int:
        """Of the random updates."""
        return int(self._counters[Counter.SEED])

    @seed.setter
    def seed(self, seed: int) -> None:
        self._counters[Counter.SEED] = seed % 2**64

    def fill(self) -> None:
        """Give a fresh table its first content."""
        fill(self.table, self.seed)

    def step(self) -> None:
        """Do the operations that are due, or rest for a moment if there are none."""
        count = self._take_due()
        if count:
            apply(self.table, self.seed, self.operations, count)
            self.operations += count
        else:
            self._sleep(PAUSE)

    def _take_due(self) -> int:
        # Open loop: operations fall due by the clock, however long the last ones took.
        if not self.rate:
            return BATCH
        now = self._clock()
        if self._asked is not None:
            self._due = min(self._due + (now - self._asked) * self.rate, max(1.0, BACKLOG * self.rate))
        self._asked = now
        if self._due < self.rate * PAUSE:
            return 0  # in handfuls, or the calls would cost more than the operations
        count = min(int(self._due), BATCH)
        self._due -= count
        return count


DESCRIPTION: Final = whimbrel.VMStateDescription(
    name="records", version_id=1, fields=[vmstate.uint64("operations"), vmstate.uint64("seed")]
)


def fill(table: Table, seed: int) -> None:
    """Write what a table holds before the first operation; no page of it is zero."""
    start = np.uint64(seed % 2**64)
    for first in range(0, table.size, _CHUNK):
        chunk = table[first : first + _CHUNK]
        np.multiply(np.arange(first + 1, first + 1 + chunk.size, dtype=np.uint64), _GOLDEN, out=chunk)
        chunk ^= start


def apply(table: Table, seed: int, first: int, count: int) -> None:
    """Do operations `first` to `first + count - 1` on `table`."""
    keys = np.arange(first, first + count, dtype=np.uint64)
    keys += np.uint64(seed % 2**64)
    keys *= _GOLDEN
    for shift, factor in _MIX:
        keys ^= keys >> shift
        keys *= factor
    # The upper half picks the record: scaled rather than taken modulo, which is slow.
    record = ((keys >> _HALF) * np.uint64(table.size // WORDS)) >> _HALF
    words = record.astype(np.int64)[:, None] * WORDS + _WORD
    np.add.at(table, words.ravel(), (keys[:, None] * _ODD).ravel())  # heeds a record that is picked twice


def replay(operations: int, seed: int = SEED, size: int = SIZE) -> Table:
    """Compute what a table of `size` bytes holds after so many operations. Raises ConfigError as `machine` does."""
    table = np.empty(_words(size), np.uint64)
    fill(table, seed)
    for first in range(0, operations, BATCH):
        apply(table, seed, first, min(BATCH, operations - first))
    return table


def check_size(size: int) -> None:
    """Raise ConfigError for a size, in bytes, that no table can have."""
    if size % RECORD or not 0 < size < RECORD << 32:
        raise ConfigError(
            f"a table of {size} bytes cannot be", hint=f"give it a size of whole records, which have {RECORD} bytes"
        )


def _words(size: int) -> int:
    check_size(size)
    return size // 8
