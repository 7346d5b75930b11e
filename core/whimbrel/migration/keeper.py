"""Writes what becomes of one side's ownership in one attempt into the machine's journal, before it becomes so.

What must be durable then and there is. Three need not be: FROZEN, which is made durable beside the sending of the rest
(RELEASED waits for that, and in pairs the proof is not asked for before); LOADING, which is made so beside the loading,
as the source may have stopped its guest by then (PREPARED waits for it: until then a crash that forgets it leaves the
machine at its source); and PREPARED, behind which a crash leads to the same as behind LOADING. Only whoever is about to
claim the machine at a witness has to know that behind a crash.
"""

from __future__ import annotations

import threading
from typing import Final

from whimbrel.errors import JournalError
from whimbrel.migration.handover import DestinationOwnership, Reason, SourceOwnership
from whimbrel.migration.journal import Journal, Record

WITNESSED: Final = "witness"  # the deal in which a witness decides

_NOTED: Final = frozenset({SourceOwnership.PREPARED, DestinationOwnership.PREPARED})
_BEHIND_ALL: Final = frozenset({SourceOwnership.RELEASED, DestinationOwnership.PREPARED})


class Keeper:
    """The scribe of one side of the attempt `mid` with the other at `peer`. Under the caller's lock.

    `deal` and `epoch` are those of the records that are still to come.
    """

    def __init__(self, journal: Journal, *, role: str, mid: bytes, peer: str, epoch: int, deal: str = "") -> None:
        self._journal, self._role, self._mid, self._peer = journal, role, mid, peer
        self.epoch, self.deal = epoch, deal
        self._failure: JournalError | None = None
        self._syncing: threading.Thread | None = None

    def begin(self, ownership: SourceOwnership | DestinationOwnership) -> None:
        """Write down where this side begins; it is durable once it has moved on. Raises JournalError."""
        self._journal.note(self._record(ownership, ""))
        self._sync_beside()

    def move(
        self,
        old: SourceOwnership | DestinationOwnership,  # noqa: ARG002 - the table has judged it already
        new: SourceOwnership | DestinationOwnership,
        why: Reason,
    ) -> None:
        """Write down a move that is about to take place. Raises JournalError; then it must not."""
        if new in _BEHIND_ALL:
            self.settle()
        record = self._record(new, why)
        if new is SourceOwnership.FROZEN:
            self._journal.note(record)
            self._sync_beside()
        elif new in _NOTED and self.deal != WITNESSED:
            self._journal.note(record)
        else:
            self._journal.append(record)

    def settle(self) -> None:
        """Wait until everything noted so far is durable. Raises JournalError."""
        if self._syncing is not None:
            self._syncing.join()
            self._syncing = None
        if self._failure is not None:
            raise self._failure

    def _sync_beside(self) -> None:
        assert self._syncing is None, "a side notes one record, FROZEN or LOADING, in its attempt"
        if self._journal.path is not None:
            self._syncing = threading.Thread(target=self._sync, name="whimbrel-journal", daemon=True)
            self._syncing.start()

    def _sync(self) -> None:
        try:
            self._journal.sync()
        except JournalError as exc:
            self._failure = exc

    def _record(self, ownership: SourceOwnership | DestinationOwnership, why: str) -> Record:
        return Record(
            mid=self._mid.hex(),
            role=self._role,
            ownership=str(ownership),
            epoch=self.epoch,
            why=str(why),
            peer=self._peer,
            deal=self.deal,
        )
