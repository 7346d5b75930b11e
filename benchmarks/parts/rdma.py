"""RAM that is written straight into the destination's memory, beside the same over TCP, and beside a plain copy."""

from __future__ import annotations

import time
from typing import Final

import attrs
import numpy as np

from benchmarks import whimbrel_pairs
from benchmarks.contents import fill
from benchmarks.measuring import Bench, Both, Figure, Samples, Take, Target
from benchmarks.work import MIB, Work
from whimbrel.machine.memory import MemoryArea

MIB_OF_RAM: Final = 1024
FASTER: Final = 3.0  # than TCP
OF_A_COPY: Final = 0.6
DESTINATION: Final = 0.1  # seconds of its processor for each GiB


def measure(bench: Bench) -> list[Figure]:
    """1 GiB of random pages into preallocated shared memory, over rdma: and over tcp:, and copied by one thread."""
    tcp = Work(mib=bench.mib(MIB_OF_RAM), shared=True, destination="preallocated")
    ways = {
        "pinned": Both(attrs.evolve(tcp, transport="rdma", pin_all=True)),
        "chunk by chunk": Both(attrs.evolve(tcp, transport="rdma")),
    }
    beside, copies = Both(tcp), list[float]()
    takes = {f"rdma, {way}": _migrating(both.ours, both.work) for way, both in ways.items()}
    takes["tcp"] = _migrating(beside.ours, tcp)
    takes["a plain copy"] = lambda: copies.append(_copy(tcp.size))
    bench.in_turns(takes)
    figures = []
    for way, both in ways.items():
        figures += _figures(way, attrs.evolve(both, theirs=beside.ours), copies)
    return figures


def _migrating(samples: Samples, work: Work) -> Take:
    return lambda: samples.take(lambda: whimbrel_pairs.migrate(work))


def _figures(way: str, both: Both, copies: list[float]) -> list[Figure]:
    name, where = f"random, preallocated, {way}", {"way": way}
    over = both.speed(
        name, beside="tcp", target=Target("ratio", least=FASTER), where={"quantity": "speed", "beside": "tcp", **where}
    )
    copied = attrs.evolve(
        over,
        beside="a plain copy",
        theirs=copies,
        theirs_error="",
        target=Target("ratio", least=OF_A_COPY),
        where={"quantity": "speed", "beside": "copy", **where},
    )
    processor = both.figure(
        f"{name}: the destination's processor",
        "CPU s/GiB",
        lambda run: run.destination_cpu / (both.work.mib / 1024),
        beside="tcp",
        more_is_better=False,
        target=Target("ours", most=DESTINATION),
        where={"quantity": "destination-cpu", **where},
    )
    return [over, copied, processor]


def _copy(size: int) -> float:
    """MiB per second of one thread that copies `size` random bytes between two memfds that are all there."""
    source, destination = MemoryArea(size, "memfd", "source"), MemoryArea(size, "memfd", "destination")
    try:
        fill(source.view, "random")
        destination.populate()
        began = time.perf_counter()
        np.copyto(destination.view, source.view)
        return size / MIB / (time.perf_counter() - began)
    finally:
        source.close()
        destination.close()
