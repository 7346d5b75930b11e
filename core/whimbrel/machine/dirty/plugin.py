"""Offers the bundled dirty trackers, through the door that a stranger's come in by."""

from __future__ import annotations

from whimbrel.abc import DirtyTrackerSpec
from whimbrel.hookspecs import hookimpl
from whimbrel.machine.dirty import compare, manual, userfaultfd


@hookimpl
def whimbrel_dirty_trackers() -> list[DirtyTrackerSpec]:
    """The three of `whimbrel.machine.dirty`."""
    return [
        DirtyTrackerSpec(
            name="userfaultfd",
            summary="the kernel notes who writes (Linux 6.7 and later)",
            create=userfaultfd.UserfaultTracker,
            probe=userfaultfd.probe,
            rank=30,
        ),
        DirtyTrackerSpec(
            name="compare",
            summary="compares memory with a copy of it; needs as much memory again",
            create=compare.CompareTracker,
            probe=compare.probe,
            rank=20,
            sees_other_processes=True,
        ),
        DirtyTrackerSpec(
            name="manual",
            summary="the program marks what it wrote",
            create=manual.ManualTracker,
            probe=manual.probe,
            rank=10,
        ),
    ]
