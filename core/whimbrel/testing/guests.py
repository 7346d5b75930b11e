"""The conformance suite for guests.

::

    class TestMine(GuestConformance):
        def make(self, ram):
            running = probe_of(ram)
            return MyGuest(running.step, running.power_on, running.announce)

The guest under test runs a `Probe`: a workload that writes down in RAM what it is at, and takes orders from there. So
it does not matter where the guest runs, in this process or in another; what it does is seen in the memory that would be
moved, which is what counts.

Nothing here sleeps in place of waiting: a check goes on when the words in memory say what it waits for.
"""

from __future__ import annotations

import gc
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Final
from unittest import SkipTest

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import Guest
from whimbrel.errors import StateError
from whimbrel.machine import GuestMemory, LoopGuest, Ram
from whimbrel.machine.dirty import choose, with_guests
from whimbrel.machine.dirty.plugin import whimbrel_dirty_trackers
from whimbrel.machine.drives import CHUNK, Drive, Drives, GuestDrives
from whimbrel.testing.trackers import tracking

if TYPE_CHECKING:
    import pytest

__all__ = ["GuestConformance", "Observed", "Probe", "Word", "probe", "probe_of"]

BLOCK: Final = "probe"
FIELD: Final = "field"
FIELD_SIZE: Final = 1 << 20  # bytes
DRIVE: Final = "disk0"
READ_ONLY: Final = "disk1"
DRIVE_SIZE: Final = (3 << 20) + 512  # bytes
_PATIENCE: Final = 30.0  # seconds; only a guest that hangs ever takes so long
_LOOK: Final = 0.0005  # seconds between two looks at a word that somebody else writes


class Word(IntEnum):
    """What the words of the block mean."""

    STEPS = 0  # done
    INSIDE = 1  # a step is running
    POWERED = 2  # how often
    ANNOUNCED = 3  # how often
    HOLD = 4  # an order: stay inside of the step while this is 1
    FAIL = 5  # an order: raise at the end of the next step; one of `Fault`


class Fault(IntEnum):
    """What the next step is to do wrong."""

    RAISES = 1
    WRITES_BEHIND_THE_END = 2  # of the drive
    WRITES_READ_ONLY = 3  # the drive that is so


class Probe:
    """The workload of the suite: each step writes to a place of the field and counts. Runs on the guest's thread.

    With `drives` it writes to a place of the drive too.
    """

    def __init__(
        self, words: npt.NDArray[np.uint64], field: npt.NDArray[np.uint64], drives: Drives | GuestDrives | None = None
    ) -> None:
        self._words, self._field = words, field
        self._drives = drives if drives is not None and DRIVE in drives else None

    def step(self) -> None:
        """Write, count, and heed the orders."""
        words = self._words
        words[Word.INSIDE] = 1
        number = int(words[Word.STEPS])
        self._field[number * 40503 % self._field.size] += np.uint64(number + 1)
        if self._drives is not None:
            drive = self._drives[DRIVE]
            drive.write(number * 40503 % (drive.size - 8), (number + 1).to_bytes(8, "big"))
        while words[Word.HOLD]:
            threading.Event().wait(_LOOK)
        fails = bool(words[Word.FAIL])
        self._do_wrong(int(words[Word.FAIL]))
        words[Word.STEPS] = number + 1
        words[Word.INSIDE] = 0
        if fails:
            raise ZeroDivisionError("a bug of the guest's")

    def power_on(self) -> None:
        """Fill the field."""
        self._field[:] = np.arange(self._field.size)
        if self._drives is not None:
            self._drives[DRIVE].write(0, b"powered on")
        self._words[Word.POWERED] += np.uint64(1)

    def announce(self) -> None:
        """Count it."""
        self._words[Word.ANNOUNCED] += np.uint64(1)

    def _do_wrong(self, fault: int) -> None:
        if fault >= Fault.WRITES_BEHIND_THE_END:
            assert self._drives is not None, "told to write to a drive that there is not"
            drive = self._drives[DRIVE if fault == Fault.WRITES_BEHIND_THE_END else READ_ONLY]
            drive.write(drive.size - 4 if fault == Fault.WRITES_BEHIND_THE_END else 0, bytes(8))


def probe_of(ram: Ram, drives: Drives | None = None) -> Probe:
    """The workload over a machine's RAM and drives, for a guest that runs in this process."""
    return Probe(ram[BLOCK].array(len(Word), "uint64"), ram[FIELD].array(dtype="uint64"), drives)


def probe(memory: GuestMemory) -> LoopGuest:
    """Make the guest of a `ProcessGuest` that runs the workload."""
    running = Probe(memory.array(BLOCK, len(Word), "uint64"), memory.array(FIELD, dtype="uint64"), memory.drives)
    return LoopGuest(running.step, power_on=running.power_on, announce=running.announce)


