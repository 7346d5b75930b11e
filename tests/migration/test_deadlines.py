"""An end always comes: links that go silent, hooks that want to leave, machines that are closed in the middle."""

from __future__ import annotations

import logging
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel import MigrationError, MigrationStatus, RunState, hookimpl
from whimbrel.abc import Patience
from whimbrel.errors import (
    ChannelClosed,
    ChannelLost,
    HandoverTimeout,
    HandoverUndecided,
    IncompatibleError,
    StateError,
    StreamError,
)
from whimbrel.migration import answers, takings
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.handover import PROOF
from whimbrel.migration.idle import IdleWatch
from whimbrel.testing.faults import Faults
from whimbrel.testing.memory import memory_pair
from whimbrel.testing.transports import receive
from whimbrel.wire import return_path

LONG = 60.0


class OneRound:
    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        return True


@pytest.fixture
def build(churning):
    return churning({"a": 6, "b": 2})


@pytest.fixture
def still(make_pair, build, settings, walk):
    """`still(where)`: a pair whose link goes silent at an element of the stream; the source's guest is paused."""
    pair = make_pair(build, settings=settings, plugins=[OneRound()])
    pair.source.power_on()
    pair.run()
    elements = {f"{one.element} {one.name}".strip(): one for one in walk(bytes(pair.recorded.sent))}
    pair.close()
    build.built.clear()

    def make(where, *, behind=0, **more):
        pair = make_pair(build, settings=settings, plugins=[OneRound()], **more)
        pair.source.power_on()
        pair.faults = Faults(stall_sent=elements[where].offset + behind)
        return pair

    return make


# -------------------------------------------------------------------------------------------- links that go silent


def test_a_deadline_closes_the_channel_unless_it_is_lifted():
    near, far = memory_pair()
    deadline = Deadline(0.01, near).start()
    with pytest.raises(ChannelClosed):
        near.recv_into(bytearray(1))
    assert deadline.passed
    near, far = memory_pair()
    with Deadline(LONG, near) as deadline:
        far.send(b"x")
        assert near.recv_into(bytearray(1)) == 1
    assert not deadline.passed
    deadline.lift()
    near.send(b"still open")


@pytest.mark.parametrize("where", ["SECTION_END ram", "SECTION_FULL counter", "SECTION_FULL globalstate"])
def test_silence_in_the_blackout_ends_it_here(still, build, settings, where):
    """The guest stands still, so there is a limit to it; and the source has not let go, so it runs on."""
    settings.limits.handover_timeout = 0.1
    pair = still(where, behind=3)
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    # handover-timeout, and twice what the rest was expected to take
    with pytest.raises(HandoverTimeout, match=r"has not proved within 0\."):
        outgoing.wait(LONG)
    assert outgoing.info.ownership == "owner"
    assert pair.source.run_state is RunState.PAUSED
    channel.release()
    with pytest.raises(ChannelLost):
        incoming.wait(LONG)
    assert not build.destination.blocks["a"].view.any()
    build.source.check()


def test_silence_behind_the_proof_is_undecided_on_both_sides(still, build, settings):
    other = settings.copy()
    settings.limits.handover_timeout = 0.1
    pair = still("EOF", destination_settings=other)
    incoming, outgoing = pair.migrate()
    pair.wait_stalled()
    with pytest.raises(HandoverUndecided, match=r"its last word has not come within 0\.1 s"):
        outgoing.wait(LONG)
    with pytest.raises(HandoverUndecided, match="ended"):
        incoming.wait(LONG)
    assert (outgoing.info.ownership, incoming.info.ownership) == ("released", "prepared")
    assert pair.source.run_state is RunState.POSTMIGRATE
    assert pair.destination.run_state is RunState.INMIGRATE
    incoming.adopt()
    assert pair.destination.run_state is RunState.PAUSED
    build.destination.check()


def test_silence_in_the_description_does_not_keep_the_destination(still, build, settings, monkeypatch):
    """It owns the machine already and has only the end of the stream to see."""
    settings.limits.handover_timeout = 0.3
    monkeypatch.setattr(takings, "LINGER", 0.05)
    pair = still("VMDESCRIPTION", behind=20)
    incoming, outgoing = pair.migrate()
    pair.wait_stalled()
    assert incoming.wait(LONG).status is MigrationStatus.COMPLETED
    assert pair.destination.run_state is RunState.PAUSED
    build.destination.check()
    # The source has heard that it runs there, whatever became of its last bytes.
    assert outgoing.wait(LONG).ownership == "done"
    assert pair.source.run_state is RunState.POSTMIGRATE


