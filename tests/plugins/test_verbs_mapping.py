"""A peer's memory, mapped: pages entered ahead by a thread and by writers at once, and let go of behind them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from whimbrel.testing._bench import nothing_left
from whimbrel_transports._verbs_copy import memory_at
from whimbrel_transports._verbs_mapping import Mapping, Paging

MIB = 1 << 20
SIZE = 11 * MIB + 4096  # no whole number of steps
LONG = 30.0


@pytest.fixture
def memfd():
    fd = os.memfd_create("mapped", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE + 8192)
    yield fd
    os.close(fd)


def present(mapping):
    """Bytes of a mapping whose pages are entered; None where it is not mapped."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{mapping.address & -4096:x}-"):
            return next(int(each.split()[1]) for each in lines if each.startswith("Rss:")) * 1024
    return None


def test_pages_are_entered_where_they_are_asked_for(memfd):
    mapping = Mapping(memfd, 4096, SIZE, write=True)
    assert present(mapping) == 0
    mapping.enter(mapping.address + 5 * MIB, 1)
    assert 0 < present(mapping) < SIZE
    mapping.enter_all(threading.Event())
    assert mapping.entered
    assert present(mapping) == SIZE
    memory_at(mapping.address + SIZE - 3, 3)[:] = b"end"
    assert os.pread(memfd, 3, 4096 + SIZE - 3) == b"end"
    mapping.close()
    mapping.close()
    assert present(mapping) is None


def test_an_unaligned_place_is_where_it_belongs(memfd):
    mapping = Mapping(memfd, 4096 + 17, SIZE, write=True)
    mapping.enter(mapping.address, SIZE)
    memory_at(mapping.address, 2)[:] = b"at"
    assert os.pread(memfd, 2, 4096 + 17) == b"at"
    mapping.close()


def test_writers_and_the_thread_enter_the_same_at_once(memfd):
    """Whoever comes second waits for that step, and nobody for ever."""
    with nothing_left(5):
        paging, mapping = Paging(), Mapping(memfd, 0, SIZE, write=True)
        go = threading.Barrier(4)

        def write(number):
            go.wait(LONG)
            for at in range(0, SIZE, 64 << 10):
                mapping.enter(mapping.address + at, 16)
                memory_at(mapping.address + at + number, 1)[:] = bytes([number + 1])

        writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        for writer in writers:
            writer.start()
        go.wait(LONG)
        paging.enter(mapping)
        for writer in writers:
            writer.join(LONG)
            assert not writer.is_alive()
        assert {os.pread(memfd, 3, at) for at in range(0, SIZE, 64 << 10)} == {b"\1\2\3"}
        paging.unmap(mapping)
        paging.close()
        assert present(mapping) is None


def test_what_is_not_written_any_more_is_not_entered_but_unmapped(memfd):
    with nothing_left(5):
        paging = Paging()
        mappings = [Mapping(memfd, 0, SIZE, write=True) for _ in range(8)]
        for mapping in mappings:
            paging.enter(mapping)
        for mapping in mappings:
            paging.unmap(mapping)
        paging.close()
        assert [present(mapping) for mapping in mappings] == [None] * 8


def test_a_thread_that_was_interrupted_goes_on(memfd):
    """Another mapping is unmapped between, and the first is entered all the same."""
    with nothing_left(5):
        paging = Paging()
        first, other = (Mapping(memfd, 0, SIZE, write=True) for _ in range(2))
        paging.enter(first)
        paging.unmap(other)
        first.enter(first.address, SIZE)  # which waits for the steps that the thread is in
        assert present(first) == SIZE
        paging.unmap(first)
        paging.close()
        assert present(first) is None
        assert present(other) is None


def test_nothing_asked_for_is_no_thread():
    with nothing_left(5):
        Paging().close()
