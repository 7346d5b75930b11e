"""The RAM of a machine: named blocks of memory, each migrated whole.

A block's name and size are what the two ends of a migration agree on; its memory is the framework's
(`memory.MemoryArea`). The program works on it through numpy views.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from whimbrel.abc import BoolArray, ByteArray
from whimbrel.errors import ConfigError, StateError, UnknownNameError
from whimbrel.machine.bitmap import runs
from whimbrel.machine.memory import PAGE_SIZE, MemoryArea, check_memory

__all__ = ["PAGE_SIZE", "Ram", "RamBlock"]


class _UnknownBlock(UnknownNameError, KeyError):
    """There is no RAM block of that name."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__("RAM block", name, known)


class RamBlock:
    """One block of RAM; made by `Ram.add`. Fits `whimbrel.abc.MemoryRegion`. Methods from any thread."""

    page_size = PAGE_SIZE

    def __init__(self, name: str, area: MemoryArea) -> None:
        self.name = name
        self.area = area
        self.size = area.size
        self.pages = area.size // PAGE_SIZE
        self.address = area.address
        self.backing = area.backing
        self.guest_address: int | None = None
        """Where the guest sees the block; told to the other side if any block has one (capability x-ignore-shared)."""
        self.shared = False
        """Its pages are not sent: both ends have them already (capability x-ignore-shared)."""
        self._lock = threading.Lock()
        # One bit a page rather than a list of ranges: however long a program marks and nobody reads, it does not grow.
        self._marks: BoolArray | None = None

    def __repr__(self) -> str:
        return f"<RamBlock {self.name!r}: {self.size} bytes, {self.backing}>"

    @property
    def view(self) -> ByteArray:
        """All bytes, shape (size,), writable, without a copy. Raises StateError once closed."""
        return self.area.view

    @property
    def fd(self) -> int | None:
        """The descriptor behind memfd or file memory, else None."""
        return self.area.fd

    def array(
        self, shape: int | tuple[int, ...] | None = None, dtype: npt.DTypeLike = np.uint8, offset: int = 0
    ) -> npt.NDArray[Any]:
        """View the block's memory from byte `offset` on as an array, without a copy.

        Without `shape` it is flat, with as many items as there is room for. Raises ConfigError if it does not fit, or
        if the items are Python objects, which have no bytes of their own.
        """
        kind = np.dtype(dtype)
        if kind.hasobject or not kind.itemsize:
            raise ConfigError(f"an array of {kind} cannot live in RAM: its items have no bytes of their own")
        room = self.size - offset
        if shape is None:
            shape = max(0, room) // kind.itemsize
        needed = _items(shape) * kind.itemsize
        if offset < 0 or needed > room:
            raise ConfigError(f"{needed} bytes at {offset} do not fit into the {self.size} of RAM block {self.name!r}")
        return self.view[offset : offset + needed].view(kind).reshape(shape)

    def mark_dirty(self, offset: int = 0, length: int | None = None) -> None:
        """Say that `length` bytes from `offset` on were written: write first, then mark.

        The `manual` tracker lives by it; the others need it only for what they cannot see (`memory`). A mark that
        comes before the write may be taken before it, and the write is lost. Raises ValueError outside of the block.
        """
        if length is None:
            length = self.size - offset
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are not inside of RAM block {self.name!r} of {self.size}")
        if not length:
            return
        with self._lock:
            if self._marks is None:
                self._marks = np.zeros(self.pages, np.bool_)
            self._marks[offset // PAGE_SIZE : -(-(offset + length) // PAGE_SIZE)] = True

    def take_marks(self) -> list[tuple[int, int]]:
        """Return the marked ranges as (offset, length), whole pages, ascending and apart, and forget them."""
        with self._lock:
            marks, self._marks = self._marks, None
        if marks is None:
            return []
        starts, ends = runs(marks)
        return list(zip((starts * PAGE_SIZE).tolist(), ((ends - starts) * PAGE_SIZE).tolist(), strict=True))

    def populate(self, offset: int = 0, length: int | None = None) -> bool:
        """Have the kernel provide the memory now (`MemoryArea.populate`)."""
        return self.area.populate(offset, length)

    def discard(self, offset: int = 0, length: int | None = None) -> None:
        """Make a range of whole pages zero again and give the memory back (`MemoryArea.discard`); marks it dirty."""
        self.area.discard(offset, length)
        self.mark_dirty(offset, length)

    def present_pages(self, first: int = 0, count: int | None = None) -> BoolArray:
        """Find out which pages may hold something else than zeros (`MemoryArea.present_pages`)."""
        return self.area.present_pages(first, count)


class Ram:
    """The RAM blocks of one machine, in the order they were added.

    `memory` is the `[backends] memory` setting (`memory`); a wrong one is a ConfigError. `check_may_change` raises
    StateError while blocks may not be added.
    """

    def __init__(self, memory: str = "anonymous", check_may_change: Callable[[], None] | None = None) -> None:
        check_memory(memory)
        self.memory = memory
        self._check_may_change = check_may_change
        self._blocks: dict[str, RamBlock] = {}
        self._closed = False

    def add(self, name: str, size: int) -> RamBlock:
        """Add a block of `size` bytes, rounded up to whole pages, all zero.

        Raises ConfigError if the name is taken or not 1 to 255 printable ASCII characters, or if there is no memory;
        StateError while blocks may not be added. Nothing is added then.
        """
        if self._closed:
            raise StateError("the machine's RAM was closed")
        if self._check_may_change is not None:
            self._check_may_change()
        if not (name.isascii() and name.isprintable() and 1 <= len(name) <= 255):
            raise ConfigError(f"a RAM block's name has 1 to 255 printable ASCII characters, got {name!r}")
        if name in self._blocks:
            raise ConfigError(f"there is already a RAM block {name!r}")
        if size <= 0:
            raise ConfigError(f"RAM block {name!r} needs a size of 1 byte or more, got {size}")
        block = RamBlock(name, MemoryArea(-(-size // PAGE_SIZE) * PAGE_SIZE, self.memory, name))
        self._blocks[name] = block
        return block

    def array(self, name: str, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Add a block that holds just this array, and return the array: zero-filled, C order, exactly `shape`.

        Raises as `add` and `RamBlock.array` do; nothing is added then.
        """
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise ConfigError(f"an array of {kind} cannot live in RAM: its items have no bytes of their own")
        return self.add(name, _items(shape) * kind.itemsize).array(shape, kind)

    @property
    def total(self) -> int:
        """Bytes of all blocks."""
        return sum(block.size for block in self)

    def __getitem__(self, name: str) -> RamBlock:
        """The block of that name; raises UnknownNameError, which is a KeyError too here."""
        return find_block(self._blocks, name)

    def __contains__(self, name: object) -> bool:
        return name in self._blocks

    def __iter__(self) -> Iterator[RamBlock]:
        return iter(list(self._blocks.values()))

    def __len__(self) -> int:
        return len(self._blocks)

    def close(self) -> None:
        """Let go of all memory; twice is fine. Views that still exist keep theirs until they are gone."""
        self._closed = True
        for block in self:
            block.area.close()


def find_block(blocks: Mapping[str, RamBlock], name: str) -> RamBlock:
    """The block of that name; raises UnknownNameError, which is a KeyError too here."""
    try:
        return blocks[name]
    except KeyError:
        raise _UnknownBlock(name, list(blocks)) from None


def _items(shape: int | tuple[int, ...]) -> int:
    sides = (shape,) if isinstance(shape, int) else shape
    if any(side < 0 for side in sides):
        raise ConfigError(f"the sides of an array are 0 or more, got {shape}")
    return math.prod(sides)
