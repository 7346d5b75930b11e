"""The pages that the other side has, as far as memory for them reaches; placed and given up as QEMU does it.

Each page has one slot where it can be, by the lowest bits of its number among all pages of RAM (wire format, section
3.4). One that was asked for in this pass of the dirty marks or in the one before is not given up for another.
"""

from __future__ import annotations

from typing import Final

import attrs
import numpy as np

from whimbrel.abc import BoolArray, ByteArray, IndexArray
from whimbrel.errors import MigrationError
from whimbrel.wire import ram as wire

LIFETIME: Final = 2  # passes


@attrs.frozen(eq=False)
class Visit:
    """What became of a batch of pages: in which slots they belong, and which have been or have now begun to be there.

    All of shape (n,). A page that is neither stays out: no copy of it is kept. The slots of all others are apart.
    """

    slots: IndexArray
    held: BoolArray
    taken: BoolArray


class PageCache:
    """Room for `size` bytes of copies (whole pages, a power of two of them) of `pages` pages. One thread.

    Memory that nothing was copied into costs nothing. Raises MigrationError if there is none.
    """

    def __init__(self, size: int, pages: int) -> None:
        self.size = size
        slots = size // wire.PAGE_SIZE
        self._mask = slots - 1
        room = min(slots, pages)  # no page belongs behind the last one
        try:
            self._holders = np.zeros(room, np.int64)  # a page's number and 1, or 0
            self._ages = np.zeros(room, np.int64)  # the pass that it was last asked for in
            self.copies: ByteArray = np.empty((room, wire.PAGE_SIZE), np.uint8)
            """The copies, by slot, shape (slots, 4096). What is in a slot without a page is anything."""
        except MemoryError as exc:
            raise MigrationError(
                f"there is no memory for {room} pages of an xbzrle cache", hint="set a smaller xbzrle-cache-size"
            ) from exc

    def visit(self, numbers: IndexArray, age: int, *, insert: bool) -> Visit:
        """Ask for pages (ascending numbers among all pages) in pass `age`; with `insert` they take what slots they can.

        That is as if one came after the other. Whoever has taken a slot owes it a copy.
        """
        slots = numbers & self._mask
        holders = numbers + 1
        taken = np.zeros(len(numbers), np.bool_)
        if insert:
            now = self._holders[slots]
            free = (now == 0) | (self._ages[slots] + LIFETIME <= age)
            taken = free & (now != holders)
            if len(numbers) and numbers[-1] - numbers[0] > self._mask:
                # Whoever comes first to a slot takes it, or is there, or nobody takes it: then it is young.
                first = np.zeros(len(numbers), np.bool_)
                first[np.unique(slots, return_index=True)[1]] = True
                taken &= first
            self._holders[slots[taken]] = holders[taken]
        held = self._holders[slots] == holders
        self._ages[slots[held]] = age
        return Visit(slots, held & ~taken, taken)
