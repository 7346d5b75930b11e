"""The manual tracker: the conformance suite with writers that mark, and what marks mean."""

from __future__ import annotations

import numpy as np
import pytest

from whimbrel.errors import StateError
from whimbrel.machine.dirty import ManualTracker, manual
from whimbrel.machine.ram import PAGE_SIZE, Ram
from whimbrel.testing.trackers import DirtyTrackerConformance, Replica


class TestConformance(DirtyTrackerConformance):
    backings = ("anonymous", "memfd", "file")
    writers_mark = True

    def make(self) -> ManualTracker:
        return ManualTracker()


@pytest.fixture
def block():
    ram = Ram()
    yield ram.add("a", 64 * PAGE_SIZE)
    ram.close()


def test_marks_from_before_the_start_are_forgotten_and_later_ones_count(block):
    block.mark_dirty()
    tracker = ManualTracker()
    tracker.start([block])
    dirty = np.zeros(block.pages, np.bool_)
    assert tracker.collect(block, dirty) == 0
    block.mark_dirty(PAGE_SIZE - 1, 2)
    assert tracker.collect(block, dirty) == 2
    assert np.flatnonzero(dirty).tolist() == [0, 1]
    with pytest.raises(StateError, match="started already"):
        tracker.start([block])
    tracker.stop()
    assert manual.probe([block]) is None


def test_a_program_that_does_not_mark_loses_its_writes(block):
    """What the suite would say of it: the tracker believes the program."""
    tracker = ManualTracker()
    tracker.start([block])
    replica = Replica(tracker, block)
    replica.send()
    block.view[0] = 1
    with pytest.raises(AssertionError, match="writes were lost"):
        replica.settle()


def test_what_is_marked_while_it_starts_is_not_taken_for_untouched(block, monkeypatch):
    pages = iter(range(block.pages))

    def touch() -> None:
        page = next(pages)
        block.view[page * PAGE_SIZE] = 1
        block.mark_dirty(page * PAGE_SIZE, 1)

    def with_a_guest(step):
        def stepped(*arguments):
            touch()
            result = step(*arguments)
            touch()
            return result

        return stepped

    tracker = ManualTracker()
    with monkeypatch.context() as patch:
        patch.setattr(manual, "known_zero", with_a_guest(manual.known_zero))
        patch.setattr(block, "take_marks", with_a_guest(block.take_marks))
        tracker.start([block])
    dirty = ~tracker.untouched(block)
    tracker.collect(block, dirty)
    assert dirty[:4].all()
    assert block.view[::PAGE_SIZE].sum() == 4


def test_pages_untouched_at_the_start_need_not_be_read(block):
    block.view[3 * PAGE_SIZE] = 1
    tracker = ManualTracker()
    tracker.start([block])
    assert not tracker.untouched(block)[3]
    assert (~tracker.untouched(block) == block.present_pages()).all()
