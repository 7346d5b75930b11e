"""The conformance suite for dirty trackers.

::

    class TestMine(DirtyTrackerConformance):
        backings = ("anonymous", "memfd")

        def make(self):
            return MyTracker()

The judge is a perfect copy: a `Replica` is sent what the tracker says is dirty, round by round, while writers go on
writing in every way there is; when they have stopped and one last round was sent, it must equal the memory byte for
byte. A tracker may say more than was written; it may never say less, and it must come to rest when nobody writes.

Nothing here sleeps: a round begins when the writers have written again, and each check asserts that they had.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import numpy as np

from whimbrel.errors import WhimbrelError
from whimbrel.machine.ram import Ram, RamBlock

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from whimbrel.abc import BoolArray, ByteArray, DirtyTracker, MemoryRegion

__all__ = ["WAYS", "DirtyTrackerConformance", "MarkingBlock", "Replica", "Writer", "tracking", "write"]

_PATIENCE = 30.0  # seconds; only a tracker that hangs, or a writer that died, ever waits so long


Way: TypeAlias = "Callable[[MemoryRegion, int, bytes], None]"
"""Writes some bytes at an offset of a region."""


# ------------------------------------------------------------------------------------------- ways of writing memory


def _numpy(region: MemoryRegion, offset: int, data: bytes) -> None:
    region.view[offset : offset + len(data)] = np.frombuffer(data, np.uint8)


def _scatter(region: MemoryRegion, offset: int, data: bytes) -> None:
    region.view[np.arange(offset, offset + len(data))] = np.frombuffer(data, np.uint8)


def _memoryview(region: MemoryRegion, offset: int, data: bytes) -> None:
    region.view.data[offset : offset + len(data)] = data


def _readinto(region: MemoryRegion, offset: int, data: bytes) -> None:
    with os.fdopen(os.memfd_create("source"), "r+b", buffering=0) as file:
        file.write(data)
        file.seek(0)
        assert file.readinto(region.view.data[offset : offset + len(data)]) == len(data)


def _recv_into(region: MemoryRegion, offset: int, data: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(data)
        into = region.view.data[offset : offset + len(data)]
        assert near.recv_into(into, len(data), socket.MSG_WAITALL) == len(data)


def _memset(region: MemoryRegion, offset: int, data: bytes) -> None:
    ctypes.memset(region.address + offset, data[0], len(data))


def _memmove(region: MemoryRegion, offset: int, data: bytes) -> None:
    ctypes.memmove(region.address + offset, data, len(data))


WAYS: dict[str, Way] = {
    "numpy": _numpy,
    "scatter": _scatter,
    "memoryview": _memoryview,
    "readinto": _readinto,
    "recv_into": _recv_into,
    "memset": _memset,
    "memmove": _memmove,
}
"""Every way in which memory is written: by Python, by C, and by the kernel on somebody's behalf."""


