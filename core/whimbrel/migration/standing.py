"""What a journal says of a machine whose process has just begun: where it is, and what may be done.

The memory of whatever ran before is gone with its process. What is left to decide is whether this side may start the
machine afresh, must ask the destination first, or must not start it.
"""

from __future__ import annotations

import threading
import time
from enum import Enum
from typing import Final, Self

import attrs

from whimbrel.errors import StateError
from whimbrel.migration.handover import Reason, SourceOwnership
from whimbrel.migration.journal import Journal, Record
from whimbrel.migration.messenger import Messenger
from whimbrel.migration.uri import resolve
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.wire.handover import Word, WordKind


class Verdict(Enum):
    """What may be done with the machine."""

    FRESH = "nothing is written: it has never run here"
    LOST = "it ran here until its process ended, and what it held in memory is gone: it may start afresh"
    ASK = "it was being handed over, and the destination may hold it whole: it is to be asked"
    UNKNOWN = "it was let go of, and nobody here can know whether it runs at the destination"
    AWAY = "it is at the destination"
    ELSEWHERE = "it was never this side's: it is at the source"


# What the newest record says, by role and ownership: in pairs, and with any other deal.
_VERDICTS: Final = {
    ("machine", "owner"): (Verdict.LOST, Verdict.LOST),
    ("source", "owner"): (Verdict.LOST, Verdict.LOST),
    ("source", "frozen"): (Verdict.ASK, Verdict.LOST),  # without a pair the last byte was never sent
    ("source", "prepared"): (Verdict.ASK, Verdict.LOST),
    ("source", "released"): (Verdict.ASK, Verdict.UNKNOWN),
    ("source", "done"): (Verdict.AWAY, Verdict.AWAY),
    ("destination", "loading"): (Verdict.ELSEWHERE, Verdict.ELSEWHERE),
    ("destination", "prepared"): (Verdict.ELSEWHERE, Verdict.ELSEWHERE),
    ("destination", "refused"): (Verdict.ELSEWHERE, Verdict.ELSEWHERE),
    ("destination", "owner"): (Verdict.LOST, Verdict.LOST),
}

_SENTENCES: Final = {
    Verdict.FRESH: "nothing is written about the machine",
    Verdict.LOST: "the machine ran here in epoch {record.epoch} until its process ended; its memory is gone with it",
    Verdict.ASK: "the machine was being handed over to {record.peer}, which may hold it whole: it has to be asked",
    Verdict.UNKNOWN: "the machine was handed over to {record.peer}, which has not said that it runs there",
    Verdict.AWAY: "the machine has moved to {record.peer}",
    Verdict.ELSEWHERE: "the machine was on its way here and has not arrived: it is where it came from",
}

_HINTS: Final = {
    Verdict.ASK: "settle_standing() asks it",
    Verdict.UNKNOWN: "look whether it runs there; if it does not and never will, start_afresh() starts it here",
    Verdict.AWAY: "if it does not run there and never will, start_afresh() starts it here",
    Verdict.ELSEWHERE: "wait for it with incoming(); if it runs nowhere and never will, start_afresh() starts it here",
}


_OWNERS: Final = {
    ("machine", "owner"): "here, in epoch {0.epoch}",
    ("source", "owner"): "here, in epoch {0.epoch}",
    ("source", "frozen"): "here, held still: it is being handed over to {0.peer}",
    ("source", "prepared"): "here, held still: {0.peer} holds it whole as well",
    ("source", "released"): "whoever has the answer of {0.peer}: it was let go of, and there is none yet",
    ("source", "done"): "{0.peer}",
    ("destination", "loading"): "its source: it is on its way here",
    ("destination", "prepared"): "its source, until that orders the start: it is here, whole and held still",
    ("destination", "refused"): "its source",
    ("destination", "owner"): "here, in epoch {0.epoch}",
}


def owner(record: Record | None) -> str:
    """Who owns a machine by its newest record, for people; empty if nobody does yet."""
    return "" if record is None else _OWNERS[record.role, record.ownership].format(record)


@attrs.frozen
class Standing:
    """What is known of the machine, by the newest record (None if there is none)."""

    verdict: Verdict
    record: Record | None = None

    @classmethod
    def of(cls, journal: Journal) -> Self:
        """What `journal` says."""
        record = journal.last
        if record is None:
            return cls(Verdict.FRESH)
        pairwise, other = _VERDICTS[record.role, record.ownership]
        return cls(pairwise if record.deal == "pairwise" else other, record)

    @property
    def sentence(self) -> str:
        """Where the machine is, for people."""
        return _SENTENCES[self.verdict].format(record=self.record)

    @property
    def hint(self) -> str:
        """What to do, for people who write programs; empty if nothing need be done."""
        return _HINTS.get(self.verdict, "")

    @property
    def may_start(self) -> bool:
        """Whether it may be started here, afresh."""
        return self.verdict in (Verdict.FRESH, Verdict.LOST)

    def check_may_start(self) -> None:
        """Raise StateError unless it may be started here."""
        if not self.may_start:
            raise StateError(self.sentence, hint=self.hint)


def settle(
    standing: Standing, journal: Journal, plugins: PluginManager, settings: Settings, stopped: threading.Event
) -> Standing:
    """Ask the destination, where it has to be asked; see `Machine.settle_standing`.

    The image here died with its process, so it can never run again: saying COMMIT takes nothing from anybody.
    """
    record = standing.record
    if standing.verdict is not Verdict.ASK or record is None:
        return standing
    if record.ownership != SourceOwnership.RELEASED:
        record = _written(journal, record, SourceOwnership.RELEASED, Reason.CRASHED, record.epoch)
    messenger = Messenger(resolve(record.peer, plugins).connector(settings), settings.limits.connect_timeout)
    answer = messenger.say(Word(WordKind.COMMIT, bytes.fromhex(record.mid), record.epoch), stopped)
    match None if answer is None else answer.kind:
        case None:
            return Standing(Verdict.ASK, record)
        case WordKind.RUNNING:
            return Standing(Verdict.AWAY, _written(journal, record, SourceOwnership.DONE, Reason.RUNNING, record.epoch))
        case WordKind.REFUSE:
            written = _written(journal, record, SourceOwnership.OWNER, Reason.REFUSE, record.epoch + 2)
            return Standing(Verdict.LOST, written)
    return Standing(Verdict.UNKNOWN, record)


def _written(journal: Journal, record: Record, ownership: SourceOwnership, why: Reason, epoch: int) -> Record:
    written = attrs.evolve(record, ownership=str(ownership), why=str(why), epoch=epoch, at=time.time())
    journal.append(written)
    return written
