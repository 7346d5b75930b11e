"""`RawImage`: a drive kept in a regular file or a block special file, byte for byte.

Reads and writes go through the kernel's cache. O_DIRECT was measured and left out: it reads at a fifteenth of the
speed of what is cached, at two thirds of it where nothing is (the kernel reads ahead), and wants everything aligned.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from whimbrel.abc import BlockDevice
from whimbrel.errors import ConfigError, StateError
from whimbrel.machine import libc
from whimbrel.machine.drives import locks
from whimbrel.machine.drives.marker import Marker

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLKFLSBUF: Final = 0x1261  # ioctl: forget what is cached of a block device
_ZEROS: Final = bytes(1 << 20)
_HOLES_FROM: Final = 4096  # bytes; shorter writes are not looked at for zeros
_UNSUPPORTED: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}


class RawImage(BlockDevice):
    """The image at `path`, which is there and keeps its size; `descriptor` is of it and ours, if it is open already.

    Raises ConfigError if it cannot be opened, or is neither a regular file nor a block special file.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, descriptor: int | None = None) -> None:
        self.place = os.fspath(path)
        self.read_only = read_only
        if descriptor is None:
            flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                descriptor = os.open(self.place, flags)
            except (OSError, ValueError) as exc:
                raise ConfigError(f"cannot open the image {self.place!r}: {exc}") from exc
        self._close = weakref.finalize(self, os.close, descriptor)
        self._open: int | None = descriptor
        try:
            mode = os.fstat(descriptor).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise ConfigError(f"the image {self.place!r} is neither a regular file nor a block special file")
            os.set_blocking(descriptor, True)
            self.size = os.lseek(descriptor, 0, os.SEEK_END)
        except OSError as exc:
            self._close()
            raise ConfigError(f"cannot use the image {self.place!r}: {exc}") from exc
        except ConfigError:
            self._close()
            raise
        self._is_block_special = stat.S_ISBLK(mode)
        self._marker = Marker(Path(self.place), mode)
        self._holder: int | None = None  # the process that took the lock; a child of it inherits the descriptor
        self._punches = True
        # What is kept in memory is read without waiting: the flag that asks for no wait is not known there.
        self._in_memory = libc.filesystem_type(descriptor) == libc.TMPFS_MAGIC

    def __repr__(self) -> str:
        return f"<RawImage {self.place!r}: {self.size} bytes{', read-only' if self.read_only else ''}>"

    @property
    def _descriptor(self) -> int:
        if self._open is None:
            raise StateError(f"the image {self.place!r} was closed")
        return self._open

    @property
    def fd(self) -> int | None:
        """The descriptor of the image, None once it is closed."""
        return self._open

    # -------------------------------------------------------------------------------------------- contents

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer`."""
        view = memoryview(buffer).cast("B")
        while len(view):
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise OSError(errno.EIO, f"the image ends at {offset}, it had {self.size} bytes", self.place)
            view, offset = view[count:], offset + count

    def read_at_once(self, offset: int, buffer: Buffer) -> bool:
        """Fill `buffer` if the kernel has all of it in memory."""
        view = memoryview(buffer).cast("B")
        flags = 0 if self._in_memory else os.RWF_NOWAIT
        try:
            return os.preadv(self._descriptor, [view], offset, flags) == len(view)
        except OSError:  # it is not there, or the file system knows no such flag; whatever else there is comes again
            return False

    def write(self, offset: int, data: Buffer) -> None:
        """Write `data`; zeros over what is a hole leave it one."""
        self._check_may_write()
        view = memoryview(data).cast("B")
        if len(view) >= _HOLES_FROM and _all_zero(view) and self._is_hole(offset, len(view)):
            return
        while len(view):
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count

    def discard(self, offset: int, length: int) -> None:
        """Make a hole, or write zeros where there can be none."""
        self._check_may_write()
        if not length or self._is_hole(offset, length):
            return
        if self._punches:
            mode = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
            number = libc.fallocate(self._descriptor, mode, offset, length)
            if not number:
                return
            if number not in _UNSUPPORTED:
                raise OSError(number, os.strerror(number), self.place)
            # A block special file wants whole sectors and an odd range says nothing of the next.
            self._punches = number == errno.EINVAL
        self._write_zeros(offset, length)

    def flush(self) -> None:
        """Have the kernel write everything to the disk."""
        os.fdatasync(self._descriptor)

    def next_extent(self, offset: int) -> tuple[int, int] | None:
        """Ask the file system; one that cannot tell has data everywhere."""
        if offset >= self.size:
            return None
        try:
            start = os.lseek(self._descriptor, offset, os.SEEK_DATA)
            end = os.lseek(self._descriptor, start, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return None
            return offset, self.size
        return start, min(max(end, start + 1), self.size)

    def _check_may_write(self) -> None:
        if self.read_only:
            raise StateError(f"the image {self.place!r} is read-only")
        if not self.acquired:
            raise StateError(
                f"the image {self.place!r} is not ours to write: its lock is not held",
                hint="a machine takes the locks of its drives when it starts, and has none after it was handed over",
            )

    def _is_hole(self, offset: int, length: int) -> bool:
        found = self.next_extent(offset)
        return found is None or found[0] >= offset + length

    def _write_zeros(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            offset += os.pwrite(self._descriptor, memoryview(_ZEROS)[: end - offset], offset)

    # ------------------------------------------------------------------------------------------- ownership

    @property
    def acquired(self) -> bool:
        """Whether this process has taken the lock here."""
        return self._holder is not None and self._holder == os.getpid()

    def in_use(self) -> bool:
        """Whether another descriptor has locked the file."""
        return locks.is_locked(self._descriptor)

    def acquire(self) -> None:
        """Lock the file."""
        if self.read_only:
            raise StateError(f"the image {self.place!r} is read-only: there is nothing to lock")
        if self.acquired:
            return
        try:
            locked = locks.try_lock(self._descriptor)
        except OSError as exc:
            raise StateError(f"the image {self.place!r} cannot be locked: {exc}") from exc
        if not locked:
            who = locks.holder(self._descriptor) or "another process, on this host or another one"
            raise StateError(
                f"the image {self.place!r} is in use: {who} holds its lock", hint="one may write at a time"
            )
        self._holder = os.getpid()

    def release(self) -> None:
        """Unlock the file."""
        if self.acquired:
            self._holder = None
            locks.unlock(self._descriptor)

    def invalidate(self) -> None:
        """Drop the kernel's cache of a block special file, as far as we may.

        A file system keeps its own caches right: a local one has no other users, and NFS looks again when it locks.
        """
        if self._is_block_special:
            os.fdatasync(self._descriptor)  # what was written here stays
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            with suppress(OSError):  # for root alone; the advice has done what it can
                fcntl.ioctl(self._descriptor, _BLKFLSBUF, 0)

    @property
    def incomplete(self) -> bool:
        """Whether the marker is there."""
        return self._marker.is_there()

    def begin_load(self) -> None:
        """Make the marker."""
        self._check_may_write()
        self._marker.put()

    def end_load(self) -> None:
        """Remove the marker."""
        self._check_may_write()
        self._marker.remove()

    def close(self) -> None:
        """Unlock and close the file."""
        if self._open is None:
            return
        with suppress(OSError):
            self.release()
        self._open = None
        self._close()


def _all_zero(view: memoryview) -> bool:
    """Mostly the first or the last byte says no."""
    return not (view[0] or view[-1]) and not np.frombuffer(view, np.uint8).any()
