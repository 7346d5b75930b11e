"""The capabilities that work: pause-before-switchover, switchover-ack, validate-uuid, return-path."""

from __future__ import annotations

import logging
import threading

import pytest

from whimbrel import MigrationStatus, RunState
from whimbrel.errors import ChannelLost, IncompatibleError, PeerRefused, StateError
from whimbrel.testing.faults import Faults
from whimbrel.wire import commands, return_path

LONG = 60.0
UUID = "00112233-4455-6677-8899-aabbccddeeff"
OTHER = "00112233-4455-6677-8899-aabbccddee00"


@pytest.fixture
def build(churning):
    return churning({"a": 20, "b": 3})


# ---------------------------------------------------------------------------------------------- pause-before-switchover


def paused_before_switchover(make_pair, build, settings, *, start=None):
    settings.capabilities.pause_before_switchover = True
    pair = make_pair(build, settings=settings)
    reached = threading.Event()
    pair.source.notifiers.add(lambda event: getattr(event, "new", "") == "pre-switchover" and reached.set())
    pair.source.start()
    incoming, outgoing = pair.migrate(start=start)
    assert reached.wait(LONG)
    return pair, incoming, outgoing


def test_it_waits_with_the_guest_stopped_until_it_may_go_on(make_pair, build, settings):
    pair, incoming, outgoing = paused_before_switchover(make_pair, build, settings)
    steps, sent = build.source.counter.steps, len(pair.recorded.sent)
    assert outgoing.status is MigrationStatus.PRE_SWITCHOVER
    assert pair.source.run_state is RunState.FINISH_MIGRATE
    with pytest.raises(TimeoutError, match="still pre-switchover"):
        outgoing.wait(0.05)
    with pytest.raises(StateError, match="Migration is not finalized yet"):
        pair.source.start()
    with pytest.raises(StateError, match="Migration is not finalized yet"):
        pair.source.stop()
    assert (build.source.counter.steps, len(pair.recorded.sent)) == (steps, sent)
    assert incoming.status is MigrationStatus.ACTIVE
    outgoing.proceed()
    assert outgoing.wait(LONG).downtime >= 50
    incoming.wait(LONG)
    build.destination.wait_steps(5)
    pair.destination.stop()
    build.destination.check()


def test_what_the_program_changes_while_it_waits_arrives(make_pair, build, settings):
    """That is what the pause is for: a last chance to put things in order."""
    _, incoming, outgoing = paused_before_switchover(make_pair, build, settings, start=False)
    build.source.blocks["b"].view[100:105] = [1, 2, 3, 4, 5]
    build.source.dial.name = b"changed!"
    outgoing.proceed()
    outgoing.wait(LONG)
    incoming.wait(LONG)
    assert build.destination.blocks["b"].view[100:105].tolist() == [1, 2, 3, 4, 5]
    assert build.destination.dial.name == b"changed!"


def test_a_peer_that_dies_meanwhile_ends_the_wait(make_pair, build, settings):
    pair, incoming, outgoing = paused_before_switchover(make_pair, build, settings)
    pair.destination.close()
    with pytest.raises(ChannelLost):
        outgoing.wait(LONG)
    assert incoming.status is MigrationStatus.CANCELLED
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(5)


def test_going_on_is_refused_anywhere_else(make_pair, build, settings):
    settings.capabilities.pause_before_switchover = True
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=20_000)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    with pytest.raises(StateError, match="Migration not in expected state: active"):
        outgoing.proceed()
    channel.release()
    while outgoing.status is MigrationStatus.ACTIVE:
        threading.Event().wait(0.001)
    outgoing.proceed()
    outgoing.wait(LONG)
    incoming.wait(LONG)
    with pytest.raises(StateError, match="Migration not in expected state: completed"):
        outgoing.proceed()


# ------------------------------------------------------------------------------------------------------- switchover-ack


