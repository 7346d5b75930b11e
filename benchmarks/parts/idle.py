"""The standstill of a machine that does nothing."""

from __future__ import annotations

from typing import Final

from benchmarks.measuring import Bench, Figure, Target
from benchmarks.work import Pattern, Work

MIB_OF_RAM: Final = 512


def measure(bench: Bench) -> list[Figure]:
    """The downtime of a guest that does nothing: 512 MiB of random pages, no limit to the bandwidth."""
    name = "downtime, idle guest"
    measured = bench.both({name: Work(mib=max(64, bench.mib(MIB_OF_RAM)), pattern=Pattern())})[name]
    return [
        measured.downtime(name, target=Target("ratio", most=0.1), where={"quantity": "downtime"}),
        measured.seconds("total time, idle guest", where={"quantity": "seconds"}),
    ]
