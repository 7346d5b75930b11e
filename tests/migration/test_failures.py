"""Failures at every stage: the source's guest runs on, the destination is clean, and the next attempt succeeds."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

import attrs
import pytest

from whimbrel import MigrationError, MigrationStatus, RunState, vmstate
from whimbrel.abc import SaveVMHandler, SaveVMSpec
from whimbrel.errors import (
    ChannelLost,
    ConnectError,
    GuestError,
    HandoverTimeout,
    HandoverUndecided,
    IncompatibleError,
    MigrationCancelled,
    PeerRefused,
    StreamError,
)
from whimbrel.events import GuestStarted, GuestStopped
from whimbrel.hookspecs import hookimpl
from whimbrel.testing.faults import Faults
from whimbrel.wire import return_path
from whimbrel.wire.primitives import U16, U32

LONG = 60.0
BLOCKS = {"a": 20, "b": 3}


@pytest.fixture
def build(churning):
    return churning(BLOCKS)


def failed(migration, kind, *words, of="source"):
    """A migration has failed with one error of `kind` that says `words`."""
    with pytest.raises(kind) as caught:
        migration.wait(LONG)
    assert type(caught.value) is kind
    assert migration.error is caught.value
    assert migration.status is MigrationStatus.FAILED
    info = migration.info
    assert (info.status, info.error, info.error_code) == (MigrationStatus.FAILED, str(caught.value), kind.code)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


def source_runs(pair, build):
    """The source's guest runs, and what it has in memory is what it wrote."""
    assert pair.source.run_state is RunState.RUNNING
    assert pair.source.migration.info.ownership == "owner"
    build.source.wait_steps(20)
    pair.source.stop()
    build.source.check()
    pair.source.start()
    return True


def clean(pair, build):
    """The destination is as it was before, and waits."""
    assert pair.destination.run_state is RunState.INMIGRATE
    churn = build.built[1]
    assert not any(block.view.any() for block in churn.blocks.values())
    assert (churn.counter.steps, churn.dial.position, churn.dial.name, churn.powered) == (0, 0, bytes(8), 0)
    assert not churn.dial.curve.any()
    return True


def next_attempt_succeeds(pair, build, *, fresh_source=False):
    """The same destination takes a machine after all: the same source's, or that of one that fits."""
    pair.faults = Faults()
    sender = build.source
    if fresh_source:
        pair.new_source().start()
        sender = build.built[-1]
    sender.wait_steps(20)
    incoming, outgoing = pair.run()
    assert (incoming.error, outgoing.error) == (None, None)
    assert build.built[1].counter.steps >= sender.counter.steps
    build.built[1].wait_steps(20)
    pair.destination.stop()
    build.built[1].check()
    return True


# ------------------------------------------------------------------------------------------------ the connection


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("tcp:127.0.0.1:1", "Failed to connect to '127.0.0.1:1': Connection refused"),
        ("unix:/nonexistent/x", "Failed to connect to '/nonexistent/x': No such file or directory"),
        ("memory:nobody", "nobody listens"),
    ],
)
def test_nobody_answers(make_pair, build, settings, uri, words):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    outgoing = pair.source.migrate(uri, handover="proof")
    failed(outgoing, ConnectError, words)
    assert source_runs(pair, build)
    assert next_attempt_succeeds(pair, build)


def test_nobody_accepts_in_time(make_pair, build, settings):
    settings.limits.connect_timeout = 0.05
    pair = make_pair(build, settings=settings)
    listener = pair.source.plugins.transport("memory").create().listen("deaf")
    pair.source.start()
    failed(pair.source.migrate("memory:deaf"), ConnectError, "no answer within 0.05 s")
    listener.close()
    assert source_runs(pair, build)


class Peer:
    """A destination made by hand, on a thread of its own: `serve(channel)` is all it does."""

    def __init__(self, pair, serve):
        self.listener = pair.source.plugins.transport("memory").create().listen("by hand")
        self.serve = serve
        self.error = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        from whimbrel.abc import Patience

        channel = self.listener.accept(Patience(LONG))
        try:
            self.serve(channel)
        except MigrationError as error:
            self.error = error
        finally:
            channel.close()
            self.listener.close()


