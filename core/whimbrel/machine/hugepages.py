"""Huge pages for memfds: asked for where nothing is yet, and had wherever the kernel gives them.

A process that maps memory of small pages enters each of them, 0.1 s and more for each GiB whose bytes copy in 0.09 s;
huge ones it enters at once. The kernel gives shared memory huge pages by itself only where its administrator allows it
(`shmem_enabled`), but makes one of what is there when it is asked to (MADV_COLLAPSE, Linux 6.1): with one small page in
it, that costs a seventh of what it costs to provide the small pages one by one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from whimbrel.machine import libc

__all__ = ["fill_holes"]

_SIZE: Final = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_LARGEST: Final = 1 << 30  # of the sizes that a system may have
_MOST_HOLES: Final = 4096  # asking for each takes two system calls


def fill_holes(fd: int, offset: int, length: int) -> None:
    """Have huge pages where a range of a memfd has none at all, as far as that is possible. What is there stays.

    Any thread; lets others run. What goes wrong is left for whoever populates the rest to find out.
    """
    size = page_size()
    first, last = -(-offset // size) * size if size else 0, (offset + length) // size * size if size else 0
    if first >= last:
        return
    with suppress(OSError):
        for start, end in _holes(fd, first, last):
            start, end = -(-start // size) * size, end // size * size
            if start < end and not _fill(fd, start, end, size):
                return


@cache
def page_size() -> int:
    """Bytes of a huge page, a power of two; 0 where the kernel knows none."""
    try:
        size = int(_SIZE.read_text())
    except (OSError, ValueError):
        return 0
    return size if 0 < size <= _LARGEST and size & (size - 1) == 0 else 0


def _holes(fd: int, first: int, last: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    position = first
    while position < last and len(found) < _MOST_HOLES:
        hole = os.lseek(fd, position, os.SEEK_HOLE)
        if hole >= last:
            break
        try:
            position = min(last, os.lseek(fd, hole, os.SEEK_DATA))
        except OSError:  # ENXIO: there is no more data
            position = last
        found.append((hole, position))
    return found


def _fill(fd: int, start: int, end: int, size: int) -> bool:
    """Fill a range of whole huge pages; False where the kernel does not."""
    with libc.SharedMapping(fd, start, end - start, size) as address:
        for at in range(address, address + end - start, size):
            if libc.madvise(at, 1, libc.MADV_POPULATE_WRITE) or libc.madvise(at, size, libc.MADV_COLLAPSE):
                return False
    return True
