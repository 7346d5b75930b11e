"""Memory that the framework owns: page-aligned mappings, all zero when they are made.

========== ================================================= ==============================================
setting    what it is                                        good for
========== ================================================= ==============================================
anonymous  MAP_PRIVATE, asks for huge pages                  most machines; the default
memfd      MAP_SHARED on a memfd, `fd` says which            memory shared with another process
file:PATH  MAP_SHARED on a new file                          memory larger than the host's, or on a DAX disk
========== ================================================= ==============================================

Files: if PATH is a folder, each block has its own file in it, named like the block (percent-encoded); else PATH is
the file of the only block. The file must not be there before. It is made for the owner only, and removed when the
memory is closed or the process exits; what a killed process left behind is for a person to delete, since whimbrel
never overwrites a file that it has not made.

A program that writes to shared memory by other ways than through this mapping (another process, write(2) on the
descriptor) goes unseen by the userfaultfd tracker; it marks what it wrote by hand. A `ProcessGuest` need not: its
process is tracked too.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from whimbrel.errors import ConfigError, StateError
from whimbrel.machine import hugepages, libc
from whimbrel.machine.bitmap import set_ranges
from whimbrel.machine.pagemap import populated, system_span

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.abc import BoolArray, ByteArray

PAGE_SIZE = 4096
"""Bytes a page, on every host: what the stream knows. The system's own pages may be larger."""

_MOST_EXTENTS = 4096  # of a sparse memfd; asking for each one takes two system calls


def check_memory(memory: str) -> None:
    """Raise ConfigError unless `memory` is "anonymous", "memfd" or "file:PATH"."""
    if memory not in {"anonymous", "memfd"} and not (memory.startswith("file:") and memory != "file:"):
        raise ConfigError(
            f"there is no memory backend {memory!r}", hint='there are "anonymous", "memfd" and "file:PATH"'
        )


