"""Handing over by a witness: whoever writes the cell of the attempt first has the machine, whatever the link does."""

from __future__ import annotations

import threading

import pytest

from whimbrel import MigrationStatus, RunState, Settings
from whimbrel.errors import HandoverTimeout, HandoverUndecided, PeerRefused, StateError, StreamError
from whimbrel.migration import witnessing
from whimbrel.migration.handover import DestinationOwnership, SourceOwnership
from whimbrel.testing.faults import Faults, FaultyChannel
from whimbrel.wire import handover
from whimbrel.wire.handover import Word, WordKind

LONG = 60.0
M, R = MigrationStatus, RunState
WITNESSED = handover.WITNESSED.to_bytes(4, "big")
RUNNING = handover.encode(Word(WordKind.RUNNING, b"", 0))[:8]


def settings_at(place):
    settings = Settings()
    settings.limits.handover_timeout = 0.5
    settings.limits.connect_timeout = 2.0
    settings.backends.witness = f"folder:{place}"
    return settings


@pytest.fixture
def pair(make_pair, churning, tmp_path):
    pair = make_pair(churning({"a": 8}), handover="auto", settings=settings_at(tmp_path), uri="tcp:127.0.0.1:0")
    pair.source.start()
    return pair


class Dying(FaultyChannel):
    """A channel that dies as soon as this is sent, or is about to be, or has come."""

    def __init__(self, inner, mark, how):
        super().__init__(inner, Faults())
        self.mark, self.how = mark, how

    def send(self, data):
        hit = self.mark in bytes(data)
        if hit and self.how == "before":
            self.die()
        super().send(data)
        if hit and self.how == "after":
            self.die()

    def recv_into(self, buffer):
        count = super().recv_into(buffer)
        if self.how == "received" and self.mark in bytes(memoryview(buffer)[:count]):
            self.die()
            return super().recv_into(buffer)
        return count


def dying(monkeypatch, mark, how):
    monkeypatch.setattr("whimbrel.testing.pair.FaultyChannel", lambda inner, faults: Dying(inner, mark, how))


def holds(pair):
    """Who may run the machine, by the journals and by what runs."""
    running = [m.run_state is R.RUNNING for m in (pair.source, pair.destination)]
    owners = [pair.source.journal.last.ownership == "owner", pair.destination.journal.last.ownership == "owner"]
    assert running == owners
    return {(True, False): "source", (False, True): "destination"}[tuple(running)]


def cells(tmp_path):
    return len(list(tmp_path.glob("*.owner")))


def test_two_whimbrels_at_one_witness_hand_over_by_it(pair, walk, tmp_path):
    incoming, outgoing = pair.run()
    assert (incoming.status, outgoing.status) == (M.COMPLETED, M.COMPLETED)
    assert holds(pair) == "destination"
    names = [one.name or one.element for one in walk(bytes(pair.recorded.sent))]
    assert names[-5:] == ["DIGEST", "PING 0x77686d35", "EOF", "VMDESCRIPTION", "DONE"]
    assert pair.source.journal.last.deal == pair.destination.journal.last.deal == "witness"
    assert "witness" in pair.destination.journal.last.why
    assert (pair.source.epoch, pair.destination.epoch) == (1, 2)
    assert cells(tmp_path) == 2  # where they met, and the attempt's


def test_a_link_that_dies_before_the_digest_gives_it_back_by_the_witness(pair, monkeypatch):
    dying(monkeypatch, WITNESSED, "before")
    incoming, outgoing = pair.run()
    assert isinstance(outgoing.error, HandoverTimeout)
    assert incoming.status is M.FAILED
    assert holds(pair) == "source"
    assert pair.source.epoch == 3  # the destination's would have been 2
    assert "witness" in pair.source.journal.last.why


def test_a_word_that_is_lost_is_found_at_the_witness(pair, monkeypatch):
    dying(monkeypatch, RUNNING, "received")
    incoming, outgoing = pair.run()
    assert (incoming.status, outgoing.status) == (M.COMPLETED, M.COMPLETED)
    assert holds(pair) == "destination"
    assert outgoing.info.ownership == SourceOwnership.DONE


@pytest.mark.parametrize("first", ["source", "destination"])
def test_either_side_wins_in_turn_when_the_link_dies_behind_the_last_byte(pair, monkeypatch, first):
    """Both claim; the other waits until the first has."""
    real, won = witnessing.ask, threading.Event()

    def in_turn(witness, mid, who, stopped):
        if who != first:
            assert won.wait(LONG)
        found = real(witness, mid, who, stopped)
        won.set()
        return found

    for module in ("deals", "takings"):
        monkeypatch.setattr(f"whimbrel.migration.{module}.ask", in_turn)
    dying(monkeypatch, WITNESSED, "after")
    incoming, outgoing = pair.run()
    assert holds(pair) == first
    if first == "source":
        assert isinstance(outgoing.error, HandoverTimeout)
        assert isinstance(incoming.error, PeerRefused)
        assert incoming.ownership is DestinationOwnership.REFUSED
    else:
        assert (incoming.status, outgoing.status) == (M.COMPLETED, M.COMPLETED)


