"""Peers that are not whimbrel: a source that asks for no proof (QEMU), and transports without a way back."""

from __future__ import annotations

import socket
import struct
import threading

import pytest

from whimbrel import MigrationStatus, RunState
from whimbrel.abc import Patience
from whimbrel.errors import ChannelLost, HandoverUndecided, MigrationError, StateError, StreamError
from whimbrel.events import Arrived
from whimbrel.migration.handover import FIRST_PING, PROOF, ROUND_PING
from whimbrel.testing.faults import Faults
from whimbrel.testing.transports import receive
from whimbrel.wire import commands, return_path

LONG = 60.0

PONG_1 = return_path.encode(return_path.Pong(FIRST_PING))
SHUT_0 = return_path.encode(return_path.Shut(0))
SHUT_1 = return_path.encode(return_path.Shut(1))


@pytest.fixture
def build(churning):
    return churning({"a": 6, "b": 2})


@pytest.fixture
def recording(make_pair, build, settings, walk):
    """A stream as QEMU sends it: no PING but the first, and the steps that its machine had made."""
    pair = make_pair(build, settings=settings)
    pair.source.start()
    build.source.wait_steps(10)
    pair.run(start=False)
    stream = bytes(pair.recorded.sent)
    pings = [one.name for one in walk(stream) if one.name.startswith("PING")]
    assert (pings[0], pings[1], pings[-1]) == (f"PING {FIRST_PING:#x}", f"PING {ROUND_PING:#x}", f"PING {PROOF:#x}")
    kept = [one for one in walk(stream) if one.name not in pings[1:]]
    steps = build.source.counter.steps
    pair.close()
    build.built.clear()
    return stream[:8] + b"".join(stream[one.offset : one.end] for one in kept), steps


class Source:
    """A source made by hand: it connects to the destination of a pair and says what it is told to."""

    def __init__(self, pair, **more):
        self.pair = pair
        self.incoming = pair.destination.incoming("memory:pair", **more)
        self.channel = pair.source.plugins.transport("memory").create().connect("pair", Patience(LONG))

    def say(self, data):
        self.channel.send(data)

    def hears(self, *messages):
        expected = b"".join(messages)
        assert receive(self.channel, len(expected)) == expected


@pytest.fixture
def source(make_pair, build, settings):
    def make(**more):
        return Source(make_pair(build, settings=settings), **more)

    return make


def arrived(source, build, steps, *, running):
    source.incoming.wait(LONG)
    assert source.pair.destination.run_state is (RunState.RUNNING if running else RunState.PAUSED)
    churn = build.built[1]
    if running:
        churn.wait_steps(5)
        source.pair.destination.stop()
    assert churn.counter.steps >= steps
    churn.check()
    return True


# ------------------------------------------------------------------------------------------------- a source like QEMU's


def test_it_starts_only_when_the_source_has_hung_up(source, build, recording):
    stream, steps = recording
    qemu = source()
    qemu.say(stream)
    qemu.hears(PONG_1, SHUT_0)
    # The source has not let go yet for all we know: QEMU resumes here if it is cancelled.
    with pytest.raises(TimeoutError):
        qemu.incoming.wait(0.05)
    assert qemu.pair.destination.run_state is RunState.INMIGRATE
    assert qemu.incoming.ownership == "prepared"
    assert build.built[1].counter.steps == steps
    assert not qemu.incoming.cancel()
    qemu.channel.close()
    assert arrived(qemu, build, steps, running=True)


@pytest.mark.parametrize(("start", "running"), [(None, True), (True, True), (False, False)])
def test_it_is_started_as_asked(source, build, recording, start, running):
    stream, steps = recording
    qemu = source(start=start)
    qemu.say(stream)
    qemu.hears(PONG_1, SHUT_0)
    qemu.channel.close()
    assert arrived(qemu, build, steps, running=running)
    assert [event.running for event in qemu.pair.destination_events if isinstance(event, Arrived)] == [running]


