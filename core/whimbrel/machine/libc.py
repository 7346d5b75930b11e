"""The system calls that Python has no door for that lets other threads run meanwhile.

`mmap.madvise` keeps the GIL, and populating a gigabyte takes a third of a second: everything here goes through
ctypes, which lets go of it. The C library is opened at the first call.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from functools import cache

MADV_DONTNEED = 4
MADV_REMOVE = 9
MADV_HUGEPAGE = 14
MADV_PAGEOUT = 21
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16

TMPFS_MAGIC = 0x01021994

_STATFS_SIZE = 120  # bytes of `struct statfs` on a 64-bit Linux, the type first


def madvise(address: int, length: int, advice: int) -> int:
    """Tell the kernel what to do with a range of memory; returns 0 or the error's number. Any thread.

    Tries again where the kernel asks for it (EAGAIN, EINTR). Source: madvise(2).
    """
    call = _libc().madvise
    while call(address, length, advice):
        number = ctypes.get_errno()
        if number not in {errno.EAGAIN, errno.EINTR}:
            return number
    return 0


class SharedMapping:
    """A range of a file, mapped shared at an address that is as far from a multiple of `align` as `offset` is.

    `with SharedMapping(…) as address` unmaps it at the end. `align` is a power of two, `offset` and `length` are of
    whole pages. Raises OSError. Source: mmap(2).
    """

    def __init__(self, descriptor: int, offset: int, length: int, align: int, *, write: bool = True) -> None:
        self.length = length
        spare = _mapped(None, length + align, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        self.address = spare + (offset - spare) % align
        end = spare + length + align
        try:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
            _mapped(self.address, length, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, offset)
        except OSError:
            _libc().munmap(spare, length + align)
            raise
        whole = -(-(self.address + length) // mmap.PAGESIZE) * mmap.PAGESIZE
        for start, stop in ((spare, self.address), (whole, end)):
            if start < stop:
                _libc().munmap(start, stop - start)

    def unmap(self, step: int) -> None:
        """Unmap it, `step` bytes at once. Once only."""
        for at in range(0, self.length, step):
            _libc().munmap(self.address + at, min(step, self.length - at))

    def __enter__(self) -> int:
        return self.address

    def __exit__(self, *exc_info: object) -> None:
        self.unmap(self.length)


def _mapped(address: int | None, length: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    found: int | None = _libc().mmap(address, length, protection, flags, descriptor, offset)
    if found is None or found == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map {length} bytes: {os.strerror(code)}")
    return found


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> int:
    """Change what a range of a file takes up on its disk; returns 0 or the error's number. Any thread.

    Python's own `posix_fallocate` knows no mode. Tries again where a signal came between. Source: fallocate(2).
    """
    call = _libc().fallocate
    while call(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            return number
    return 0


def filesystem_type(descriptor: int) -> int:
    """The magic number of the file system that a file is on, 0 where it cannot be told. Source: fstatfs(2)."""
    answer = ctypes.create_string_buffer(_STATFS_SIZE)
    if _libc().fstatfs(descriptor, answer):
        return 0
    return int.from_bytes(answer.raw[:8], sys.byteorder)


def userfaultfd(number: int, flags: int) -> int:
    """Open a descriptor of that kind; returns it. Raises OSError.

    The C library has no wrapper for the call. Source: userfaultfd(2).
    """
    descriptor: int = _libc().syscall(number, flags)
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return descriptor


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.madvise.restype = ctypes.c_int
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
    )  # fmt: skip
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.munmap.restype = ctypes.c_int
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    libc.fallocate.restype = ctypes.c_int
    libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
    libc.fstatfs.restype = ctypes.c_int
    libc.syscall.argtypes = (ctypes.c_long, ctypes.c_int)
    libc.syscall.restype = ctypes.c_long
    return libc
