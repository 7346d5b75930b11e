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
    Reason,
    SourceOwnership,
    destination_handover,
    last_word_timeout,
    source_handover,
)
from whimbrel.migration.status import DESTINATION_MOVES, FINISHED, SOURCE_MOVES, StatusMachine

M, S, D, R = MigrationStatus, SourceOwnership, DestinationOwnership, Reason

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
        (S.OWNER, S.FROZEN): {R.STOPPED},
        (S.FROZEN, S.OWNER): {R.THAWED},
        (S.FROZEN, S.PREPARED): {R.PROVED},
        (S.FROZEN, S.RELEASED): {R.LET_GO, R.CRASHED},
        (S.PREPARED, S.OWNER): {R.THAWED},
        (S.PREPARED, S.RELEASED): {R.LET_GO, R.CRASHED},
        (S.RELEASED, S.DONE): {R.RUNNING, R.WITNESS},
        (S.RELEASED, S.OWNER): {R.REFUSE, R.WITNESS, R.OPERATOR},
        (S.DONE, S.OWNER): {R.OPERATOR},
    }),
    "destination": (D, DESTINATION_OWNERSHIP, {
        (D.LOADING, D.PREPARED): {R.LOADED},
        (D.LOADING, D.REFUSED): {R.FAILED, R.CRASHED},
        (D.PREPARED, D.OWNER): {R.ORDERED, R.UNPROVED, R.WITNESS, R.OPERATOR},
        (D.PREPARED, D.REFUSED): {R.ABORTED, R.FAILED, R.WITNESS, R.CRASHED, R.OPERATOR},
    }),
}  # fmt: skip


@pytest.mark.parametrize(
    ("role", "old", "new"),
    [(role, old, new) for role, (states, _, _) in OWNERSHIP.items() for old in states for new in states],
)
def test_every_pair_of_ownerships_for_every_reason(role, old, new):
    _, table, legal = OWNERSHIP[role]
    for why in Reason:
        heard = []
        handover = Handover(old, table, lambda *move, heard=heard: heard.append(move))
        if why in legal.get((old, new), ()):
            handover.move(new, why)
            assert handover.now is new
            assert heard == [(old, new, why)]
        else:
            with pytest.raises(StateError, match=f"cannot go from {old} to {new} because"):
                handover.move(new, why)
            assert handover.now is old
            assert not heard


def test_a_move_that_cannot_be_recorded_has_not_happened():
    def on_move(old, new, why):
        raise OSError("the journal's disk is full")

    handover = Handover(S.PREPARED, SOURCE_OWNERSHIP, on_move)
    with pytest.raises(OSError, match="full"):
        handover.move(S.RELEASED, R.LET_GO)
    assert handover.now is S.PREPARED


def test_the_law_is_in_the_tables():
    # Once it has let go, the source runs only by the word of somebody else: nothing that it knows by itself is enough.
    back = {why for state in (S.RELEASED, S.DONE) for why in SOURCE_OWNERSHIP[state].get(S.OWNER, ())}
    assert back == {R.REFUSE, R.WITNESS, R.OPERATOR}
    assert {old for old, moves in SOURCE_OWNERSHIP.items() if S.RELEASED in moves} == {S.FROZEN, S.PREPARED}
    # The destination runs only what it held whole before, and what it has refused never; what it owns it keeps.
    assert {old for old, moves in DESTINATION_OWNERSHIP.items() if D.OWNER in moves} == {D.PREPARED}
    assert not DESTINATION_OWNERSHIP[D.REFUSED]
    assert not DESTINATION_OWNERSHIP[D.OWNER]


def test_where_an_attempt_begins():
    assert source_handover().now is S.OWNER
    assert destination_handover().now is D.LOADING
    assert last_word_timeout(0.0) == 10.0
    assert last_word_timeout(3.0) == 3.0
