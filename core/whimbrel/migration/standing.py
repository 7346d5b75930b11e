"""What a journal says of a machine whose process has just begun: where it is, and what may be done.

The memory of whatever ran before is gone with its process. What is left to decide is whether this side may start the
machine afresh, must ask the destination or a witness first, or must not start it; and what a source is answered that
still asks for an attempt of then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from enum import Enum
from typing import Final, Self, TypeAlias

import attrs

from whimbrel.errors import ConfigError, StateError
from whimbrel.migration.desk import Desk
from whimbrel.migration.handover import DestinationOwnership, Reason, SourceOwnership
from whimbrel.migration.journal import Journal, Record
from whimbrel.migration.keeper import WITNESSED
from whimbrel.migration.messenger import Messenger
from whimbrel.migration.uri import resolve
from whimbrel.migration.witnessing import DESTINATION, SOURCE, ask, witness_of
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.wire.handover import Word, WordKind


class Verdict(Enum):
    """What may be done with the machine."""

    FRESH = "nothing is written: it has never run here"
    LOST = "it ran here until its process ended, and what it held in memory is gone: it may start afresh"
    ASK = "it was being handed over, and the destination may hold it whole: it is to be asked"
    ASK_WITNESS = "it was being handed over, and a witness knows whose it is: it is to be asked"
    UNKNOWN = "it was let go of, and nobody here can know whether it runs at the destination"
    AWAY = "it is at the destination"
    ELSEWHERE = "it was never this side's: it is at the source"


_V: TypeAlias = Verdict

# What the newest record says, by role and ownership: in pairs, with a witness, and with any other deal. In pairs alone
# the destination may hold the machine whole before the source lets go of it.
_VERDICTS: Final = {
    ("machine", "owner"): (_V.LOST, _V.LOST, _V.LOST),
    ("source", "owner"): (_V.LOST, _V.LOST, _V.LOST),
    ("source", "frozen"): (_V.ASK, _V.LOST, _V.LOST),
    ("source", "prepared"): (_V.ASK, _V.LOST, _V.LOST),
    ("source", "released"): (_V.ASK, _V.ASK_WITNESS, _V.UNKNOWN),
    ("source", "done"): (_V.AWAY, _V.AWAY, _V.AWAY),
    ("destination", "loading"): (_V.ELSEWHERE, _V.ELSEWHERE, _V.ELSEWHERE),
    ("destination", "prepared"): (_V.ELSEWHERE, _V.ASK_WITNESS, _V.ELSEWHERE),
    ("destination", "refused"): (_V.ELSEWHERE, _V.ELSEWHERE, _V.ELSEWHERE),
    ("destination", "owner"): (_V.LOST, _V.LOST, _V.LOST),
}
_DEALS: Final = ("pairwise", WITNESSED)

# What follows from whose the machine is by the witness, by role: the verdict, and the record that is written, so many
# epochs later.
_WITNESSED: Final[Mapping[tuple[str, str], tuple[Verdict, SourceOwnership | DestinationOwnership, int]]] = {
    ("source", SOURCE): (_V.LOST, SourceOwnership.OWNER, 2),  # the next would have been the destination's
    ("source", DESTINATION): (_V.AWAY, SourceOwnership.DONE, 0),
    ("destination", SOURCE): (_V.ELSEWHERE, DestinationOwnership.REFUSED, 0),
    ("destination", DESTINATION): (_V.LOST, DestinationOwnership.OWNER, 0),
}

_SENTENCES: Final = {
    Verdict.FRESH: "nothing is written about the machine",
    Verdict.LOST: "the machine ran here in epoch {record.epoch} until its process ended; its memory is gone with it",
    Verdict.ASK: "the machine was being handed over to {record.peer}, which may hold it whole: it has to be asked",
    Verdict.ASK_WITNESS: "the machine was being handed over to {record.peer}: the witness has to be asked whose it is",
    Verdict.UNKNOWN: "the machine was handed over to {record.peer}, which has not said that it runs there",
    Verdict.AWAY: "the machine has moved to {record.peer}",
    Verdict.ELSEWHERE: "the machine was on its way here and has not arrived: it is where it came from",
}

_HINTS: Final = {
    Verdict.ASK: "settle_standing() asks it",
    Verdict.ASK_WITNESS: "settle_standing() asks it",
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
        column = _DEALS.index(record.deal) if record.deal in _DEALS else len(_DEALS)
        return cls(_VERDICTS[record.role, record.ownership][column], record)

    @property
    def sentence(self) -> str:
        """Where the machine is, for people."""
        return _SENTENCES[self.verdict].format(record=self.record)

    @property
    def hint(self) -> str:
        """What to do, for people who write programs; empty if nothing need be done."""
        return _HINTS.get(self.verdict, "")

    @property
    def must_ask(self) -> bool:
        """Whether `Machine.settle_standing` has somebody to ask, which takes as long as that takes."""
        return self.verdict in (Verdict.ASK, Verdict.ASK_WITNESS)

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
    """Ask whoever has to be asked; see `Machine.settle_standing`."""
    record = standing.record
    assert record is not None or standing.verdict is Verdict.FRESH, "a verdict without a record"
    match standing.verdict:
        case Verdict.ASK if record is not None:
            return _ask_the_destination(record, journal, plugins, settings, stopped)
        case Verdict.ASK_WITNESS if record is not None:
            return _ask_the_witness(record, journal, plugins, settings, stopped)
    return standing


def answer_from(journal: Journal, word: Word) -> Word | None:
    """The answer to a word about an attempt that nobody here is at any more: whatever the journal has of it."""
    record = journal.of(word.mid)
    if word.kind is WordKind.DONE:
        return None
    if record is None or record.role != "destination":
        return Word(WordKind.UNKNOWN, word.mid, word.epoch)
    if record.ownership == DestinationOwnership.OWNER:
        return Word(WordKind.RUNNING, word.mid, record.epoch)
    return Word(WordKind.REFUSE, word.mid, word.epoch)


def desk_for(standing: Standing, journal: Journal, plugins: PluginManager, settings: Settings) -> Desk | None:
    """Where a source may still ask that has not heard that the machine arrived here: answers it from the records.

    It is not open yet; None if there is no such source. Raises ConnectError or ConfigError if its address
    cannot be had any more.
    """
    record = standing.record
    if record is None or (record.role, record.ownership) != ("destination", DestinationOwnership.OWNER):
        return None
    destination = resolve(record.peer, plugins)
    if not destination.spec.several:
        return None  # it has no second connection to ask over

    def answer(word: Word) -> Word | None:
        if word.kind is WordKind.DONE and journal.of(word.mid) is not None:
            desk.end()
        return answer_from(journal, word)

    desk = Desk(destination.listen(settings), answer, settings.limits.header_timeout)
    return desk


def _ask_the_destination(
    record: Record, journal: Journal, plugins: PluginManager, settings: Settings, stopped: threading.Event
) -> Standing:
    """Say COMMIT. The image here died with its process, so it can never run again: that takes nothing from anybody."""
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


def _ask_the_witness(
    record: Record, journal: Journal, plugins: PluginManager, settings: Settings, stopped: threading.Event
) -> Standing:
    """Claim for the source: a destination that holds the machine whole has claimed it since, and no other has it."""
    witness = witness_of(settings, plugins)
    if witness is None:
        raise ConfigError(
            f"{Standing(Verdict.ASK_WITNESS, record).sentence}, and none is named",
            hint="[backends] witness has to name the one at which it was handed over",
        )
    try:
        found = ask(witness, bytes.fromhex(record.mid), SOURCE, stopped)
    finally:
        witness.close()
    if found is None:
        return Standing(Verdict.ASK_WITNESS, record)
    verdict, ownership, epochs = _WITNESSED[record.role, found]
    return Standing(verdict, _written(journal, record, ownership, Reason.WITNESS, record.epoch + epochs))


def _written(
    journal: Journal, record: Record, ownership: SourceOwnership | DestinationOwnership, why: Reason, epoch: int
) -> Record:
    written = attrs.evolve(record, ownership=str(ownership), why=str(why), epoch=epoch, at=time.time())
    journal.append(written)
    return written
