"""Machines that write while they are moved: working set x rate x bandwidth."""

from __future__ import annotations

from itertools import product
from typing import Final

from benchmarks.measuring import Bench, Figure
from benchmarks.work import MIB, UNLIMITED, Pattern, Work

MIB_OF_RAM: Final = 128
WORKING_SETS: Final = (8, 63)  # MiB
RATES: Final = (16, 256)  # MiB/s
CAPS: Final = (128, UNLIMITED)  # MiB/s
BOUND: Final = 6.0  # seconds: all of RAM has gone four times through the narrowest link by then
BEFORE: Final = 0.2  # seconds


def measure(bench: Bench) -> list[Figure]:
    """A guest writes into a working set at a rate, the link has a bandwidth: 128 MiB, a downtime limit of 300 ms."""
    grid = list(product(WORKING_SETS, RATES, CAPS))
    if bench.quick:
        grid = grid[:1]
    works = {}
    for working_set, rate, cap in grid:
        name = f"{working_set} MiB written at {rate} MiB/s, {f'{cap} MiB/s' if cap else 'unlimited'}"
        works[name] = Work(
            mib=MIB_OF_RAM,
            pattern=Pattern(working_set * MIB, rate * MIB),
            bandwidth=cap * MIB,
            before=BEFORE,
            bound=BOUND,
        )
    figures = []
    for (name, both), (working_set, rate, cap) in zip(bench.both(works).items(), grid, strict=True):
        where = {"working-set": working_set, "rate": rate, "cap": cap}
        figures += [
            both.downtime(f"{name}: downtime", where={"quantity": "downtime", **where}),
            both.seconds(f"{name}: total time", where={"quantity": "seconds", **where}),
            both.figure(
                f"{name}: rounds",
                "rounds",
                lambda run: float(run.rounds),
                more_is_better=None,
                where={"quantity": "rounds", **where},
            ),
        ]
    return figures