class MemoryArea:
    """One mapping. All methods but `close` may be called from any thread; those that take long release the GIL.

    `size` is in bytes and a multiple of PAGE_SIZE, `memory` as the table above says, `name` the block's. With `fd`,
    the descriptor behind it, it is memfd or file memory that another process has made; the descriptor belongs to the
    area from then on. Raises ConfigError if the mapping cannot be made; nothing is left behind then.
    """

    def __init__(self, size: int, memory: str = "anonymous", name: str = "", *, fd: int | None = None) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"memory comes in whole pages of {PAGE_SIZE} bytes, got {size}")
        if fd is None:
            check_memory(memory)
        self.size = size
        self.backing, _, path = memory.partition(":")
        self.fd: int | None = None
        """The descriptor of a memfd or file, for other processes to map."""
        self._release: Callable[[], object] = _nothing
        try:
            if self.backing == "anonymous":
                area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                if fd is None:
                    self._open(name, path)
                else:
                    self.fd, self._release = fd, weakref.finalize(self, _release, fd, None, os.getpid())
                area = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED)  # type: ignore[arg-type]
        except (OSError, OverflowError) as exc:
            self._release()
            raise ConfigError(f"cannot map {size} bytes of {memory} memory for {name!r}: {exc}") from exc
        self._map: mmap.mmap | None = area
        self._view: ByteArray | None = np.frombuffer(area, np.uint8)
        self.address = self._view.ctypes.data
        if self.backing == "anonymous":
            libc.madvise(self.address, size, libc.MADV_HUGEPAGE)  # advice: a kernel without huge pages says no

    def _open(self, name: str, path: str) -> None:
        if self.backing == "memfd":
            # The name only shows in /proc, and may have 249 bytes at most.
            self.fd, file = os.memfd_create(f"whimbrel:{name}"[:200], os.MFD_CLOEXEC), None
        else:
            file = _file_of(name, Path(path))
            try:
                self.fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError as exc:
                raise ConfigError(
                    f"the file {str(file)!r} for the memory of {name!r} is there already",
                    hint="two blocks or machines cannot share one; delete it if an earlier run left it behind",
                ) from exc
        self._release = weakref.finalize(self, _release, self.fd, file, os.getpid())
        os.ftruncate(self.fd, self.size)
        if self.backing == "file":
            # A full disk must be said now: later it would be a SIGBUS in the middle of somebody's write.
            os.posix_fallocate(self.fd, 0, self.size)

    @property
    def view(self) -> ByteArray:
        """All bytes, shape (size,), writable, without a copy. Raises StateError once closed."""
        if self._view is None:
            raise StateError("the memory was closed")
        return self._view

    def populate(self, offset: int = 0, length: int | None = None) -> bool:
        """Have the kernel provide the pages of a range now, so that writing them costs no page fault.

        What is there stays. Of a memfd they are huge ones where there is nothing yet (`hugepages`). Returns False where
        the kernel is older than 5.14, and has done nothing then. Raises OSError if it has no memory left (ENOMEM), or
        the file's disk no room (EFAULT), where a plain write would kill the process; part of the range may be populated
        then.
        """
        start, end = system_span(*self._span(offset, length))
        if self.backing == "memfd" and self.fd is not None:
            hugepages.fill_holes(self.fd, start - self.address, end - start)
        code = libc.madvise(start, end - start, libc.MADV_POPULATE_WRITE)
        if code and code != errno.EINVAL:
            raise OSError(code, f"cannot populate {end - start} bytes of {self.backing} memory: {os.strerror(code)}")
        return not code

    def discard(self, offset: int = 0, length: int | None = None) -> None:
        """Make a range of whole pages zero again, and give its memory back where that is possible.

        No tracker of dirty pages notices by itself: `RamBlock.discard` tells it.
        """
        address, length = self._span(offset, length)
        if offset % PAGE_SIZE or length % PAGE_SIZE:
            raise ValueError(f"only whole pages can be discarded, got {length} bytes at {offset}")
        advice = libc.MADV_DONTNEED if self.backing == "anonymous" else libc.MADV_REMOVE
        # Locked memory, a file system without holes, a system with larger pages: then zeros are written.
        if libc.madvise(address, length, advice):
            self.view[offset : offset + length] = 0
        elif self.backing == "file" and self.fd is not None:
            os.posix_fallocate(self.fd, offset, length)  # the disk's blocks stay ours

    def present_pages(self, first: int = 0, count: int | None = None) -> BoolArray:
        """Find out which of `count` pages from page `first` on may hold something else than zeros, shape (count,).

        A page that is False was zero when it was looked at, and nobody had to read it. Errs towards True: always for
        files, for anonymous memory on kernels before 6.7 and while userfaultfd tracks it (`pagemap.populated`).
        """
        if count is None:
            count = self.size // PAGE_SIZE - first
        address, length = self._span(first * PAGE_SIZE, count * PAGE_SIZE)
        if self.backing == "anonymous":
            return populated(address, count, PAGE_SIZE)
        if self.backing == "memfd":
            return self._data_pages(first * PAGE_SIZE, length)
        # A file system may keep what was written through the mapping and not yet to the disk out of SEEK_DATA.
        return np.ones(count, np.bool_)

    def _data_pages(self, offset: int, length: int) -> BoolArray:
        # Not what this process has mapped counts, but what the memfd holds: another process may have written it.
        assert self.fd is not None
        starts: list[int] = []
        ends: list[int] = []
        position, end = offset, offset + length
        while position < end and len(starts) < _MOST_EXTENTS:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError:  # ENXIO: there is no more
                position = end
                break
            position = os.lseek(self.fd, start, os.SEEK_HOLE)
            if start < end:
                starts.append((start - offset) // PAGE_SIZE)
                ends.append(-(-(min(position, end) - offset) // PAGE_SIZE))
        bits = np.zeros(length // PAGE_SIZE, np.bool_)
        set_ranges(bits, np.array(starts, np.intp), np.array(ends, np.intp))
        bits[max(0, position - offset) // PAGE_SIZE :] = True
        return bits

    def _span(self, offset: int, length: int | None) -> tuple[int, int]:
        if self._view is None:
            raise StateError("the memory was closed")
        if length is None:
            length = self.size - offset
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are not inside of {self.size} bytes of memory")
        return self.address + offset, length

    def close(self) -> None:
        """Let go of the memory; twice is fine. Not while another thread is in one of the other methods.

        numpy views that still exist stay usable, and keep it in memory until the last one is gone.
        """
        area, self._map, self._view = self._map, None, None
        if area is not None:
            with suppress(BufferError):  # views exist; the last one takes the mapping with it
                area.close()
        self._release()
        self.fd = None


def _nothing() -> None:
    pass


def _file_of(name: str, path: Path) -> Path:
    if not path.is_dir():
        return path
    encoded = quote(name, safe="")
    return path / (encoded.replace(".", "%2E") if encoded in {".", ".."} else encoded)


def _release(fd: int, file: Path | None, owner: int) -> None:
    os.close(fd)
    if file is not None and os.getpid() == owner:  # not from a child that was forked off
        file.unlink(missing_ok=True)
