"""The userfaultfd tracker: the conformance suite, and what only this kernel interface can get wrong."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from whimbrel.errors import StateError, TrackerUnavailable
from whimbrel.machine import libc, pagemap
from whimbrel.machine.dirty import UserfaultTracker, kernel, userfaultfd
from whimbrel.machine.ram import PAGE_SIZE, Ram, RamBlock
from whimbrel.testing.trackers import DirtyTrackerConformance, Replica, tracking

WHY_NOT = userfaultfd.probe([])
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


class TestConformance(DirtyTrackerConformance):
    backings = ("anonymous", "memfd", "file")

    def make(self) -> UserfaultTracker:
        return UserfaultTracker()


class TestConformanceWhereHolesAreNotReportedAsWritten(TestConformance):
    """The way that is taken on kernels whose scan does not protect what does not exist."""

    backings = ("anonymous",)

    @pytest.fixture(autouse=True)
    def older_kernel(self, monkeypatch):
        kind = kernel.Userfault.protect_reporting
        calls = []

        def without_holes(self, start, end, report):
            calls.append(start)
            for regions in kind(self, start, end, report):
                holes = (regions["categories"] & (pagemap.PAGE_IS_PRESENT | pagemap.PAGE_IS_SWAPPED)) == 0
                regions["categories"][holes] = 0
                yield regions

        monkeypatch.setattr(kernel.Userfault, "protect_reporting", without_holes)
        return calls

    def test_it_is_the_way_that_is_taken(self, older_kernel, ram):
        block = ram.add("a", 1 << 20)
        with tracking(UserfaultTracker(), [block]) as (replica,):
            assert older_kernel == [block.address]
            assert not replica.tracker.untouched(block).any()


@pytest.fixture
def ram():
    ram = Ram()
    yield ram
    ram.close()


def written(tracker: UserfaultTracker, block: RamBlock) -> list[int]:
    dirty = np.zeros(block.pages, np.bool_)
    assert tracker.collect(block, dirty) == np.count_nonzero(dirty)
    return np.flatnonzero(dirty).tolist()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_exactly_the_written_pages_are_seen_even_in_huge_pages(ram):
    block = ram.add("a", 8 << 20)
    block.view[: 4 << 20] = 1
    with tracking(UserfaultTracker(), [block]) as (replica,):
        tracker = replica.tracker
        assert written(tracker, block) == []
        for page in (0, 5, 600, 1024, 2047):
            block.view[page * PAGE_SIZE + 3] += 1
        assert written(tracker, block) == [0, 5, 600, 1024, 2047]
        assert written(tracker, block) == []
        assert not block.view[7 * PAGE_SIZE :: 1000].all()  # reading is not writing
        assert written(tracker, block) == []


def test_more_ranges_than_the_kernel_answers_at_once(ram, monkeypatch):
    monkeypatch.setattr(pagemap.Pagemap.__init__, "__defaults__", (7,))
    block = ram.add("a", 400 * PAGE_SIZE)
    with tracking(UserfaultTracker(), [block]) as (replica,):
        block.view[:: 2 * PAGE_SIZE] = 1
        block.view[-1] = 1
        assert written(replica.tracker, block) == [*range(0, 400, 2), 399]
        assert written(replica.tracker, block) == []


def test_a_written_page_is_seen_after_the_kernel_has_taken_it_out_to_the_file(tmp_path):
    """Pages of files come and go; what was written and is gone must still count."""
    ram = Ram(f"file:{tmp_path}/ram")
    block = ram.add("a", 512 * PAGE_SIZE)
    with mmap.mmap(block.fd, block.size) as other, tracking(UserfaultTracker(), [block]) as (replica,):

        def take_out() -> None:
            other.flush()
            libc.madvise(block.address, block.size, libc.MADV_PAGEOUT)

        block.view[:: 4 * PAGE_SIZE] = 1
        take_out()
        if pagemap_present(block).any():
            pytest.skip("this file system keeps its pages in memory")
        assert set(written(replica.tracker, block)) >= set(range(0, 512, 4))
        take_out()
        assert block.view.sum() == 128  # brought back in by reading: still protected, still clean
        assert written(replica.tracker, block) == []
        block.view[PAGE_SIZE] = 1
        take_out()
        assert 1 in written(replica.tracker, block)
    ram.close()


def pagemap_present(block: RamBlock) -> np.ndarray:
    bits = np.zeros(block.pages, np.bool_)
    with pagemap.Pagemap() as opened:
        present = pagemap.PAGE_IS_PRESENT
        for regions in opened.scan(block.address, block.address + block.size, mask=present, report=present):
            pagemap.set_pages(bits, regions, block.address, PAGE_SIZE)
    return bits


@pytest.mark.parametrize("size", [64 * PAGE_SIZE, 8 << 20])
@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
def test_discarded_pages_are_dirty(memory, size):
    ram = Ram(memory)
    block = ram.add("a", size)
    block.view[:] = 1
    with tracking(UserfaultTracker(), [block]) as (replica,):
        block.discard(0, size // 2)
        assert written(replica.tracker, block) == list(range(block.pages // 2))
        block.discard()
        block.view[PAGE_SIZE] = 9
        replica.settle()
    ram.close()


def test_what_came_in_another_way_is_marked_by_hand():
    ram = Ram("memfd")
    block = ram.add("a", 64 * PAGE_SIZE)
    with mmap.mmap(block.fd, block.size) as other, tracking(UserfaultTracker(), [block]) as (replica,):
        other[3 * PAGE_SIZE] = 1
        block.mark_dirty(3 * PAGE_SIZE, 1)
        assert replica.round() == 1
        other[4 * PAGE_SIZE] = 1
        block.mark_dirty(4 * PAGE_SIZE, 1)
        replica.settle()
    ram.close()


def test_untouched_pages_are_known_or_written_later(ram, monkeypatch):
    """The guest writes a new page before and after each step of the start; none may be both zero and unwritten."""
    block = ram.add("a", 16 << 20)
    libc.madvise(block.address, block.size, 15)  # MADV_NOHUGEPAGE: each page comes on its own
    pages = iter(np.random.default_rng(5).permutation(block.pages).tolist())

    def touch() -> None:
        block.view[next(pages) * PAGE_SIZE] = 1

    def with_a_guest(step):
        def stepped(*arguments, **options):
            touch()
            result = step(*arguments, **options)
            touch()
            if not isinstance(result, Iterator):
                return result
            return (touch() or part for part in result)

        return stepped

    for name in ("register", "protect", "protect_reporting"):
        monkeypatch.setattr(kernel.Userfault, name, with_a_guest(getattr(kernel.Userfault, name)))
    touch()
    tracker = UserfaultTracker()
    tracker.start([block])
    try:
        untouched = tracker.untouched(block)
        replica = Replica(tracker, block)
        replica._dirty[:] = ~untouched
        replica.bytes[:] = 0
        replica.send()
        replica.settle()
        touched = block.view[::PAGE_SIZE].sum()
        assert touched >= 7
        if untouched.any():  # a kernel that can tell
            assert untouched.sum() > block.pages - touched - 10
    finally:
        tracker.stop()


def test_memory_is_tracked_once_and_a_failed_start_leaves_nothing(ram):
    one, other = ram.add("one", 1 << 20), ram.add("other", 1 << 20)
    first, second = UserfaultTracker(), UserfaultTracker()
    before = open_descriptors()
    with tracking(first, [other]):
        with pytest.raises(TrackerUnavailable, match=r"another userfaultfd tracks this memory already \('other'\)"):
            second.start([one, other])
        with pytest.raises(StateError, match="'one' is not being tracked"):
            second.collect(one, np.zeros(one.pages, np.bool_))
        other.view[0] = 1
        assert written(first, other) == [0]
        with pytest.raises(StateError, match="started already"):
            first.start([one])
    assert open_descriptors() == before
    second.start([one, other])
    one.view[0] = 1
    assert written(second, one) == [0]
    second.stop()
    assert open_descriptors() == before


def test_the_stop_outlives_the_memory(ram):
    block = ram.add("a", 1 << 20)
    tracker = UserfaultTracker()
    tracker.start([block])
    ram.close()
    tracker.stop()


def test_a_kernel_that_fails_half_way_ends_the_tracking_with_an_error(ram, monkeypatch):
    block = ram.add("a", 1 << 20)
    with tracking(UserfaultTracker(), [block]) as (replica,), monkeypatch.context() as patch:
        patch.setattr(pagemap, "_PAGEMAP_SCAN", 0xC0606677)
        with pytest.raises(TrackerUnavailable, match="lost track of writes"):
            written(replica.tracker, block)


def test_a_forked_child_neither_disturbs_nor_keeps_the_tracking():
    """A child's writes are its own, the parent's are seen, and a stop counts although the child has the descriptor."""
    script = """
