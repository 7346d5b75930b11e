"""PAGEMAP_SCAN: asks the kernel what the pages of a process are (Linux 6.7 and later).

Source: Documentation/admin-guide/mm/pagemap.rst and include/uapi/linux/fs.h. The scan answers with ranges of pages
of equal categories, in ascending order, as a numpy array; the ioctl releases the GIL.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from whimbrel.machine.bitmap import set_ranges

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from whimbrel.abc import BoolArray

PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5

PM_SCAN_WP_MATCHING = 1 << 0
"""Write-protect the pages that match, in the same breath as they are reported."""
PM_SCAN_CHECK_WPASYNC = 1 << 1
"""Fail with EPERM on memory that is not registered for asynchronous write-protection."""

_PAGEMAP_SCAN = 0xC0606610
_ARGUMENT = struct.Struct("=12Q")  # struct pm_scan_arg
_WALK_END = 32  # offset of its field that says how far the scan came
_REGION = np.dtype([("start", "=u8"), ("end", "=u8"), ("categories", "=u8")])  # struct page_region

PAGEMAP = "/proc/self/pagemap"

VECTOR = 4096
"""How many ranges one ioctl can answer with; more take more ioctls."""

RegionArray: TypeAlias = npt.NDArray[np.void]


class Pagemap:
    """An open `/proc/self/pagemap`. It speaks of the process that opened it: of no use after a fork.

    That may be another process, which has passed its descriptor as `file`; it belongs to the Pagemap then. Raises
    OSError where /proc is not there. One thread at a time.
    """

    def __init__(self, vector: int = VECTOR, *, file: int | None = None) -> None:
        self._file = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC) if file is None else file
        self._vector: RegionArray = np.zeros(vector, _REGION)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close it; twice is fine."""
        descriptor, self._file = self._file, -1
        if descriptor >= 0:
            os.close(descriptor)

    def scan(
        self, start: int, end: int, *, report: int, mask: int = 0, anyof: int = 0, inverted: int = 0, flags: int = 0
    ) -> Iterator[RegionArray]:
        """Yield the ranges of pages from address `start` to `end` whose categories match; the rest is passed over.

        A page matches if, with the categories in `inverted` turned round, it has all of `mask` and, unless that is 0,
        one of `anyof`. Each answer is an array with the fields `start` and `end` (addresses) and `categories` (those
        in `report`); it is only good until the next one is asked for. Raises OSError: ENOTTY where the kernel is too
        old, EPERM as PM_SCAN_CHECK_WPASYNC says; with PM_SCAN_WP_MATCHING, pages may then have been protected again
        without having been reported.
        """
        address, vector = start, self._vector
        while address < end:
            argument = bytearray(
                _ARGUMENT.pack(
                    _ARGUMENT.size, flags, address, end, 0,
                    vector.ctypes.data, vector.size, 0,
                    inverted, mask, anyof, report,
                )
            )  # fmt: skip
            found = fcntl.ioctl(self._file, _PAGEMAP_SCAN, argument)
            (reached,) = struct.unpack_from("=Q", argument, _WALK_END)
            if reached <= address:
                raise OSError(errno.EIO, "PAGEMAP_SCAN makes no headway")
            if found:
                yield vector[:found]
            address = reached


def system_span(address: int, length: int) -> tuple[int, int]:
    """Widen a span of memory to whole pages of the system (which may be larger than ours): its start and end."""
    start = address & -mmap.PAGESIZE
    return start, -(-(address + length) // mmap.PAGESIZE) * mmap.PAGESIZE


def set_pages(bits: BoolArray, regions: RegionArray, address: int, page_size: int) -> None:
    """Set the bits of the pages that `regions` cover; bit 0 is the page at `address`. What lies outside is ignored."""
    limit = bits.size * page_size
    # Signed, and cut to the block: a page of the system may reach over either of its ends.
    starts = np.clip(regions["start"].astype(np.int64) - address, 0, limit) // page_size
    ends = -(-np.clip(regions["end"].astype(np.int64) - address, 0, limit) // page_size)
    set_ranges(bits, starts.astype(np.intp, copy=False), ends.astype(np.intp, copy=False))


def populated(address: int, pages: int, page_size: int) -> BoolArray:
    """Find the pages of anonymous memory that may hold something else than zeros, shape (pages,).

    The others have never been written (or were given back): they are zero, and need not be read to know it. Where
    the kernel cannot tell, all pages are. While userfaultfd tracks the memory every page counts as populated, since
    the kernel reports its own markers as swapped-out pages. Any thread; releases the GIL.
    """
    bits = np.zeros(pages, np.bool_)
    start, end = system_span(address, pages * page_size)
    try:
        with Pagemap() as pagemap:
            for regions in pagemap.scan(
                start,
                end,
                report=PAGE_IS_PRESENT,
                inverted=PAGE_IS_PFNZERO,
                mask=PAGE_IS_PFNZERO,
                anyof=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            ):
                set_pages(bits, regions, address, page_size)
    except OSError:
        bits[:] = True
    return bits
