"""Who owns the machine: the two-phase switch, as one table for each side.

The law: never two running. Safety needs no clock, since both sides stand still while it is undecided.

Over a duplex channel (to a QEMU as well as to a whimbrel, since it uses nothing but PING, PONG, EOF and SHUT):

1. the source stops its guest (FROZEN), sends what is left and all devices, and then `PING x`;
2. the destination answers `PONG x` only when it has loaded and checked everything before it: PREPARED;
3. the source, on that PONG, becomes RELEASED and only then writes EOF. Until RELEASED it may thaw at any time, for any
   reason; from RELEASED on it never runs by itself, whatever the write returned;
4. the destination starts on EOF, as OWNER, and says `SHUT 0`; on that the source is DONE.

If the link dies between 3 and 4, the source is RELEASED without an answer and the destination may be PREPARED without
an order. Both keep what they have, both stand still, and both say so (`HandoverUndecided`): an operator decides.

Without a way back there is no PREPARED: the source is RELEASED before it writes EOF, and the destination does not start
by itself.

A journal that survives a crash will record these same moves; `on_move` is its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, Generic, TypeVar

from whimbrel.errors import StateError

# Its last byte is not 0: a QEMU answers a PING that was cut with zeros in place of what is missing.
PROOF: Final = 0x77686D62  # the value of the PING that asks for the proof ("whmb")
FIRST_PING: Final = 1  # sent as the return path opens, as QEMU does
ROUND_PING: Final = 0x10000  # + the round's number


class HandoverTiming(StrEnum):
    """When the source lets go."""

    PROOF = "proof"  # once the destination has proved that it holds everything
    QEMU = "qemu"  # once the last byte is written, as QEMU does: a destination that refuses it then is a machine lost


class SourceOwnership(StrEnum):
    """What the source may do with the machine."""

    OWNER = "owner"  # run it
    FROZEN = "frozen"  # hold it still, or thaw
    PREPARED = "prepared"  # the destination has proved that it holds everything; hold still, or thaw
    RELEASED = "released"  # nothing, ever
    DONE = "done"  # nothing: the destination said that it runs


class DestinationOwnership(StrEnum):
    """What the destination may do with the machine."""

    LOADING = "loading"  # load it
    PREPARED = "prepared"  # hold it still, whole
    OWNER = "owner"  # run it
    REFUSED = "refused"  # nothing: what was loaded is gone


_S, _D = SourceOwnership, DestinationOwnership

SOURCE_MOVES: Final[Mapping[SourceOwnership, frozenset[SourceOwnership]]] = {
    _S.OWNER: frozenset({_S.FROZEN}),
    _S.FROZEN: frozenset({_S.OWNER, _S.PREPARED, _S.RELEASED}),
    _S.PREPARED: frozenset({_S.OWNER, _S.RELEASED}),
    _S.RELEASED: frozenset({_S.DONE}),
    _S.DONE: frozenset(),
}

DESTINATION_MOVES: Final[Mapping[DestinationOwnership, frozenset[DestinationOwnership]]] = {
    _D.LOADING: frozenset({_D.PREPARED, _D.REFUSED}),
    _D.PREPARED: frozenset({_D.OWNER, _D.REFUSED}),
    _D.OWNER: frozenset(),
    _D.REFUSED: frozenset(),
}

Side = TypeVar("Side", SourceOwnership, DestinationOwnership)


class Handover(Generic[Side]):
    """One side's ownership in one attempt. The caller holds its own lock where a move must be atomic with others."""

    def __init__(
        self,
        start: Side,
        moves: Mapping[Side, frozenset[Side]],
        on_move: Callable[[Side, Side], object] = lambda _old, _new: None,
    ) -> None:
        self._now: Side = start
        self._moves: Mapping[Side, frozenset[Side]] = moves
        self._on_move: Callable[[Side, Side], object] = on_move

    @property
    def now(self) -> Side:
        """The ownership, as of the last move."""
        return self._now

    def move(self, to: Side) -> None:
        """Go to `to`; raises StateError for an illegal move. `on_move` is told first; if it raises, nothing moved."""
        if to not in self._moves[self._now]:
            raise StateError(f"ownership cannot go from {self._now} to {to}")
        self._on_move(self._now, to)
        self._now = to


def source_handover() -> Handover[SourceOwnership]:
    """The source's side of a new attempt."""
    return Handover(SourceOwnership.OWNER, SOURCE_MOVES)


def destination_handover() -> Handover[DestinationOwnership]:
    """The destination's side of a new attempt."""
    return Handover(DestinationOwnership.LOADING, DESTINATION_MOVES)


def last_word_timeout(limit: float) -> float:
    """How long a side that may do nothing without the other's word waits for it, in seconds.

    The source, RELEASED, waits for the destination to say that it runs; the destination, PREPARED, for the order to.
    Nothing follows from the silence but that somebody has to decide.
    """
    return limit or 10.0
