"""Handing over in pairs: the order to start is repeated until it is answered, and each answer is heeded."""

from __future__ import annotations

import socket
import threading

import pytest

from whimbrel import MigrationStatus, RunState, Settings
from whimbrel.errors import HandoverUndecided, PeerRefused, StateError
from whimbrel.migration.handover import DestinationOwnership, SourceOwnership
from whimbrel.testing.faults import Faults, FaultyChannel
from whimbrel.wire import handover
from whimbrel.wire.handover import Word, WordKind

LONG = 60.0
TCP = "tcp:127.0.0.1:0"

M, R = MigrationStatus, RunState


@pytest.fixture
def pair(make_pair, churning):
    settings = Settings()
    settings.limits.handover_timeout = 0.5
    settings.limits.connect_timeout = 2.0
    pair = make_pair(churning({"a": 8}), handover="auto", settings=settings, uri=TCP)
    pair.source.start()
    return pair


def elements(pair, walk):
    return [one.name or one.element for one in walk(bytes(pair.recorded.sent))]


def test_two_whimbrels_hand_over_in_pairs(pair, walk):
    incoming, outgoing = pair.run()
    assert (incoming.status, outgoing.status) == (M.COMPLETED, M.COMPLETED)
    assert pair.source.run_state is R.POSTMIGRATE
    assert pair.destination.run_state is R.RUNNING
    names = elements(pair, walk)
    assert names[-4:] == ["PING 0x77686d62", "EOF", "VMDESCRIPTION", "DONE"]
    assert names[-5] == "DIGEST"
    assert names.count("ATTEMPT") == 1
    assert names.index("ATTEMPT") < names.index("globalstate")
    assert pair.source.journal.last.ownership == "done"
    assert pair.source.journal.last.deal == "pairwise"
    assert pair.destination.journal.last.ownership == "owner"
    assert (pair.source.epoch, pair.destination.epoch) == (1, 2)


def test_one_who_wants_the_proof_alone_has_it(pair, walk):
    pair.handover = "proof"
    incoming, outgoing = pair.run()
    assert (incoming.status, outgoing.status) == (M.COMPLETED, M.COMPLETED)
    assert "ATTEMPT" not in elements(pair, walk)
    assert pair.source.journal.last.deal == "proof"


class DyingAt(FaultyChannel):
    """A channel that dies as soon as this is sent, or has come."""

    def __init__(self, inner, mark, *, received=False, before=True):
        super().__init__(inner, Faults())
        self.mark, self.on_receive, self.before = mark, received, before

    def send(self, data):
        hit = not self.on_receive and self.mark in bytes(data)
        if hit and self.before:
            self.die()
        super().send(data)
        if hit and not self.before:
            self.die()

    def recv_into(self, buffer):
        count = super().recv_into(buffer)
        if self.on_receive and self.mark in bytes(memoryview(buffer)[:count]):
            self.die()
            return super().recv_into(buffer)
        return count


def dying(pair, monkeypatch, mark, **how):
    """The first connection dies at `mark`, others live."""
    made = []

    def wrap(inner, faults):
        made.append(inner)
        return DyingAt(inner, mark, **how) if len(made) == 1 else FaultyChannel(inner, Faults())

    monkeypatch.setattr("whimbrel.testing.pair.FaultyChannel", wrap)
    return made


EOF = b"\0\x06"  # the end of the stream, and what follows it


def test_an_order_that_never_left_is_said_again(pair, monkeypatch):
    made = dying(pair, monkeypatch, EOF)
    incoming, outgoing = pair.run()
    assert (incoming.status, outgoing.status) == (M.COMPLETED, M.COMPLETED)
    assert pair.destination.run_state is R.RUNNING
    assert pair.source.run_state is R.POSTMIGRATE
    assert len(made) == 2  # the order came over a second connection


def test_an_order_that_left_and_was_not_answered_is_answered_the_second_time(pair, monkeypatch):
    made = dying(pair, monkeypatch, handover.encode(Word(WordKind.RUNNING, b"", 0))[:8], received=True)
    incoming, outgoing = pair.run()
    assert (incoming.status, outgoing.status) == (M.COMPLETED, M.COMPLETED)
    assert pair.destination.run_state is R.RUNNING
    assert len(made) == 2


