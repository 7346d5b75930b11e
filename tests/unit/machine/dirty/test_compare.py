"""The compare tracker: the conformance suite, and its shadow."""

from __future__ import annotations

import numpy as np
import pytest

from whimbrel.errors import StateError, TrackerUnavailable
from whimbrel.machine.dirty import CompareTracker, compare
from whimbrel.machine.ram import PAGE_SIZE, Ram
from whimbrel.testing.trackers import DirtyTrackerConformance, tracking


class TestConformance(DirtyTrackerConformance):
    backings = ("anonymous", "memfd", "file")

    def make(self) -> CompareTracker:
        return CompareTracker()


@pytest.fixture
def block():
    ram = Ram()
    yield ram.add("a", 600 * PAGE_SIZE)
    ram.close()


def test_what_is_sent_stands_still_while_the_guest_writes(block):
    block.view[:] = 1
    with tracking(CompareTracker(), [block]) as (replica,):
        tracker = replica.tracker
        pages = tracker.pages(block)
        block.view[5] = 2
        assert pages[5] == 1
        with pytest.raises(ValueError, match="read-only"):
            pages[5] = 3
        assert replica.round() == 1
        assert tracker.pages(block)[5] == 2


def test_a_write_between_comparing_and_copying_is_found_next_time(monkeypatch):
    block = Ram().add("a", 100 * PAGE_SIZE)  # compared in one go
    guest = iter([(3, 11), (7, 12), (7, 13)])

    class Raced(np.ndarray):
        """Memory that the guest writes to as soon as it has been compared."""

        def __ne__(self, other):
            differs = np.asarray(self) != other
            for page, value in guest:
                block.view[page * PAGE_SIZE] = value
                break
            return differs

    block.view[:] = 1
    with tracking(CompareTracker(), [block]) as (replica,):
        words = compare._words
        monkeypatch.setattr(
            compare, "_words", lambda view, size: words(view, size).view(Raced if view is block.view else np.ndarray)
        )
        block.view[7 * PAGE_SIZE] = 2
        for _ in range(3):
            assert replica.round() > 0
        assert next(guest, None) is None
        replica.settle()


def test_bytes_written_again_as_they_were_are_not_dirty(block):
    block.view[:] = 1
    with tracking(CompareTracker(), [block]) as (replica,):
        replica.settle()
        block.view[:] = 1
        assert replica.round() == 0


def test_untouched_memory_is_neither_read_nor_copied(block):
    if block.present_pages().any():
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    with tracking(CompareTracker(), [block]) as (replica,):
        tracker = replica.tracker
        assert tracker.untouched(block).all()
        assert replica.round() == 0
        assert not block.present_pages().any()
        block.view[300 * PAGE_SIZE] = 1
        assert replica.round() == 1
        replica.settle()


def test_untouched_pages_are_zero_in_what_is_sent(block):
    block.view[PAGE_SIZE] = 1
    tracker = CompareTracker()
    tracker.start([block])
    block.view[:] = 2
    untouched = tracker.untouched(block)
    assert not untouched[1]
    assert not tracker.pages(block).reshape(block.pages, PAGE_SIZE)[untouched].any()
    tracker.stop()


def test_discarded_pages_are_dirty(block):
    block.view[:] = 1
    with tracking(CompareTracker(), [block]) as (replica,):
        block.discard(0, 10 * PAGE_SIZE)
        assert replica.round() == 10
        block.discard()
        replica.settle()


def test_no_room_for_the_copy_is_said_before_it_is_made(block, monkeypatch):
    monkeypatch.setattr(compare, "_available", lambda: 5 * PAGE_SIZE)
    block.view[:] = 1
    tracker = CompareTracker()
    with pytest.raises(TrackerUnavailable, match=f"{600 * PAGE_SIZE} bytes, and only {5 * PAGE_SIZE}"):
        tracker.start([block])
    with pytest.raises(StateError, match="not being tracked"):
        tracker.pages(block)
    assert compare.probe([block]) is None


def test_memory_that_runs_out_is_a_reason_too(block, monkeypatch):
    def no_memory(*_) -> np.ndarray:
        raise MemoryError("no")

    tracker = CompareTracker()
    with monkeypatch.context() as patch:
        patch.setattr(compare, "_words", no_memory)
        with pytest.raises(TrackerUnavailable, match="no room for a copy of all memory"):
            tracker.start([block])
    tracker.start([block])
    with pytest.raises(StateError, match="started already"):
        tracker.start([block])
    tracker.stop()


def test_free_memory_is_read_where_the_kernel_says_it(monkeypatch, tmp_path):
    assert compare._available() > 0
    monkeypatch.setattr(compare, "Path", lambda _: tmp_path / "none")
    assert compare._available() is None
