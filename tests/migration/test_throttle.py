"""auto-converge: QEMU's rule; a guest that never converged completes under it; it is let go of whatever happens."""

from __future__ import annotations

import threading
import time

import attrs
import pytest

from whimbrel import LoopGuest, Machine, MigrationStatus
from whimbrel.errors import GuestError, MigrationError
from whimbrel.events import GuestThrottled, Round, Stalled
from whimbrel.migration.throttle import AutoConverge
from whimbrel.settings import Parameters
from whimbrel.testing.faults import Faults

from .simulated import MIB, Link, World, saw, steady

LONG = 60.0
PAGE = 4096

ROUND = Round(
    number=2,
    seconds=2.0,
    sent_bytes=1_000_000,
    remaining=900_000,
    previous_remaining=1_000_000,
    total=1 << 30,
    bandwidth=500_000.0,
    dirty_rate=0.0,
    expected_downtime=1.8,
    downtime_limit=0.3,
)


def wrote(share, **more):
    """A round in which the guest wrote `share` of what was sent."""
    return attrs.evolve(ROUND, dirty_rate=share * ROUND.sent_bytes / ROUND.seconds, **more)


@pytest.fixture
def applied():
    return []


@pytest.fixture
def parameters():
    return Parameters()


@pytest.fixture
def rule(parameters, applied):
    return AutoConverge(parameters, applied.append)


# ------------------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    ("shares", "steps"),
    [
        ([0.51], []),
        ([0.51, 0.51], [20]),
        ([0.50, 0.50, 0.50], []),  # at the threshold is not above it
        ([0.51, 0.1, 0.51], [20]),  # one behind the other or not
        ([0.9] * 5, [20, 30]),
        ([0.9] * 16, [20, 30, 40, 50, 60, 70, 80, 90]),
        ([0.9] * 18, [20, 30, 40, 50, 60, 70, 80, 90, 99]),
        ([0.9] * 40, [20, 30, 40, 50, 60, 70, 80, 90, 99]),
        ([30.0] * 4, [20, 30]),
    ],
)
def test_the_steps(rule, applied, shares, steps):
    for share in shares:
        rule.heard(wrote(share))
    assert applied == steps
    assert rule.percent == (steps or [0])[-1]


def test_the_steps_are_the_parameters(rule, parameters, applied):
    parameters.update({"cpu-throttle-initial": 5, "cpu-throttle-increment": 40, "max-cpu-throttle": 60})
    parameters.throttle_trigger_threshold = 80
    for _ in range(10):
        rule.heard(wrote(0.79))
    assert applied == []
    for _ in range(10):
        rule.heard(wrote(0.81))
    assert applied == [5, 45, 60]
    parameters.max_cpu_throttle = 30
    for _ in range(2):
        rule.heard(wrote(0.81))
    assert applied == [5, 45, 60, 30]


def test_towards_the_end_the_steps_become_smaller(rule, parameters, applied):
    """Of the 40 % that the guest has left, 0.5 / 0.55 would do: that is 4 % less."""
    parameters.update({"cpu-throttle-initial": 60, "cpu-throttle-tailslow": True})
    for _ in range(2):
        rule.heard(wrote(0.9))
    for _ in range(2):
        rule.heard(wrote(0.55))
    for _ in range(2):
        rule.heard(wrote(0.501))  # less than one per cent would be no step at all
    for _ in range(2):
        rule.heard(wrote(5.0))  # never more than the increment
    assert applied == [60, 63, 64, 74]


def test_the_first_round_and_those_that_fit_do_not_count(rule, applied):
    rule.heard(wrote(10.0, number=1))
    rule.heard(wrote(10.0))
    for _ in range(10):
        rule.heard(wrote(10.0, expected_downtime=0.2))
    assert applied == []
    rule.heard(wrote(10.0))
    assert applied == [20]


def test_release_is_once(rule, applied):
    rule.release()
    assert applied == []
    for _ in range(2):
        rule.heard(wrote(1.0))
    rule.release()
    rule.release()
    assert applied == [20, 0]


def test_a_guest_that_raises_when_throttled_is_released_all_the_same():
    applied = []

    def apply(percent):
        applied.append(percent)
        if percent:
            raise ZeroDivisionError("a bug of the guest's")

    rule = AutoConverge(Parameters(), apply)
    rule.heard(wrote(1.0))
    with pytest.raises(ZeroDivisionError):
        rule.heard(wrote(1.0))
    rule.release()
    assert applied == [20, 0]


class Slowed:
    """A guest made of numbers that gets as much of its time as the rule leaves it."""

    def __init__(self, written):
        self.written, self.rule, self.applied = written, None, []

    def throttle(self, parameters):
        self.rule = AutoConverge(parameters, self.applied.append)
        return self.rule

    def __call__(self, began, ended):
        return self.written(began, began + (ended - began) * (100 - self.rule.percent) / 100)


