"""The suite itself: trackers that lie are found out, each by the check that is there for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from whimbrel.abc import BoolArray, ByteArray, DirtyTracker, MemoryRegion
from whimbrel.machine.dirty import CompareTracker
from whimbrel.machine.ram import Ram
from whimbrel.testing import trackers
from whimbrel.testing.trackers import WAYS, DirtyTrackerConformance, Writer


@pytest.fixture
def block():
    ram = Ram()
    yield ram.add("a", 1 << 20)
    ram.close()


class Liar(CompareTracker):
    """Right so far; each subclass does one thing wrong."""


class Blind(Liar):
    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        return 0


class LosesSome(Liar):
    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        before = dirty.copy()
        super().collect(region, dirty)
        dirty[::7] = before[::7]
        return int(np.count_nonzero(dirty) - np.count_nonzero(before))


class SendsTheMemory(Liar):
    def pages(self, region: MemoryRegion) -> ByteArray:
        return region.view


class ForgetsOldMarks(Liar):
    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        dirty[:] = False
        return super().collect(region, dirty)


class Miscounts(Liar):
    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        super().collect(region, dirty)
        return int(np.count_nonzero(dirty))


class NeverRests(Liar):
    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        new = int(not dirty[0])
        dirty[0] = True
        return super().collect(region, dirty) + new


class KnowsOneRegion(Liar):
    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        for other in self._regions:
            if other.address != region.address:
                super().collect(other, np.zeros(other.size // other.page_size, np.bool_))
        return super().collect(region, dirty)

    def start(self, regions: Sequence[MemoryRegion]) -> None:
        self._regions = regions
        super().start(regions)


class NeverStops(Liar):
    def stop(self) -> None:
        pass


class ClearsAfterReading(DirtyTracker):
    """Sends the memory, and only then forgets that it was dirty: the very rule turned round."""

    def start(self, regions: Sequence[MemoryRegion]) -> None:
        self._inner = CompareTracker()
        self._inner.start(regions)

    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        return self._inner.collect(region, dirty)

    def pages(self, region: MemoryRegion) -> ByteArray:
        copy = region.view.copy()
        region.view[5] += 1  # the guest, at the worst of times
        self._inner.collect(region, np.zeros(region.size // region.page_size, np.bool_))
        return copy

    def stop(self) -> None:
        self._inner.stop()


numpy_ = [WAYS["numpy"]]


@pytest.mark.parametrize(
    ("liar", "check", "words"),
    [
        (Blind, lambda t, b: trackers.check_keeps_up(t, b, numpy_), "no page is dirty"),
        (Blind, lambda t, b: trackers.check_sees(t, b, 4095, 2), "not seen in all"),
        (LosesSome, lambda t, b: trackers.check_keeps_up(t, b, numpy_), "writes were lost"),
        (LosesSome, lambda t, b: trackers.check_sees(t, b, 4095, 2), "not seen in all"),
        (LosesSome, trackers.check_scattered, "not seen|writes were lost"),
        (SendsTheMemory, trackers.check_there_and_back, "writes were lost"),
        (NeverRests, trackers.check_write_after_collect, "said to be dirty"),
        (ClearsAfterReading, trackers.check_write_after_collect, "writes were lost"),
        (KnowsOneRegion, lambda t, b: trackers.check_regions_apart(t, b, Ram().add("b", 1 << 18)), "assert"),
        (NeverStops, lambda t, b: trackers.check_ends(lambda: t, b), "stopped tracker|started already"),
    ],
)
def test_a_liar_is_found_out(liar, check, words, block):
    with pytest.raises(AssertionError, match=words):
        check(liar(), block)


def test_marks_that_were_set_before_must_stay_and_not_be_counted(block):
    for liar, words in ((ForgetsOldMarks, "before the collect is gone"), (Miscounts, "what is new")):
        with trackers.tracking(liar(), [block]) as (replica,):
            replica._dirty[3] = True
            block.view[5 * 4096] += 1
            with pytest.raises(AssertionError, match=words):
                replica.collect()


def test_a_writer_that_fails_is_heard(block):
    def fail(region: MemoryRegion, offset: int, data: bytes) -> None:
        raise ZeroDivisionError

    writer = Writer(block, [fail])
    writer.start()
    with pytest.raises(ZeroDivisionError):
        writer.wait(1)
    writer.stop()


def test_every_way_of_writing_writes(block):
    for number, way in enumerate(WAYS.values()):
        data = bytes([number + 1]) * 5000
        way(block, number * 8192 + 77, data)
        assert block.view[number * 8192 + 77 : number * 8192 + 5077].tobytes() == data
        assert not block.view[number * 8192 : number * 8192 + 77].any()


def test_the_base_class_is_not_collected_and_needs_a_tracker():
    assert not DirtyTrackerConformance.__name__.startswith("Test")
    with pytest.raises(TypeError, match="make"):
        DirtyTrackerConformance()
