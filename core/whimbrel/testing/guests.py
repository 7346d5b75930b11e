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
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import Guest
from whimbrel.errors import StateError
from whimbrel.machine import GuestMemory, LoopGuest, Ram
from whimbrel.machine.dirty import choose, with_guests
from whimbrel.machine.dirty.plugin import whimbrel_dirty_trackers
from whimbrel.testing.trackers import tracking

if TYPE_CHECKING:
    import pytest

__all__ = ["GuestConformance", "Observed", "Probe", "Word", "probe", "probe_of"]

BLOCK: Final = "probe"
FIELD: Final = "field"
FIELD_SIZE: Final = 1 << 20  # bytes
_PATIENCE: Final = 30.0  # seconds; only a guest that hangs ever takes so long
_LOOK: Final = 0.0005  # seconds between two looks at a word that somebody else writes


class Word(IntEnum):
    """What the words of the block mean."""

    STEPS = 0  # done
    INSIDE = 1  # a step is running
    POWERED = 2  # how often
    ANNOUNCED = 3  # how often
    HOLD = 4  # an order: stay inside of the step while this is 1
    FAIL = 5  # an order: raise at the end of the next step


class Probe:
    """The workload of the suite: each step writes to a place of the field and counts. Runs on the guest's thread."""

    def __init__(self, words: npt.NDArray[np.uint64], field: npt.NDArray[np.uint64]) -> None:
        self._words, self._field = words, field

    def step(self) -> None:
        """Write, count, and heed the orders."""
        words = self._words
        words[Word.INSIDE] = 1
        number = int(words[Word.STEPS])
        self._field[number * 40503 % self._field.size] += np.uint64(number + 1)
        while words[Word.HOLD]:
            threading.Event().wait(_LOOK)
        fails = bool(words[Word.FAIL])
        words[Word.STEPS] = number + 1
        words[Word.INSIDE] = 0
        if fails:
            raise ZeroDivisionError("a bug of the guest's")

    def power_on(self) -> None:
        """Fill the field."""
        self._field[:] = np.arange(self._field.size)
        self._words[Word.POWERED] += np.uint64(1)

    def announce(self) -> None:
        """Count it."""
        self._words[Word.ANNOUNCED] += np.uint64(1)


def probe_of(ram: Ram) -> Probe:
    """The workload over a machine's RAM, for a guest that runs in this process."""
    return Probe(ram[BLOCK].array(len(Word), "uint64"), ram[FIELD].array(dtype="uint64"))


def probe(memory: GuestMemory) -> LoopGuest:
    """Make the guest of a `ProcessGuest` that runs the workload."""
    running = Probe(memory.array(BLOCK, len(Word), "uint64"), memory.array(FIELD, dtype="uint64"))
    return LoopGuest(running.step, power_on=running.power_on, announce=running.announce)


@attrs.define(eq=False)
class Observed:
    """A guest that is ready to run, its memory, and what it has told of its failures."""

    guest: Guest
    ram: Ram
    words: npt.NDArray[np.uint64]
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

    def check_rests(self) -> None:
        """Nothing runs: no step is inside, and memory stands still."""
        assert not self.words[Word.INSIDE], "a step was running when stop had returned"
        before = [block.view.copy() for block in self.ram]
        threading.Event().wait(2 * _LOOK)  # time for whatever should not run; that nothing does needs no waiting
        for block, then in zip(self.ram, before, strict=True):
            changed = np.flatnonzero(block.view != then)
            assert not changed.size, f"byte {changed[0]} of {block.name!r} was written after stop had returned"


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

    @contextmanager
    def observed(self) -> Iterator[Observed]:
        """A guest that is ready, with memory; in the end it must have left nothing behind."""
        ram = Ram(self.memory)
        words = ram.array(BLOCK, len(Word), "uint64")
        ram.add(FIELD, FIELD_SIZE)
        before = _Holdings.now()
        seen = Observed(self.make(ram), ram, words)
        seen.guest.on_failure = seen.heard
        try:
            seen.guest.prepare(list(ram))
            yield seen
        finally:
            words[Word.HOLD] = 0
            seen.guest.close()
            seen.guest.close()
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
