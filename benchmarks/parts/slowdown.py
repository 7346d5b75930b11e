"""What a guest gets done while it is moved."""

from __future__ import annotations

from typing import Final

import attrs

from benchmarks.measuring import Bench, Figure, Target
from benchmarks.work import MIB, PAGE, Pattern, Run, Work

RATE: Final = 40_000 * PAGE  # bytes a second: 40 000 pages, as the demo's guest does
DEFAULT_BANDWIDTH: Final = 128 * MIB
LEAST: Final = 0.85


def measure(bench: Bench) -> list[Figure]:
    """Pages that a guest in a process of its own writes per second during the migration, as a share of before."""
    large, small = bench.mib(1024), bench.mib(256)
    paced, flat_out = Pattern(63 * MIB, RATE, apart=True), Pattern(63 * MIB, apart=True)
    works = {
        "40,000 pages/s, unlimited": Work(mib=max(128, large), pattern=paced),
        "flat out, 128 MiB/s": Work(
            mib=max(64, small), pattern=Pattern(16 * MIB, apart=True), bandwidth=DEFAULT_BANDWIDTH
        ),
        "flat out, unlimited": Work(mib=max(128, large), pattern=flat_out),
    }
    works = {name: attrs.evolve(work, before=0.5) for name, work in works.items()}
    figures = []
    for name, both in bench.both(works).items():
        target = Target("ours", least=LEAST)
        figures += [
            both.figure(name, "of before", share, target=target, where={"quantity": "share", "guest": name}),
            both.figure(
                f"{name}: pages written",
                "thousands a second",
                lambda run: run.pages_during / 1000,
                more_is_better=None,  # a guest in Python and one under TCG are two guests
                where={"quantity": "pages", "guest": name},
            ),
        ]
    return figures


def share(run: Run) -> float:
    """What the guest wrote in a second of the migration, by what it wrote in one before."""
    return run.pages_during / run.pages_before if run.pages_before else 0.0
