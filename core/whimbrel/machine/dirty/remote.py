"""Tracks from outside what another process writes into memory that it shares with this one.

That process opens a userfaultfd and its own pagemap and passes both (`kernel.open_descriptors`). They stay bound to
its memory whoever holds them: protecting, scanning and protecting again is done here, with the other's addresses, and
costs the other nothing but the page faults.

A scan of a process that has ended finds nothing, and no error says so: what it wrote since the last scan would be lost.
So each collect asks, behind its scan, whether the memory is still there (`Userfault.check_there`).

What this process writes is not seen here, and what further processes write that the other has forked off is seen
nowhere. Works beside a tracker of this process's own writes (`combined`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from whimbrel.abc import DirtyTracker
from whimbrel.errors import StateError, TrackerUnavailable
from whimbrel.machine.dirty.kernel import Userfault
from whimbrel.machine.pagemap import set_pages, system_span

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from whimbrel.abc import BoolArray, MemoryRegion


class RemoteTracker(DirtyTracker):
    """Lets the kernel note what another process writes. May be started again after a stop.

    `open_there` returns a userfaultfd and a pagemap that the process has just opened, which belong to the tracker from
    then on; it raises TrackerUnavailable. `addresses` says where the process has mapped each region, by name.
    """

    def __init__(self, open_there: Callable[[], tuple[int, int]], addresses: Mapping[str, int]) -> None:
        self._open_there, self._addresses = open_there, addresses
        self._userfault: Userfault | None = None
        self._registered: dict[str, tuple[int, int]] = {}

    def start(self, regions: Sequence[MemoryRegion]) -> None:
        """Protect all memory there. Raises TrackerUnavailable with the reason; nothing is protected then."""
        if self._userfault is not None:
            raise StateError("this tracker has been started already")
        unknown = [region.name for region in regions if region.name not in self._addresses]
        if unknown:
            raise TrackerUnavailable(f"the other process does not share {unknown[0]!r}")
        self._userfault = userfault = Userfault(self._open_there())
        try:
            for region in regions:
                span = system_span(self._addresses[region.name], region.size)
                userfault.register(*span)
                self._registered[region.name] = span
                userfault.protect(*span)
        except BaseException:
            self.stop()
            raise

    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        """Set the bits of pages written there and protect them again; returns how many were newly set.

        Raises TrackerUnavailable if the process has ended, or the kernel fails half way: writes may be lost, and the
        migration must end.
        """
        if self._userfault is None or region.name not in self._registered:
            raise StateError(f"the memory of {region.name!r} is not being tracked")
        span, address = self._registered[region.name], self._addresses[region.name]
        before = np.count_nonzero(dirty)
        for found in self._userfault.written(*span):
            set_pages(dirty, found, address, region.page_size)
        try:
            self._userfault.check_there(*span)
        except TrackerUnavailable as exc:
            raise TrackerUnavailable(
                f"the process that writes to {region.name!r} has gone, and what it wrote last is not known"
            ) from exc
        return int(np.count_nonzero(dirty) - before)

    def stop(self) -> None:
        """End all protection and close the descriptors. Twice is fine."""
        userfault, self._userfault = self._userfault, None
        registered, self._registered = self._registered, {}
        if userfault is not None:
            for span in registered.values():
                userfault.unregister(*span)
            userfault.close()
