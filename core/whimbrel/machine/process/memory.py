"""The machine's RAM as a workload in another process sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from whimbrel.machine.drives.lent import GuestDrives
from whimbrel.machine.memory import MemoryArea
from whimbrel.machine.ram import RamBlock, find_block

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from whimbrel.abc import ByteArray


class GuestMemory:
    """A machine's RAM blocks by their names, mapped into this process, and its drives; a factory is called with it.

    What is written there is the machine's at once, and is moved with it. Any thread.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, RamBlock] = {}
        self.drives = GuestDrives()
        """The machine's drives by their names: `drives["disk0"].write(offset, data)`, while the machine runs."""

    def view(self, name: str) -> ByteArray:
        """All bytes of a block, shape (size,), writable. Raises UnknownNameError, which is a KeyError too."""
        return find_block(self._blocks, name).view

    def array(
        self,
        name: str,
        shape: int | tuple[int, ...] | None = None,
        dtype: npt.DTypeLike = np.uint8,
        offset: int = 0,
    ) -> npt.NDArray[Any]:
        """View a block from byte `offset` on as an array, without a copy (`RamBlock.array`).

        Without `shape` it is flat, with as many items as there is room for. Raises UnknownNameError, and ConfigError if
        it does not fit.
        """
        return find_block(self._blocks, name).array(shape, dtype, offset)

    def size(self, name: str) -> int:
        """Bytes of a block. Raises UnknownNameError."""
        return find_block(self._blocks, name).size

    def __contains__(self, name: object) -> bool:
        return name in self._blocks

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def regions(self) -> list[RamBlock]:
        """All blocks, in the machine's order."""
        return list(self._blocks.values())

    def attach(self, name: str, descriptor: int, size: int, backing: str) -> int:
        """Map a block, whose descriptor is ours from then on; returns its address. Called before the factory is."""
        block = self._blocks[name] = RamBlock(name, MemoryArea(size, backing, name, fd=descriptor))
        return block.address
