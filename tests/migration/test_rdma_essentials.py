"""What any migration does, over rdma: as over tcp:, with and without pin-all, over both bundled providers.

Each case is a short form of what its own module in this folder tests in full. All four ways of rdma: are among the
tests that run each time; tcp:, for comparison, and a provider of the tests' own are among the long ones.
"""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from whimbrel import MigrationStatus, RunState, hookimpl
from whimbrel.abc import SaveVMHandler, SaveVMSpec
from whimbrel.errors import ChannelLost, MigrationCancelled, PeerRefused, StateError
from whimbrel.migration import outgoing as outgoing_module
from whimbrel.stream import Pacer

from .over_rdma import BUNDLED, LONG, OTHERS, Two, link_over, mapped

BLOCKS = {"a": 300, "b": 4}
MIB = 1 << 20


@pytest.fixture(params=[*BUNDLED, *(pytest.param(way, marks=pytest.mark.long) for way in OTHERS)], ids=str)
def way(request):
    return request.param


@pytest.fixture(params=["memfd", pytest.param("anonymous", marks=pytest.mark.long)])
def memory(request):
    return request.param


@pytest.fixture
def build(churning):
    return churning(BLOCKS)


@pytest.fixture
def two(way, memory, settings):
    """`two(build, …)`: a source that runs and a destination; when both are closed nothing of either is mapped."""
    settings.capabilities.rdma_pin_all = way.pin_all
    settings.backends.memory = memory
    before, made = mapped(), []

    def make(build, **more):
        link = None if way.provider is None else link_over(way.provider)
        made.append(Two(build, settings, link, uri=way.uri, **more))
        return made[-1]

    yield make
    while made:
        pair = made.pop()
        pair.close()
        pair.build.built.clear()
    del make, pair
    if mapped() != before:
        gc.collect()  # what only the frames of an error hold, which its migration keeps, is not lost
    assert mapped() == before


def started(pair):
    pair.source.start()
    pair.build.source.wait_steps(20)
    return pair


def arrived(pair, incoming, outgoing):
    """Both say so, the guest goes on at the destination, and not a byte of it is wrong."""
    assert (str(incoming.error), str(outgoing.error)) == ("None", "None")
    churn = next(churn for churn in pair.build.built if churn.machine is pair.destination)
    assert churn.powered == 0
    if pair.destination.run_state is not RunState.RUNNING:
        pair.destination.start()
    churn.wait_steps(5)
    pair.destination.stop()
    churn.check()
    return True


def stayed(pair, incoming):
    """The source runs on as the only one, the destination is as it was, and the next attempt arrives."""
    assert incoming.error is not None
    assert pair.source.run_state is RunState.RUNNING
    assert pair.source.migration.info.ownership == "owner"
    assert pair.destination.run_state is RunState.INMIGRATE
    assert not any(block.view.any() for block in pair.build.destination.blocks.values())
    pair.build.source.wait_steps(5)
    return arrived(pair, *pair.run())


class Rounds:
    """Makes a migration go through some rounds, the guest writing in each; `meet` is called in each of them."""

    def __init__(self, build, rounds, meet=lambda round_: None):
        self.build, self.rounds, self.meet = build, rounds, meet
        self.seen = []

    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        self.seen.append(round)
        self.meet(round)
        if round.number < self.rounds:
            self.build.source.wait_steps(20)
            return False
        return None


class Standstill:
    """Where a migration stands still until it may go on."""

    def __init__(self):
        self.reached, self._go_on = threading.Event(), threading.Event()

    def __call__(self, *args):
        self.reached.set()
        assert self._go_on.wait(LONG)

    def go_on(self):
        self._go_on.set()


class Gate(SaveVMHandler):
    """A part of the machine in whose saving, with the guest stopped, the migration stands still."""

    idstr = "gate"

    def __init__(self, standstill):
        self.standstill = standstill

    def save(self, out):
        self.standstill()
        out.write(b"gate")

    def load(self, reader, kind, version_id):
        reader.window(4)
        reader.advance(4)


class Gates:
    def __init__(self):
        self.standstill = Standstill()

    @hookimpl
    def whimbrel_savevm_handlers(self, machine):
        return [SaveVMSpec(name="gate", summary="", create=lambda: [Gate(self.standstill)])]


# ---------------------------------------------------------------------------------------------------------- arriving


def test_every_byte_arrives_in_several_rounds(two, churning):
    build = churning(BLOCKS, alter=lambda machine, churn: machine.ram.add("zeros", 300 * 4096))
    rounds = Rounds(build, 3)
    pair = started(two(build, plugins=[rounds]))
    incoming, outgoing = pair.run()
    info = outgoing.info
    at_source = build.source.counter.steps
    assert arrived(pair, incoming, outgoing)
    assert build.source.counter.steps == at_source < build.destination.counter.steps
    assert info.rounds == len(rounds.seen) >= 3
    assert any(round_.remaining for round_ in rounds.seen[:-1])
    assert info.ram.normal + info.ram.duplicate > sum(BLOCKS.values()) + 300
    assert info.ram.transferred >= 152 * 4096
    assert info.downtime_exact > 0
    assert info.downtime <= info.total_time


