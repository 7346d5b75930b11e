"""A machine whose memory is all zero."""

from __future__ import annotations

from typing import Final

from benchmarks.measuring import Bench, Figure, Target
from benchmarks.work import Work

MIB_OF_RAM: Final = 2048
NAMES: Final = {"none": "all zero, never touched", "touched": "all zero, touched"}


def measure(bench: Bench) -> list[Figure]:
    """2 GiB of zero pages: never touched, and touched by the source."""
    works = {name: Work(mib=bench.mib(MIB_OF_RAM), content=content) for content, name in NAMES.items()}
    measured = bench.both(works)
    return [
        measured[name].speed(name, target=Target("ratio", least=10), where={"content": content})
        for content, name in NAMES.items()
    ]
