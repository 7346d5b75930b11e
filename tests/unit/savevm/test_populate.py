"""Memory is made ready ahead of the data in proportion to it: how far, where, and where not."""

import threading

import pytest

from whimbrel_savevm._populate import AHEAD, STEP, Populator

PAGE = 4096
STEPS = STEP // PAGE  # pages of a step


class FakeBlock:
    """Notes what it is told to populate; `answer` is what it says to that."""

    name = "fake"

    def __init__(self, pages, answer=True):
        self.pages, self.size = pages, pages * PAGE
        self.answer = answer
        self.asked = []
        self._changed = threading.Condition()

    def populate(self, offset, length):
        with self._changed:
            self.asked.append((offset // PAGE, length // PAGE))
            self._changed.notify_all()
        assert offset % PAGE == length % PAGE == 0
        assert 0 < length <= STEP
        assert offset + length <= self.size
        return self.answer

    @property
    def populated(self):
        return sum(length for _, length in self.asked)

    def wait_for(self, pages):
        with self._changed:
            assert self._changed.wait_for(lambda: self.populated >= pages, 10), f"only {self.asked}"


@pytest.fixture
def populator():
    populator = Populator()
    yield populator
    populator.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "whimbrel-populate"]


def test_nothing_happens_before_a_step_has_arrived(populator):
    block = FakeBlock(1 << 20)
    for first in range(0, STEPS - 1, 3):
        populator.arrived(block, first, first + 3)
    populator.close()
    assert block.asked == []


def test_as_much_is_made_ready_as_has_arrived(populator):
    block = FakeBlock(1 << 20)
    populator.arrived(block, 0, STEPS)
    block.wait_for(STEPS)
    populator.arrived(block, STEPS, 4 * STEPS)
    block.wait_for(4 * STEPS)
    populator.close()
    ranges = sorted(block.asked)
    assert ranges[0] == (STEPS, STEPS)
    assert ranges[-1][0] + ranges[-1][1] == 8 * STEPS


def test_never_more_than_so_far_ahead(populator):
    block = FakeBlock(1 << 30)
    most = AHEAD // PAGE
    populator.arrived(block, 0, 100 * most)
    block.wait_for(most)
    populator.close()
    assert max(block.asked) == (101 * most - STEPS, STEPS)
    assert block.populated == most


def test_never_beyond_the_block(populator):
    block = FakeBlock(3 * STEPS + 5)
    populator.arrived(block, 0, 2 * STEPS)
    block.wait_for(STEPS)
    populator.arrived(block, 2 * STEPS, 3 * STEPS + 5)
    populator.close()
    assert block.asked == [(2 * STEPS, STEPS)]


def test_what_lies_scattered_makes_nothing_ready(populator):
    block = FakeBlock(1 << 30)
    for number in range(5000):
        populator.arrived(block, number * 1000, number * 1000 + 10)
    populator.close()
    assert block.asked == []


def test_memory_of_which_half_is_passed_over_is_hardly_made_ready(populator):
    block = FakeBlock(1 << 30)
    arrived = 0
    for number in range(2000):
        populator.arrived(block, number * 100, number * 100 + 50)
        arrived += 50
    populator.close()
    assert block.populated <= arrived


def test_a_few_gaps_do_no_harm(populator):
    block = FakeBlock(1 << 30)
    for number in range(64):
        populator.arrived(block, number * 256, number * 256 + 250)
    block.wait_for(4 * STEPS)


def test_it_begins_anew_in_another_block_and_further_back(populator):
    first, second = FakeBlock(1 << 20), FakeBlock(1 << 20)
    populator.arrived(first, 0, 4 * STEPS)
    first.wait_for(4 * STEPS)
    populator.arrived(second, 1000, 1010)
    populator.arrived(first, 5, 10)
    populator.arrived(first, 10, 20)
    populator.close()
    assert second.asked == []
    assert first.populated == 4 * STEPS


def test_a_kernel_that_cannot_is_asked_once(populator):
    block = FakeBlock(1 << 20, answer=False)
    populator.arrived(block, 0, 4 * STEPS)
    block.wait_for(1)
    populator._thread.join(10)
    populator.arrived(block, 4 * STEPS, 8 * STEPS)
    assert len(block.asked) == 1


def test_after_the_end_nothing_begins():
    populator = Populator()
    populator.close()
    populator.close()
    block = FakeBlock(1 << 20)
    populator.arrived(block, 0, 8 * STEPS)
    assert populator._thread is None
    assert block.asked == []