@attrs.define(eq=False)
class Observed:
    """A guest that is ready to run, its memory, and what it has told of its failures."""

    guest: Guest
    ram: Ram
    words: npt.NDArray[np.uint64]
    drives: Drives
    told: list[BaseException] = attrs.field(factory=list)
    _changed: threading.Condition = attrs.field(factory=threading.Condition)

    def heard(self, exc: BaseException) -> None:
        """Note a failure that the guest tells of."""
        with self._changed:
            self.told.append(exc)
            self._changed.notify_all()

    def wait_told(self) -> BaseException:
        """Wait until the guest has told of a failure."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.told, _PATIENCE), "on_failure was not called"
        return self.told[0]

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until the memory is so."""
        looks = threading.Event()
        for _ in range(int(_PATIENCE / _LOOK)):
            if condition():
                return
            looks.wait(_LOOK)
        raise AssertionError(f"{what}, and does not come to it")

    def wait_steps(self, more: int) -> None:
        """Wait until that many more steps were done from now on."""
        goal = int(self.words[Word.STEPS]) + more
        self.wait(lambda: int(self.words[Word.STEPS]) >= goal, f"the guest is to do {more} steps")

    def power_on(self) -> None:
        """Switch it on, as a machine does."""
        with self.drives.admitted():
            self.guest.power_on()

    def start(self) -> None:
        """Have it run, as a machine does."""
        self.drives.admit()
        self.guest.start()

    def stop(self) -> None:
        """Have it stand still, as a machine does."""
        self.guest.stop()
        self.drives.bar()

    def contents(self) -> npt.NDArray[np.uint8]:
        """All bytes of the drive."""
        data = np.empty(self.drives[DRIVE].size, np.uint8)
        self.drives[DRIVE].read_into(0, data.data)
        return data

    def check_rests(self) -> None:
        """Nothing runs: no step is inside, and memory stands still, and the drive."""
        assert not self.words[Word.INSIDE], "a step was running when stop had returned"
        before = [block.view.copy() for block in self.ram]
        drives_before = [self.contents()] if DRIVE in self.drives else []
        threading.Event().wait(2 * _LOOK)  # time for whatever should not run; that nothing does needs no waiting
        for block, then in zip(self.ram, before, strict=True):
            changed = np.flatnonzero(block.view != then)
            assert not changed.size, f"byte {changed[0]} of {block.name!r} was written after stop had returned"
        for contents in drives_before:
            changed = np.flatnonzero(self.contents() != contents)
            assert not changed.size, f"byte {changed[0]} of the drive was written after stop had returned"


@attrs.frozen
class _Holdings:
    """What this process holds that a guest might leave behind."""

    threads: frozenset[str]
    descriptors: int
    children: frozenset[int]

    @classmethod
    def now(cls) -> _Holdings:
        gc.collect()  # memory of earlier tests keeps its descriptor until it goes
        children = (path.read_text() for path in Path("/proc/self/task").glob("*/children"))
        return cls(
            frozenset(thread.name for thread in threading.enumerate()),
            len(list(Path("/proc/self/fd").iterdir())),
            frozenset(int(pid) for line in children for pid in line.split()),
        )


