"""A machine's drives in another process, that of its guest: what the machine lends, and what the guest makes of it.

For each drive the machine lends two descriptors: the image's own, so that the lock on it lasts as long as anybody may
write, and that of the marks, memory with a byte for each chunk. Whoever borrows it writes the image by itself and marks
the chunk, before the write, so that a death in the middle of it is not unseen, and behind it, since a mark may be taken
and the chunk be read at any moment. The machine clears a mark before it reads the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from whimbrel.errors import UnknownNameError
from whimbrel.machine.drives.drive import CHUNK, Drive, marks_size
from whimbrel.machine.drives.gate import Gate
from whimbrel.machine.drives.raw import RawImage
from whimbrel.machine.memory import MemoryArea

_MARKED: Final = 1


class BorrowedImage(RawImage):
    """An image that another process has opened and locked; `descriptor` is ours from then on.

    Raises as `RawImage` does. Whether it may be written is for that process to say, which opens the gate.
    """

    @property
    def acquired(self) -> bool:
        """Always: the lock is that of the open file, which is the same one."""
        return True

    def acquire(self) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """Nothing: it is not ours to let go of."""


class BorrowedDrive(Drive):
    """A drive of the machine in its guest's process; methods as `Drive`'s."""

    def __init__(self, name: str, device: BorrowedImage, gate: Gate, marks: MemoryArea) -> None:
        super().__init__(name, device, gate)
        self._marks = marks  # without it the memory would go
        self._chunks_marked = marks.view

    def mark_dirty(self, offset: int, size: int) -> None:
        """Mark the chunks of a range, which is inside of the drive, for the machine's process."""
        if size:
            self._chunks_marked[offset // CHUNK : -(-(offset + size) // CHUNK)] = _MARKED

    def _change(self, offset: int, size: int, action: Callable[[], None]) -> None:
        def marked() -> None:
            self.mark_dirty(offset, size)
            action()

        super()._change(offset, size, marked)


class GuestDrives:
    """The drives of a machine by their names, in its guest's process. Any thread."""

    def __init__(self) -> None:
        self._drives: dict[str, BorrowedDrive] = {}
        self._gate = Gate()

    def __getitem__(self, name: str) -> Drive:
        """The drive of that name; raises UnknownNameError, which is a KeyError too here."""
        try:
            return self._drives[name]
        except KeyError:
            raise UnknownDrive(name, list(self._drives)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._drives

    def __iter__(self) -> Iterator[Drive]:
        return iter(list(self._drives.values()))

    def __len__(self) -> int:
        return len(self._drives)

    def borrow(self, name: str, place: str, image: int, marks: int, *, read_only: bool) -> None:
        """Have a drive, whose descriptors are ours from then on. Before the factory is called. Raises ConfigError."""
        device = BorrowedImage(place, read_only=read_only, descriptor=image)
        area = MemoryArea(marks_size(device.size), "memfd", name, fd=marks)
        self._drives[name] = BorrowedDrive(name, device, self._gate, area)

    def admit(self) -> None:
        """Let the guest write: the machine has the locks."""
        self._gate.open()

    def bar(self) -> None:
        """Let nobody write any more; returns when no write is under way. Twice is fine."""
        self._gate.close()


class UnknownDrive(UnknownNameError, KeyError):
    """There is no drive of that name."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__("drive", name, known)