def undecided(source, words):
    with pytest.raises(HandoverUndecided, match=words) as caught:
        source.incoming.wait(LONG)
    assert source.incoming.status is MigrationStatus.FAILED
    assert source.incoming.ownership == "prepared"
    assert source.incoming.info.error_code == "undecided"
    assert source.pair.destination.run_state is RunState.INMIGRATE
    with pytest.raises(StateError, match="waiting for an incoming migration"):
        source.pair.destination.start()
    with pytest.raises(StateError, match="adopt"):
        source.pair.destination.incoming("memory:pair")
    assert "adopt()" in str(caught.value)
    assert "discard()" in str(caught.value)
    return True


def test_after_a_reset_it_stays_undecided_until_somebody_decides(source, build, recording):
    stream, steps = recording
    qemu = source()
    qemu.say(stream)
    qemu.hears(PONG_1, SHUT_0)
    qemu.channel.reset()
    assert undecided(qemu, "reset")
    qemu.incoming.adopt()
    assert qemu.incoming.ownership == "owner"
    assert qemu.pair.destination.run_state is RunState.RUNNING
    build.built[1].wait_steps(5)
    qemu.pair.destination.stop()
    build.built[1].check()
    assert build.built[1].counter.steps >= steps + 5
    for decide in (qemu.incoming.adopt, qemu.incoming.discard):
        with pytest.raises(StateError, match="nothing is left undecided"):
            decide()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_over_a_real_socket_an_end_and_a_reset_are_told_apart(make_pair, build, settings, recording, how):
    stream, steps = recording
    pair = make_pair(build, settings=settings, uri="tcp:127.0.0.1:0")
    incoming = pair.destination.incoming(pair.uri)
    with socket.create_connection(("127.0.0.1", int(incoming.uri.rpartition(":")[2]))) as qemu:
        qemu.sendall(stream)
        heard = b""
        while len(heard) < len(PONG_1 + SHUT_0):
            heard += qemu.recv(100)
        assert heard == PONG_1 + SHUT_0
        if how == "reset":
            qemu.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "close":
        incoming.wait(LONG)
        assert pair.destination.run_state is RunState.RUNNING
        build.built[1].wait_steps(5)
    else:
        with pytest.raises(HandoverUndecided, match="Connection reset by peer"):
            incoming.wait(LONG)
        assert pair.destination.run_state is RunState.INMIGRATE
        assert build.built[1].counter.steps == steps


@pytest.mark.parametrize("decision", ["adopt", "discard"])
def test_an_operator_need_not_wait_for_the_order(source, build, recording, decision):
    stream, _ = recording
    qemu = source()
    qemu.say(stream)
    qemu.hears(PONG_1, SHUT_0)
    getattr(qemu.incoming, decision)()
    assert qemu.incoming.status is MigrationStatus.FAILED
    assert isinstance(qemu.incoming.error, HandoverUndecided)
    assert receive(qemu.channel, 1) == b""  # hung up on
    with pytest.raises(ChannelLost):
        qemu.say(b"x")
    if decision == "adopt":
        assert qemu.pair.destination.run_state is RunState.RUNNING
        build.built[1].wait_steps(5)
    else:
        assert qemu.pair.destination.run_state is RunState.INMIGRATE
        assert not build.built[1].blocks["a"].view.any()
    with pytest.raises(StateError, match="nothing is left undecided"):
        getattr(qemu.incoming, decision)()


@pytest.mark.parametrize("decision", ["adopt", "discard"])
@pytest.mark.parametrize("at", [0, 8, 100, 5_000])
def test_there_is_nothing_to_decide_before_the_proof(source, build, recording, decision, at):
    stream, _ = recording
    qemu = source()
    qemu.say(stream[:at])
    with pytest.raises(StateError, match="nothing is left undecided: this side's ownership is loading"):
        getattr(qemu.incoming, decision)()
    assert not qemu.incoming.status.finished
    qemu.channel.close()


def test_what_is_discarded_is_gone_and_the_machine_can_wait_again(source, build, recording):
    stream, steps = recording
    qemu = source()
    qemu.say(stream)
    qemu.hears(PONG_1, SHUT_0)
    qemu.channel.reset()
    assert undecided(qemu, "reset")
    assert build.built[1].counter.steps == steps
    qemu.incoming.discard()
    assert qemu.incoming.ownership == "refused"
    churn = build.built[1]
    assert not any(block.view.any() for block in churn.blocks.values())
    assert (churn.counter.steps, churn.dial.name) == (0, bytes(8))
    for decide in (qemu.incoming.adopt, qemu.incoming.discard):
        with pytest.raises(StateError, match="nothing is left undecided"):
            decide()
    qemu.pair.source.start()
    incoming, outgoing = qemu.pair.run()
    assert (incoming.error, outgoing.error) == (None, None)
    churn.wait_steps(5)


