"""What the program marked by hand, brought into a dirty array: part of every tracker's collect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from whimbrel.machine.bitmap import set_ranges
from whimbrel.machine.pagemap import populated
from whimbrel.machine.ram import RamBlock

if TYPE_CHECKING:
    from whimbrel.abc import BoolArray, MemoryRegion


def set_marked(region: MemoryRegion, dirty: BoolArray) -> None:
    """Set dirty[i] for each page i that a mark of `region` touches, and forget the marks."""
    marks = np.array(region.take_marks(), np.intp).reshape(-1, 2)
    set_ranges(dirty, marks[:, 0] // region.page_size, -(-marks.sum(axis=1) // region.page_size))


def known_zero(region: MemoryRegion) -> BoolArray:
    """Find the pages of `region` that are zero for certain, without reading them: shape (pages,)."""
    if isinstance(region, RamBlock):
        return ~region.present_pages()
    pages = region.size // region.page_size
    if region.backing == "anonymous":
        return ~populated(region.address, pages, region.page_size)
    return np.zeros(pages, np.bool_)
