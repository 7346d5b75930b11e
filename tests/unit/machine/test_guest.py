"""Guests: safe points, throttling, failures."""

from __future__ import annotations

import itertools
import threading

import pytest

from whimbrel.errors import StateError
from whimbrel.machine import IdleGuest, LoopGuest

LONG = 20.0


class Steps:
    """A step that can be held in its middle, and that knows whether it is in there."""

    def __init__(self):
        self.entered, self.leave = threading.Event(), threading.Event()
        self.leave.set()
        self.inside = False
        self.count = 0
        self.changed = threading.Condition()

    def __call__(self):
        self.inside = True
        self.entered.set()
        assert self.leave.wait(LONG)
        with self.changed:
            self.count += 1
            self.changed.notify_all()
        self.inside = False

    def wait_for(self, more):
        """Wait for `more` further steps."""
        with self.changed:
            goal = self.count + more
            assert self.changed.wait_for(lambda: self.count >= goal, LONG)


@pytest.fixture
def steps():
    return Steps()


@pytest.fixture
def guest(steps):
    guest = LoopGuest(steps)
    yield guest
    steps.leave.set()
    if guest.failure is None:
        guest.stop()
    guest.close()
    assert "whimbrel-guest" not in {thread.name for thread in threading.enumerate()}


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name == "whimbrel-guest"]


def test_nothing_runs_before_the_first_start(guest, steps):
    assert not threads()
    guest.start()
    steps.wait_for(3)
    assert len(threads()) == 1


def test_stop_waits_for_the_end_of_the_step(guest, steps):
    steps.leave.clear()
    guest.start()
    assert steps.entered.wait(LONG)
    stopping = threading.Thread(target=guest.stop)
    stopping.start()
    stopping.join(0.05)
    assert stopping.is_alive()
    assert steps.inside
    steps.leave.set()
    stopping.join(LONG)
    assert not steps.inside
    assert steps.count == guest.steps == 1


def test_no_step_runs_between_stop_and_start():
    stopped, caught, ran = [False], [], []
    again = threading.Event()

    def step():
        before = stopped[0]
        ran.append(threading.get_ident())
        again.set()
        if before or stopped[0]:
            caught.append(len(ran))

    guest = LoopGuest(step)
    guest.start()
    for _ in range(100):
        assert again.wait(LONG)
        guest.stop()
        stopped[0] = True
        again.clear()
        count = len(ran)
        threading.Event().wait(0.0001)  # others may run; whatever they do, no step
        assert len(ran) == count
        stopped[0] = False
        guest.start()
    guest.stop()
    guest.close()
    assert len(ran) >= 100
    assert len(set(ran)) == 1
    assert not caught


def test_stopping_at_once_after_starting_is_safe(guest, steps):
    for _ in range(500):
        guest.start()
        guest.stop()
        assert not steps.inside
    before = steps.count
    guest.start()
    steps.wait_for(1)
    assert steps.count > before


def test_a_step_cannot_stop_its_own_guest():
    outcome = []
    done = threading.Event()

    def step():
        if not outcome:
            try:
                guest.stop()
            except StateError as exc:
                outcome.append(exc)
            done.set()

    guest = LoopGuest(step)
    guest.start()
    assert done.wait(LONG)
    guest.stop()
    guest.close()
    assert "wait for itself" in str(outcome[0])


def test_a_step_that_raises_ends_the_guest_and_is_told():
    told = []
    failed = threading.Event()

    def step():
        raise ZeroDivisionError("a bug of the guest's")

    guest = LoopGuest(step)
    guest.on_failure = lambda exc: (told.append((exc, guest.failure)), failed.set())
    guest.start()
    assert failed.wait(LONG)
    assert isinstance(guest.failure, ZeroDivisionError)
    assert told == [(guest.failure, guest.failure)]
    guest.stop()  # nothing runs, so it returns
    with pytest.raises(StateError, match="a bug of the guest's"):
        guest.start()
    guest.close()
    guest.close()


