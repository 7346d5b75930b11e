"""The tables of status and ownership: every pair, on both sides, and in the order that a stream allows."""

from __future__ import annotations

import threading

import pytest

from whimbrel.errors import StateError
from whimbrel.migration import MigrationStatus
from whimbrel.migration.handover import DESTINATION_MOVES as DESTINATION_OWNERSHIP
from whimbrel.migration.handover import SOURCE_MOVES as SOURCE_OWNERSHIP
from whimbrel.migration.handover import (
    DestinationOwnership,
    Handover,
    SourceOwnership,
    destination_handover,
    last_word_timeout,
    source_handover,
)
from whimbrel.migration.status import DESTINATION_MOVES, FINISHED, SOURCE_MOVES, StatusMachine

M, S, D = MigrationStatus, SourceOwnership, DestinationOwnership

# Written out once more, so that a change of a table is a decision and not an accident.
LEGAL = {
    "source": {
        (M.NONE, M.SETUP),
        (M.SETUP, M.ACTIVE), (M.SETUP, M.FAILED), (M.SETUP, M.CANCELLING),
        (M.ACTIVE, M.PRE_SWITCHOVER), (M.ACTIVE, M.COMPLETED), (M.ACTIVE, M.FAILED), (M.ACTIVE, M.CANCELLING),
        (M.PRE_SWITCHOVER, M.DEVICE), (M.PRE_SWITCHOVER, M.FAILED), (M.PRE_SWITCHOVER, M.CANCELLING),
        (M.DEVICE, M.COMPLETED), (M.DEVICE, M.FAILED), (M.DEVICE, M.CANCELLING),
        (M.CANCELLING, M.CANCELLED),
    },
    "destination": {
        (M.NONE, M.SETUP),
        (M.SETUP, M.ACTIVE), (M.SETUP, M.FAILED), (M.SETUP, M.CANCELLING),
        (M.ACTIVE, M.COMPLETED), (M.ACTIVE, M.FAILED), (M.ACTIVE, M.CANCELLING),
        (M.CANCELLING, M.CANCELLED),
    },
}  # fmt: skip
TABLES = {"source": SOURCE_MOVES, "destination": DESTINATION_MOVES}


@pytest.mark.parametrize(
    ("role", "old", "new"), [(role, old, new) for role, table in TABLES.items() for old in table for new in M]
)
def test_every_pair_of_statuses(role, old, new):
    heard = []
    status = StatusMachine(TABLES[role], lambda *move: heard.append(move))
    status._status = old
    if (old, new) in LEGAL[role]:
        assert status.try_move(new)
        assert status.now is new
        assert heard == [(old, new)]
    else:
        assert not status.try_move(new)
        with pytest.raises(StateError, match=f"that is {old} cannot become {new}"):
            status.move(new)
        assert status.now is old
        assert not heard


def test_the_tables_have_every_status_that_can_be_reached():
    for table in TABLES.values():
        assert set(table) == {M.NONE}.union(*table.values())
    assert set(SOURCE_MOVES) == set(M)


def test_what_has_finished_stays_finished():
    for status in M:
        assert status.finished == (status in {M.COMPLETED, M.FAILED, M.CANCELLED}) == (status in FINISHED)
        for table in TABLES.values():
            if status.finished:
                assert not table.get(status)


def test_of_many_moves_at_once_one_wins():
    for _ in range(20):
        heard = []
        status = StatusMachine(SOURCE_MOVES, lambda *move, heard=heard: heard.append(move))
        status.move(M.SETUP)
        status.move(M.ACTIVE)
        gate, won = threading.Barrier(8), []

        def race(to, status=status, gate=gate, won=won):
            gate.wait()
            if status.try_move(to):
                won.append(to)

        racers = [threading.Thread(target=race, args=(to,)) for to in [M.COMPLETED, M.FAILED, M.CANCELLING] * 2]
        racers += [threading.Thread(target=race, args=(M.PRE_SWITCHOVER,)) for _ in range(2)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert len(heard) - 2 == len(won)
        assert all((old, new) in LEGAL["source"] for old, new in heard)
        assert status.now is heard[-1][1]


def test_waiting_for_the_end():
    status = StatusMachine(SOURCE_MOVES, lambda *move: None)
    status.move(M.SETUP)
    assert not status.wait_finished(0.01)
    ended = []
    waiting = threading.Thread(target=lambda: ended.append(status.wait_finished(20)))
    waiting.start()
    status.move(M.FAILED)
    waiting.join()
    assert ended == [True]


OWNERSHIP = {
    "source": (S, SOURCE_OWNERSHIP, {
        (S.OWNER, S.FROZEN),
        (S.FROZEN, S.OWNER), (S.FROZEN, S.PREPARED), (S.FROZEN, S.RELEASED),
        (S.PREPARED, S.OWNER), (S.PREPARED, S.RELEASED),
        (S.RELEASED, S.DONE),
    }),
    "destination": (D, DESTINATION_OWNERSHIP, {
        (D.LOADING, D.PREPARED), (D.LOADING, D.REFUSED),
        (D.PREPARED, D.OWNER), (D.PREPARED, D.REFUSED),
    }),
}  # fmt: skip


@pytest.mark.parametrize(
    ("role", "old", "new"),
    [(role, old, new) for role, (states, _, _) in OWNERSHIP.items() for old in states for new in states],
)
def test_every_pair_of_ownerships(role, old, new):
    _, table, legal = OWNERSHIP[role]
    heard = []
    handover = Handover(old, table, lambda *move: heard.append(move))
    if (old, new) in legal:
        handover.move(new)
        assert handover.now is new
        assert heard == [(old, new)]
    else:
        with pytest.raises(StateError, match=f"cannot go from {old} to {new}"):
            handover.move(new)
        assert handover.now is old
        assert not heard


def test_a_move_that_cannot_be_recorded_has_not_happened():
    def on_move(old, new):
        raise OSError("the journal's disk is full")

    handover = Handover(S.PREPARED, SOURCE_OWNERSHIP, on_move)
    with pytest.raises(OSError, match="full"):
        handover.move(S.RELEASED)
    assert handover.now is S.PREPARED


def test_the_law_is_in_the_tables():
    def reachable(table, state):
        found = {state}
        while (more := found.union(*(table[one] for one in found))) != found:
            found = more
        return found

    # From where the source has let go there is no way back to running, and only one way there.
    assert S.OWNER not in reachable(SOURCE_OWNERSHIP, S.RELEASED)
    assert {old for old, moves in SOURCE_OWNERSHIP.items() if S.RELEASED in moves} == {S.FROZEN, S.PREPARED}
    # The destination runs only what it held whole before, and what it has refused never.
    assert {old for old, moves in DESTINATION_OWNERSHIP.items() if D.OWNER in moves} == {D.PREPARED}
    assert D.OWNER not in reachable(DESTINATION_OWNERSHIP, D.REFUSED)
    assert reachable(DESTINATION_OWNERSHIP, D.OWNER) == {D.OWNER}


def test_where_an_attempt_begins():
    assert source_handover().now is S.OWNER
    assert destination_handover().now is D.LOADING
    assert last_word_timeout(0.0) == 10.0
    assert last_word_timeout(3.0) == 3.0
