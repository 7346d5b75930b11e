"""Who owns the machine: one table of moves for each side, and what may cause each of them.

The law: never two running. Safety needs no clock, since both sides stand still while it is undecided.

How ownership passes is a *deal*, which depends on what the other side can do (`whimbrel.migration.deals`). They are all
paths through the same two tables:

* **pairwise**, between two whimbrels: the destination is PREPARED once it holds everything and the digest agrees; the
  source, RELEASED, says COMMIT until it is answered, over new connections if it must; the answer is RUNNING (DONE) or
  REFUSE (the source is OWNER again);
* **witness**, two whimbrels and a third place that both can reach: whoever writes its cell first is OWNER;
* **proof**, with a QEMU: nothing but PING, PONG, EOF and SHUT. The PONG behind the devices is PREPARED, EOF is COMMIT;
* **qemu**, QEMU's own timing, and **one way**, without a way back: RELEASED without a proof.

Whatever the deal, RELEASED is the point of no return: until then the source may thaw at any time, for any reason; from
then on it never runs without the other side's or the witness's word, or an operator's, whatever a write returned.

A journal hears of each move before it takes place (`on_move`) and may stop it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, Generic, TypeAlias, TypeVar

from whimbrel.errors import StateError

# Its last byte is not 0: a QEMU answers a PING that was cut with zeros in place of what is missing.
PROOF: Final = 0x77686D62  # the value of the PING that asks for the proof ("whmb")
FIRST_PING: Final = 1  # sent as the return path opens, as QEMU does
ROUND_PING: Final = 0x10000  # + the round's number


class HandoverTiming(StrEnum):
    """When the source lets go."""

    AUTO = "auto"  # as safely as the other side can: pairwise with a whimbrel, by proof with a QEMU
    PROOF = "proof"  # once the destination has proved that it holds everything, over one connection
    QEMU = "qemu"  # once the last byte is written, as QEMU does: a destination that refuses it then is a machine lost


class SourceOwnership(StrEnum):
    """What the source may do with the machine."""

    OWNER = "owner"  # run it
    FROZEN = "frozen"  # hold it still, or thaw
    PREPARED = "prepared"  # the destination has proved that it holds everything; hold still, or thaw
    RELEASED = "released"  # nothing, unless the destination or the witness gives it back
    DONE = "done"  # nothing: the destination said that it is its own


class DestinationOwnership(StrEnum):
    """What the destination may do with the machine."""

    LOADING = "loading"  # load it
    PREPARED = "prepared"  # hold it still, whole
    OWNER = "owner"  # run it
    REFUSED = "refused"  # nothing: what was loaded is gone


class Reason(StrEnum):
    """What causes a move."""

    STOPPED = "the guest was stopped for the switchover"
    THAWED = "the attempt failed or was cancelled"
    PROVED = "the destination has proved that it holds everything"
    LET_GO = "the order to start is about to be sent"
    RUNNING = "the destination has said that it owns the machine"
    REFUSE = "the destination has said that it has not run the machine and never will"
    LOADED = "everything is here and has been checked"
    FAILED = "loading failed, or the machine cannot be taken over"
    ORDERED = "the source has ordered the start"
    ABORTED = "the source has taken the machine back"
    UNPROVED = "the source lets go without a proof"
    WITNESS = "the witness has decided"
    CRASHED = "the process that held the machine has ended"
    OPERATOR = "an operator has said so"


_S, _D, _R = SourceOwnership, DestinationOwnership, Reason

Side = TypeVar("Side", SourceOwnership, DestinationOwnership)
Moves: TypeAlias = Mapping[Side, Mapping[Side, frozenset[Reason]]]

SOURCE_MOVES: Final[Moves[SourceOwnership]] = {
    _S.OWNER: {_S.FROZEN: frozenset({_R.STOPPED})},
    _S.FROZEN: {
        _S.OWNER: frozenset({_R.THAWED}),
        _S.PREPARED: frozenset({_R.PROVED}),
        _S.RELEASED: frozenset({_R.LET_GO, _R.CRASHED}),
    },
    _S.PREPARED: {
        _S.OWNER: frozenset({_R.THAWED}),
        _S.RELEASED: frozenset({_R.LET_GO, _R.CRASHED}),
    },
    _S.RELEASED: {
        _S.DONE: frozenset({_R.RUNNING, _R.WITNESS}),
        _S.OWNER: frozenset({_R.REFUSE, _R.WITNESS, _R.OPERATOR}),
    },
    _S.DONE: {_S.OWNER: frozenset({_R.OPERATOR})},
}

DESTINATION_MOVES: Final[Moves[DestinationOwnership]] = {
    _D.LOADING: {
        _D.PREPARED: frozenset({_R.LOADED}),
        _D.REFUSED: frozenset({_R.FAILED, _R.CRASHED}),
    },
    _D.PREPARED: {
        _D.OWNER: frozenset({_R.ORDERED, _R.UNPROVED, _R.WITNESS, _R.OPERATOR}),
        _D.REFUSED: frozenset({_R.ABORTED, _R.FAILED, _R.WITNESS, _R.CRASHED, _R.OPERATOR}),
    },
    _D.OWNER: {},
    _D.REFUSED: {},
}

OnMove: TypeAlias = Callable[[Side, Side, Reason], object]


class Handover(Generic[Side]):
    """One side's ownership in one attempt. The caller holds its own lock where a move must be atomic with others."""

    def __init__(self, start: Side, moves: Moves[Side], on_move: OnMove[Side] = lambda _old, _new, _why: None) -> None:
        self._now: Side = start
        self._moves: Moves[Side] = moves
        self.on_move: OnMove[Side] = on_move

    @property
    def now(self) -> Side:
        """The ownership, as of the last move."""
        return self._now

    def move(self, to: Side, why: Reason) -> None:
        """Go to `to`; raises StateError for an illegal move. `on_move` is told first; if it raises, nothing moved."""
        if why not in self._moves[self._now].get(to, ()):
            raise StateError(f"ownership cannot go from {self._now} to {to} because {why}")
        self.on_move(self._now, to, why)
        self._now = to


def source_handover() -> Handover[SourceOwnership]:
    """The source's side of a new attempt."""
    return Handover(SourceOwnership.OWNER, SOURCE_MOVES)


def destination_handover() -> Handover[DestinationOwnership]:
    """The destination's side of a new attempt."""
    return Handover(DestinationOwnership.LOADING, DESTINATION_MOVES)


def last_word_timeout(limit: float) -> float:
    """How long a side that may do nothing without the other's word waits for it on one connection, in seconds.

    The source, RELEASED, waits for the destination to say that it runs; the destination, PREPARED, for the order to.
    Nothing follows from the silence but that another way has to be found, or somebody has to decide.
    """
    return limit or 10.0
