"""`Drive`: a named block device as the guest sees it, which notes what is written while a migration runs."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from whimbrel.abc import BlockDevice, BoolArray
from whimbrel.errors import StateError
from whimbrel.machine.drives.gate import Gate
from whimbrel.machine.memory import PAGE_SIZE, MemoryArea

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHUNK: Final = 1 << 20
"""Bytes: what is told apart when writes are noted, and what goes over the wire at once."""


def marks_size(size: int) -> int:
    """How many bytes the marks of a drive of `size` bytes take up, which are memory of whole pages."""
    chunks = -(-size // CHUNK)
    return max(1, -(-chunks // PAGE_SIZE)) * PAGE_SIZE


class Drive:
    """A drive of a machine; made by `Drives.add`. Methods from any thread, several at once.

    Offsets and sizes are in bytes, any alignment. A range that is not inside of the drive is a ValueError, what the
    storage fails with an OSError. Whoever writes goes through here and not to `device`, so that a migration sees it.
    """

    def __init__(self, name: str, device: BlockDevice, gate: Gate) -> None:
        self.name = name
        self.device = device
        self.read_only = device.read_only
        self._gate = gate
        self.loading = False
        """Whether it is being loaded into by this machine."""
        self._usable = False  # known not to be incomplete, until it is let go of or loaded into
        self._lock = threading.Lock()
        self._written: BoolArray | None = None  # chunks, while somebody wants to know
        self._lent: MemoryArea | None = None  # a byte for each chunk, which another process sets

    def __repr__(self) -> str:
        return f"<Drive {self.name!r}: {self.size} bytes of {self.device.place!r}>"

    @property
    def place(self) -> str:
        """Where it is kept: the device's."""
        return self.device.place

    @property
    def size(self) -> int:
        """Bytes: the device's."""
        return self.device.size

    @property
    def chunks(self) -> int:
        """How many chunks it has; the last one may be a part of one."""
        return -(-self.size // CHUNK)

    # --------------------------------------------------------------------------------- what the guest does

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes. Raises StateError while the image is incomplete."""
        data = bytearray(self._checked(offset, size))
        self.read_into(offset, data)
        return bytes(data)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` (writable, C-contiguous) from `offset` on. Raises StateError while the image is incomplete."""
        view = memoryview(buffer).cast("B")
        self._checked(offset, len(view))
        if not self._usable:
            self.refuse_incomplete()
        self.device.read_into(offset, view)

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` (C-contiguous): whoever reads now sees it, `flush` makes it durable.

        Raises StateError, having written nothing, while the machine does not run, where the drive is read-only, and
        in any other process than the machine's. After an OSError part of it may be written.
        """
        view = memoryview(data).cast("B")
        self._checked(offset, len(view))
        self._change(offset, len(view), lambda: self.device.write(offset, view))

    def discard(self, offset: int, size: int) -> None:
        """Make a range read as zeros and give its room on the disk back. Raises as `write` does."""
        self._checked(offset, size)
        self._change(offset, size, lambda: self.device.discard(offset, size))

    def flush(self) -> None:
        """Make durable everything that was written before the call."""
        self.device.flush()

    def open(self) -> DriveFile:
        """The drive as a file, unbuffered, at position 0."""
        return DriveFile(self)

    def _change(self, offset: int, size: int, action: Callable[[], None]) -> None:
        with self._gate:
            try:
                action()
            finally:
                # Behind it, not before: a mark may be taken, and the chunk be read, at any moment.
                self.mark_dirty(offset, size)

    def _checked(self, offset: int, size: int) -> int:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"{size} bytes at {offset} are not inside of drive {self.name!r} of {self.size}")
        return size

    # ------------------------------------------------------------------------- what a migration does with it

    def track(self) -> None:
        """Note from here on which chunks are written."""
        with self._lock:
            self._written = np.zeros(self.chunks, np.bool_)
            self._take_marks()  # of what was written before
        self.device.track()

    def untrack(self) -> None:
        """Note nothing any more. Twice is fine."""
        with self._lock:
            self._written = None
        self.device.untrack()

    def mark_dirty(self, offset: int, size: int) -> None:
        """Note that a range was written in another way than through here; the range is inside of the drive."""
        with self._lock:
            if self._written is not None and size:
                self._written[offset // CHUNK : -(-(offset + size) // CHUNK)] = True

    def collect(self) -> BoolArray:
        """Which chunks were written since the last collect, shape (chunks,), and forget it. While tracked."""
        with self._lock:
            assert self._written is not None, "collected without being tracked"
            written, self._written = self._written, np.zeros(self.chunks, np.bool_)
            written |= self._take_marks()
        self.device.collect(written, CHUNK)
        return written

    def lend(self) -> tuple[int, int] | None:
        """Descriptors of the image and of its marks for the guest's process (`lent`), which stay ours.

        None where the device has none to give. What is written there is tracked as what is written here. Raises
        ConfigError if there is no memory for the marks.
        """
        image = self.device.fd
        if image is None:
            return None
        with self._lock:
            if self._lent is None:
                self._lent = MemoryArea(marks_size(self.size), "memfd", f"marks of {self.name}")
        assert self._lent.fd is not None
        return image, self._lent.fd

    def close(self) -> None:
        """Close the image, and the lock with it. Twice is fine."""
        with self._lock:
            lent, self._lent = self._lent, None
        if lent is not None:
            lent.close()
        self.device.close()

    def _take_marks(self) -> BoolArray:
        """The marks that another process has set, shape (chunks,), and clear them; the caller holds the lock.

        Those alone are cleared that are taken: one that is set meanwhile stays for the next time, or is of a write that
        is over before the chunk is read.
        """
        if self._lent is None:
            return np.zeros(self.chunks, np.bool_)
        marks = self._lent.view[: self.chunks]
        taken: BoolArray = marks != 0
        marks[taken] = 0
        return taken

    def allocated(self) -> BoolArray:
        """Which chunks have anything allocated, shape (chunks,); the others read as zeros."""
        found = np.zeros(self.chunks, np.bool_)
        position = 0
        while (extent := self.device.next_extent(position)) is not None:
            start, end = extent
            stop = -(-end // CHUNK)
            found[start // CHUNK : stop] = True
            position = stop * CHUNK  # a chunk with many extents is asked for once
        return found

    def refuse_incomplete(self) -> None:
        """Raise StateError if a load into the image has begun and never ended."""
        if self.device.incomplete:
            raise StateError(
                f"the image {self.device.place!r} of drive {self.name!r} is not whole: a load into it has not ended",
                hint="load it again, or remove the marker file beside it if you know that it is whole",
            )

    def use(self) -> None:
        """Have the guest read and write it: the lock is taken. Raises StateError, and it is as before."""
        had = self.device.acquired
        if not (self.read_only or had):
            self.device.acquire()
        try:
            self.refuse_incomplete()
        except BaseException:
            if not had:
                self.device.release()
            raise
        self._usable = True

    def begin_load(self) -> None:
        """Mark the image as incomplete; its lock is held. Raises OSError."""
        self._usable = False
        self.loading = True
        self.device.begin_load()

    def end_load(self) -> None:
        """Take the mark away: everything is there and flushed. Raises OSError."""
        self.device.end_load()
        self.loading = False

    def let_go(self) -> None:
        """Release the lock; somebody else may write now."""
        self._usable = self.loading = False
        self.device.release()


class DriveFile(io.RawIOBase):
    """A drive as a file of fixed size, unbuffered; `io.BufferedRandom(drive.open())` buffers. One thread at a time.

    `flush` makes durable what was written, and so does `close`. Writes raise as `Drive.write` does; what would go
    beyond the end is cut off, and OSError (ENOSPC) is raised where nothing fits.
    """

    def __init__(self, drive: Drive) -> None:
        self._drive = drive
        self._position = 0
        self._wrote = False
        self.name = drive.name
        self.mode = "rb" if drive.read_only else "rb+"

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def writable(self) -> bool:
        """Unless the drive is read-only."""
        return not self._drive.read_only

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, also beyond the end."""
        self._check_open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._drive.size}.get(whence)
        if base is None:
            raise ValueError(f"whence is 0, 1 or 2, got {whence}")
        if base + offset < 0:
            raise ValueError(f"there is no position {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        self._check_open()
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Read up to the end; 0 there."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._drive.size - self._position))
        if count:
            self._drive.read_into(self._position, view[:count])
            self._position += count
        return count

    def write(self, data: Buffer) -> int:
        """Write up to the end; returns how much that was."""
        self._check_open()
        if not self.writable():
            raise io.UnsupportedOperation("the drive is read-only")
        view = memoryview(data).cast("B")
        count = min(len(view), self._drive.size - self._position)
        if len(view) and count <= 0:
            raise OSError(errno.ENOSPC, f"drive {self._drive.name!r} ends at {self._drive.size}")
        if count:
            self._drive.write(self._position, view[:count])
            self._position += count
            self._wrote = True
        return count

    def flush(self) -> None:
        """Make durable what was written here."""
        if self._wrote:
            self._drive.flush()
            self._wrote = False

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
