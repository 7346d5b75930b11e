"""The `userfaultfd` tracker: the kernel write-protects pages and notes who writes (`kernel`).

Every write through the mapping is seen, whoever makes it: Python, C, another thread, the kernel in read(2) or recv(2).
Not seen is what does not pass through the mapping at the time: another process's writes to shared memory, write(2) on
the file, and a device that writes into pages which the kernel has pinned (O_DIRECT reads, io_uring with registered
buffers, RDMA): those pages count as written when they are pinned, and the bytes come later. The program marks all these
by hand when they are done (`RamBlock.mark_dirty`), and marks count here too.

A collect is one PAGEMAP_SCAN: it reports the written pages and protects them again page by page under the kernel's
lock, so that a write is either reported now or next time. The first write to a page after each collect costs about
1.5 µs more than usual.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import attrs
import numpy as np

from whimbrel.abc import DirtyTracker
from whimbrel.errors import StateError, TrackerUnavailable
from whimbrel.machine.dirty.kernel import Userfault
from whimbrel.machine.dirty.marks import known_zero, set_marked
from whimbrel.machine.memory import MemoryArea
from whimbrel.machine.pagemap import (
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_IS_WRITTEN,
    set_pages,
    system_span,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.abc import BoolArray, ByteArray, MemoryRegion


class UserfaultTracker(DirtyTracker):
    """Lets the kernel note writes. May be started again after a stop."""

    def __init__(self) -> None:
        self._userfault: Userfault | None = None
        self._untouched: dict[int, BoolArray] = {}
        self._registered: list[tuple[int, int]] = []

    def start(self, regions: Sequence[MemoryRegion]) -> None:
        """Protect all memory. Raises TrackerUnavailable with the reason; nothing is protected then."""
        if self._userfault is not None:
            raise StateError("this tracker has been started already")
        self._userfault = userfault = Userfault()
        try:
            for region in regions:
                self._begin(userfault, region)
        except BaseException:
            self.stop()
            raise

    def _begin(self, userfault: Userfault, region: MemoryRegion) -> None:
        span = system_span(region.address, region.size)
        try:
            userfault.register(*span)
            self._registered.append(span)
            region.take_marks()
            self._untouched[region.address] = _protect(userfault, region)
        except TrackerUnavailable as exc:
            raise TrackerUnavailable(f"{exc.message} ({region.name!r})") from exc

    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        """Set the bits of written pages and protect them again; returns how many were newly set.

        Raises TrackerUnavailable if the kernel fails half way: writes may be lost, and the migration must end.
        """
        userfault = self._of(region)
        before = np.count_nonzero(dirty)
        set_marked(region, dirty)
        for regions in userfault.written(*system_span(region.address, region.size)):
            set_pages(dirty, regions, region.address, region.page_size)
        return int(np.count_nonzero(dirty) - before)

    def untouched(self, region: MemoryRegion) -> BoolArray:
        """The pages that were zero for certain when they were protected, shape (pages,)."""
        self._of(region)
        return self._untouched[region.address]

    def stop(self) -> None:
        """End all protection and close the descriptors. Twice is fine."""
        userfault, self._userfault = self._userfault, None
        registered, self._registered, self._untouched = self._registered, [], {}
        if userfault is not None:
            # Closing would do, but for a process that was forked off and still has the descriptor.
            for span in registered:
                userfault.unregister(*span)
            userfault.close()

    def _of(self, region: MemoryRegion) -> Userfault:
        if self._userfault is None or region.address not in self._untouched:
            raise StateError(f"the memory of {region.name!r} is not being tracked")
        return self._userfault


def _protect(userfault: Userfault, region: MemoryRegion) -> BoolArray:
    """Protect `region`; returns the pages that were zero for certain at that moment, shape (pages,).

    What memory of a file has can be looked at when it is protected, and whoever writes from then on is noted. Anonymous
    memory cannot: protection alone makes page tables. Looking first and protecting then would miss a page written in
    between. So the pages are protected by a scan that says in the same breath what they were. It can only do that for
    pages that have page tables, and a first round of protection, taken back at once, makes those.
    """
    span = system_span(region.address, region.size)
    nothing = np.zeros(region.size // region.page_size, np.bool_)
    if region.backing != "anonymous":
        userfault.protect(*span)
        return known_zero(region)
    # A look without consequences, which tells whether it is worth while: it triples the time of the start.
    much = np.count_nonzero(known_zero(region)) > nothing.size // 16
    userfault.protect(*span)
    if not much:
        return nothing
    userfault.protect(*span, on=False)
    populated = np.zeros_like(nothing)
    report = PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    for regions in userfault.protect_reporting(*span, report):
        categories = regions["categories"]
        if not (categories & PAGE_IS_WRITTEN).all():
            # This kernel does not call a page that does not exist written, and so has not protected it.
            userfault.protect(*span)
            return nothing
        exist = (categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED)) != 0
        set_pages(populated, regions[exist], region.address, region.page_size)
    return ~populated


@attrs.frozen(eq=False)
class _Page:
    """A region of one page of the system, to try the kernel on."""

    view: ByteArray
    address: int
    backing: str
    size: int = mmap.PAGESIZE
    page_size: int = mmap.PAGESIZE
    name: str = "probe"
    fd: int | None = None

    def take_marks(self) -> list[tuple[int, int]]:
        return []


def probe(regions: Sequence[MemoryRegion]) -> str | None:
    """Try it for real on each kind of memory among `regions`; returns None if it works, else the reason."""
    try:
        for region in {region.backing: region for region in regions}.values():
            if region.backing not in {"anonymous", "memfd"}:
                # What a file allows depends on its file system: nothing but its own first page can tell.
                # It belongs to the guest, so nothing is written there and what is seen means nothing.
                _watch(_Page(region.view[: mmap.PAGESIZE], region.address, region.backing), [False])
        for backing in {"anonymous", *(region.backing for region in regions)} & {"anonymous", "memfd"}:
            area = MemoryArea(mmap.PAGESIZE, backing, "probe")
            try:
                page = _Page(area.view, area.address, backing)
                if _watch(page, [True, False, True]) != [True, False, True]:
                    return "the kernel offers it, but it did not notice a write"
            finally:
                area.close()
    except TrackerUnavailable as exc:
        return exc.message
    return None


def _watch(page: _Page, writes: list[bool]) -> list[bool]:
    """Track `page` over as many rounds as `writes` has, writing in those that are True; returns which saw a write."""
    tracker = UserfaultTracker()
    tracker.start([page])
    try:
        seen = []
        for write in writes:
            if write:
                page.view[0] ^= 0xFF
            seen.append(bool(tracker.collect(page, np.zeros(1, np.bool_))))
        return seen
    finally:
        tracker.stop()