import os, numpy as np
from whimbrel.machine.dirty import UserfaultTracker
from whimbrel.machine.ram import Ram
block = Ram().add("a", 1 << 20)
block.view[:] = 1
tracker = UserfaultTracker()
tracker.start([block])
stay, go = os.pipe()
if not os.fork():
    os.close(go)
    block.view[40 * 4096] = 9
    os.read(stay, 1)
    os._exit(0)
block.view[41 * 4096] = 9
dirty = np.zeros(block.pages, bool)
tracker.collect(block, dirty)
assert np.flatnonzero(dirty).tolist() == [41], dirty
tracker.stop()
UserfaultTracker().start([block])  # refused if the first one still had the memory
os.close(go)
os.wait()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# ---------------------------------------------------------------------------------------------------- the reasons


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSYS, "this kernel has no userfaultfd"),
        (errno.EPERM, "userfaultfd is not permitted here; a container's seccomp profile may forbid it"),
        (errno.EINVAL, "this kernel's userfaultfd cannot note writes by itself; Linux 6.7 and later can"),
        (errno.EMFILE, "userfaultfd cannot be opened: Too many open files"),
    ],
)
def test_the_probe_says_why_it_cannot_be_opened(monkeypatch, code, words):
    def refuse(number: int, flags: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(libc, "userfaultfd", refuse)
    assert userfaultfd.probe([]) == words


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (
            "_UFFDIO_API",
            errno.EINVAL,
            "this kernel's userfaultfd cannot note writes by itself; Linux 6.7 and later can",
        ),
        ("_UFFDIO_API", errno.EIO, "the handshake with userfaultfd failed: Input/output error"),
        ("_UFFDIO_REGISTER", errno.EINVAL, "this kind of memory cannot be write-protected on this kernel"),
        ("_UFFDIO_REGISTER", errno.ENOMEM, "the memory cannot be registered: Cannot allocate memory"),
        ("_UFFDIO_WRITEPROTECT", errno.ENOMEM, "the memory cannot be write-protected: Cannot allocate memory"),
        ("_PAGEMAP_SCAN", errno.ENOTTY, "this kernel has no PAGEMAP_SCAN; Linux 6.7 and later have it"),
        ("_PAGEMAP_SCAN", errno.EPERM, "the kernel lost track of writes: Operation not permitted"),
    ],
)
def test_the_probe_says_which_step_fails_and_leaves_nothing(monkeypatch, request_, code, words):
    refused = getattr(kernel if request_.startswith("_U") else pagemap, request_)
    real = fcntl.ioctl

    def ioctl(file: int, request: int, argument: object) -> int:
        if request == refused:
            raise OSError(code, os.strerror(code))
        return real(file, request, argument)

    before = open_descriptors()
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert str(userfaultfd.probe([])).startswith(words)
    assert open_descriptors() == before


def test_the_probe_says_that_the_machine_is_unknown(monkeypatch):
    monkeypatch.setattr(kernel, "_NUMBERS", {})
    assert "does not know userfaultfd's number on" in str(userfaultfd.probe([]))


def test_the_probe_notices_a_kernel_that_does_not_notice(monkeypatch):
    monkeypatch.setattr(kernel.Userfault, "written", lambda *_: iter(()))
    assert userfaultfd.probe([]) == "the kernel offers it, but it did not notice a write"


def test_the_probe_tries_each_kind_of_memory_and_leaves_it_alone(tmp_path):
    rams = [Ram("anonymous"), Ram("memfd"), Ram(f"file:{tmp_path}/ram")]
    blocks = [ram.add("a", 1 << 20) for ram in rams]
    for block in blocks:
        block.view[:] = 3
        block.mark_dirty(0, 1)
    assert userfaultfd.probe(blocks) is None
    for block in blocks:
        assert (block.view == 3).all()
        assert block.take_marks()
    with tracking(UserfaultTracker(), blocks[2:]):
        assert "tracks this memory already" in str(userfaultfd.probe(blocks))
    for ram in rams:
        ram.close()
