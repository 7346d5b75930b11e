"""The status of a migration as a table, with QEMU's names, for either side; moves are atomic.

A status tells the operator how far things are. *Who owns the machine* is another question with a table of its own
(`whimbrel.migration.handover`), and no status answers it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final

from whimbrel.errors import StateError


class MigrationStatus(StrEnum):
    """QEMU's MigrationStatus, as far as a migration here can be in it."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return self in FINISHED


_S = MigrationStatus
FINISHED: Final = frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELLED})

Moves = Mapping[MigrationStatus, frozenset[MigrationStatus]]

SOURCE_MOVES: Final[Moves] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.FAILED, _S.CANCELLING}),
    _S.ACTIVE: frozenset({_S.PRE_SWITCHOVER, _S.COMPLETED, _S.FAILED, _S.CANCELLING}),
    _S.PRE_SWITCHOVER: frozenset({_S.DEVICE, _S.FAILED, _S.CANCELLING}),
    _S.DEVICE: frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELLING}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
    _S.COMPLETED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}

DESTINATION_MOVES: Final[Moves] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.FAILED, _S.CANCELLING}),
    _S.ACTIVE: frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELLING}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
    _S.COMPLETED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}


class StatusMachine:
    """One migration's status. `on_move(old, new)` is called inside the lock, so in order. Any thread."""

    def __init__(self, moves: Moves, on_move: Callable[[MigrationStatus, MigrationStatus], object]) -> None:
        self._moves = moves
        self._on_move = on_move
        self._status = MigrationStatus.NONE
        self.changed = threading.Condition()

    @property
    def now(self) -> MigrationStatus:
        """The status, without a lock."""
        return self._status

    def move(self, to: MigrationStatus) -> None:
        """Go to `to`. Raises StateError, and stays, if that is no legal move."""
        if not self.try_move(to):
            raise StateError(f"a migration that is {self._status} cannot become {to}")

    def try_move(self, to: MigrationStatus) -> bool:
        """Go to `to` if that is a legal move, and say whether it was."""
        with self.changed:
            old = self._status
            if to not in self._moves[old]:
                return False
            self._status = to
            self._on_move(old, to)
            self.changed.notify_all()
            return True

    def wait_finished(self, timeout: float | None) -> bool:
        """Wait for the end; False if it has not come within `timeout` seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: self._status.finished, timeout)