def swallow(channel, until=1 << 62):
    """Read up to `until` bytes, or all."""
    sink = memoryview(bytearray(1 << 16))
    while until > 0:
        count = channel.recv_into(sink[: min(len(sink), until)])
        if not count:
            return
        until -= count


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("read", [0, 8, 100, 30_000])
def test_the_peer_goes_at_once_or_soon(make_pair, build, settings, how, read):
    def serve(channel):
        swallow(channel, read)
        getattr(channel, how)()

    pair = make_pair(build, settings=settings)
    pair.source.start()
    pair.forget_events()
    peer = Peer(pair, serve)
    outgoing = pair.source.migrate("memory:by hand", handover="proof")
    error = failed(outgoing, ChannelLost)
    peer.thread.join()
    assert error.place.peer
    assert not any(isinstance(event, GuestStopped) for event in pair.source_events)
    assert source_runs(pair, build)
    assert next_attempt_succeeds(pair, build)


def test_a_destination_that_is_shut_down_in_the_middle(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=30_000)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    pair.destination.close()
    channel.release()
    failed(outgoing, ChannelLost)
    assert incoming.status is MigrationStatus.CANCELLED
    assert source_runs(pair, build)
    pair.new_destination()
    build.built[1] = build.built[-1]
    assert next_attempt_succeeds(pair, build)


# ----------------------------------------------------------------------------- what comes back on the return path


PONG_1 = return_path.encode(return_path.Pong(1))

BACK = {
    "a PONG that was not asked for": (return_path.encode(return_path.Pong(7)), StreamError, "never sent (0x7)"),
    "an early SHUT 0": (return_path.encode(return_path.Shut(0)), StreamError, "before it had everything"),
    "SHUT 1": (return_path.encode(return_path.Shut(1)), PeerRefused, "the destination failed (SHUT 1)"),
    "SHUT 2^32-1": (return_path.encode(return_path.Shut(2**32 - 1)), PeerRefused, "SHUT 4294967295"),
    "a page request": (U16.pack(4) + U16.pack(12) + bytes(12), StreamError, "REQ_PAGES belongs to postcopy"),
    "an unknown message": (U16.pack(99) + U16.pack(0), StreamError, "unknown return-path message 99"),
    "a PONG of two bytes": (U16.pack(2) + U16.pack(2) + bytes(2), StreamError, "is 2 bytes long, expected 4"),
    "a message of 64 KiB": (U16.pack(1) + U16.pack(0xFFFF), StreamError, "is 65535 bytes long"),
    "half a message": (U16.pack(2) + U16.pack(4) + b"\0", ChannelLost, "ended"),
}


@pytest.mark.parametrize("what", BACK)
def test_nonsense_on_the_way_back(make_pair, build, settings, what):
    data, kind, words = BACK[what]

    def serve(channel):
        swallow(channel, 100)
        channel.send(PONG_1 + data)
        channel.end_writing()
        swallow(channel)

    pair = make_pair(build, settings=settings)
    pair.source.start()
    peer = Peer(pair, serve)
    error = failed(pair.source.migrate("memory:by hand", handover="proof"), kind, words, "section return path")
    peer.thread.join()
    assert error.place.offset is not None
    assert source_runs(pair, build)
    assert next_attempt_succeeds(pair, build)


def answering(channel, *, until):
    """Answer every PING as a destination would, except from `until` on: a PING's value or None."""
    data = bytearray()
    sink = memoryview(bytearray(1 << 16))
    done = 0
    while True:
        count = channel.recv_into(sink)
        if not count:
            return
        data += sink[:count]
        while (at := data.find(b"\x08\0\x02\0\x04", done)) >= 0 and len(data) >= at + 9:
            (value,) = U32.unpack(data[at + 5 : at + 9])
            if value == until:
                return
            done = at + 9
            if value < 1 << 24:  # what looks like a PING in the pages does not count
                channel.send(return_path.encode(return_path.Pong(value)))


def test_a_destination_that_does_not_prove_anything(make_pair, build, settings):
    settings.limits.handover_timeout = 0.05
    leave = threading.Event()

    def serve(channel):
        answering(channel, until=0x77686D62)
        assert leave.wait(LONG)

    pair = make_pair(build, settings=settings)
    pair.source.start()
    pair.forget_events()
    peer = Peer(pair, serve)
    outgoing = pair.source.migrate("memory:by hand", handover="proof")
    failed(outgoing, HandoverTimeout, "has not proved within 0.0", "peer memory:by hand")
    assert source_runs(pair, build)
    leave.set()
    peer.thread.join()
    events = [type(event) for event in pair.source_events if isinstance(event, GuestStopped | GuestStarted)]
    assert events[:2] == [GuestStopped, GuestStarted]
    settings.limits.handover_timeout = 0.0
    assert next_attempt_succeeds(pair, build)