def test_more_bytes_behind_the_end_are_no_hang_up(source, build, recording):
    stream, _ = recording
    qemu = source()
    qemu.say(stream + b"x")
    assert undecided(qemu, "bytes came behind the end")
    qemu.incoming.discard()
    qemu.channel.close()


def test_bytes_that_come_late_are_no_hang_up_either(source, build, recording):
    stream, _ = recording
    qemu = source()
    qemu.say(stream)
    qemu.hears(PONG_1, SHUT_0)
    qemu.say(b"x")
    assert undecided(qemu, "bytes came behind the end")
    qemu.channel.close()


@pytest.mark.parametrize("missing", [1, 100])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_one_that_hangs_up_before_it_is_through_has_not_let_go(source, build, recording, missing, how):
    """It hung up in its description: a QEMU that was cancelled there runs on."""
    stream, _ = recording
    qemu = source()
    qemu.say(stream[:-missing])
    qemu.hears(PONG_1)
    getattr(qemu.channel, how)()
    assert undecided(qemu, "ended" if how == "close" else "reset")
    qemu.incoming.discard()


def test_one_that_never_hangs_up_is_not_waited_for_for_ever(source, build, recording, settings):
    stream, _ = recording
    settings.limits.handover_timeout = 0.05
    qemu = source()
    qemu.say(stream)
    qemu.hears(PONG_1, SHUT_0)
    assert undecided(qemu, "it took too long")
    qemu.incoming.adopt()
    build.built[1].wait_steps(5)
    qemu.channel.close()


def test_closing_the_machine_while_it_is_undecided(source, build, recording):
    stream, _ = recording
    qemu = source()
    qemu.say(stream)
    qemu.hears(PONG_1, SHUT_0)
    qemu.pair.destination.close()
    assert qemu.incoming.status is MigrationStatus.FAILED
    assert isinstance(qemu.incoming.error, HandoverUndecided)
    assert qemu.pair.destination.run_state is RunState.SHUTDOWN
    qemu.channel.close()


def test_without_a_return_path_nobody_is_answered_and_nothing_starts(source, build, recording):
    """QEMU without capability return-path: it closes behind its last byte, reads nothing, and says `completed`."""
    stream, steps = recording
    opened = commands.encode(commands.OpenReturnPath()) + commands.encode(commands.Ping(FIRST_PING))
    assert stream.count(opened) == 1
    qemu = source()
    qemu.say(stream.replace(opened, b""))
    qemu.channel.end_writing()
    assert arrived(qemu, build, steps, running=False)
    assert receive(qemu.channel, 1) == b""
    qemu.channel.close()


def test_without_a_return_path_it_starts_if_it_was_told_to(source, build, recording):
    stream, steps = recording
    opened = commands.encode(commands.OpenReturnPath()) + commands.encode(commands.Ping(FIRST_PING))
    qemu = source(start=True)
    qemu.say(stream.replace(opened, b""))
    qemu.channel.close()
    assert arrived(qemu, build, steps, running=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda open_, ping: ping, "PING came without an open return path"),
        (lambda open_, ping: open_ + open_, "opens the return path twice"),
    ],
)
def test_commands_out_of_order(source, build, recording, change, words):
    stream, _ = recording
    open_, ping = commands.encode(commands.OpenReturnPath()), commands.encode(commands.Ping(FIRST_PING))
    qemu = source()
    qemu.say(stream.replace(open_ + ping, change(open_, ping)))
    qemu.channel.end_writing()
    with pytest.raises(StreamError, match=words) as caught:
        qemu.incoming.wait(LONG)
    assert caught.value.place.section == "command"
    qemu.channel.close()


