"""The workload of test_process_guest.py: each step appends a line to a ledger and writes somewhere in a field."""

from __future__ import annotations

import time

import numpy as np

from whimbrel.machine import LoopGuest

LINE = np.dtype([("host", "=u8"), ("number", "=u8")])
LEDGER = 32 << 20  # bytes: lines for as long as any test takes
FIELD = 4 << 20  # bytes
COUNT, FAIL, POWERED = range(3)


def ledger(memory, host, rest):
    """A guest that writes `host` into its lines and rests for so many seconds after each step."""
    words = memory.array("words", 8, "uint64")
    lines = memory.array("ledger", dtype=LINE)
    field = memory.array("field", dtype="uint64")

    def step():
        number = int(words[COUNT])
        lines[number] = (host, number)
        write(field, number, 1)
        words[COUNT] = number + 1
        if words[FAIL]:
            raise ZeroDivisionError("a bug of the guest's")
        time.sleep(rest)

    def power_on():
        field[:] = np.arange(field.size, dtype=np.uint64)
        words[POWERED] += 1

    return LoopGuest(step, power_on=power_on)


def write(field, first, count):
    """What steps `first` to `first + count - 1` write: additions, so that none covers up another that was lost."""
    numbers = np.arange(first, first + count, dtype=np.uint64)
    np.add.at(field, (numbers * np.uint64(2654435761) >> np.uint64(7)) % np.uint64(field.size), numbers + np.uint64(1))