def test_a_destination_that_gives_up_after_its_proof_keeps_the_source_from_running(make_pair, build, settings):
    """PONG for the proof, then silence: the machine was let go of, and nobody may conclude that it may run here."""
    settings.limits.handover_timeout = 0.2

    def serve(channel):
        answering(channel, until=0x77686D62)
        channel.send(return_path.encode(return_path.Pong(0x77686D62)))
        swallow(channel)

    pair = make_pair(build, settings=settings)
    pair.source.start()
    peer = Peer(pair, serve)
    outgoing = pair.source.migrate("memory:by hand", handover="proof")
    failed(outgoing, HandoverUndecided, "last word has not come", "reclaim")
    peer.thread.join()
    assert outgoing.info.ownership == "released"
    assert pair.source.run_state is RunState.POSTMIGRATE
    pair.source.reclaim()
    pair.source.start()
    build.source.wait_steps(5)


@pytest.mark.parametrize("word", [0, 1, None])
def test_what_comes_with_the_proof_decides_nothing(make_pair, build, settings, word):
    """A SHUT that comes in one go with the proof: early if 0, a refusal if not; a hang-up is a broken link."""
    together = threading.Event()

    def serve(channel):
        answering(channel, until=0x77686D62)
        answer = b"" if word is None else return_path.encode(return_path.Shut(word))
        channel.send(return_path.encode(return_path.Pong(0x77686D62)) + answer)
        channel.close()
        together.set()

    pair = make_pair(build, settings=settings)
    pair.source.start()
    peer = Peer(pair, serve)
    outgoing = pair.source.migrate("memory:by hand", handover="proof")
    with pytest.raises(MigrationError):
        outgoing.wait(LONG)
    peer.thread.join()
    # Whether the source noticed before or after it let go is a race; what follows is not.
    if outgoing.info.ownership == "owner":
        assert pair.source.run_state is RunState.RUNNING
        assert not isinstance(outgoing.error, HandoverUndecided)
    else:
        assert outgoing.info.ownership == "released"
        assert pair.source.run_state is RunState.POSTMIGRATE
        assert isinstance(outgoing.error, HandoverUndecided)


# ------------------------------------------------------------------------------------------ machines that do not fit


@attrs.define
class Extra:
    x: int = 0


def with_extra(machine, churn):
    machine.devices.add("extra", Extra(), vmstate.VMStateDescription("extra", 1, fields=[vmstate.uint8("x")]))


def with_newer(machine, churn):
    fields = [vmstate.uint64("steps"), vmstate.uint8("more")]
    churn.counter = attrs.make_class("Newer", {"steps": attrs.field(default=0), "more": attrs.field(default=0)})()
    device = machine.devices["counter"]
    object.__setattr__(device, "obj", churn.counter)
    object.__setattr__(device, "description", vmstate.VMStateDescription("counter", 2, fields=fields))


def with_longer(machine, churn):
    device = machine.devices["counter"]
    churn.counter = attrs.make_class("Longer", {"steps": attrs.field(default=0), "more": attrs.field(default=0)})()
    object.__setattr__(device, "obj", churn.counter)
    fields = [vmstate.uint64("steps"), vmstate.uint8("more")]
    object.__setattr__(device, "description", vmstate.VMStateDescription("counter", 1, fields=fields))


def out_of_range(machine, churn):
    fields = [vmstate.int16("position"), vmstate.buffer("name", size=8), vmstate.float64("curve", length=5)]
    object.__setattr__(machine.devices["dial"], "description", vmstate.VMStateDescription("dial", 2, fields=fields))
    turn = churn.machine.guest._power_on

    def power_on():
        turn()
        churn.dial.position = 101

    churn.machine.guest._power_on = power_on


