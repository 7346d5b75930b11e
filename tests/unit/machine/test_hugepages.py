"""Huge pages for memfds: where nothing is yet, and nowhere else; and mappings at the place that they need."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from whimbrel.machine import hugepages, libc
from whimbrel.machine.memory import MemoryArea

SIZE = hugepages.page_size() or 2 << 20


@pytest.fixture
def memfd():
    fd = os.memfd_create("huge", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * SIZE)
    yield fd
    os.close(fd)


def filled(fd):
    """Which of a file's places for huge pages hold memory, all of it."""
    with mmap.mmap(fd, 0) as whole:
        count = len(whole) // SIZE
    found = []
    for number in range(count):
        hole = os.lseek(fd, number * SIZE, os.SEEK_HOLE)
        found.append(hole >= (number + 1) * SIZE)
    return found


def entered_by_one_touch(fd, number):
    """Bytes that a process has mapped once it has touched one byte of a place."""
    with libc.SharedMapping(fd, number * SIZE, SIZE, SIZE) as address:
        assert not libc.madvise(address, 1, libc.MADV_POPULATE_WRITE)
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        for line in lines:
            if line.startswith(f"{address:x}-"):
                return next(int(each.split()[1]) for each in lines if each.startswith("Rss:")) * 1024
    return None


def gives_huge_pages(fd):
    hugepages.fill_holes(fd, 0, SIZE)
    return filled(fd)[0]


def test_only_whole_places_that_are_empty_are_filled(memfd):
    if not gives_huge_pages(memfd):
        pytest.skip("this kernel makes no huge pages for shared memory")
    os.pwrite(memfd, b"there", SIZE + 4096)
    hugepages.fill_holes(memfd, 4096, 3 * SIZE)
    assert filled(memfd) == [True, False, True, False]
    assert os.pread(memfd, 5, SIZE + 4096) == b"there"
    assert not any(os.pread(memfd, SIZE, 2 * SIZE))
    assert entered_by_one_touch(memfd, 2) == SIZE
    assert entered_by_one_touch(memfd, 1) < SIZE


def test_what_the_kernel_refuses_is_left(memfd, monkeypatch):
    asked = []

    def refuse(address, length, advice):
        asked.append(advice)
        return errno.EINVAL if advice == libc.MADV_COLLAPSE else 0

    monkeypatch.setattr(libc, "madvise", refuse)
    hugepages.fill_holes(memfd, 0, 4 * SIZE)
    assert asked == [libc.MADV_POPULATE_WRITE, libc.MADV_COLLAPSE] * bool(hugepages.page_size())


def test_a_system_without_huge_pages(memfd, monkeypatch):
    monkeypatch.setattr(hugepages, "page_size", lambda: 0)
    hugepages.fill_holes(memfd, 0, 4 * SIZE)
    assert filled(memfd) == [False] * 4


def test_what_is_populated_is_zero_or_what_it_was_and_belongs_to_whoever_maps_it():
    area = MemoryArea(3 * SIZE + 4096, "memfd", "populated")
    area.view[SIZE + 5] = 5
    assert area.populate()
    assert area.view.nonzero()[0].tolist() == [SIZE + 5]
    area.view[2 * SIZE] = 7
    assert os.pread(area.fd, 1, 2 * SIZE) == b"\7"
    area.discard(2 * SIZE, 4096)
    assert area.view.nonzero()[0].tolist() == [SIZE + 5]
    area.close()


@pytest.mark.parametrize("offset", [0, 4096, SIZE - 4096])
def test_a_mapping_is_as_far_from_a_multiple_as_its_place_in_the_file(memfd, offset):
    os.pwrite(memfd, b"first", offset)
    with libc.SharedMapping(memfd, offset, SIZE, SIZE) as address:
        assert address % SIZE == offset % SIZE
        assert f"{address:x}-{address + SIZE:x} rw-s" in Path("/proc/self/maps").read_text()
    assert f"{address:x}-{address + SIZE:x} rw-s" not in Path("/proc/self/maps").read_text()


def test_a_mapping_that_cannot_be_leaves_nothing(memfd):
    fd = os.open("/dev/null", os.O_RDONLY)
    before = Path("/proc/self/maps").read_text().count("\n")
    with pytest.raises(OSError, match="cannot map"):
        libc.SharedMapping(fd, 0, SIZE, SIZE)
    os.close(fd)
    assert Path("/proc/self/maps").read_text().count("\n") <= before + 1  # the allocator's own
