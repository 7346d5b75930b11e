"""The table of run states: every pair of states is either a legal move or an error that says what is."""

from __future__ import annotations

import itertools

import pytest

from whimbrel.errors import StateError
from whimbrel.machine.runstate import MOVES, RunState, check_move

S = RunState

# Written out once more, so that a change of the table is a decision and not an accident.
LEGAL = {
    (S.PRELAUNCH, S.RUNNING), (S.PRELAUNCH, S.PAUSED), (S.PRELAUNCH, S.INMIGRATE), (S.PRELAUNCH, S.SHUTDOWN),
    (S.INMIGRATE, S.RUNNING), (S.INMIGRATE, S.PAUSED), (S.INMIGRATE, S.SHUTDOWN),
    (S.RUNNING, S.PAUSED), (S.RUNNING, S.FINISH_MIGRATE), (S.RUNNING, S.INTERNAL_ERROR), (S.RUNNING, S.SHUTDOWN),
    (S.PAUSED, S.RUNNING), (S.PAUSED, S.FINISH_MIGRATE), (S.PAUSED, S.SHUTDOWN),
    (S.FINISH_MIGRATE, S.RUNNING), (S.FINISH_MIGRATE, S.PAUSED), (S.FINISH_MIGRATE, S.POSTMIGRATE),
    (S.POSTMIGRATE, S.PAUSED), (S.POSTMIGRATE, S.SHUTDOWN),
    (S.INTERNAL_ERROR, S.SHUTDOWN),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), list(itertools.product(RunState, RunState)))
def test_every_pair(old, new):
    if (old, new) in LEGAL:
        check_move(old, new)
    else:
        with pytest.raises(StateError) as caught:
            check_move(old, new)
        assert f"a machine in {old} cannot become {new}" in str(caught.value)
        assert all(str(state) in str(caught.value) for state in MOVES[old])


def test_every_state_is_in_the_table_and_can_be_reached():
    assert set(MOVES) == set(RunState)
    reached = {S.PRELAUNCH}
    while (more := reached.union(*(MOVES[state] for state in reached))) != reached:
        reached = more
    assert reached == set(RunState)


def test_a_machine_that_was_let_go_of_has_one_way_back():
    assert {old for old, moves in MOVES.items() if S.RUNNING in moves} == {
        S.PRELAUNCH,
        S.INMIGRATE,
        S.PAUSED,
        S.FINISH_MIGRATE,
    }
    assert not MOVES[S.SHUTDOWN]


def test_the_names_are_those_of_qemu():
    assert [str(state) for state in RunState] == [
        "prelaunch",
        "inmigrate",
        "running",
        "paused",
        "finish-migrate",
        "postmigrate",
        "internal-error",
        "shutdown",
    ]