def test_a_section_behind_the_proof_is_refused_and_what_was_proved_is_kept(source, build, recording):
    stream, _ = recording
    qemu = source()
    end = stream.rindex(b"\0\x06\0\0")
    qemu.say(stream[:end] + commands.encode(commands.Ping(PROOF)) + b"\x04\0\0\0\x09\x05extra\0\0\0\0\0\0\0\1")
    qemu.hears(PONG_1, return_path.encode(return_path.Pong(PROOF)))
    assert undecided(qemu, "a section came behind the PING")
    qemu.incoming.discard()
    qemu.channel.close()


def test_a_ping_before_everything_is_there_is_refused(source, build, recording, walk):
    stream, _ = recording
    qemu = source()
    (dial,) = [one for one in walk(stream) if one.name == "dial"]
    qemu.say(stream[: dial.offset] + commands.encode(commands.Ping(PROOF)))
    qemu.channel.end_writing()
    with pytest.raises(MigrationError, match="the stream lacks what this machine has: dial, globalstate"):
        qemu.incoming.wait(LONG)
    qemu.hears(PONG_1, SHUT_1)
    assert qemu.incoming.ownership == "refused"
    qemu.channel.close()


# ------------------------------------------------------------------------------------------------ without a way back


@pytest.mark.parametrize("source_runs", [True, False])
@pytest.mark.parametrize("start", [None, True, False])
def test_one_way_it_stays_paused_unless_told_to_start(make_pair, build, settings, start, source_runs):
    pair = make_pair(build, settings=settings, duplex=False)
    pair.source.start()
    build.source.wait_steps(10)
    if not source_runs:
        pair.source.stop()
    incoming, outgoing = pair.run(start=start)
    assert (incoming.error, outgoing.error) == (None, None)
    assert outgoing.status is incoming.status is MigrationStatus.COMPLETED
    assert outgoing.info.ownership == "released"  # and not done: nobody has said so
    assert outgoing.info.downtime_exact > 0
    assert pair.source.run_state is RunState.POSTMIGRATE
    runs = source_runs and start is True
    assert pair.destination.run_state is (RunState.RUNNING if runs else RunState.PAUSED)
    assert not pair.recorded.received
    assert b"\x08\0\x01\0\0" not in bytes(pair.recorded.sent)[:100]  # no OPEN_RETURN_PATH
    if not runs:
        build.destination.check()
        pair.destination.start()
    build.destination.wait_steps(5)
    pair.destination.stop()
    build.destination.check()


def test_one_way_a_stream_that_breaks_off_leaves_nothing_there(make_pair, build, settings):
    pair = make_pair(build, settings=settings, duplex=False)
    pair.faults = Faults(cut_sent=15_000)
    pair.source.start()
    incoming, outgoing = pair.run()
    assert isinstance(incoming.error, ChannelLost)
    assert isinstance(outgoing.error, ChannelLost)
    assert pair.source.run_state is RunState.RUNNING
    assert not any(block.view.any() for block in build.destination.blocks.values())
    pair.faults = Faults()
    incoming, outgoing = pair.run(start=True)
    assert (incoming.error, outgoing.error) == (None, None)
    build.destination.wait_steps(5)


def test_one_way_a_stream_that_breaks_off_at_its_end_is_undecided_at_the_source(make_pair, build, settings):
    pair = make_pair(build, settings=settings, duplex=False)
    pair.source.power_on()
    pair.run()
    end = bytes(pair.recorded.sent).rindex(b"\0\x06\0\0")
    pair.close()
    build.built.clear()
    pair = make_pair(build, settings=settings, duplex=False)
    pair.source.power_on()
    pair.faults = Faults(cut_sent=end)
    incoming, outgoing = pair.run(start=True)
    assert isinstance(outgoing.error, HandoverUndecided)
    assert pair.source.run_state is RunState.POSTMIGRATE
    assert isinstance(incoming.error, ChannelLost)
    assert pair.destination.run_state is RunState.INMIGRATE
    assert not any(block.view.any() for block in build.destination.blocks.values())


def test_threads_of_the_watch_are_gone_when_it_is_over(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    pair.run()
    for thread in threading.enumerate():
        if thread.name == "whimbrel-watchdog":
            thread.join(LONG)
            assert not thread.is_alive()
