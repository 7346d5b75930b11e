"""max-bandwidth and downtime-limit: they hold, and they can be changed while a migration runs."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from whimbrel import Machine, MigrationStatus
from whimbrel.errors import StateError
from whimbrel.events import RoundFinished
from whimbrel.migration import outgoing as outgoing_module
from whimbrel.stream import Pacer
from whimbrel.testing.faults import ChannelWrapper

LONG = 60.0
MIB = 1 << 20
ALLOWED = 1.05  # the bandwidth holds within 5 %
WINDOW = 0.1  # seconds; what one window grants may go at once


class Timed(ChannelWrapper):
    """Notes when how many bytes had gone."""

    def __init__(self, inner, clock):
        super().__init__(inner)
        self.clock = clock
        self.samples = []

    def send(self, data):
        super().send(data)
        before = self.samples[-1][1] if self.samples else 0
        self.samples.append((self.clock(), before + memoryview(data).nbytes))

    def rates(self, first, last, seconds=1.0):
        """The rates over stretches of `seconds` at least that lie between the times `first` and `last`."""
        samples = [sample for sample in self.samples if first <= sample[0] <= last]
        for (began, before), (ended, after) in itertools.combinations(samples[:: max(1, len(samples) // 200)], 2):
            if ended - began >= seconds:
                yield (after - before) / (ended - began), ended - began


def timed(pair, clock):
    transport = pair.source.plugins.transport("memory").create()
    wrap = transport.on_connect
    channels = []

    def on_connect(channel):
        channels.append(Timed(wrap(channel), clock))
        return channels[-1]

    transport.on_connect = on_connect
    return channels


class Full:
    """Builds machines with `size` bytes that are nowhere zero, and no guest."""

    def __init__(self, size):
        self.size = size

    def __call__(self, settings, plugins):
        machine = Machine("full", settings=settings, plugins=plugins)
        self.last = machine.ram.add("a", self.size)
        return machine


class VirtualTime:
    """A clock that only waiting moves, put under the pacer: sending takes no time by it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.at = []  # (time, action), ascending

        def pacer(**arguments):
            arguments["wait"] = self.wait
            return Pacer(**arguments, clock=self)

        monkeypatch.setattr(outgoing_module, "Pacer", pacer)

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds
        while self.at and self.at[0][0] <= self.now:
            self.at.pop(0)[1]()
        return False


@pytest.fixture
def virtual(monkeypatch):
    return VirtualTime(monkeypatch)


def filled(pair):
    pair.source.ram["a"].view[:] = np.random.default_rng(1).integers(1, 256, len(pair.source.ram["a"].view), np.uint8)


def test_bandwidth_holds_on_both_sides(make_pair, settings, virtual):
    settings.parameters.max_bandwidth = 8 * MIB
    pair = make_pair(Full(40 * MIB), settings=settings)
    filled(pair)
    channels = timed(pair, virtual)
    _, outgoing = pair.run()
    assert outgoing.error is None
    samples = channels[0].samples
    assert 4.8 <= samples[-1][0] <= 5.2  # 40 MiB at 8 MiB/s, by the virtual clock
    rates = [rate for rate, _ in channels[0].rates(0.0, samples[-1][0] - WINDOW, seconds=2.0)]
    assert len(rates) > 100
    assert max(rates) <= 8 * MIB * (1 + WINDOW / 2.0) * 1.001  # the window that both ends of a stretch share
    assert min(rates) >= 8 * MIB * (1 - WINDOW / 2.0) * 0.999
    mean = samples[-1][1] / (samples[-1][0] + WINDOW)
    assert mean == pytest.approx(8 * MIB, rel=0.05)
    pair.destination.stop()
    assert np.array_equal(pair.source.ram["a"].view, pair.destination.ram["a"].view)