class GuestConformance(ABC):
    """Inherit it and say how to make your guest, which has to run a `Probe` over `ram`."""

    memory: ClassVar[str] = "anonymous"
    """The `[backends] memory` that the guest needs."""

    @abstractmethod
    def make(self, ram: Ram) -> Guest:
        """A guest that runs the workload that `probe_of(ram)` is."""

    def make_with_drives(self, ram: Ram, drives: Drives) -> Guest | None:  # noqa: ARG002 - some have none
        """A guest that runs the workload that `probe_of(ram, drives)` is; None for one that writes no drives.

        It is told of the drives by `use_drives` too.
        """
        return None

    @contextmanager
    def observed(self, *, with_drives: bool = False) -> Iterator[Observed]:
        """A guest that is ready, with memory; in the end it must have left nothing behind."""
        with TemporaryDirectory() as folder:
            yield from self._observed(Path(folder), with_drives=with_drives)

    def _observed(self, folder: Path, *, with_drives: bool) -> Iterator[Observed]:
        ram = Ram(self.memory)
        words = ram.array(BLOCK, len(Word), "uint64")
        ram.add(FIELD, FIELD_SIZE)
        before = _Holdings.now()
        drives = Drives(lambda: None)
        if with_drives:
            _add_drives(drives, folder)
        guest = self.make_with_drives(ram, drives) if with_drives else self.make(ram)
        if guest is None:
            drives.close()
            ram.close()
            raise SkipTest("this guest writes no drives")
        seen = Observed(guest, ram, words, drives)
        seen.guest.on_failure = seen.heard
        try:
            seen.guest.use_drives(list(drives))
            seen.guest.prepare(list(ram))
            yield seen
        finally:
            words[Word.HOLD] = 0
            seen.guest.close()
            seen.guest.close()
            drives.close()
            after = _Holdings.now()
            seen.guest.on_failure = None  # nobody is left in a circle, and the memory goes at once
            ram.close()
        assert after == before, f"the guest has left something behind: {before} before, {after} after"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run the checks on tracking under each tracker that needs no help."""
        if "tracker_name" in metafunc.fixturenames:
            metafunc.parametrize("tracker_name", ["userfaultfd", "compare"])

    def test_power_on_fills_the_machine_and_runs_nothing(self) -> None:
        """Once, before the first start."""
        with self.observed() as seen:
            assert not seen.words[Word.POWERED], "nobody has powered it on"
            seen.guest.power_on()
            assert seen.words[Word.POWERED] == 1
            assert seen.ram[FIELD].array(dtype="uint64")[-1] == FIELD_SIZE // 8 - 1, "power_on returned too early"
            assert not seen.words[Word.STEPS], "no step may run before the first start"
            seen.check_rests()

    def test_it_runs_only_between_start_and_stop(self) -> None:
        """And goes on where it was."""
        with self.observed() as seen:
            seen.guest.power_on()
            last = 0
            for _ in range(25):
                seen.guest.start()
                seen.wait_steps(3)
                seen.guest.stop()
                seen.check_rests()
                assert seen.words[Word.STEPS] >= last + 3
                last = int(seen.words[Word.STEPS])
            assert seen.words[Word.POWERED] == 1
            assert seen.guest.failure is None
            assert not seen.told

    def test_a_machine_that_arrived_is_started_without_power(self) -> None:
        """Its memory has come from elsewhere."""
        with self.observed() as seen:
            seen.words[Word.STEPS] = 1000
            seen.guest.start()
            seen.wait_steps(3)
            seen.guest.stop()
            assert not seen.words[Word.POWERED]
            assert seen.words[Word.STEPS] >= 1003

    def test_stopping_at_once_after_starting(self) -> None:
        """Whether a step has begun or not."""
        with self.observed() as seen:
            for _ in range(200):
                seen.guest.start()
                seen.guest.stop()
                assert not seen.words[Word.INSIDE]
            seen.check_rests()
            seen.guest.start()
            seen.wait_steps(1)
            seen.guest.stop()

    def test_stop_waits_for_the_end_of_the_step(self) -> None:
        """A step that takes long is not cut off, and stop does not return before."""
        with self.observed() as seen:
            seen.words[Word.HOLD] = 1
            seen.guest.start()
            seen.wait(lambda: seen.words[Word.INSIDE], "a step is to begin")
            stopping = threading.Thread(target=seen.guest.stop)
            stopping.start()
            stopping.join(0.05)
            assert stopping.is_alive(), "stop returned while a step was running"
            seen.words[Word.HOLD] = 0
            stopping.join(_PATIENCE)
            assert not stopping.is_alive(), "the step has ended, and stop does not return"
            assert seen.words[Word.STEPS] == 1
            seen.check_rests()

    def test_throttled_it_runs_and_stops_as_ever(self) -> None:
        """At every share, before the start and behind it."""
        with self.observed() as seen:
            seen.guest.throttle(50)
            seen.guest.start()
            for percent in (99, 20, 0):
                seen.guest.throttle(percent)
                seen.wait_steps(2)
            seen.guest.throttle(99)
            seen.guest.stop()
            seen.check_rests()
            seen.guest.throttle(0)
            seen.guest.start()
            seen.wait_steps(2)
            seen.guest.stop()

    def test_it_announces_while_it_runs(self) -> None:
        """As often as it is asked to."""
        with self.observed() as seen:
            seen.guest.start()
            for _ in range(3):
                seen.guest.announce()
            assert seen.words[Word.ANNOUNCED] == 3
            seen.guest.stop()

    def test_a_failure_is_told_once(self) -> None:
        """With the guest's own words, and then it never runs again."""
        with self.observed() as seen:
            seen.guest.start()
            seen.wait_steps(1)
            seen.words[Word.FAIL] = 1
            told = seen.wait_told()
            assert seen.guest.failure is told
            assert "a bug of the guest's" in str(told)
            seen.guest.stop()  # as a machine does that has not heard yet
            seen.check_rests()
            seen.words[Word.FAIL] = 0
            why = ""
            try:
                seen.guest.start()
            except StateError as exc:
                why = str(exc)
            assert "a bug of the guest's" in why, "a guest that has failed was started again, or does not say why not"
            seen.check_rests()
        assert len(seen.told) == 1, "on_failure was called more than once"

    def test_a_failure_in_the_last_step_is_known_when_stop_returns(self) -> None:
        """Or a machine whose guest has failed would be moved as if it had not."""
        with self.observed() as seen:
            seen.words[Word.HOLD] = seen.words[Word.FAIL] = 1
            seen.guest.start()
            seen.wait(lambda: seen.words[Word.INSIDE], "a step is to begin")
            stopping = threading.Thread(target=seen.guest.stop)
            stopping.start()
            seen.words[Word.HOLD] = 0
            stopping.join(_PATIENCE)
            assert not stopping.is_alive(), "the step has failed, and stop does not return"
            assert seen.guest.failure is not None, "stop returned, and the failure is not known"
            assert seen.wait_told() is seen.guest.failure

    def test_it_may_be_closed_without_having_run(self) -> None:
        """Twice, and nothing is left."""
        with self.observed() as seen:
            seen.guest.close()
            assert not seen.words[Word.STEPS]

    def test_no_write_is_lost(self, tracker_name: str) -> None:
        """Rounds are sent while it writes all the time, and the copy is perfect in the end."""
        with self.observed() as seen:
            seen.guest.power_on()
            seen.guest.start()
            seen.wait_steps(1)
            specs = with_guests(whimbrel_dirty_trackers(), seen.guest.dirty_tracker())
            spec, _ = choose(tracker_name, specs, list(seen.ram))
            with tracking(spec.create(), list(seen.ram)) as replicas:
                for number in range(30):
                    seen.wait_steps(2)
                    new = [replica.round() for replica in replicas]
                    assert all(new), f"round {number}: the guest wrote, and no page is dirty"
                seen.guest.stop()
                for replica in replicas:
                    replica.settle()

    def test_drives_are_written_only_between_start_and_stop(self) -> None:
        """And while it powers on."""
        with self.observed(with_drives=True) as seen:
            seen.power_on()
            assert bytes(seen.contents()[:10]) == b"powered on"
            for _ in range(10):
                seen.start()
                seen.wait_steps(3)
                seen.stop()
                seen.check_rests()
            last = int(seen.words[Word.STEPS]) - 1
            at = last * 40503 % (seen.drives[DRIVE].size - 8)
            assert int.from_bytes(bytes(seen.contents()[at : at + 8]), "big") == last + 1

    def test_no_write_to_a_drive_is_lost(self) -> None:
        """Rounds of a drive are sent while it writes all the time, and the copy is perfect in the end."""
        with self.observed(with_drives=True) as seen:
            drive = seen.drives[DRIVE]
            seen.power_on()
            seen.start()
            drive.track()
            replica = seen.contents()
            for number in range(30):
                seen.wait_steps(2)
                assert _catch_up(drive, replica), f"round {number}: the guest wrote, and no chunk is dirty"
            seen.stop()
            _catch_up(drive, replica)
            assert not drive.collect().any(), "nothing is written, and chunks are dirty"
            drive.untrack()
            different = np.flatnonzero(seen.contents() != replica)
            assert not different.size, f"byte {different[0]} of the drive was written, and not told of"

    def test_what_was_written_before_it_is_tracked_is_not_told_of(self) -> None:
        """Whoever tracks a drive reads all of it first."""
        with self.observed(with_drives=True) as seen:
            seen.start()
            seen.wait_steps(3)
            seen.stop()
            seen.drives[DRIVE].track()
            assert not seen.drives[DRIVE].collect().any()

    def test_a_write_behind_the_end_of_a_drive_is_the_guests_failure(self) -> None:
        """And nothing is written."""
        self._check_refused(Fault.WRITES_BEHIND_THE_END, DRIVE, "not inside of drive")

    def test_a_write_to_a_drive_that_is_read_only_is_the_guests_failure(self) -> None:
        """And nothing is written."""
        self._check_refused(Fault.WRITES_READ_ONLY, READ_ONLY, "is read-only")

    def _check_refused(self, fault: Fault, name: str, words: str) -> None:
        with self.observed(with_drives=True) as seen:
            image = Path(seen.drives[name].device.place)
            seen.start()
            seen.wait_steps(1)
            seen.words[Word.FAIL] = fault
            assert words in str(seen.wait_told())
            seen.stop()
            assert image.stat().st_size == DRIVE_SIZE, "the image has grown"
            assert name == DRIVE or not any(image.read_bytes()), "a drive that is read-only was written"


def _add_drives(drives: Drives, folder: Path) -> None:
    for name, read_only in ((DRIVE, False), (READ_ONLY, True)):
        path = folder / name
        path.touch()
        os.truncate(path, DRIVE_SIZE)
        drives.add(name, path, read_only)
    drives.acquire()


def _catch_up(drive: Drive, replica: npt.NDArray[np.uint8]) -> int:
    """Copy what was written since the last time; returns how many chunks that were."""
    dirty = np.flatnonzero(drive.collect())
    for number in dirty:
        start = int(number) * CHUNK
        drive.read_into(start, replica[start : start + CHUNK].data)
    return len(dirty)
