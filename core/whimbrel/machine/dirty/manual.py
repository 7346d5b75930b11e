"""The `manual` tracker: the program says what it wrote.

The order matters: *write first, then mark*. A mark is taken before its page is read; so a mark that comes first may
be taken, and the page be read, before the write lands, and nobody hears of that write. A page that is marked late is
sent once more, and no harm is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from whimbrel.abc import DirtyTracker
from whimbrel.errors import StateError
from whimbrel.machine.dirty.marks import known_zero, set_marked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.abc import BoolArray, MemoryRegion


class ManualTracker(DirtyTracker):
    """Believes the program: a page is dirty if `mark_dirty` touched it."""

    def __init__(self) -> None:
        self._untouched: dict[int, BoolArray] | None = None

    def start(self, regions: Sequence[MemoryRegion]) -> None:
        """Forget all marks so far; from here on each one is heard."""
        if self._untouched is not None:
            raise StateError("this tracker has been started already")
        self._untouched = {}
        for region in regions:
            # In this order: what is written after the look at the memory is marked after the old marks are forgotten.
            region.take_marks()
            self._untouched[region.address] = known_zero(region)

    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        """Set the bits of marked pages and forget the marks; returns how many were newly set."""
        self._of(region)
        before = np.count_nonzero(dirty)
        set_marked(region, dirty)
        return int(np.count_nonzero(dirty) - before)

    def untouched(self, region: MemoryRegion) -> BoolArray:
        """The pages that were zero for certain when the tracking began, shape (pages,)."""
        return self._of(region)

    def stop(self) -> None:
        """Forget the regions. Twice is fine."""
        self._untouched = None

    def _of(self, region: MemoryRegion) -> BoolArray:
        if self._untouched is None or region.address not in self._untouched:
            raise StateError(f"the memory of {region.name!r} is not being tracked")
        return self._untouched[region.address]


def probe(regions: Sequence[MemoryRegion]) -> str | None:  # noqa: ARG001 - a probe's signature
    """It works everywhere; whether the program marks what it writes, nobody can see."""
    return None