# In what the source differs, what the destination says to it, and whether it was refused before the guest was stopped.
MISFITS = {
    "another name": ({"name": "other"}, IncompatibleError, ["'other'", "'churning'", "section configuration"], True),
    "another block": ({"blocks": {"a": 20, "c": 3}}, IncompatibleError, ["'b'", "'c'", "section 'ram'"], True),
    "a block more": ({"blocks": {"a": 20, "b": 3, "c": 1}}, IncompatibleError, ["it has 'c' of 4096 bytes"], True),
    "a block less": ({"blocks": {"a": 20}}, IncompatibleError, ["it lacks 'b' of 12288 bytes"], True),
    "a longer block": ({"blocks": {"a": 21, "b": 3}}, IncompatibleError, ["'a' is 86016 bytes", "81920"], True),
    "a shorter block": ({"blocks": {"a": 19, "b": 3}}, IncompatibleError, ["'a' is 77824 bytes", "81920"], True),
    "no RAM at all": ({"blocks": {}}, IncompatibleError, ["lacks 'a'"], True),
    "a device more": ({"alter": with_extra}, IncompatibleError, ["no 'extra'", "'counter', 'dial'"], False),
    "a newer device": ({"alter": with_newer}, IncompatibleError, ["'counter'", "version 2", "up to 1"], False),
    "a longer device": ({"alter": with_longer}, StreamError, ["section 'counter'", "footer"], False),
    "a value out of range": ({"alter": out_of_range}, StreamError, ["section 'dial'", "101"], False),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_machine_that_does_not_fit(make_pair, churning, settings, misfit):
    differs, kind, words, early = MISFITS[misfit]
    build = churning(BLOCKS, source=differs)
    pair = make_pair(build, settings=settings)
    pair.source.start()
    pair.forget_events()
    incoming, outgoing = pair.migrate()
    error = failed(incoming, kind, *words)
    assert error.place.section
    assert error.place.offset is not None
    failed(outgoing, PeerRefused, "its own error says why")
    assert any(isinstance(event, GuestStopped) for event in pair.source_events) is not early
    if misfit not in {"no RAM at all", "a newer device", "a longer device", "a value out of range"}:
        assert source_runs(pair, build)
    assert pair.source.run_state is RunState.RUNNING
    assert clean(pair, build)
    assert next_attempt_succeeds(pair, build, fresh_source=True)


def test_a_device_less_is_refused_at_the_proof(make_pair, churning, settings):
    build = churning(BLOCKS, alter=with_extra, source={"alter": None})
    pair = make_pair(build, settings=settings)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    failed(incoming, IncompatibleError, "the stream lacks what this machine has: extra", "section command")
    failed(outgoing, PeerRefused)
    assert source_runs(pair, build)
    assert clean(pair, build)
    assert next_attempt_succeeds(pair, build, fresh_source=True)


# ------------------------------------------------------------------------------------------- what goes wrong on its own


def test_a_post_load_that_raises(make_pair, build, settings):
    def on_load():
        raise ValueError("this dial cannot be turned")

    pair = make_pair(build, settings=settings)
    build.destination.on_load = on_load
    pair.source.start()
    incoming, outgoing = pair.migrate()
    failed(incoming, IncompatibleError, "this dial cannot be turned", "section 'dial'")
    failed(outgoing, PeerRefused)
    assert source_runs(pair, build)
    assert clean(pair, build)
    build.destination.on_load = lambda: None
    assert next_attempt_succeeds(pair, build)


class Fragile(SaveVMHandler):
    """A part of the machine that breaks where it is told to; `log` has what was called."""

    idstr = "fragile"
    priority = -5

    def __init__(self, plugin, machine):
        self.plugin, self.machine = plugin, machine

    def _call(self, name):
        self.plugin.log.append((self.machine.run_state, name))
        if name in self.plugin.breaks:
            raise self.plugin.error

    def save(self, out):
        self._call("save")
        out.write(b"frag")

    def load(self, reader, kind, version_id):
        self._call("load")
        reader.window(4)
        reader.advance(4)

    def commit(self):
        self._call("commit")

    def rollback(self):
        self._call("rollback")

    def finish(self):
        self._call("finish")


class FragilePlugin:
    def __init__(self, *breaks, error):
        self.breaks, self.error, self.log = set(breaks), error, []

    @hookimpl
    def whimbrel_savevm_handlers(self, machine):
        return [SaveVMSpec(name="fragile", summary="", create=lambda: [Fragile(self, machine)])]


ERRORS = [RuntimeError("a bug"), StreamError("the part is malformed"), OSError(5, "io"), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["save", "load", "commit"])
def test_a_handler_that_breaks(make_pair, build, settings, caplog, where, error):
    fragile = FragilePlugin(where, error=error)
    pair = make_pair(build, settings=settings, plugins=[fragile])
    pair.source.start()
    with caplog.at_level(logging.CRITICAL, "whimbrel"):
        incoming, outgoing = pair.run()
    broken, other = (outgoing, incoming) if where == "save" else (incoming, outgoing)
    if isinstance(error, MigrationError):
        assert broken.error is error
        assert "'fragile'" in error.place.section
    else:
        assert type(broken.error) is MigrationError
        assert "this is a bug" in str(broken.error)
        assert broken.error.__cause__ is error
    assert isinstance(other.error, MigrationError)
    assert (broken.status, other.status) == (MigrationStatus.FAILED, MigrationStatus.FAILED)
    assert source_runs(pair, build)
    assert clean(pair, build)
    ends = [name for _, name in fragile.log if name == "finish"]
    assert len(ends) == 2  # once on either side
    assert ("rollback" in [name for _, name in fragile.log]) is True
    fragile.breaks.clear()
    error.__traceback__ = None
    assert next_attempt_succeeds(pair, build)


@pytest.mark.parametrize("where", [("finish",), ("finish", "commit", "rollback")])
def test_a_handler_that_breaks_even_the_end(make_pair, build, settings, caplog, where):
    fragile = FragilePlugin(*where, error=RuntimeError("a bug"))
    pair = make_pair(build, settings=settings, plugins=[fragile])
    pair.source.start()
    with caplog.at_level(logging.CRITICAL, "whimbrel"):
        incoming, outgoing = pair.run()
    if "commit" in where:
        assert source_runs(pair, build)
        assert clean(pair, build)
        fragile.breaks = {"finish"}
        assert next_attempt_succeeds(pair, build)
    else:
        assert (incoming.error, outgoing.error) == (None, None)
        build.destination.wait_steps(10)


# --------------------------------------------------------------------------------------------------------- the guests


def test_a_guest_that_failed_before_it_could_be_stopped(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=30_000)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    build.source.fail()
    channel.release()
    failed(outgoing, GuestError, "a bug of the guest's")
    assert pair.source.run_state is RunState.INTERNAL_ERROR
    failed(incoming, ChannelLost)
    assert clean(pair, build)
    assert next_attempt_succeeds(pair, build, fresh_source=True)


def test_a_guest_that_fails_in_its_last_step(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    stop, failing = pair.source.guest.stop, threading.Event()

    def on_step():
        failing.set()
        raise ZeroDivisionError("a bug of the guest's")

    def stop_in_its_last_step():
        build.source.on_step = on_step
        assert failing.wait(LONG)
        stop()

    pair.source.guest.stop = stop_in_its_last_step
    pair.source.start()
    incoming, outgoing = pair.migrate()
    failed(outgoing, GuestError, "a bug of the guest's")
    assert pair.source.run_state is RunState.INTERNAL_ERROR
    failed(incoming, ChannelLost)
    assert clean(pair, build)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_guest_that_does_not_start(make_pair, build, settings, side):
    """At the source after a failure, at the destination after its arrival: the machine is there, paused."""
    pair = make_pair(build, settings=settings)
    pair.source.start()
    churn = build.source if side == "source" else build.destination
    start = churn.machine.guest.start

    def no_start():
        raise OSError("the engine is flooded")

    churn.machine.guest.start = no_start
    if side == "source":
        build.destination.on_load = lambda: 1 / 0
    incoming, outgoing = pair.run()
    assert churn.machine.run_state is RunState.PAUSED
    if side == "source":
        failed(outgoing, GuestError, "the engine is flooded")
        assert outgoing.info.ownership == "owner"
        assert clean(pair, build)
    else:
        failed(incoming, GuestError, "the engine is flooded")
        assert incoming.info.ownership == "owner"
        failed(outgoing, HandoverUndecided)
        assert pair.source.run_state is RunState.POSTMIGRATE
    churn.machine.guest.start = start
    churn.machine.start()
    churn.wait_steps(5)
    churn.machine.stop()
    churn.check()


# --------------------------------------------------------------------------------------------- strangers who connect


def knock(pair, data, *, end=True):
    """Connect to the destination as a stranger and say `data`; returns the channel."""
    from whimbrel.abc import Patience

    channel = pair.source.plugins.transport("memory").create().connect("pair", Patience(LONG))
    channel.send(data)
    if end:
        channel.end_writing()
    return channel


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it hung up before it said what it is"),
        (b"GET / HTTP/1.1\r\n\r\n", "this is not a migration stream"),
        (b"QEV", "it hung up before it said what it is"),
        (b"QEVM\0\0\0", "it hung up before it said what it is"),
    ],
)
def test_a_stranger_who_says_something_else_ends_nothing(make_pair, build, settings, caplog, data, words):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    incoming = pair.destination.incoming("memory:pair")
    channel = knock(pair, data)
    assert hung_up_on(channel)
    assert words in caplog.text
    assert "memory:pair was hung up on, and the source is waited for" in caplog.text
    assert not incoming.status.finished
    assert source_arrives(pair, build, incoming)


