"""A machine that stands still, all of its memory random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs

from benchmarks import sockets
from benchmarks.measuring import Bench, Both, Figure, Target
from benchmarks.work import MIB, Work

MIB_OF_RAM: Final = 1024
WAYS: Final = {0: "one channel", 2: "two lanes"}
TARGETS: Final = {("fresh", 0): 4.0, ("fresh", 2): 3.0, ("preallocated", 0): 1.2, ("preallocated", 2): 1.2}
CPU: Final = 1.0  # seconds for each GiB
OVERHEAD: Final = 64  # MiB


def measure(bench: Bench) -> list[Figure]:
    """1 GiB of random pages, into fresh and into preallocated memory, over one channel and over two lanes."""
    mib = bench.mib(MIB_OF_RAM)
    works = {
        f"random, {memory}, {WAYS[lanes]}": Work(mib=mib, destination=memory, lanes=lanes) for memory, lanes in TARGETS
    }
    bare = {memory: Both(Work(mib=mib, destination=memory)) for memory in ("fresh", "preallocated")}
    measured = bench.both(works, {f"{memory}: bare socket": _sending(both) for memory, both in bare.items()})
    figures = []
    for (name, both), ((memory, lanes), least) in zip(measured.items(), TARGETS.items(), strict=True):
        where = {"memory": memory, "lanes": lanes}
        target = Target("ratio", least=least)
        figures += [
            both.speed(name, target=target, where={"quantity": "speed", **where}),
            both.cpu(f"{name}: processor", target=Target("ours", most=CPU), where={"quantity": "cpu", **where}),
        ]
    for memory, both in bare.items():
        beside = attrs.evolve(both, ours=measured[f"random, {memory}, {WAYS[0]}"].ours)
        where = {"quantity": "bare", "memory": memory}
        figures.append(beside.speed(f"random, {memory}, {WAYS[0]}", beside="bare socket", where=where))
    grown = measured[f"random, fresh, {WAYS[0]}"].figure(
        "source's memory above its RAM",
        "MiB",
        lambda run: run.overhead / MIB,
        more_is_better=False,
        target=Target("ours", most=OVERHEAD),
        where={"quantity": "overhead"},
    )
    return [*figures, grown]


def _sending(both: Both) -> Callable[[], None]:
    return lambda: both.theirs.take(lambda: sockets.send(both.work))
