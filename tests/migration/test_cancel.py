"""Cancelling, in every state: the guest runs on, both ends are clean, and the next attempt succeeds."""

from __future__ import annotations

import threading

import pytest

from whimbrel import MigrationStatus, OutgoingMigration, RunState, hookimpl
from whimbrel.abc import SaveVMHandler, SaveVMSpec
from whimbrel.errors import HandoverUndecided, MigrationCancelled, MigrationError, StateError
from whimbrel.testing.faults import Faults

LONG = 60.0


class OneRound:
    """One round and no more, so that everyone knows how many bytes come back."""

    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        return True


# What comes back in one round: PONG 1, PONG of the round, PONG of the proof, SHUT; eight bytes each. Where the link
# stands still behind the first byte of one, the destination has sent it, and so has got what it answers.
PONG, PROOF, SHUT = 8, 16, 24


class Gate(SaveVMHandler):
    """A part of the machine whose saving stands still until it is let go."""

    idstr = "gate"
    entered = leave = None

    def save(self, out):
        self.plugin.entered.set()
        assert self.plugin.leave.wait(LONG)
        out.write(b"gate")

    def load(self, reader, kind, version_id):
        reader.window(4)
        reader.advance(4)


class Gates:
    def __init__(self):
        self.entered, self.leave = threading.Event(), threading.Event()

    @hookimpl
    def whimbrel_savevm_handlers(self, machine):
        def create():
            gate = Gate()
            gate.plugin = self
            return [gate]

        return [SaveVMSpec(name="gate", summary="", create=create)]


@pytest.fixture
def build(churning):
    return churning({"a": 30, "b": 4})


def cancelled(outgoing):
    with pytest.raises(MigrationCancelled, match="goes on here"):
        outgoing.wait(LONG)
    info = outgoing.info
    assert (outgoing.status, info.error_code, info.ownership) == (MigrationStatus.CANCELLED, "cancelled", "owner")
    return True


def destination_clean(pair, build, incoming):
    """The destination has failed, and is as it was before."""
    nobody_came = pair.recorded is None or len(pair.recorded.sent) < 8
    if nobody_came:
        assert incoming.cancel()  # else it would wait on
    with pytest.raises((MigrationError, MigrationCancelled)):
        incoming.wait(LONG)
    assert incoming.status is (MigrationStatus.CANCELLED if nobody_came else MigrationStatus.FAILED)
    assert incoming.info.ownership == "refused"
    assert pair.destination.run_state is RunState.INMIGRATE
    churn = build.destination
    assert not any(block.view.any() for block in churn.blocks.values())
    assert (churn.counter.steps, churn.dial.position, churn.dial.name) == (0, 0, bytes(8))
    return True


def runs_on_and_moves(pair, build, settings):
    """The guest runs, and a second attempt to the same destination brings it there whole."""
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(20)
    pair.faults = Faults()
    settings.capabilities.pause_before_switchover = False
    incoming, outgoing = pair.run()
    assert (incoming.error, outgoing.error) == (None, None)
    build.destination.wait_steps(20)
    pair.destination.stop()
    build.destination.check()
    return True