def test_a_source_of_another_version(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    incoming = pair.destination.incoming("memory:pair")
    channel = knock(pair, b"QEVM\0\0\0\2")
    error = failed(incoming, StreamError, "version is 2, expected 3", "section header", "peer memory:pair")
    assert error.place.offset is not None
    assert incoming.info.ownership == "refused"
    channel.close()
    assert clean(pair, build)
    assert next_attempt_succeeds(pair, build)


def test_a_stranger_who_says_nothing_is_hung_up_on(make_pair, build, settings, caplog):
    settings.limits.header_timeout = 0.2
    pair = make_pair(build, settings=settings)
    pair.source.start()
    incoming = pair.destination.incoming("memory:pair")
    assert hung_up_on(knock(pair, b"QEVM", end=False))
    while "no stream header within 0.2 s; [limits] header-timeout says how long to wait" not in caplog.text:
        assert not incoming.status.finished
    assert source_arrives(pair, build, incoming)


def hung_up_on(channel):
    with suppress(ChannelLost):
        while channel.recv_into(bytearray(64)):
            pass
    channel.close()
    return True


def source_arrives(pair, build, incoming):
    """The one that was waited for all the time."""
    outgoing = pair.source.migrate(incoming.uri)
    outgoing.wait(LONG)
    incoming.wait(LONG)
    return pair.destination.run_state is RunState.RUNNING


def test_a_transport_that_breaks_its_contract_does_not_hang_anybody(make_pair, build, settings, caplog):
    pair = make_pair(build, settings=settings)
    transport = pair.source.plugins.transport("memory").create()
    wrap = transport.on_connect

    def on_connect(channel):
        channel = wrap(channel)

        def recv_into(buffer):
            raise RuntimeError("a bug of the transport's")

        close = channel.close

        def broken_close():
            close()
            raise RuntimeError("another")

        channel.recv_into, channel.close = recv_into, broken_close
        return channel

    transport.on_connect = on_connect
    pair.source.start()
    with caplog.at_level(logging.CRITICAL, "whimbrel"):
        incoming, outgoing = pair.migrate()
        failed(outgoing, MigrationError, "a bug of the transport's", "return path")
        incoming.cancel()  # it waits on, where the header had not gone yet
        with pytest.raises((MigrationError, MigrationCancelled)):
            incoming.wait(LONG)
    assert source_runs(pair, build)
    transport.on_connect = wrap
    assert clean(pair, build)
    assert next_attempt_succeeds(pair, build)


def test_a_link_that_takes_nothing_more_and_says_nothing(make_pair, build, settings):
    """The send fails and the way back is silent: the send's own error is the reason, after a moment for last words."""
    pair = make_pair(build, settings=settings)
    transport = pair.source.plugins.transport("memory").create()
    wrap = transport.on_connect

    def on_connect(channel):
        channel = wrap(channel)
        send, sent = channel.send, [0]

        def half_broken(data):
            sent[0] += memoryview(data).nbytes
            if sent[0] > 20_000:
                raise ChannelLost("no route to host")
            send(data)

        channel.send = half_broken
        return channel

    transport.on_connect = on_connect
    pair.source.start()
    incoming, outgoing = pair.migrate()
    failed(outgoing, ChannelLost, "no route to host", "section 'ram'")
    failed(incoming, ChannelLost)
    transport.on_connect = wrap
    assert source_runs(pair, build)
    assert clean(pair, build)
    assert next_attempt_succeeds(pair, build)


def test_even_a_machine_that_does_not_thaw_ends_the_migration(make_pair, build, settings, caplog):
    pair = make_pair(build, settings=settings)
    build.destination.on_load = lambda: 1 / 0
    thaw = pair.source.thaw

    def broken(to):
        raise RuntimeError("a bug of the machine's")

    pair.source.thaw = broken
    pair.source.start()
    with caplog.at_level(logging.CRITICAL, "whimbrel"):
        incoming, outgoing = pair.run()
    assert outgoing.status is MigrationStatus.FAILED
    assert isinstance(outgoing.error, MigrationError)
    assert isinstance(incoming.error, MigrationError)
    thaw(RunState.RUNNING)
    build.source.wait_steps(5)
