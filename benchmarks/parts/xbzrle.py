"""A link too narrow for a guest that changes little in many pages."""

from __future__ import annotations

from typing import Final

from benchmarks.measuring import Bench, Figure
from benchmarks.work import MIB, Pattern, Work

MIB_OF_RAM: Final = 96
PATTERN: Final = Pattern(40 * MIB, 96 * MIB, words=8)
CAP: Final = 64 * MIB
BOUND: Final = 5.0  # seconds: all of RAM has gone three times through the link by then


def measure(bench: Bench) -> list[Figure]:
    """8 words changed in each page of 40 MiB, at 96 MiB/s, over 64 MiB/s: with XBZRLE and without."""
    works = {
        name: Work(mib=MIB_OF_RAM, pattern=PATTERN, bandwidth=CAP, xbzrle=wanted, bound=BOUND, before=0.2)
        for name, wanted in (("without XBZRLE", False), ("with XBZRLE", True))
    }
    figures = []
    for name, both in bench.both(works).items():
        where = {"xbzrle": both.work.xbzrle}
        figures += [
            both.seconds(f"{name}: total time", where={"quantity": "seconds", **where}),
            both.downtime(f"{name}: downtime", where={"quantity": "downtime", **where}),
            both.figure(
                f"{name}: sent",
                "MiB",
                lambda run: run.sent / MIB,
                more_is_better=False,
                where={"quantity": "sent", **where},
            ),
        ]
    return figures