def test_nobody_runs_while_the_witness_is_out_of_reach(pair, monkeypatch, tmp_path):
    """It goes with the last byte and comes back when both have asked it in vain."""
    away, asked = tmp_path.with_name(tmp_path.name + "-away"), {"source": 0, "destination": 0}
    states, one_at_a_time = [], threading.Lock()

    class Watch:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def claim(self, mid, who, patience):
            if mid_of(pair) == mid.hex():
                with one_at_a_time:
                    if not any(asked.values()):
                        tmp_path.rename(away)
                    asked[who] += 1
                    if min(asked.values()) == 2 and away.exists():
                        states.extend(m.run_state is R.RUNNING for m in (pair.source, pair.destination))
                        away.rename(tmp_path)
            return self.inner.claim(mid, who, patience)

    made = witnessing.witness_of
    for module in ("outgoing", "incoming"):
        monkeypatch.setattr(f"whimbrel.migration.{module}.witness_of", lambda s, p: Watch(made(s, p)))
    dying(monkeypatch, WITNESSED, "after")
    pair.run()
    assert states == [False, False]
    assert min(asked.values()) >= 2
    assert holds(pair) in {"source", "destination"}


def mid_of(pair):
    return pair.source.journal.last.mid


@pytest.mark.parametrize("which", ["source", "destination", "other place", "none"])
def test_without_a_witness_at_both_sides_they_hand_over_pairwise(pair, tmp_path, which):
    folder = tmp_path / "other"
    if which == "other place":
        folder.mkdir()
    side = pair.source if which == "source" else pair.destination
    side.settings.backends.witness = "" if which == "none" else f"folder:{folder}"
    incoming, outgoing = pair.run()
    assert (incoming.status, outgoing.status) == (M.COMPLETED, M.COMPLETED)
    assert holds(pair) == "destination"
    assert pair.source.journal.last.deal == pair.destination.journal.last.deal == "pairwise"


def test_a_source_that_is_given_up_while_the_witness_is_away_is_undecided(pair, monkeypatch, tmp_path):
    """And so is the destination: an operator's word ends the asking, and nobody runs before it."""
    made, away = witnessing.witness_of, tmp_path.with_name(tmp_path.name + "-away")
    asking, one_at_a_time = {"source": threading.Event(), "destination": threading.Event()}, threading.Lock()

    class Watch:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def claim(self, mid, who, patience):
            if mid.hex() == mid_of(pair):
                with one_at_a_time:
                    if tmp_path.exists():
                        tmp_path.rename(away)
                asking[who].set()
            return self.inner.claim(mid, who, patience)

    for module in ("outgoing", "incoming"):
        monkeypatch.setattr(f"whimbrel.migration.{module}.witness_of", lambda s, p: Watch(made(s, p)))
    dying(monkeypatch, WITNESSED, "after")
    incoming, outgoing = pair.migrate()
    assert all(event.wait(LONG) for event in asking.values())
    outgoing.give_up()
    assert isinstance(outgoing.error, HandoverUndecided)
    incoming.adopt()
    assert isinstance(incoming.error, HandoverUndecided)
    assert holds(pair) == "destination"


def test_a_witness_that_the_two_have_not_met_at_is_not_asked(pair, monkeypatch):
    """A source that leaves it to one all the same is refused, and has the machine back."""
    monkeypatch.setattr("whimbrel.migration.takings.destination_meets", lambda *_: False)
    monkeypatch.setattr("whimbrel.migration.return_path.ReturnPath.met", True)
    incoming, outgoing = pair.run()
    assert isinstance(incoming.error, StreamError)
    assert "at which we have not met" in str(incoming.error)
    assert isinstance(outgoing.error, HandoverTimeout)
    assert holds(pair) == "source"


def test_a_destination_that_cannot_have_its_drives_does_not_ask(pair, monkeypatch):
    """What the witness has given cannot be given back: the drives come first, and without them the source wins."""

    def taken():
        raise StateError("the drive disk0 is in use by somebody else")

    monkeypatch.setattr(pair.destination.drives, "take_over", taken)
    incoming, outgoing = pair.run()
    assert incoming.ownership == "refused"
    assert "in use" in str(incoming.error)
    assert outgoing.info.ownership == "owner"
    assert pair.source.run_state == "running"