@pytest.mark.parametrize("handover", ["auto", "proof", "qemu"])
def test_each_handover(two, build, handover):
    pair = started(two(build))
    incoming, outgoing = pair.run(handover=handover, start=True)
    assert outgoing.info.ownership == "done"
    assert arrived(pair, incoming, outgoing)


def test_a_start_that_is_put_off(two, build):
    pair = started(two(build))
    incoming, outgoing = pair.run(start=False)
    assert pair.destination.run_state is RunState.PAUSED
    assert build.destination.counter.steps == build.source.counter.steps
    build.destination.check()
    assert arrived(pair, incoming, outgoing)


def test_it_waits_before_the_switchover(two, build, settings):
    settings.capabilities.pause_before_switchover = True
    pair = two(build)
    reached = threading.Event()
    pair.source.notifiers.add(lambda event: getattr(event, "new", "") == "pre-switchover" and reached.set())
    incoming, outgoing = started(pair).migrate(start=False)
    assert reached.wait(LONG)
    assert outgoing.status is MigrationStatus.PRE_SWITCHOVER
    assert pair.source.run_state is RunState.FINISH_MIGRATE
    build.source.blocks["b"].view[100:105] = [1, 2, 3, 4, 5]  # a last chance to put things in order
    outgoing.proceed()
    pair.settle(incoming, outgoing)
    assert (incoming.error, outgoing.error) == (None, None)
    assert build.destination.blocks["b"].view[100:105].tolist() == [1, 2, 3, 4, 5]


def test_the_limit_of_the_downtime_is_held(two, churning, settings):
    """What is left is measured against it by what went past the stream."""
    build = churning(BLOCKS)
    settings.parameters.downtime_limit = 200
    rounds = Rounds(build, 2)
    pair = started(two(build, plugins=[rounds]))
    incoming, outgoing = pair.run()
    assert rounds.seen[-1].expected_downtime <= 0.2
    assert rounds.seen[0].bandwidth > 0
    assert rounds.seen[0].sent_bytes >= 152 * 4096
    assert arrived(pair, incoming, outgoing)


