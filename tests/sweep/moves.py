"""Who owned the machine, move by move on both sides, replayed through the tables of the protocol.

The tables are the code's own (`whimbrel.migration.handover`). What is checked here is what they cannot say: that no
move was made past them, that a guest ran only where its side owned the machine, and what the two sides may be together.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import attrs

from whimbrel.migration import handover
from whimbrel.migration.handover import (
    DESTINATION_MOVES,
    SOURCE_MOVES,
    DestinationOwnership,
    Reason,
    SourceOwnership,
)

SOURCE: Final = "source"
DESTINATION: Final = "destination"
_S, _D = SourceOwnership, DestinationOwnership
_LET_GO: Final = frozenset({_S.RELEASED, _S.DONE})


@attrs.frozen
class Step:
    """One thing that happened: `side` went from `old` to `new` because of `why`, or began or ceased to run."""

    side: str
    old: str
    new: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.side} {self.old}→{self.new} ({self.why})" if self.old else f"{self.side} {self.new}"


RUNS: Final = "runs"
STANDS: Final = "stands"


class Recorder:
    """Writes steps down, in the order in which they happen. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: list[Step] = []

    def add(self, step: Step) -> None:
        """It has happened."""
        with self._lock:
            self._steps.append(step)

    def take(self) -> list[Step]:
        """All steps since the last call."""
        with self._lock:
            steps, self._steps = self._steps, []
        return steps


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Every move of every handover in this process is told to `recorder`, once it is made."""
    real = handover.Handover.move

    def move(self: Any, to: Any, why: Any) -> None:
        old = self.now
        real(self, to, why)
        recorder.add(Step(SOURCE if isinstance(to, SourceOwnership) else DESTINATION, str(old), str(to), str(why)))

    handover.Handover.move = move  # type: ignore[method-assign]
    try:
        yield
    finally:
        handover.Handover.move = real  # type: ignore[method-assign]


def check(steps: Sequence[Step], *, source: str, destination: str) -> list[str]:
    """What in one attempt the model does not know; `source` and `destination` are the ends that the sides tell.

    It begins with a source that owns the machine and runs it, and a destination that loads.
    """
    wrong: list[str] = []
    mine, theirs = _S.OWNER, _D.LOADING
    runs = {SOURCE: True, DESTINATION: False}
    ever_ran = False
    for step in steps:
        if not step.old:
            runs[step.side] = step.new == RUNS
            ever_ran = ever_ran or runs[DESTINATION]
            if runs[SOURCE] and mine is not _S.OWNER:
                wrong.append(f"{step}: the source is {mine}")
            if runs[DESTINATION] and theirs is not _D.OWNER:
                wrong.append(f"{step}: the destination is {theirs}")
        elif step.side == SOURCE:
            old, mine = mine, _S(step.new)
            if step.old != old or step.why not in SOURCE_MOVES[old].get(mine, ()):
                wrong.append(f"{step}: the model has no such move from {old}")
            if old is _S.RELEASED and mine is _S.OWNER and theirs is not _D.REFUSED:
                wrong.append(f"{step}: the destination is {theirs} and has not refused")
            if old is _S.RELEASED and mine is _S.OWNER and step.why != Reason.REFUSE:
                wrong.append(f"{step}: nobody else gives it back in an attempt")
            if mine in (_S.PREPARED, _S.RELEASED) and theirs is not _D.PREPARED:
                wrong.append(f"{step}: the destination is {theirs} and has proved nothing")
            if mine is _S.DONE and theirs is not _D.OWNER:
                wrong.append(f"{step}: the destination is {theirs}")
        else:
            before, theirs = theirs, _D(step.new)
            if step.old != before or step.why not in DESTINATION_MOVES[before].get(theirs, ()):
                wrong.append(f"{step}: the model has no such move from {before}")
            if theirs is _D.OWNER and mine not in _LET_GO:
                wrong.append(f"{step}: the source is {mine} and has not let go")
            if step.why == Reason.ABORTED and mine is not _S.OWNER:
                wrong.append(f"{step}: the source is {mine} and has taken nothing back")
            if theirs is _D.REFUSED and ever_ran:
                wrong.append(f"{step}: it has run")
        if runs[SOURCE] and runs[DESTINATION]:
            wrong.append(f"{step}: both run")
    if (str(mine), str(theirs)) != (source, destination):
        wrong.append(f"the sides say {source}, {destination}; by their moves they are {mine}, {theirs}")
    return wrong