def test_in_setup_while_nobody_accepts(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    listener = pair.source.plugins.transport("memory").create().listen("never")
    outgoing = pair.source.migrate("memory:never")
    assert outgoing.status is MigrationStatus.SETUP
    assert outgoing.cancel()
    assert cancelled(outgoing)
    listener.close()
    assert runs_on_and_moves(pair, build, settings)


STALLS = {
    "setup, in the header": (Faults(stall_sent=4), "setup"),
    "setup, in the block list": (Faults(stall_sent=60), "setup"),
    "active, in a page": (Faults(stall_sent=20_000), "active"),
    "active, waiting for the end of a round": (Faults(stall_received=PONG + 1), "active"),
    "active, waiting for the proof": (Faults(stall_received=PROOF + 1), "active"),
}


@pytest.mark.parametrize("where", STALLS)
def test_while_the_link_stands_still(make_pair, build, settings, where):
    faults, status = STALLS[where]
    pair = make_pair(build, settings=settings, plugins=[OneRound()])
    pair.faults = faults
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    assert outgoing.status == status
    assert outgoing.cancel()
    assert cancelled(outgoing)
    assert not outgoing.cancel()
    channel.release()
    if "proof" in where:
        # The destination has proved that it holds everything, so it keeps it: it cannot know of the cancel.
        with pytest.raises(HandoverUndecided, match="adopt"):
            incoming.wait(LONG)
        assert pair.destination.run_state is RunState.INMIGRATE
        incoming.discard()
        assert not build.destination.blocks["a"].view.any()
    else:
        assert destination_clean(pair, build, incoming)
    assert runs_on_and_moves(pair, build, settings)


def test_in_pre_switchover(make_pair, build, settings):
    settings.capabilities.pause_before_switchover = True
    pair = make_pair(build, settings=settings)
    reached = threading.Event()
    pair.source.notifiers.add(lambda event: getattr(event, "new", "") == "pre-switchover" and reached.set())
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert reached.wait(LONG)
    assert outgoing.status is MigrationStatus.PRE_SWITCHOVER
    assert pair.source.run_state is RunState.FINISH_MIGRATE
    assert outgoing.cancel()
    assert cancelled(outgoing)
    with pytest.raises(StateError, match="Migration not in expected state: cancelled"):
        outgoing.proceed()
    assert destination_clean(pair, build, incoming)
    assert runs_on_and_moves(pair, build, settings)


@pytest.mark.parametrize("status", ["active", "device"])
def test_inside_of_a_handler_with_the_guest_stopped(make_pair, build, settings, status):
    settings.capabilities.pause_before_switchover = status == "device"
    gates = Gates()
    pair = make_pair(build, settings=settings, plugins=[gates])
    reached = threading.Event()
    pair.source.notifiers.add(lambda event: getattr(event, "new", "") == "pre-switchover" and reached.set())
    pair.source.start()
    incoming, outgoing = pair.migrate()
    if status == "device":
        assert reached.wait(LONG)
        outgoing.proceed()
    assert gates.entered.wait(LONG)
    assert outgoing.status == status
    assert pair.source.run_state is RunState.FINISH_MIGRATE
    assert outgoing.cancel()
    assert outgoing.status is MigrationStatus.CANCELLING
    assert not outgoing.cancel()  # in cancelling it is on its way
    with pytest.raises(StateError, match="process in progress"):
        pair.source.migrate("memory:other")
    gates.leave.set()
    assert cancelled(outgoing)
    assert destination_clean(pair, build, incoming)
    assert runs_on_and_moves(pair, build, settings)


def test_after_the_release_it_is_too_late(make_pair, build, settings):
    pair = make_pair(build, settings=settings, plugins=[OneRound()])
    pair.faults = Faults(stall_received=SHUT)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    incoming.wait(LONG)
    assert pair.destination.run_state is RunState.RUNNING
    assert outgoing.info.ownership == "released"
    assert not outgoing.cancel()
    assert not pair.source.cancel_migration()
    assert outgoing.status is MigrationStatus.ACTIVE
    assert pair.source.run_state is RunState.FINISH_MIGRATE
    channel.release()
    assert outgoing.wait(LONG).status is MigrationStatus.COMPLETED
    assert pair.source.run_state is RunState.POSTMIGRATE


def test_what_does_not_run_cannot_be_cancelled(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    assert not pair.source.cancel_migration()
    pair.source.start()
    failing = pair.source.migrate("memory:nobody")
    failing.join()
    assert failing.status is MigrationStatus.FAILED
    assert not failing.cancel()
    incoming, outgoing = pair.run()
    assert not outgoing.cancel()
    assert not incoming.cancel()
    assert not pair.destination.cancel_migration()
    assert (incoming.status, outgoing.status) == (MigrationStatus.COMPLETED, MigrationStatus.COMPLETED)


def test_a_paused_machine_stays_paused(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=20_000)
    pair.source.start()
    build.source.wait_steps(5)
    pair.source.stop()
    incoming, outgoing = pair.migrate()
    pair.wait_stalled()
    assert outgoing.cancel()
    assert cancelled(outgoing)
    assert destination_clean(pair, build, incoming)
    assert pair.source.run_state is RunState.PAUSED
    build.source.check()


def test_with_bandwidth_to_wait_for(make_pair, build, settings):
    settings.parameters.max_bandwidth = 1000  # the 30 pages take two minutes
    pair = make_pair(build, settings=settings)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    build.source.wait_steps(100)
    assert outgoing.cancel()
    assert cancelled(outgoing)
    assert destination_clean(pair, build, incoming)
    settings.parameters.max_bandwidth = 0
    assert runs_on_and_moves(pair, build, settings)


def test_at_any_byte_it_either_stays_or_has_gone(make_pair, churning, settings):
    """A cancel at some byte either is in time, or says that it is not; never is the machine in two places."""
    build = churning({"a": 3, "b": 1})

    def fresh():
        pair = make_pair(build, settings=settings, plugins=[OneRound()])
        pair.source.power_on()  # and not started, so that each time the same bytes go
        return pair

    pair = fresh()
    pair.run()
    length = len(pair.recorded.sent)
    released = length - 1 - (length - pair.recorded.sent.rindex(b"\x06\0\0"))  # EOF, and the description behind it
    outcomes = {}
    for at in sorted({*range(1, length, length // 40), *range(released - 3, released + 3)}):
        pair = fresh()
        pair.faults = Faults(stall_sent=at)
        incoming, outgoing = pair.migrate()
        channel = pair.wait_stalled()
        outcomes[at] = outgoing.cancel()
        channel.release()
        if outcomes[at]:
            assert cancelled(outgoing)
            if at < 8:  # whoever does not say a whole header is a stranger, and the source is waited for
                assert incoming.cancel()
            with pytest.raises(MigrationError):
                incoming.wait(LONG)
            assert pair.source.run_state is RunState.PAUSED
            assert pair.destination.run_state is RunState.INMIGRATE
        else:
            outgoing.wait(LONG)
            incoming.wait(LONG)
            assert pair.source.run_state is RunState.POSTMIGRATE
            assert pair.destination.run_state is RunState.PAUSED
        pair.close()
    assert outcomes == {at: at < released for at in outcomes}
    assert set(outcomes.values()) == {True, False}


@pytest.mark.parametrize("side", ["source", "destination"])
def test_at_the_very_moment_in_which_the_connection_is_made(make_pair, build, settings, side):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    transport = pair.source.plugins.transport("memory").create()
    name = "on_connect" if side == "source" else "on_accept"
    wrap = getattr(transport, name)

    def connected(channel):
        assert getattr(pair, side).cancel_migration()
        return wrap(channel)

    setattr(transport, name, connected)
    incoming = pair.destination.incoming("memory:pair")
    with pair.source.lock:  # so that the migration is known before it has connected
        outgoing = pair.source.migrate("memory:pair")
    cancelled_one, other = (outgoing, incoming) if side == "source" else (incoming, outgoing)
    with pytest.raises(MigrationCancelled):
        cancelled_one.wait(LONG)
    if side == "source":
        assert other.cancel()  # no source has come there: it waits on
    with pytest.raises(MigrationError):
        other.wait(LONG)
    setattr(transport, name, wrap)
    assert runs_on_and_moves(pair, build, settings)


def test_between_setup_and_active(make_pair, build, settings, monkeypatch):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    sync = OutgoingMigration._sync

    def cancel_and_sync(migration):
        migration.cancel()
        sync(migration)

    monkeypatch.setattr(OutgoingMigration, "_sync", cancel_and_sync)
    incoming, outgoing = pair.migrate()
    assert cancelled(outgoing)
    assert destination_clean(pair, build, incoming)
    monkeypatch.undo()
    assert runs_on_and_moves(pair, build, settings)


# -------------------------------------------------------------------------------------------------- the destination's


def incoming_cancelled(pair, incoming):
    with pytest.raises(MigrationCancelled, match="as before"):
        incoming.wait(LONG)
    assert incoming.status is MigrationStatus.CANCELLED
    assert pair.destination.run_state is RunState.INMIGRATE
    return True


def test_a_destination_that_waits(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    incoming = pair.destination.incoming("memory:pair")
    assert pair.destination.cancel_migration()
    assert incoming_cancelled(pair, incoming)
    pair.source.start()
    assert runs_on_and_moves(pair, build, settings)


@pytest.mark.parametrize("at", [0, 4, 8, 60, 20_000])
def test_a_destination_that_loads(make_pair, build, settings, at):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=at)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    assert incoming.cancel()
    assert not incoming.cancel()
    assert incoming_cancelled(pair, incoming)
    channel.release()
    with pytest.raises(MigrationError):
        outgoing.wait(LONG)
    assert outgoing.status is MigrationStatus.FAILED
    assert not any(block.view.any() for block in build.destination.blocks.values())
    assert runs_on_and_moves(pair, build, settings)


def test_a_destination_that_has_loaded_all_but_has_not_proved_it(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    answers = []
    build.destination.on_load = lambda: answers.append(pair.destination.cancel_migration())
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert incoming_cancelled(pair, incoming)
    with pytest.raises(MigrationError):
        outgoing.wait(LONG)
    assert answers[0] is True
    assert outgoing.info.ownership == "owner"
    assert not build.destination.blocks["a"].view.any()
    build.destination.on_load = lambda: None
    assert runs_on_and_moves(pair, build, settings)


def test_a_destination_that_has_proved_cannot_be_cancelled(make_pair, build, settings):
    pair = make_pair(build, settings=settings, plugins=[OneRound()])
    pair.faults = Faults(stall_received=PROOF)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    while incoming.ownership != "prepared":
        threading.Event().wait(0.001)
    assert not incoming.cancel()
    channel.release()
    outgoing.wait(LONG)
    incoming.wait(LONG)
    assert pair.destination.run_state is RunState.RUNNING


@pytest.mark.parametrize("side", ["source", "destination", "both"])
@pytest.mark.parametrize("at", [0, 60, 20_000])
def test_closing_a_machine_cancels_what_runs(make_pair, build, settings, side, at):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=at)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    if side != "destination":
        pair.source.close()
        assert outgoing.status is MigrationStatus.CANCELLED
    if side != "source":
        pair.destination.close()
        assert incoming.status is MigrationStatus.CANCELLED or side == "both"
    channel.release()
    pair.close()
    assert outgoing.status.finished
    assert incoming.status.finished
    assert pair.source.run_state is pair.destination.run_state is RunState.SHUTDOWN