def test_a_source_that_thaws_tells_a_prepared_destination(pair, monkeypatch):
    """The proof is lost, so the source goes on; the destination, prepared, hears of it and drops the machine."""
    dying(pair, monkeypatch, (0x77686D62).to_bytes(4, "big"), received=True)
    incoming, outgoing = pair.run()
    assert outgoing.status is M.FAILED
    assert pair.source.run_state is R.RUNNING
    assert incoming.status is M.FAILED
    assert isinstance(incoming.error, PeerRefused)
    assert incoming.ownership is DestinationOwnership.REFUSED
    assert pair.destination.run_state is R.INMIGRATE
    pair.faults = Faults()
    monkeypatch.undo()
    incoming, outgoing = pair.run()
    assert (incoming.status, outgoing.status) == (M.COMPLETED, M.COMPLETED)


def test_what_cannot_be_taken_over_goes_back(pair, monkeypatch):
    def taken():
        raise StateError("the drive disk0 is in use by somebody else")

    monkeypatch.setattr(pair.destination.drives, "take_over", taken)
    incoming, outgoing = pair.run()
    assert isinstance(outgoing.error, PeerRefused)
    assert pair.source.run_state is R.RUNNING
    assert pair.source.epoch == 3  # the destination's would have been 2
    assert incoming.ownership is DestinationOwnership.REFUSED
    assert "in use" in str(incoming.error)


def test_a_source_asks_until_it_is_answered_or_somebody_decides(pair, monkeypatch):
    dying(pair, monkeypatch, EOF)
    incoming = pair.destination.incoming(TCP)
    real = incoming._prepared

    def prepared():
        real()
        incoming._desk.close()  # nobody answers at the address any more when the order is due

    monkeypatch.setattr(incoming, "_prepared", prepared)
    outgoing = pair.source.migrate(incoming.uri)
    with pytest.raises(TimeoutError):
        outgoing.wait(1.0)
    assert not outgoing.cancel()
    assert pair.source.run_state is R.FINISH_MIGRATE
    pair.source.reclaim()
    assert isinstance(outgoing.error, HandoverUndecided)
    assert pair.source.run_state is R.PAUSED
    assert pair.source.journal.last.why == "an operator has said so"
    incoming.discard()


def say(uri, word):
    host, port = uri.removeprefix("tcp:").rsplit(":", 1)
    with socket.create_connection((host, int(port)), 10) as link:
        link.settimeout(10)
        link.sendall(handover.encode(word))
        answer = link.recv(handover.SIZE)
        return handover.decode(answer) if answer else None


def test_a_stranger_learns_nothing_and_changes_nothing(pair, monkeypatch):
    incoming = pair.destination.incoming(TCP)
    halted, go = threading.Event(), threading.Event()
    real = pair.source.drives.flush

    def flush():
        halted.set()
        assert go.wait(LONG)
        real()

    monkeypatch.setattr(pair.source.drives, "flush", flush)
    outgoing = pair.source.migrate(incoming.uri)
    assert halted.wait(LONG)
    for kind in (WordKind.COMMIT, WordKind.ABORT):
        assert say(incoming.uri, Word(kind, bytes(16), 1)).kind is WordKind.UNKNOWN
    assert say(incoming.uri, Word(WordKind.RUNNING, bytes(16), 1)) is None
    go.set()
    outgoing.wait(LONG)
    incoming.wait(LONG)
    assert outgoing.status is M.COMPLETED
    assert outgoing.info.ownership == str(SourceOwnership.DONE)


def test_words_are_32_bytes():
    word = Word(WordKind.COMMIT, bytes(range(16)), 7)
    assert handover.encode(word) == bytes.fromhex("57484d42 0001 0001") + bytes(range(16)) + (7).to_bytes(8, "big")
    assert handover.decode(handover.encode(word)) == word
