"""Run states of a machine and their legal moves, with QEMU's names.

Every move is in this table; the diagram in the docs is drawn from it. What a state means:

* a machine is built in `prelaunch`, or waits for another in `inmigrate`;
* `finish-migrate` is the blackout: stopped for the last part of a migration, and not yet let go of;
* `postmigrate` has been let go of. It never runs again by itself; only an operator's word (`reclaim`) brings it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from whimbrel.errors import StateError


class RunState(StrEnum):
    """QEMU's RunState, as far as a machine here can be in it."""

    PRELAUNCH = "prelaunch"
    INMIGRATE = "inmigrate"
    RUNNING = "running"
    PAUSED = "paused"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    INTERNAL_ERROR = "internal-error"
    SHUTDOWN = "shutdown"


MOVES: Final[Mapping[RunState, frozenset[RunState]]] = {
    RunState.PRELAUNCH: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.INMIGRATE, RunState.SHUTDOWN}),
    RunState.INMIGRATE: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.SHUTDOWN}),
    RunState.RUNNING: frozenset({
        RunState.PAUSED, RunState.FINISH_MIGRATE, RunState.INTERNAL_ERROR, RunState.SHUTDOWN,
    }),
    RunState.PAUSED: frozenset({RunState.RUNNING, RunState.FINISH_MIGRATE, RunState.SHUTDOWN}),
    RunState.FINISH_MIGRATE: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.POSTMIGRATE}),
    RunState.POSTMIGRATE: frozenset({RunState.PAUSED, RunState.SHUTDOWN}),
    RunState.INTERNAL_ERROR: frozenset({RunState.SHUTDOWN}),
    RunState.SHUTDOWN: frozenset(),
}  # fmt: skip


def check_move(old: RunState, new: RunState) -> None:
    """Raise StateError unless a machine may go from `old` to `new`."""
    if new not in MOVES[old]:
        legal = ", ".join(sorted(MOVES[old])) or "nothing"
        raise StateError(f"a machine in {old} cannot become {new}; from {old} it may become {legal}")
