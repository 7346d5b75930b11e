"""A guest that has arrived tells its network: how often, how far apart, and that nothing waits for it."""

from __future__ import annotations

import logging
import threading

import pytest

from whimbrel import LoopGuest, Parameters
from whimbrel.migration.announce import Announcer, pauses

LONG = 60.0


def schedule(**parameters):
    return [round(pause * 1000) for pause in pauses(Parameters(**parameters))]


def test_the_schedule_is_qemus():
    assert schedule() == [0, 50, 150, 250, 350]
    assert schedule(announce_rounds=8) == [0, 50, 150, 250, 350, 450, 550, 550]
    assert schedule(announce_initial=10, announce_step=0, announce_rounds=3) == [0, 10, 10]
    assert schedule(announce_initial=900, announce_max=300, announce_rounds=3) == [0, 300, 300]
    assert schedule(announce_rounds=1) == [0]
    assert schedule(announce_rounds=0) == []


class Network:
    """An injected wait that only notes, and a guest that notes as well."""

    def __init__(self, stop_at=None, fail_at=None):
        self.log = []
        self.stop_at, self.fail_at = stop_at, fail_at
        self.guest = LoopGuest(lambda: None, announce=self.announce)

    def announce(self):
        self.log.append("here")
        if self.log.count("here") == self.fail_at:
            raise OSError("no network")

    def wait(self, seconds):
        self.log.append(round(seconds * 1000))
        return len(self.log) == self.stop_at

    def run(self, **parameters):
        announcer = Announcer(self.guest, Parameters(**parameters), wait=self.wait)
        announcer.start()
        announcer._thread.join(LONG)
        announcer.close()
        return self.log


def test_it_announces_after_each_pause():
    assert Network().run() == [0, "here", 50, "here", 150, "here", 250, "here", 350, "here"]
    assert Network().run(announce_rounds=0) == []


def test_it_ends_in_the_middle_of_a_pause():
    assert Network(stop_at=5).run() == [0, "here", 50, "here", 150]


def test_one_that_fails_is_not_asked_again(caplog):
    with caplog.at_level(logging.CRITICAL, "whimbrel"):
        assert Network(fail_at=2).run() == [0, "here", 50, "here"]


def test_closing_does_not_wait_for_the_pauses():
    here = threading.Event()
    guest = LoopGuest(lambda: None, announce=here.set)
    announcer = Announcer(guest, Parameters(announce_initial=100_000, announce_max=100_000))
    announcer.start()
    assert here.wait(LONG)
    announcer.close()
    assert not announcer._thread.is_alive()
    announcer.close()


def test_closing_from_inside_of_an_announcement():
    closed = threading.Event()

    def announce():
        announcer.close()
        closed.set()

    announcer = Announcer(LoopGuest(lambda: None, announce=announce), Parameters())
    announcer.start()
    assert closed.wait(LONG)
    announcer._thread.join(LONG)
    assert not announcer._thread.is_alive()


@pytest.mark.parametrize(("start", "expected"), [(None, 3), (False, 0)])
def test_an_arrival_announces_if_the_guest_runs(make_pair, churning, settings, start, expected):
    settings.parameters.update({"announce_rounds": 3, "announce_initial": 1, "announce_step": 1})
    build = churning({"a": 3})
    pair = make_pair(build, settings=settings)
    pair.source.start()
    incoming, _ = pair.run(start=start)
    if incoming._holding._announcer is not None:
        incoming._holding._announcer._thread.join(LONG)
    assert len(build.destination.announced) == expected
    assert build.source.announced == []


def test_closing_the_machine_ends_the_announcing(make_pair, churning, settings):
    settings.parameters.update({"announce_rounds": 100, "announce_initial": 100_000, "announce_max": 100_000})
    build = churning({"a": 3})
    pair = make_pair(build, settings=settings)
    pair.source.start()
    pair.run()
    pair.destination.close()
    assert len(build.destination.announced) <= 1
