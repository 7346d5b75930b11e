"""The parts of the benchmark, each a module with a function `measure(bench)` that returns figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs

from benchmarks.measuring import Bench, Figure
from benchmarks.parts import (
    bulk,
    codecs,
    cold,
    compressible,
    demo,
    drives,
    handover,
    idle,
    live,
    rdma,
    receiving,
    rewriting,
    scaling,
    slowdown,
    startup,
    xbzrle,
    zero,
)

__all__ = ["PARTS", "Part"]


@attrs.frozen
class Part:
    """`measure` and its first sentence; `default` parts are measured when none is named."""

    measure: Callable[[Bench], Sequence[Figure]]
    default: bool = True

    @property
    def about(self) -> str:
        """What it measures, in a sentence."""
        return (self.measure.__doc__ or "").splitlines()[0]


PARTS: Final[Mapping[str, Part]] = {
    "bulk": Part(bulk.measure),
    "zero": Part(zero.measure),
    "compressible": Part(compressible.measure),
    "idle": Part(idle.measure),
    "handover": Part(handover.measure),
    "rewriting": Part(rewriting.measure),
    "live": Part(live.measure),
    "xbzrle": Part(xbzrle.measure),
    "slowdown": Part(slowdown.measure),
    "codecs": Part(codecs.measure),
    "scaling": Part(scaling.measure),
    "receiving": Part(receiving.measure),
    "rdma": Part(rdma.measure),
    "drives": Part(drives.measure),
    "demo": Part(demo.measure),
    "startup": Part(startup.measure),
    "large": Part(scaling.measure_large, default=False),
    "cold": Part(cold.measure, default=False),
}