def test_a_refused_source_that_does_not_hang_up_is_not_waited_for(make_pair, build, settings, monkeypatch):
    monkeypatch.setattr(answers, "LINGER", 0.05)
    pair = make_pair(build, settings=settings)
    incoming = pair.destination.incoming("memory:pair")
    channel = pair.source.plugins.transport("memory").create().connect("pair", Patience(LONG))
    channel.send(b"QEVM\0\0\0\3\7\0\0\0\5other")
    channel.send(b"\x08")
    with pytest.raises(IncompatibleError, match="'other'"):
        incoming.wait(LONG)
    assert receive(channel, 9) == return_path.encode(return_path.Shut(1))
    channel.close()


# ------------------------------------------------------------------------------------------- links that swallow all


@given(st.lists(st.tuples(st.sampled_from(["pass", "move", "wait", "work"]), st.floats(0, 12)), max_size=40))
def test_a_link_is_silent_when_nothing_moved_for_as_long_while_it_was_waited_for(steps):
    """Whoever looks at every change finds what a plain account of them says."""
    now, moved, waits, since = [0.0], 0, False, 0.0
    watch = IdleWatch(10.0, memory_pair()[0], lambda: moved, clock=lambda: now[0])
    for step, span in steps:
        now[0] += span
        if step == "move":
            moved += 1
        elif step == "wait" and not waits:
            watch.__enter__()
            waits = True
        elif step == "work" and waits:
            watch.__exit__(None, None, None)
            waits = False
        else:
            assert watch.silent() == (waits and now[0] - since >= 10)
            since = since if waits else now[0]
            continue
        since = now[0]
        assert not watch.silent()


def test_a_watch_without_a_time_never_looks():
    near, far = memory_pair()
    with IdleWatch(0.0, near, lambda: pytest.fail("it looks")).start() as watch:
        far.send(b"x")
        assert near.recv_into(bytearray(1)) == 1
        watch.end()
    assert not watch.passed


@pytest.mark.parametrize("faults", [Faults(stall_sent=9000), Faults(stall_received=0)], ids=["bytes", "answers"])
def test_a_link_that_swallows_all_ends_it_while_the_guest_runs(make_pair, build, settings, faults):
    settings.limits.idle_timeout = 0.2
    pair = make_pair(build, settings=settings)
    pair.source.start()
    pair.faults = faults
    incoming, outgoing = pair.migrate()
    with pytest.raises(ChannelLost, match=r"no byte and brought no answer for 0\.2 s.*idle-timeout"):
        outgoing.wait(LONG)
    assert (outgoing.status, outgoing.info.ownership) == (MigrationStatus.FAILED, "owner")
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(5)
    with pytest.raises(MigrationError):
        incoming.wait(LONG)
    pair.faults = Faults()
    assert [migration.error for migration in pair.run()] == [None, None]


