"""Mappings: zero at first, populated, discarded, known to be zero without being read, and let go of."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from whimbrel.errors import ConfigError, StateError
from whimbrel.machine import libc, memory, pagemap
from whimbrel.machine.memory import PAGE_SIZE, MemoryArea

KINDS = ["anonymous", "memfd", "file"]
PAGES = 64


@pytest.fixture(params=KINDS)
def area(request, tmp_path):
    area = MemoryArea(PAGES * PAGE_SIZE, f"file:{tmp_path}/ram" if request.param == "file" else request.param, "ram")
    yield area
    area.close()


@pytest.fixture
def scans() -> None:
    try:
        with pagemap.Pagemap() as opened:
            list(opened.scan(0, PAGE_SIZE, report=pagemap.PAGE_IS_PRESENT))
    except OSError:
        pytest.skip("this kernel has no PAGEMAP_SCAN")


def open_descriptors() -> set[str]:
    return {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}


def test_new_memory_is_zero_page_aligned_and_writable(area):
    assert area.view.shape == (PAGES * PAGE_SIZE,)
    assert area.view.dtype == np.uint8
    assert not area.view.any()
    assert area.address % mmap.PAGESIZE == 0
    area.view[-1] = 7
    assert ctypes.string_at(area.address + area.size - 1, 1) == b"\x07"


def test_shared_memory_is_shared_through_its_descriptor(area):
    assert (area.fd is None) == (area.backing == "anonymous")
    if area.fd is not None:
        with mmap.mmap(area.fd, area.size) as other:
            other[5000] = 42
        assert area.view[5000] == 42


def test_populate_keeps_what_is_there(area):
    area.view[PAGE_SIZE] = 3
    assert area.populate(0, PAGE_SIZE + 1)
    assert area.populate()
    assert area.present_pages().all()
    assert np.flatnonzero(area.view).tolist() == [PAGE_SIZE]


def test_populate_says_no_on_an_old_kernel_and_raises_what_is_serious(area, monkeypatch):
    monkeypatch.setattr(libc, "madvise", lambda *_: errno.EINVAL)
    assert not area.populate()
    monkeypatch.setattr(libc, "madvise", lambda *_: errno.ENOMEM)
    with pytest.raises(OSError, match="cannot populate") as caught:
        area.populate()
    assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize("punches", [True, False])
def test_discarded_pages_are_zero_and_their_neighbours_are_not(area, monkeypatch, punches):
    if not punches:
        monkeypatch.setattr(libc, "madvise", lambda *_: errno.EOPNOTSUPP)
    area.view[:] = 9
    area.discard(2 * PAGE_SIZE, 3 * PAGE_SIZE)
    pages = area.view.reshape(PAGES, PAGE_SIZE)
    assert not pages[2:5].any()
    assert (pages[:2] == 9).all()
    assert (pages[5:] == 9).all()
    area.discard()
    assert not area.view.any()
    area.view[0] = 1  # and it can be written again


def test_discard_gives_the_memory_back(scans):
    for kind in ("anonymous", "memfd"):
        area = MemoryArea(PAGES * PAGE_SIZE, kind)
        area.view[:] = 9
        assert area.present_pages().all()
        area.discard()
        assert not area.present_pages().any()
        area.close()


def test_only_whole_pages_inside_are_discarded(area):
    for offset, length in ((1, PAGE_SIZE), (0, 100)):
        with pytest.raises(ValueError, match="whole pages"):
            area.discard(offset, length)
    for offset, length in ((-PAGE_SIZE, PAGE_SIZE), (area.size, PAGE_SIZE), (0, area.size + PAGE_SIZE)):
        with pytest.raises(ValueError, match="not inside"):
            area.discard(offset, length)
        with pytest.raises(ValueError, match="not inside"):
            area.populate(offset, length)


def test_a_page_that_holds_something_is_present(area):
    area.view[7 * PAGE_SIZE + 1] = 1
    assert area.present_pages()[7]
    assert area.present_pages(7, 1).tolist() == [True]
    assert area.present_pages(PAGES, 0).tolist() == []
    absent = np.flatnonzero(~area.present_pages())
    assert not area.view.reshape(PAGES, PAGE_SIZE)[absent].any()


def test_untouched_anonymous_pages_are_known_to_be_zero(scans):
    area = MemoryArea(PAGES * PAGE_SIZE)
    assert not area.present_pages().any()
    assert not area.view[10 * PAGE_SIZE : 20 * PAGE_SIZE].any()  # reading maps the one page of zeros
    area.view[30 * PAGE_SIZE] = 1
    assert np.flatnonzero(area.present_pages()).tolist() == [30]
    assert np.flatnonzero(area.present_pages(25, 10)).tolist() == [5]


def test_what_another_mapping_wrote_to_a_memfd_is_present():
    area = MemoryArea(PAGES * PAGE_SIZE, "memfd")
    with mmap.mmap(area.fd, area.size) as other:
        other[30 * PAGE_SIZE] = 1
        other[33 * PAGE_SIZE] = 1
    assert np.flatnonzero(area.present_pages()).tolist() == [30, 33]
    assert np.flatnonzero(area.present_pages(31, 10)).tolist() == [2]
    assert np.flatnonzero(area.present_pages(30, 1)).tolist() == [0]


def test_a_memfd_in_too_many_pieces_counts_as_present_from_there_on(monkeypatch):
    monkeypatch.setattr(memory, "_MOST_EXTENTS", 3)
    area = MemoryArea(PAGES * PAGE_SIZE, "memfd")
    area.view[:: 4 * PAGE_SIZE] = 1
    assert np.flatnonzero(area.present_pages()).tolist() == [0, 4, 8, *range(9, PAGES)]


def test_where_the_kernel_cannot_tell_every_page_is_present(monkeypatch):
    monkeypatch.setattr(pagemap, "_PAGEMAP_SCAN", 0xC0606677)  # a request that no kernel knows
    assert MemoryArea(PAGES * PAGE_SIZE).present_pages().all()


def test_a_scan_goes_on_where_its_answer_was_full(scans):
    area = MemoryArea(PAGES * PAGE_SIZE)
    libc.madvise(area.address, area.size, 15)  # MADV_NOHUGEPAGE
    area.view[:: 2 * PAGE_SIZE] = 1
    with pagemap.Pagemap(vector=5) as opened:
        answers = [
            (regions["start"].tolist(), regions["categories"].tolist())
            for regions in opened.scan(
                area.address,
                area.address + area.size,
                mask=pagemap.PAGE_IS_PRESENT,
                report=pagemap.PAGE_IS_PRESENT,
            )
        ]
    assert len(answers) > PAGES // 2 // 5
    found = [start for starts, _ in answers for start in starts]
    assert found == list(range(area.address, area.address + area.size, 8192))
    assert {category for _, categories in answers for category in categories} == {pagemap.PAGE_IS_PRESENT}


def test_ranges_are_cut_to_the_block_even_where_system_pages_reach_over_it():
    bits = np.zeros(4, np.bool_)
    regions = np.array([(0x10000, 0x13000, 0), (0x15000, 0x20000, 0)], pagemap._REGION)
    pagemap.set_pages(bits, regions, 0x12000, PAGE_SIZE)
    assert bits.tolist() == [True, False, False, True]


def test_views_survive_the_close(area):
    view = area.view
    view[0] = 5
    area.close()
    area.close()
    with pytest.raises(StateError, match="closed"):
        _ = area.view
    with pytest.raises(StateError, match="closed"):
        area.populate()
    view[1] = 6
    assert view[:2].tolist() == [5, 6]


def test_nothing_is_left_after_the_close(tmp_path):
    before = open_descriptors()
    for kind in ("anonymous", "memfd", f"file:{tmp_path}/ram"):
        MemoryArea(PAGE_SIZE, kind).close()
    forgotten = MemoryArea(PAGE_SIZE, f"file:{tmp_path}/forgotten")
    assert (tmp_path / "forgotten").stat().st_mode & 0o777 == 0o600
    del forgotten
    gc.collect()
    assert open_descriptors() == before
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_remove_the_file(tmp_path):
    file = tmp_path / "ram"
    file.touch()
    memory._release(os.open(file, os.O_RDWR), file, owner=os.getpid() + 1)
    assert file.exists()


def test_in_a_folder_each_block_has_its_own_file(tmp_path):
    names = ["pc.ram", "/rom@etc/acpi", "a/b", "a%2Fb", ".", "..", "0000:00:02.0/vga.vram"]
    areas = [MemoryArea(PAGE_SIZE, f"file:{tmp_path}", name) for name in names]
    assert len(list(tmp_path.iterdir())) == len(names)
    assert (tmp_path / "%2From%40etc%2Facpi").stat().st_size == PAGE_SIZE
    for area in areas:
        area.close()


def test_a_file_that_is_there_is_never_overwritten(tmp_path):
    file = tmp_path / "precious"
    file.write_bytes(b"do not lose me")
    with pytest.raises(ConfigError, match=r"is there already.*left it behind"):
        MemoryArea(PAGE_SIZE, f"file:{file}", "ram")
    with pytest.raises(ConfigError, match="is there already"):
        MemoryArea(PAGE_SIZE, f"file:{tmp_path}", "precious")
    assert file.read_bytes() == b"do not lose me"


def test_memory_that_cannot_be_had_leaves_nothing_behind(tmp_path):
    before = open_descriptors()
    for kind in ("anonymous", "memfd", f"file:{tmp_path}/ram", f"file:{tmp_path}/no/such/folder"):
        with pytest.raises(ConfigError, match="cannot map"):
            MemoryArea(1 << 62, kind, "huge")
    assert open_descriptors() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["", "hugetlbfs", "file", "file:", "Anonymous"])
def test_unknown_kinds_are_refused(kind):
    with pytest.raises(ConfigError, match='"anonymous", "memfd" and "file:PATH"'):
        MemoryArea(PAGE_SIZE, kind)


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, PAGE_SIZE + 1])
def test_odd_sizes_are_refused(size):
    with pytest.raises(ValueError, match="whole pages"):
        MemoryArea(size)


def test_the_advice_is_repeated_where_the_kernel_asks_for_it(monkeypatch):
    answers = iter([errno.EAGAIN, errno.EINTR, 0])

    class Library:
        @staticmethod
        def madvise(*_) -> int:
            answer = next(answers)
            ctypes.set_errno(answer)
            return -1 if answer else 0

    monkeypatch.setattr(libc, "_libc", Library)
    assert libc.madvise(0, PAGE_SIZE, libc.MADV_DONTNEED) == 0
    assert list(answers) == []
