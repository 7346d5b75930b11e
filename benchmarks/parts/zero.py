"""A machine whose memory is all zero."""

from __future__ import annotations

from typing import Final

from benchmarks.measuring import Bench, Figure, Target
from benchmarks.work import Work

MIB_OF_RAM: Final = 2048
KINDS: Final = {
    "all zero, never touched": ("none", False),
    "all zero, never touched, shared memory": ("none", True),
    "all zero, touched": ("touched", False),
}


def measure(bench: Bench) -> list[Figure]:
    """2 GiB of zero pages: never touched, in anonymous and in shared memory, and touched by the source."""
    mib = bench.mib(MIB_OF_RAM)
    works = {name: Work(mib=mib, content=content, shared=shared) for name, (content, shared) in KINDS.items()}
    target = Target("ratio", least=10)
    return [
        both.speed(name, target=target, where={"content": both.work.content, "shared": both.work.shared})
        for name, both in bench.both(works).items()
    ]