def test_with_the_word_it_switches(make_pair, build, settings):
    settings.capabilities.update({"return_path": True, "switchover_ack": True})
    pair = make_pair(build, settings=settings)
    pair.source.start()
    incoming, outgoing = pair.run()
    assert (incoming.error, outgoing.error) == (None, None)
    ack = return_path.encode(return_path.SwitchoverAck())
    received = bytes(pair.recorded.received)
    assert received[8 : 8 + len(ack)] == ack  # behind the first PONG, before that of the first round
    assert received.count(ack) == 1
    build.destination.wait_steps(5)


def test_without_the_word_it_goes_on_in_rounds(make_pair, build, settings):
    """A destination that knows nothing of the capability never says it: the guest runs until somebody cancels."""
    settings.capabilities.update({"return_path": True, "switchover_ack": True})
    other = settings.copy()
    other.capabilities.update({"return_path": True, "switchover_ack": False})
    pair = make_pair(build, settings=settings, destination_settings=other)
    many = threading.Event()
    pair.source.notifiers.add(lambda event: getattr(event, "number", 0) >= 10 and many.set())
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert many.wait(LONG)
    assert pair.source.run_state is RunState.RUNNING
    assert outgoing.info.expected_downtime < settings.parameters.downtime_limit
    assert outgoing.cancel()
    with pytest.raises(Exception, match="goes on here"):
        outgoing.wait(LONG)
    with pytest.raises(ChannelLost):
        incoming.wait(LONG)
    assert pair.source.run_state is RunState.RUNNING


def test_a_destination_that_says_it_to_one_that_does_not_ask_does_no_harm(make_pair, build, settings):
    other = settings.copy()
    other.capabilities.update({"return_path": True, "switchover_ack": True})
    pair = make_pair(build, settings=settings, destination_settings=other)
    pair.source.start()
    incoming, outgoing = pair.run()
    assert (incoming.error, outgoing.error) == (None, None)


# -------------------------------------------------------------------------------------------------------- validate-uuid


CASES = {
    "both the same": (UUID, UUID, None),
    "they differ": (UUID, OTHER, IncompatibleError),
    "none at the source": (None, UUID, None),
    "none at the destination": (UUID, None, None),
    "none at all": (None, None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_uuid(make_pair, churning, settings, caplog, case):
    ours, theirs, kind = CASES[case]
    settings.capabilities.validate_uuid = True
    build = churning({"a": 3}, uuid=theirs, source={"uuid": ours})
    pair = make_pair(build, settings=settings)
    pair.source.start()
    with caplog.at_level(logging.WARNING, "whimbrel"):
        incoming, outgoing = pair.run()
    assert (b"configuration/uuid" in pair.recorded.sent) is (ours is not None)
    if kind is None:
        assert (incoming.error, outgoing.error) == (None, None)
        assert ("not compared" in caplog.text) is (case == "none at the destination")
    else:
        assert type(incoming.error) is kind
        assert UUID in str(incoming.error)
        assert OTHER in str(incoming.error)
        assert incoming.error.place.section == "configuration"
        assert type(outgoing.error) is PeerRefused
        assert pair.source.run_state is RunState.RUNNING


def test_without_the_capability_no_uuid_is_sent(make_pair, churning, settings):
    build = churning({"a": 3}, uuid=UUID, source={"uuid": OTHER})
    pair = make_pair(build, settings=settings)
    pair.source.start()
    incoming, _ = pair.run()
    assert incoming.error is None
    assert b"uuid" not in pair.recorded.sent


# ---------------------------------------------------------------------------------------------------------- return-path


@pytest.mark.parametrize("asked", [True, False])
def test_the_way_back_is_opened_wherever_there_is_one(make_pair, build, settings, asked):
    settings.capabilities.return_path = asked
    pair = make_pair(build, settings=settings)
    pair.source.start()
    _, outgoing = pair.run()
    assert commands.encode(commands.OpenReturnPath()) in pair.recorded.sent
    assert outgoing.info.ownership == "done"


def test_capabilities_count_from_the_start(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=20_000)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    settings.capabilities.pause_before_switchover = True
    channel.release()
    outgoing.wait(LONG)
    incoming.wait(LONG)
    assert outgoing.status is MigrationStatus.COMPLETED