class Writer(threading.Thread):
    """Writes random bytes at random places of a region, in each of `ways` in turn, until it is told to stop.

    The writes have 1 byte to three pages, so that many lie across a border of pages.
    """

    def __init__(self, region: MemoryRegion, ways: Sequence[Way], *, seed: int = 0) -> None:
        super().__init__(name=f"writer-{seed}", daemon=True)
        self.region, self.ways, self.seed = region, ways, seed
        self.failure: BaseException | None = None
        self._written = 0
        self._more = threading.Condition()
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """Write until told to stop."""
        random = np.random.default_rng(self.seed)
        try:
            while not self._stop_asked.is_set():
                length = int(random.integers(1, 3 * self.region.page_size))
                offset = int(random.integers(0, self.region.size - length))
                write(self.region, offset, random.bytes(length), self.ways[self._written % len(self.ways)])
                with self._more:
                    self._written += 1
                    self._more.notify_all()
        except BaseException as exc:  # noqa: BLE001 - handed over to the thread that waits
            with self._more:
                self.failure = exc
                self._more.notify_all()

    def wait(self, writes: int) -> None:
        """Wait until that many more writes have been made from now on."""
        with self._more:
            goal = self._written + writes
            assert self._more.wait_for(lambda: self._written >= goal or self.failure, _PATIENCE), "the writer hangs"
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Stop; returns when no write is under way."""
        self._stop_asked.set()
        self.join(_PATIENCE)
        assert not self.is_alive(), "the writer hangs"


def write(region: MemoryRegion, offset: int, data: bytes, way: Way = _numpy) -> None:
    """Write, and then mark what was written if writers of this region do."""
    way(region, offset, data)
    if isinstance(region, MarkingBlock):
        region.mark_dirty(offset, len(data))


class MarkingBlock(RamBlock):
    """A block whose writers say what they wrote, as the `manual` tracker needs it: after they wrote it."""


# -------------------------------------------------------------------------------------------------------- the judge


class Replica:
    """What the other side would have: a copy of `region` made of nothing but what `tracker` said to send."""

    def __init__(self, tracker: DirtyTracker, region: MemoryRegion) -> None:
        self.tracker, self.region = tracker, region
        self.bytes: ByteArray = np.full(region.size, 0xEE, np.uint8)
        self._dirty: BoolArray = np.ones(region.size // region.page_size, np.bool_)

    def collect(self) -> int:
        """Ask the tracker what was written, and hold it to what it returns."""
        before = self._dirty.copy()
        new = self.tracker.collect(self.region, self._dirty)
        assert not (before & ~self._dirty).any(), "a mark that was set before the collect is gone"
        assert new == np.count_nonzero(self._dirty) - np.count_nonzero(before), "it does not return what is new"
        return new

    def send(self) -> None:
        """Send what is dirty."""
        pages = np.flatnonzero(self._dirty)
        self._dirty[:] = False
        size = self.region.page_size
        self.bytes.reshape(-1, size)[pages] = self.tracker.pages(self.region).reshape(-1, size)[pages]

    def round(self) -> int:
        """Collect and send; returns how many pages were new."""
        new = self.collect()
        self.send()
        return new

    def settle(self) -> None:
        """Send one last round, now that nobody writes, and compare; then the tracker must have come to rest."""
        self.round()
        wrong = np.flatnonzero((self.bytes != self.region.view).reshape(-1, self.region.page_size).any(axis=1))
        assert not wrong.size, f"the copy differs in {wrong.size} pages, the first is {wrong[0]}: writes were lost"
        self.round()
        assert self.round() == 0, "nobody writes, and still pages are said to be dirty"


@contextmanager
def tracking(tracker: DirtyTracker, regions: Sequence[MemoryRegion]) -> Iterator[list[Replica]]:
    """Start `tracker`, send everything once, and stop it in the end; yields a replica of each region."""
    tracker.start(regions)
    try:
        replicas = [Replica(tracker, region) for region in regions]
        for replica in replicas:
            replica.send()
        yield replicas
    finally:
        tracker.stop()


# ------------------------------------------------------------------------------------------------------- the checks


def check_keeps_up(
    tracker: DirtyTracker, region: MemoryRegion, ways: Sequence[Way], *, writers: int = 1, rounds: int = 6
) -> None:
    """Rounds are sent while writers write all the time, and the copy is perfect in the end."""
    threads = [Writer(region, ways, seed=seed) for seed in range(writers)]
    for thread in threads:
        thread.start()
    try:
        with tracking(tracker, [region]) as (replica,):
            for number in range(rounds):
                for thread in threads:
                    thread.wait(2 * len(ways))
                assert replica.round() > 0, f"round {number}: there were writes, and no page is dirty"
            for thread in threads:
                thread.stop()
            replica.settle()
    finally:
        for thread in threads:
            thread.stop()


def check_sees(tracker: DirtyTracker, region: MemoryRegion, offset: int, length: int, way: Way = _numpy) -> None:
    """In quiet memory, a write of `length` bytes is seen in each page that it touches, again and again."""
    with tracking(tracker, [region]) as (replica,):
        replica.settle()
        pages = slice(offset // region.page_size, -(-(offset + length) // region.page_size))
        for value in (0x5A, 0xA5):
            write(region, offset, bytes([value]) * length, way)
            dirty = np.zeros(region.size // region.page_size, np.bool_)
            tracker.collect(region, dirty)
            assert dirty[pages].all(), f"{length} bytes written at {offset} were not seen in all their pages"
            replica.bytes[:] = tracker.pages(region)
        replica.settle()


def check_write_after_collect(tracker: DirtyTracker, region: MemoryRegion) -> None:
    """A write between collecting and sending belongs to the next round: marks are cleared before pages are read."""
    with tracking(tracker, [region]) as (replica,):
        for value in (1, 2, 3):
            write(region, 0, bytes([value]) * 10)
            assert replica.collect() > 0
            write(region, 0, bytes([value + 100]) * 10)
            replica.send()
        replica.settle()


def check_there_and_back(tracker: DirtyTracker, region: MemoryRegion) -> None:
    """A page that is changed, sent and changed back reaches the other side as it is in the end."""
    write(region, 0, b"A" * 100)
    tracker.start([region])
    try:
        replica = Replica(tracker, region)
        write(region, 0, b"B" * 100)
        replica.send()
        write(region, 0, b"A" * 100)
        replica.settle()
        write(region, 0, b"C" * 100)
        replica.collect()
        write(region, 0, b"A" * 100)
        replica.send()
        replica.settle()
    finally:
        tracker.stop()


def check_scattered(tracker: DirtyTracker, region: MemoryRegion) -> None:
    """Very many ranges at once: every other page is written, and each is seen."""
    pages = region.size // region.page_size
    with tracking(tracker, [region]) as (replica,):
        replica.settle()
        for first in (0, 1):
            region.view.reshape(pages, -1)[first::2, 7] += 1
            if isinstance(region, MarkingBlock):
                for page in range(first, pages, 2):
                    region.mark_dirty(page * region.page_size, 8)
            assert replica.collect() >= pages // 2, "some of very many scattered pages were not seen"
            replica.send()
        replica.settle()


def check_regions_apart(tracker: DirtyTracker, one: MemoryRegion, other: MemoryRegion) -> None:
    """What is written to one region is seen there, and a collect of one forgets nothing of the other."""
    with tracking(tracker, [one, other]) as (first, second):
        first.settle()
        second.settle()
        write(one, 0, b"one")
        write(other, other.size - 5, b"other")
        assert first.round() > 0
        assert second.round() > 0
        write(other, 0, b"more")
        assert first.round() == 0
        assert second.round() > 0
        first.settle()
        second.settle()


def check_ends(make: Callable[[], DirtyTracker], region: MemoryRegion) -> None:
    """After the stop the memory is as before, another tracker can have it, and the old one says no."""
    dirty = np.zeros(region.size // region.page_size, np.bool_)
    for value in (1, 2):
        tracker = make()
        with tracking(tracker, [region]) as (replica,):
            write(region, 0, bytes([value]) * 5000)
            assert replica.round() > 0
            replica.settle()
        tracker.stop()
        write(region, 4000, bytes([value + 10]) * 200)
        assert region.view[4000] == value + 10
        try:
            tracker.collect(region, dirty)
        except WhimbrelError:
            pass
        else:
            raise AssertionError("a stopped tracker still answers")
    make().stop()


class DirtyTrackerConformance(ABC):
    """Inherit it and say how to make your tracker; `backings` are the kinds of memory that it can track."""

    backings: ClassVar[tuple[str, ...]] = ("anonymous",)
    """Of "anonymous", "memfd" and "file"."""
    writers_mark: ClassVar[bool] = False
    """Whether the tracker needs writers to mark what they wrote."""

    @abstractmethod
    def make(self) -> DirtyTracker:
        """A tracker that has not been started."""

    @contextmanager
    def regions(self, backing: str, sizes: Sequence[int], folder: Path) -> Iterator[list[MemoryRegion]]:
        """Fresh memory that nobody has touched, one region for each of `sizes` (bytes)."""
        ram = Ram(f"file:{folder}" if backing == "file" else backing)
        kind = MarkingBlock if self.writers_mark else RamBlock
        try:
            blocks = [ram.add(f"region {number}", size) for number, size in enumerate(sizes)]
            yield [kind(block.name, block.area) for block in blocks]
        finally:
            ram.close()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each check for each kind of memory, and where it matters in each way of writing."""
        if "backing" in metafunc.fixturenames:
            metafunc.parametrize("backing", self.backings)
        if "way" in metafunc.fixturenames:
            metafunc.parametrize("way", WAYS.values(), ids=WAYS)

    def test_keeps_up_with_a_writer(self, backing: str, way: Way, tmp_path: Path) -> None:
        """One writer, one way of writing."""
        with self.regions(backing, [1 << 20], tmp_path) as (region,):
            check_keeps_up(self.make(), region, [way])

    def test_keeps_up_with_two_writers(self, backing: str, tmp_path: Path) -> None:
        """Two writers at once, in all ways."""
        with self.regions(backing, [1 << 20], tmp_path) as (region,):
            check_keeps_up(self.make(), region, list(WAYS.values()), writers=2)

    def test_keeps_up_on_populated_memory(self, backing: str, tmp_path: Path) -> None:
        """Memory that was all written before, in huge pages where the host has them."""
        with self.regions(backing, [4 << 20], tmp_path) as (region,):
            region.view[:] = 7
            check_keeps_up(self.make(), region, [_numpy, _recv_into])

    def test_sees_the_first_write_to_a_page(self, backing: str, way: Way, tmp_path: Path) -> None:
        """The page has never been touched when the tracking starts."""
        with self.regions(backing, [1 << 20], tmp_path) as (region,):
            check_sees(self.make(), region, 100 * region.page_size + 5, 1, way)

    def test_sees_both_pages_of_a_straddling_write(self, backing: str, way: Way, tmp_path: Path) -> None:
        """One byte in each of two pages."""
        with self.regions(backing, [1 << 20], tmp_path) as (region,):
            check_sees(self.make(), region, 9 * region.page_size - 1, 2, way)

    def test_sees_the_first_and_the_last_byte(self, backing: str, tmp_path: Path) -> None:
        """The borders of the region, and all of it."""
        with self.regions(backing, [1 << 18], tmp_path) as (region,):
            check_sees(self.make(), region, 0, 1)
            check_sees(self.make(), region, region.size - 1, 1)
            check_sees(self.make(), region, 0, region.size)

    def test_a_write_after_the_collect_is_in_the_next(self, backing: str, tmp_path: Path) -> None:
        """Marks are cleared before pages are read."""
        with self.regions(backing, [1 << 18], tmp_path) as (region,):
            check_write_after_collect(self.make(), region)

    def test_there_and_back(self, backing: str, tmp_path: Path) -> None:
        """A write that is taken back around the sending."""
        with self.regions(backing, [1 << 18], tmp_path) as (region,):
            check_there_and_back(self.make(), region)

    def test_very_many_ranges(self, tmp_path: Path) -> None:
        """More ranges than fit into one answer of the kernel's."""
        with self.regions(self.backings[0], [48 << 20], tmp_path) as (region,):
            check_scattered(self.make(), region)

    def test_regions_are_apart(self, backing: str, tmp_path: Path) -> None:
        """Two regions under one tracker."""
        with self.regions(backing, [1 << 18, 1 << 20], tmp_path) as (one, other):
            check_regions_apart(self.make(), one, other)

    def test_one_tracker_after_another(self, backing: str, tmp_path: Path) -> None:
        """The stop ends it, and leaves the memory to others."""
        with self.regions(backing, [1 << 18], tmp_path) as (region,):
            check_ends(self.make, region)
