"""Memory that the host has yet to find."""

from __future__ import annotations

from typing import Final

from benchmarks.measuring import Bench, Figure
from benchmarks.work import Work

MIB_OF_RAM: Final = 1024


def measure(bench: Bench) -> list[Figure]:
    """1 GiB of random pages into fresh memory that the hypervisor has taken back before, where it does so."""
    works = {
        f"random, fresh, cold host, {name}": Work(mib=bench.mib(MIB_OF_RAM), lanes=lanes, host="cold")
        for lanes, name in ((0, "one channel"), (2, "two lanes"))
    }
    return [
        both.speed(name, where={"memory": "cold", "lanes": both.work.lanes}) for name, both in bench.both(works).items()
    ]
