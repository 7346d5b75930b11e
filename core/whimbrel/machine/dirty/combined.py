"""Two trackers as one, for memory that is written from two processes: this one's, and the guest's.

A page is dirty if either says so. Both clear their marks before the page is read, so the rule holds for both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from whimbrel.abc import DirtyTracker
from whimbrel.errors import TrackerUnavailable
from whimbrel.machine.dirty.marks import known_zero

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.abc import BoolArray, ByteArray, DirtyTrackerSpec, MemoryRegion


class CombinedTracker(DirtyTracker):
    """Says what `own`, a tracker of this process's writes, and `other`, one of another process's, say together."""

    def __init__(self, own: DirtyTracker, other: DirtyTracker) -> None:
        self._own, self._other = own, other
        self._untouched: dict[int, BoolArray] = {}

    def start(self, regions: Sequence[MemoryRegion]) -> None:
        """Start both. Raises what either raises; neither has been started then."""
        self._other.start(regions)
        try:
            self._own.start(regions)
            for region in regions:
                if self._own.pages(region).ctypes.data != region.address:
                    raise TrackerUnavailable("a tracker that sends from a copy misses what another process writes")
                # Behind both starts: what is not there now is zero, and whoever writes it is noted. (What `own` knows
                # to be zero it may have looked at before; and it knows nothing of the other's page tables.)
                self._untouched[region.address] = known_zero(region)
        except BaseException:
            self.stop()
            raise

    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        """Set the bits of pages that either has seen written; returns how many were newly set."""
        return self._own.collect(region, dirty) + self._other.collect(region, dirty)

    def untouched(self, region: MemoryRegion) -> BoolArray | None:
        """The pages that were zero for certain when both had begun, shape (pages,)."""
        return self._untouched.get(region.address)

    def pages(self, region: MemoryRegion) -> ByteArray:
        """The memory itself, shape (size,)."""
        return self._own.pages(region)

    def stop(self) -> None:
        """Stop both. Twice is fine."""
        self._untouched = {}
        try:
            self._own.stop()
        finally:
            self._other.stop()


def with_guests(specs: Sequence[DirtyTrackerSpec], other: DirtyTrackerSpec | None) -> list[DirtyTrackerSpec]:
    """Have each tracker of `specs` that does not see other processes' writes work together with the guest's `other`.

    Without one they are as they were. A combination works where both do; names and ranks stay those of `specs`.
    """
    return list(specs) if other is None else [_beside(spec, other) for spec in specs]


def _beside(spec: DirtyTrackerSpec, other: DirtyTrackerSpec) -> DirtyTrackerSpec:
    if spec.sees_other_processes:
        return spec

    def probe(regions: Sequence[MemoryRegion]) -> str | None:
        return spec.probe(regions) or other.probe(regions)

    return attrs.evolve(spec, probe=probe, create=lambda: CombinedTracker(spec.create(), other.create()))
