"""Machines that are moved while their guest writes all the time arrive byte for byte."""

from __future__ import annotations

import pytest

from whimbrel import RunState, hookimpl
from whimbrel.errors import StateError
from whimbrel.testing.faults import Faults

LONG = 60.0
BLOCKS = {"small": 1, "odd": 37, "large": 700}


class AtLeast:
    """Makes a migration go through some rounds, in each of which the guest has written."""

    def __init__(self, rounds, build):
        self.rounds, self.build = rounds, build
        self.seen = []

    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        self.seen.append(round)
        if round.number < self.rounds:
            self.build.source.wait_steps(20)
            return False
        return None


def move(make_pair, build, settings, **more):
    """Move a running machine in three rounds at least, let it run on there and stop it."""
    choose = AtLeast(3, build)
    pair = make_pair(build, settings=settings, plugins=[choose], **more)
    pair.source.start()
    build.source.wait_steps(50)
    incoming, outgoing = pair.migrate()
    info = outgoing.wait(LONG)
    incoming.wait(LONG)
    assert pair.source.run_state is RunState.POSTMIGRATE
    at_source = build.source.counter.steps
    build.destination.wait_steps(50)
    pair.destination.stop()
    # What is claimed to have happened did: the guest wrote in each round, and went on at the other end.
    assert info.rounds == len(choose.seen) >= 3
    assert any(round_.remaining for round_ in choose.seen[:-1])
    assert info.ram.normal + info.ram.duplicate > sum(build.blocks.values())
    assert build.source.counter.steps == at_source
    assert build.destination.counter.steps >= at_source + 50
    assert (build.source.powered, build.destination.powered) == (1, 0)
    return pair, info


@pytest.mark.parametrize("memory", ["anonymous", "memfd", "file"])
@pytest.mark.parametrize(
    "tracker",
    [
        "userfaultfd",
        "compare",
        "manual",
    ],
)
def test_every_tracker_on_every_memory(make_pair, churning, settings, tmp_path, tracker, memory):
    other = settings.copy()
    for side, folder in ((settings, tmp_path / "source"), (other, tmp_path / "destination")):
        folder.mkdir()
        side.backends.dirty_tracker = tracker
        side.backends.memory = f"file:{folder}" if memory == "file" else memory
    build = churning(BLOCKS, rest=0)
    pair, info = move(make_pair, build, settings, destination_settings=other)
    build.destination.check()
    assert info.tracker == tracker
    assert {block.backing for machine in (pair.source, pair.destination) for block in machine.ram} == {memory}
    pair.close()
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "tcp:[::1]:0", "unix"])
def test_over_sockets(make_pair, churning, settings, tmp_path, uri):
    build = churning(BLOCKS, rest=0)
    move(make_pair, build, settings, uri=f"unix:{tmp_path}/socket" if uri == "unix" else uri)
    build.destination.check()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", [{"one": 1}, {"a": 1, "b": 2, "c": 1}, {"x" * 255: 2}, {"a": 4097}])
def test_blocks_of_any_size(make_pair, churning, settings, blocks):
    build = churning(blocks, rest=0)
    move(make_pair, build, settings)
    build.destination.check()


def test_a_machine_without_ram(make_pair, churning, settings):
    build = churning({})
    pair = make_pair(build, settings=settings)
    pair.source.start()
    build.source.wait_steps(10)
    _, outgoing = pair.run()
    assert outgoing.error is None
    build.destination.wait_steps(10)
    assert build.destination.counter.steps >= build.source.counter.steps + 10


def test_every_byte_alone(make_pair, churning, settings):
    build = churning({"a": 2, "b": 1})
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(crumbs=1)
    pair.source.start()
    build.source.wait_steps(10)
    pair.source.stop()
    _, outgoing = pair.run()
    assert outgoing.error is None
    assert pair.destination.run_state is RunState.PAUSED
    assert build.destination.counter.steps == build.source.counter.steps
    build.destination.check()


def test_zero_pages_travel_as_such(make_pair, churning, settings):
    build = churning({"a": 1000})
    pair = make_pair(build, settings=settings)
    pair.source.power_on()
    _, outgoing = pair.run()
    assert (outgoing.info.ram.normal, outgoing.info.ram.duplicate) == (500, 500)
    assert len(pair.recorded.sent) < 500 * 4200 + 500 * 10 + 2000
    build.destination.check()


def test_pages_that_become_zero_are_zero_there(make_pair, churning, settings):
    build = churning({"a": 64})

    class Wipe:
        @hookimpl
        def whimbrel_choose_switchover(self, round):  # noqa: A002
            if round.number == 1:
                build.source.blocks["a"].view.reshape(-1, 4096)[::2] = 0  # the pages that hold something
                return False
            return None

    pair = make_pair(build, settings=settings, plugins=[Wipe()])
    pair.source.power_on()
    _, outgoing = pair.run()
    assert (outgoing.info.ram.normal, outgoing.info.ram.duplicate) == (32, 32 + 32)
    assert not build.destination.blocks["a"].view.any()


def test_a_machine_goes_on_to_a_third_place_and_can_be_watched_there(make_pair, churning, settings):
    build = churning({"a": 20, "b": 3})
    pair = make_pair(build, settings=settings)
    pair.source.start()
    steps = 0
    for _ in range(3):
        build.built[-2].wait_steps(20)
        incoming, outgoing = pair.migrate()
        outgoing.wait(LONG)
        incoming.wait(LONG)
        assert build.built[-2].counter.steps > steps
        steps = build.built[-2].counter.steps
        pair.move_on()
    build.built[-2].wait_steps(20)
    pair.source.stop()
    build.built[-2].check()
    assert [churn.powered for churn in build.built] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("source", ["running", "paused", "prelaunch"])
@pytest.mark.parametrize("start", [None, True, False])
def test_it_goes_on_as_it_was_unless_told_not_to(make_pair, churning, settings, source, start):
    build = churning({"a": 5})
    pair = make_pair(build, settings=settings)
    if source != "prelaunch":
        pair.source.start()
        build.source.wait_steps(5)
    if source == "paused":
        pair.source.stop()
    incoming, outgoing = pair.run(start=start)
    assert (incoming.error, outgoing.error) == (None, None)
    runs = source == "running" and start is not False
    assert pair.destination.run_state == ("running" if runs else "paused")
    assert build.source.powered == 1  # also where it was never started: what arrives is a whole machine
    assert build.destination.powered == 0
    if runs:
        build.destination.wait_steps(5)
        pair.destination.stop()
    else:
        assert build.destination.counter.steps == build.source.counter.steps
        build.destination.check()
        pair.destination.start()
        build.destination.wait_steps(5)
        pair.destination.stop()
    build.destination.check()
    assert build.destination.powered == 0


def test_the_machine_that_was_handed_over_stays_still(make_pair, churning, settings):
    build = churning({"a": 5})
    pair = make_pair(build, settings=settings)
    pair.source.start()
    _, outgoing = pair.run()
    assert outgoing.info.ownership == "done"
    with pytest.raises(StateError, match="handed over"):
        pair.source.start()
    with pytest.raises(StateError, match="paused due to previous migration"):
        pair.source.migrate("memory:elsewhere")
    pair.destination.close()
    pair.source.reclaim()
    pair.source.start()
    build.source.wait_steps(5)
    pair.source.stop()
    build.source.check()