def test_bandwidth_can_be_raised_lowered_and_lifted_while_it_runs(make_pair, settings, virtual):
    settings.parameters.max_bandwidth = 4 * MIB
    pair = make_pair(Full(64 * MIB), settings=settings)
    filled(pair)
    channels = timed(pair, virtual)
    limits = [(2.0, 16 * MIB), (4.0, 2 * MIB), (6.0, 0)]
    virtual.at = [
        (at, lambda limit=limit: setattr(settings.parameters, "max_bandwidth", limit)) for at, limit in limits
    ]
    _, outgoing = pair.run()
    assert outgoing.error is None
    samples = channels[0].samples

    def sent_between(first, last):
        return sum(
            after[1] - before[1]
            for before, after in itertools.pairwise([(0.0, 0), *samples])
            if first <= after[0] < last
        )

    for (began, limit), ended in zip([(0.0, 4 * MIB), *limits[:2]], [2.0, 4.0, 6.0], strict=True):
        # One window on either end of a phase belongs to its neighbour.
        assert sent_between(began + 0.15, ended - 0.05) == pytest.approx(limit * (ended - began - 0.2), rel=0.06)
    assert samples[-1][0] == pytest.approx(6.0, abs=0.15)  # and then all at once


def test_bandwidth_holds_by_the_clock_on_the_wall(make_pair, settings):
    """One run in real time, with an upper bound alone: how fast it could be is the host's business."""
    limit = 8 * MIB
    settings.parameters.max_bandwidth = limit
    pair = make_pair(Full(12 * MIB), settings=settings)
    filled(pair)
    channels = timed(pair, time.monotonic)
    _, outgoing = pair.run()
    assert outgoing.error is None
    samples = channels[0].samples
    seconds = samples[-1][0] - samples[0][0]
    assert seconds >= 1.0
    assert samples[-1][1] <= ALLOWED * limit * (seconds + WINDOW)


def test_the_blackout_is_not_held_back(make_pair, churning, settings, virtual):
    """While the guest stands still every millisecond counts, and what is left has been judged to fit."""
    settings.parameters.update({"max_bandwidth": 100_000, "downtime_limit": 2_000_000})
    build = churning({"a": 30})
    pair = make_pair(build, settings=settings)
    pair.source.start()
    _, outgoing = pair.run()
    assert outgoing.error is None
    assert outgoing.info.downtime < 2_000_000
    build.destination.wait_steps(5)


# ------------------------------------------------------------------------------------------------------- downtime-limit


@pytest.mark.slow
def test_what_does_not_converge_completes_when_the_limit_is_raised(make_pair, churning, settings):
    settings.parameters.update({"max_bandwidth": 500_000, "downtime_limit": 1})
    build = churning({"a": 40}, rest=0)
    pair = make_pair(build, settings=settings)
    many = threading.Event()
    rounds = []

    def look(event):
        if isinstance(event, RoundFinished):
            rounds.append(event.round)
            if len(rounds) >= 4:
                many.set()

    pair.source.notifiers.add(look)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert many.wait(LONG)
    assert outgoing.status is MigrationStatus.ACTIVE
    assert all(round_.expected_downtime > round_.downtime_limit == 0.001 for round_ in rounds)
    settings.parameters.downtime_limit = 2_000_000
    info = outgoing.wait(LONG)
    incoming.wait(LONG)
    assert rounds[-1].downtime_limit == 2000.0
    assert info.rounds > 4
    build.destination.wait_steps(5)
    pair.destination.stop()
    build.destination.check()


def test_a_limit_of_nothing_waits_for_a_round_that_leaves_nothing(make_pair, churning, settings):
    settings.parameters.downtime_limit = 0
    build = churning({"a": 10}, rest=0)
    pair = make_pair(build, settings=settings)
    rounds, enough = [], threading.Event()

    def look(event):
        if isinstance(event, RoundFinished):
            rounds.append(event.round.remaining)
        if len(rounds) >= 5 or getattr(event, "new", "") == "completed":
            enough.set()

    pair.source.notifiers.add(look)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert enough.wait(LONG)
    with suppress(StateError):  # it is just being handed over
        pair.source.stop()  # now nobody writes, unless it has gone already
    assert outgoing.wait(LONG).status is MigrationStatus.COMPLETED
    incoming.wait(LONG)
    assert all(rounds[:-1])
    assert rounds[-1] == 0
    pair.destination.stop()
    build.destination.check()
