"""Lanes that compress, on pages that can be compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from benchmarks.measuring import Bench, Both, Figure
from benchmarks.work import MIB, Work

MIB_OF_RAM: Final = 256
LANES: Final = 2


def measure(bench: Bench) -> list[Figure]:
    """256 MiB of compressible pages over two lanes with zlib and with zstd, both at level 1."""
    mib = bench.mib(MIB_OF_RAM)
    works = {name: Work(mib=mib, content="words", lanes=LANES, compression=name) for name in ("zlib", "zstd")}
    figures = []
    for name, both in bench.both(works).items():
        where = {"compression": name}
        label = f"two lanes, {name}"
        figures += [
            both.speed(label, where={"quantity": "speed", **where}),
            _sent(both, label, {"quantity": "sent", **where}),
            both.cpu(f"{label}: processor", where={"quantity": "cpu", **where}),
        ]
    return figures


def _sent(both: Both, label: str, where: Mapping[str, str]) -> Figure:
    """What whimbrel has sent; a QEMU 7.2 counts what its lanes send as though they did not compress."""
    sent = both.figure(f"{label}: sent", "MiB", lambda run: run.sent / MIB, more_is_better=False, where=where)
    return attrs.evolve(sent, theirs=[], theirs_error="")