def test_the_limit_of_the_bandwidth_holds(two, churning, settings, monkeypatch):
    """By a clock that only the waiting for bandwidth moves."""
    now = [0.0]

    def wait(seconds):
        now[0] += seconds
        return False

    monkeypatch.setattr(outgoing_module, "Pacer", lambda **kept: Pacer(**{**kept, "wait": wait}, clock=lambda: now[0]))
    settings.parameters.max_bandwidth = MIB // 4
    build = churning({"a": 800})
    pair = two(build)
    pair.source.power_on()
    incoming, outgoing = pair.run()
    assert outgoing.error is None
    # Every second of the pages is random, and what one window grants may go at once.
    assert now[0] >= 400 * 4096 / (MIB // 4) - 0.2
    assert arrived(pair, incoming, outgoing)


def test_with_xbzrle_pages_go_whole_or_as_deltas_and_arrive(two, churning, settings):
    settings.capabilities.xbzrle = True
    build = churning(BLOCKS)
    pair = started(two(build, plugins=[Rounds(build, 3)]))
    assert arrived(pair, *pair.run())


def test_drives_go_along(two, churning, settings, tmp_path):
    paths = [tmp_path / "here", tmp_path / "there"]
    for path in paths:
        path.write_bytes(bytes(2 * MIB))

    def alter(machine, churn):
        machine.drives.add("disk", paths[len(build.built) - 1])

    build = churning(BLOCKS, alter=alter)
    settings.capabilities.block = True
    pair = started(two(build))
    content = bytes(range(256)) * 4096
    pair.source.drives["disk"].write(1 << 19, content)
    assert arrived(pair, *pair.run())
    came = np.frombuffer(bytes(pair.destination.drives["disk"].read(1 << 19, len(content))), np.uint8)
    wrong = np.flatnonzero(came != np.frombuffer(content, np.uint8))
    assert not len(wrong), f"{len(wrong)} bytes of the drive are wrong, the first at {wrong[0]:#x}"


def test_on_to_a_third_place(two, build):
    """What came over it goes over it again."""
    pair = started(two(build))
    incoming, outgoing = pair.run()
    assert (incoming.error, outgoing.error) == (None, None)
    build.built[1].wait_steps(5)
    pair.move_on()
    assert arrived(pair, *pair.run())
    assert [churn.powered for churn in build.built] == [1, 0, 0]


def test_where_nobody_asked_for_a_way_back(two, build, settings):
    settings.capabilities.return_path = False
    pair = started(two(build))
    assert arrived(pair, *pair.run())


# ----------------------------------------------------------------------------------------------------------- staying


def cancelled(outgoing):
    with pytest.raises(MigrationCancelled, match="goes on here"):
        outgoing.wait(LONG)
    assert outgoing.status is MigrationStatus.CANCELLED
    return True


def test_a_cancel_in_setup(two, build):
    pair = two(build)
    deaf = pair.source.plugins.transport(pair.uri.partition(":")[0]).create().listen("127.0.0.1:0")
    pair.source.start()
    outgoing = pair.source.migrate(deaf.uri)
    try:
        assert outgoing.cancel()
        assert cancelled(outgoing)
    finally:
        deaf.close()
    build.source.wait_steps(5)
    assert arrived(pair, *pair.run())


def test_a_cancel_between_two_rounds(two, build):
    here = Standstill()
    pair = started(two(build, plugins=[Rounds(build, 1, here)]))
    incoming, outgoing = pair.migrate()
    assert here.reached.wait(LONG)
    assert outgoing.status is MigrationStatus.ACTIVE
    assert outgoing.cancel()
    here.go_on()
    assert cancelled(outgoing)
    pair.settle(incoming, outgoing)
    assert stayed(pair, incoming)


@pytest.mark.parametrize("status", ["active", "pre-switchover", "device"])
def test_a_cancel_with_the_guest_stopped(two, build, settings, status):
    settings.capabilities.pause_before_switchover = status != "active"
    gates, reached = Gates(), threading.Event()
    pair = two(build, plugins=[gates])
    pair.source.notifiers.add(lambda event: getattr(event, "new", "") == "pre-switchover" and reached.set())
    incoming, outgoing = started(pair).migrate()
    if status != "active":
        assert reached.wait(LONG)
    if status == "device":
        outgoing.proceed()
    if status != "pre-switchover":
        assert gates.standstill.reached.wait(LONG)
    assert outgoing.status == status
    assert pair.source.run_state is RunState.FINISH_MIGRATE
    assert outgoing.cancel()
    gates.standstill.go_on()
    assert cancelled(outgoing)
    with pytest.raises(StateError):
        outgoing.proceed()
    pair.settle(incoming, outgoing)
    settings.capabilities.pause_before_switchover = False
    assert stayed(pair, incoming)


def test_a_cancel_that_comes_too_late(two, build):
    """The destination has been told that it may start the guest, and does not yet say that it has."""
    here = Standstill()
    pair = two(build)
    guest = build.destination.machine.guest
    start = guest.start

    def starts():
        here()
        start()

    guest.start = starts
    incoming, outgoing = started(pair).migrate(handover="proof")
    assert here.reached.wait(LONG)
    assert not outgoing.cancel()
    assert not incoming.cancel()
    here.go_on()
    pair.settle(incoming, outgoing)
    assert outgoing.status is MigrationStatus.COMPLETED
    assert pair.source.run_state is RunState.POSTMIGRATE
    assert arrived(pair, incoming, outgoing)


def test_a_destination_that_is_gone_between_two_rounds(two, build):
    def dies(round_):
        pair.destination.close()

    pair = started(two(build, plugins=[Rounds(build, 1, dies)]))
    incoming, outgoing = pair.run()
    assert outgoing.status is MigrationStatus.FAILED
    assert isinstance(outgoing.error, ChannelLost)
    assert incoming.error is not None
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(5)
    pair.source.stop()
    build.source.check()


def test_a_source_that_is_gone_between_two_rounds(two, build):
    here = Standstill()
    pair = started(two(build, plugins=[Rounds(build, 1, here)]))
    incoming, outgoing = pair.migrate()
    assert here.reached.wait(LONG)
    closing = threading.Thread(target=pair.source.close)
    closing.start()
    here.go_on()
    closing.join(LONG)
    pair.settle(incoming, outgoing)
    assert outgoing.status is MigrationStatus.CANCELLED
    assert incoming.status is MigrationStatus.FAILED
    assert pair.destination.run_state is RunState.INMIGRATE
    assert not any(block.view.any() for block in build.destination.blocks.values())


def test_the_source_hears_that_the_destination_refuses(two, build):
    def refuse():
        raise ValueError("not today")

    pair = two(build)
    build.destination.on_load = refuse
    incoming, outgoing = started(pair).run()
    assert "not today" in str(incoming.error)
    assert outgoing.status is MigrationStatus.FAILED
    assert isinstance(outgoing.error, PeerRefused)
    build.destination.on_load = lambda: None
    assert stayed(pair, incoming)
