"""A machine that rewrites 63 MiB all the time."""

from __future__ import annotations

from typing import Final

from benchmarks.measuring import Bench, Figure, Target
from benchmarks.work import MIB, Pattern, Work

MIB_OF_RAM: Final = 256
WORKING_SET: Final = 63 * MIB


def measure(bench: Bench) -> list[Figure]:
    """A guest rewrites 63 of 256 MiB as fast as it can; no limit to the bandwidth, a downtime limit of 300 ms."""
    works = {
        "63 MiB rewritten, guest in the process": Work(mib=MIB_OF_RAM, pattern=Pattern(WORKING_SET)),
        "63 MiB rewritten, ProcessGuest": Work(mib=MIB_OF_RAM, pattern=Pattern(WORKING_SET, apart=True)),
    }
    figures = []
    for name, both in bench.both(works).items():
        where = {"apart": both.work.pattern is not None and both.work.pattern.apart}
        figures += [
            both.downtime(f"{name}: downtime", target=Target("ratio", most=1), where={"quantity": "downtime", **where}),
            both.seconds(f"{name}: total time", where={"quantity": "seconds", **where}),
        ]
    return figures
