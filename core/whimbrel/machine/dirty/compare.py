"""The `compare` tracker: keeps a copy of all memory, the *shadow*, and finds what differs from it. Any kernel.

What is sent is the shadow, never the memory itself. Else a write that is taken back would be lost: say the shadow
has A; the guest writes B; the page is read from memory and sent as B; the guest writes A again. The next look finds
A in the memory and A in the shadow, a clean page, and the other side keeps B for ever. If instead the shadow is what
is sent, the other side has what the next look compares with, and any difference that lasts is found.

Costs as much memory again as the pages that hold something, and a pass over all of it per collect (about 8 GB/s).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import DirtyTracker
from whimbrel.errors import StateError, TrackerUnavailable
from whimbrel.machine.dirty.marks import known_zero

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.abc import BoolArray, ByteArray, MemoryRegion

_CHUNK = 1 << 20  # bytes compared at once: both sides and the outcome fit into the second-level cache

WordPages: TypeAlias = npt.NDArray[np.uint64]


@attrs.define(eq=False)
class _Shadow:
    """The copy of one region. A page of `untouched` was zero at the start, and `bytes_` has zeros for it."""

    bytes_: ByteArray
    untouched: BoolArray
    filled: BoolArray  # pages of the shadow that may hold something else than zeros


class CompareTracker(DirtyTracker):
    """Finds written pages by comparing; what it says is dirty has changed, so rewriting the same bytes goes unseen."""

    def __init__(self) -> None:
        self._shadows: dict[int, _Shadow] | None = None

    def start(self, regions: Sequence[MemoryRegion]) -> None:
        """Copy all memory. Raises TrackerUnavailable if there is no room for the copy; nothing is held then."""
        if self._shadows is not None:
            raise StateError("this tracker has been started already")
        untouched = {region.address: known_zero(region) for region in regions}
        needed = sum(int((~untouched[region.address]).sum()) * region.page_size for region in regions)
        free = _available()
        if free is not None and needed > free:
            raise TrackerUnavailable(
                f"comparing needs a copy of all memory, {needed} bytes, and only {free} are available on this host"
            )
        try:
            self._shadows = {region.address: _copy(region, untouched[region.address]) for region in regions}
        except MemoryError as exc:
            raise TrackerUnavailable(f"there is no room for a copy of all memory, {needed} bytes: {exc}") from exc

    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        """Copy the pages that differ into the shadow and set their bits; returns how many were newly set."""
        shadow = self._of(region)
        region.take_marks()  # they say nothing that comparing does not find
        # Where neither side has ever held anything, both are zero; whoever writes there later is found next time.
        changed = _update(region, shadow, ~known_zero(region) | shadow.filled)
        before = np.count_nonzero(dirty)
        np.logical_or(dirty, changed, out=dirty)
        return int(np.count_nonzero(dirty) - before)

    def pages(self, region: MemoryRegion) -> ByteArray:
        """The shadow, shape (size,), read-only: it stands still until the next collect."""
        still = self._of(region).bytes_.view()
        still.flags.writeable = False
        return still

    def untouched(self, region: MemoryRegion) -> BoolArray:
        """The pages that were zero for certain when the tracking began, shape (pages,)."""
        return self._of(region).untouched

    def stop(self) -> None:
        """Give the shadow's memory back. Twice is fine."""
        self._shadows = None

    def _of(self, region: MemoryRegion) -> _Shadow:
        if self._shadows is None or region.address not in self._shadows:
            raise StateError(f"the memory of {region.name!r} is not being tracked")
        return self._shadows[region.address]


def probe(regions: Sequence[MemoryRegion]) -> str | None:  # noqa: ARG001 - a probe's signature
    """It works everywhere; whether there is room for the copy shows at the start.

    A probe that looked at free memory would let `auto` fall through to `manual`, which loses the writes of a program
    that does not mark them.
    """
    return None


def _copy(region: MemoryRegion, untouched: BoolArray) -> _Shadow:
    shadow = _Shadow(np.zeros(region.size, np.uint8), untouched, np.zeros_like(untouched))
    _update(region, shadow, ~untouched)
    # The guest runs: what it wrote behind the look at its pages may be in the copy already, and not differ any more.
    shadow.untouched = untouched & ~shadow.filled
    region.take_marks()  # whatever was marked is in the copy
    return shadow


def _update(region: MemoryRegion, shadow: _Shadow, candidates: BoolArray) -> BoolArray:
    """Make the shadow's `candidates` equal to memory; returns which pages were not, shape (pages,)."""
    memory, copy = _words(region.view, region.page_size), _words(shadow.bytes_, region.page_size)
    changed = np.zeros(len(candidates), np.bool_)
    step = max(1, _CHUNK // region.page_size)
    for first in range(0, len(candidates), step):
        chunk = slice(first, first + step)
        if not candidates[chunk].any():
            continue
        now, then = memory[chunk], copy[chunk]
        differ = (now != then).any(axis=1)
        if differ.any():
            # The guest writes meanwhile. Each page is read once here, and what was read is both compared with next
            # time and sent: a write that comes too late for this copy makes a difference next time.
            then[differ] = now[differ]
            changed[chunk] = differ
    shadow.filled |= changed
    return changed


def _words(view: ByteArray, page_size: int) -> WordPages:
    return view.view(np.uint64).reshape(-1, page_size // 8)


def _available() -> int | None:
    """Bytes that can be had without swapping, or None where the kernel does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