@pytest.mark.parametrize("lanes", [0, 2])
def test_a_listener_that_never_accepts_ends_it(make_pair, churning, settings, lanes):
    """What the system takes for it is a few MiB; then nothing goes, and no answer ever comes."""
    settings.limits.idle_timeout = 0.2
    settings.capabilities.multifd = bool(lanes)
    settings.parameters.multifd_channels = lanes or 2
    pair = make_pair(churning({"a": 4096}), settings=settings)
    pair.source.start()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        outgoing = pair.source.migrate(f"tcp:127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(ChannelLost, match=r"no byte and brought no answer"):
            outgoing.wait(LONG)
    assert pair.source.run_state is RunState.RUNNING


# ------------------------------------------------------------------------------------------- hooks that want to leave


@pytest.mark.parametrize("exception", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_a_device_that_wants_to_leave_is_a_bug_and_the_guest_runs_on(make_pair, build, settings, caplog, exception):
    def on_load():
        raise exception

    pair = make_pair(build, settings=settings)
    build.destination.on_load = on_load
    pair.source.start()
    with caplog.at_level(logging.CRITICAL, "whimbrel"):
        incoming, outgoing = pair.run()
    assert isinstance(incoming.error, MigrationError)
    assert type(exception).__name__ in str(incoming.error)
    assert isinstance(outgoing.error, MigrationError)
    assert pair.source.run_state is RunState.RUNNING
    assert not build.destination.blocks["a"].view.any()
    assert build.destination.counter.steps == 0
    build.source.wait_steps(5)
    build.destination.on_load = lambda: None
    incoming, outgoing = pair.run()
    assert (incoming.error, outgoing.error) == (None, None)


class Leaves:
    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        raise SystemExit(3)


def test_a_choice_that_wants_to_leave(make_pair, build, settings, caplog):
    pair = make_pair(build, settings=settings, plugins=[Leaves()])
    pair.source.start()
    with caplog.at_level(logging.CRITICAL, "whimbrel"):
        incoming, outgoing = pair.run()
    assert "SystemExit" in str(outgoing.error)
    assert isinstance(incoming.error, ChannelLost)
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(5)


# --------------------------------------------------------------------------------------- machines that are closed


def test_closing_a_source_that_has_let_go_cuts_it_off(make_pair, build, settings):
    pair = make_pair(build, settings=settings, plugins=[OneRound()])
    pair.faults = Faults(stall_received=24)
    pair.source.power_on()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    incoming.wait(LONG)
    pair.source.close()
    assert isinstance(outgoing.error, HandoverUndecided)
    assert outgoing.info.ownership == "released"
    assert pair.source.run_state is RunState.SHUTDOWN
    assert pair.destination.run_state is RunState.PAUSED
    channel.release()


def test_closing_a_destination_that_has_proved_cuts_it_off(make_pair, build, settings):
    pair = make_pair(build, settings=settings, plugins=[OneRound()])
    pair.faults = Faults(stall_received=17)
    pair.source.power_on()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    pair.destination.close()
    assert isinstance(incoming.error, HandoverUndecided)
    assert pair.destination.run_state is RunState.SHUTDOWN
    channel.release()
    with pytest.raises(MigrationError):
        outgoing.wait(LONG)
    # Whether the proof had got through is a matter of luck; the law is not.
    if outgoing.info.ownership == "owner":
        assert pair.source.run_state is RunState.PAUSED
    else:
        assert pair.source.run_state is RunState.POSTMIGRATE
        assert isinstance(outgoing.error, HandoverUndecided)


@pytest.mark.parametrize("call", ["migrate", "incoming"])
def test_nothing_begins_on_a_machine_that_is_being_closed(make_pair, build, settings, call):
    pair = make_pair(build, settings=settings)
    if call == "migrate":
        pair.source.start()
    entered, go_on = threading.Event(), threading.Event()

    def close():
        entered.set()
        assert go_on.wait(LONG)

    pair.source.guest.close = close
    closing = threading.Thread(target=pair.source.close)
    closing.start()
    assert entered.wait(LONG)
    with pytest.raises((StateError, MigrationError)):
        getattr(pair.source, call)("memory:pair")
    go_on.set()
    closing.join(LONG)
    assert pair.source.migration is None
    del pair.source.guest.close
    pair.source.guest.close()


# ---------------------------------------------------------------------------------------- words said twice


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (return_path.Pong(1), "never sent"),
        (return_path.SwitchoverAck(), "twice"),
        (return_path.Pong(PROOF), "never sent"),
    ],
)
def test_a_word_said_twice_or_too_early_is_no_word(make_pair, build, settings, message, words):
    pair = make_pair(build, settings=settings)
    listener = pair.source.plugins.transport("memory").create().listen("by hand")

    def serve():
        channel = listener.accept(Patience(LONG))
        receive(channel, 100)
        ack = return_path.encode(return_path.SwitchoverAck())
        channel.send(return_path.encode(return_path.Pong(1)) + ack + return_path.encode(message))
        while receive(channel, 1 << 16):
            pass
        channel.close()
        listener.close()

    serving = threading.Thread(target=serve)
    serving.start()
    pair.source.start()
    with pytest.raises(StreamError, match=words):
        pair.source.migrate("memory:by hand", handover="proof").wait(LONG)
    serving.join(LONG)
    assert pair.source.run_state is RunState.RUNNING
