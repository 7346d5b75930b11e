"""How the cost grows with the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.measuring import Bench, Figure
from benchmarks.work import Work

SIZES: Final = (256, 512, 1024, 2048)  # MiB
LARGE: Final = (4096, 8192)


def measure(bench: Bench) -> list[Figure]:
    """256 MiB to 2 GiB of random pages into fresh memory over one channel."""
    return _measure(bench, SIZES[:1] if bench.quick else SIZES)


def measure_large(bench: Bench) -> list[Figure]:
    """4 and 8 GiB of random pages into fresh memory over one channel."""
    return _measure(bench, LARGE)


def _measure(bench: Bench, sizes: Sequence[int]) -> list[Figure]:
    works = {f"{mib} MiB" if mib < 1024 else f"{mib // 1024} GiB": Work(mib=bench.mib(mib)) for mib in sizes}
    figures = []
    for (name, both), mib in zip(bench.both(works).items(), sizes, strict=True):
        figures += [
            both.seconds(f"{name}: total time", where={"quantity": "seconds", "mib": mib}),
            both.cpu(f"{name}: processor", where={"quantity": "cpu", "mib": mib}),
        ]
    return figures