def test_even_a_step_that_exits_is_a_failure():
    failed = threading.Event()

    def step():
        raise SystemExit(3)

    guest = LoopGuest(step)
    guest.on_failure = lambda exc: failed.set()
    guest.start()
    assert failed.wait(LONG)
    assert isinstance(guest.failure, SystemExit)
    guest.close()


class Clocked:
    """A step that takes a set time of a clock that only it moves, and rests that are noted instead of waited for."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.rests = []
        self.guest = LoopGuest(self.step)
        monkeypatch.setattr("whimbrel.machine.guest.time.perf_counter", lambda: self.now)
        wait_for = self.guest._changed.wait_for

        def noted(predicate, timeout=None):
            if timeout is None:
                return wait_for(predicate)
            self.rests.append(timeout)
            return predicate()

        self.guest._changed.wait_for = noted
        self.seen = threading.Event()

    def step(self):
        self.now += 0.004
        if len(self.rests) >= 5:
            self.seen.set()


@pytest.mark.parametrize(("percent", "rest"), [(50, 0.004), (20, 0.001), (99, 0.396), (100, 0.396)])
def test_throttling_rests_after_each_step_for_its_share(monkeypatch, percent, rest):
    clocked = Clocked(monkeypatch)
    clocked.guest.throttle(percent)
    clocked.guest.start()
    assert clocked.seen.wait(LONG)
    clocked.guest.stop()
    clocked.guest.close()
    assert clocked.rests == [pytest.approx(rest)] * len(clocked.rests)


def test_stopping_takes_as_long_as_a_step(monkeypatch):
    assert IdleGuest().stopping_time() == 0.0
    clocked = Clocked(monkeypatch)
    assert clocked.guest.stopping_time() == 0.0
    clocked.guest.throttle(50)
    clocked.guest.start()
    assert clocked.seen.wait(LONG)
    clocked.guest.stop()
    clocked.guest.close()
    assert clocked.guest.stopping_time() == pytest.approx(0.004)  # without the rest behind it, which is cut short


def test_without_throttle_there_is_no_rest(monkeypatch):
    clocked = Clocked(monkeypatch)
    clocked.guest.throttle(50)
    clocked.guest.throttle(-3)
    clocked.guest.start()
    assert not clocked.seen.wait(0.05)
    clocked.guest.stop()
    clocked.guest.close()
    assert clocked.guest.steps > 0
    assert not clocked.rests


@pytest.mark.parametrize("wake", ["stop", "throttle"])
def test_a_long_rest_is_cut_short(monkeypatch, wake):
    # By the clock that it is shown a step works for an hour, so it would rest for four days.
    hours = itertools.count(step=3600.0)
    monkeypatch.setattr("whimbrel.machine.guest.time.perf_counter", lambda: next(hours))
    steps = Steps()
    guest = LoopGuest(steps)
    guest.throttle(99)
    guest.start()
    steps.wait_for(1)
    if wake == "throttle":
        assert steps.count == 1
        guest.throttle(0)
        steps.wait_for(10)
    guest.stop()
    guest.close()


def test_close_ends_the_thread_and_twice_is_fine(guest, steps):
    guest.start()
    steps.wait_for(1)
    guest.stop()
    guest.close()
    assert not threads()
    guest.close()


def test_power_on_and_announce_call_what_was_given():
    calls = []
    guest = LoopGuest(lambda: None, power_on=lambda: calls.append("on"), announce=lambda: calls.append("here"))
    guest.power_on()
    guest.announce()
    assert calls == ["on", "here"]
    bare = LoopGuest(lambda: None)
    bare.power_on()
    bare.announce()


def test_an_idle_guest_does_nothing():
    guest = IdleGuest()
    guest.power_on()
    guest.start()
    guest.throttle(50)
    guest.stop()
    guest.announce()
    guest.close()
    assert guest.failure is None
    assert not threads()