@pytest.mark.parametrize("tailslow", [False, True])
@pytest.mark.parametrize(
    "written",
    [steady(200 * MIB, 120 * MIB), steady(200 * MIB, 800 * MIB), saw(200 * MIB, [400 * MIB, 60 * MIB], 0.7)],
    ids=["a little too fast", "far too fast", "a saw"],
)
def test_a_guest_that_never_converged_does(written, tailslow):
    without = World(Link(100 * MIB), written)
    assert not without.run(most=100)
    guest = Slowed(written)
    world = World(Link(100 * MIB), guest, throttle=guest.throttle, cpu_throttle_tailslow=tailslow)
    assert world.run()
    assert world.downtime <= 0.3
    assert guest.applied == sorted(guest.applied)
    assert guest.applied[0] == 20


# ------------------------------------------------------------------------------------------------------------ real runs


class Recorded(LoopGuest):
    """Remembers how it was throttled."""

    def __init__(self, step):
        super().__init__(step)
        self.percents = []

    def throttle(self, percent):
        self.percents.append(percent)
        super().throttle(percent)


class Eager:
    """Builds machines whose guest goes over its memory far faster than the link; 99 per cent less would do."""

    PAGES = 150

    def __init__(self):
        self.built = []

    def __call__(self, settings, plugins):
        machine = Machine("eager", settings=settings, plugins=plugins)
        block = machine.ram.add("a", self.PAGES * PAGE)
        at = [0]

        def step():
            for _ in range(10):
                block.view[at[0] * PAGE] += 1
                block.mark_dirty(at[0] * PAGE, 1)
                at[0] = (at[0] + 1) % self.PAGES
            time.sleep(0.001)

        machine.guest = Recorded(step)
        self.built.append(machine)
        return machine


@pytest.fixture
def build():
    return Eager()


@pytest.fixture
def slow(settings):
    """Settings for a link of 4 MB/s, on which 58 pages may be left."""
    settings.parameters.update(
        {
            "max-bandwidth": 4_000_000,
            "avail-switchover-bandwidth": 4_000_000,
            "downtime-limit": 60,
            "cpu-throttle-increment": 60,
        }
    )
    settings.capabilities.auto_converge = True
    return settings


def heard(machine, kind):
    """A flag that is set when `machine` tells of an event of this kind."""
    flag = threading.Event()
    machine.notifiers.add(lambda event: isinstance(event, kind) and flag.set())
    return flag


def test_a_guest_that_would_not_converge_completes_and_runs_free_there(make_pair, build, slow):
    pair = make_pair(build, settings=slow)
    shown = []

    def look(event):
        if isinstance(event, GuestThrottled) and event.percent:
            shown.append(pair.source.migration.info.as_qmp().get("cpu-throttle-percentage"))

    pair.source.notifiers.add(look)
    pair.source.start()
    incoming, outgoing = pair.run()
    assert (outgoing.error, incoming.error) == (None, None)
    source, destination = (machine.guest for machine in build.built)
    assert source.percents[0] == 20
    assert source.percents[:-1] == sorted(source.percents[:-1])
    assert source.percents[-1] == 0
    assert source._throttle == 0
    assert destination.percents == []
    told = [event.percent for event in pair.source_events if isinstance(event, GuestThrottled)]
    assert told == source.percents
    assert shown
    assert set(shown) - {None} <= set(source.percents)
    assert outgoing.info.cpu_throttle == 0
    assert "cpu-throttle-percentage" not in outgoing.info.as_qmp()
    assert outgoing.info.decision == "within the limit"
    assert outgoing.info.switchover_expected <= 60


def test_without_it_the_same_guest_stalls(make_pair, build, slow):
    slow.capabilities.auto_converge = False
    pair = make_pair(build, settings=slow)
    stalled = heard(pair.source, Stalled)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert stalled.wait(LONG)
    assert outgoing.status is MigrationStatus.ACTIVE
    outgoing.cancel()
    outgoing.join()
    incoming.close()
    assert build.built[0].guest.percents == []


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_whatever_happens_the_guest_is_let_go_of(make_pair, build, slow, end):
    slow.parameters.downtime_limit = 1
    pair = make_pair(build, settings=slow)
    throttled = heard(pair.source, GuestThrottled)
    if end == "failed":
        pair.faults = Faults(cut_sent=3_000_000)  # some five times its memory
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert throttled.wait(LONG)
    if end == "cancelled":
        outgoing.cancel()
    with pytest.raises(MigrationError):
        outgoing.wait(LONG)
    assert outgoing.status == end
    guest = build.built[0].guest
    assert guest.percents[0] == 20
    assert guest.percents[-1] == guest._throttle == 0
    assert pair.source.run_state == "running"
    incoming.close()


def test_a_guest_that_cannot_be_throttled_fails_the_migration_while_that_is_free(make_pair, build, slow):
    pair = make_pair(build, settings=slow)
    guest, free = build.built[0].guest, LoopGuest.throttle

    def throttle(percent):
        if percent:
            raise GuestError("it has no brakes")
        free(guest, percent)

    guest.throttle = throttle
    pair.source.start()
    incoming, outgoing = pair.run()
    assert "it has no brakes" in str(outgoing.error)
    assert pair.source.run_state == "running"
    assert incoming.error is not None
