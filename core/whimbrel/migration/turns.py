"""Whose turn it is to send: handlers that have something to send share the link by bytes, so that none starves.

RAM and drives are saved by handlers of their own, and either could fill any link for long. Each gets turns of
`QUANTUM` bytes; one that has sent more, since its pieces are large, waits until the others have caught up. Who has
nothing ready when it could send loses that, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from whimbrel.abc import IterableHandler, Slice

QUANTUM: Final = 4 << 20  # bytes of a turn: a few milliseconds of a fast link


@attrs.frozen
class Turn:
    """A part of a slice (`whimbrel.abc.Slice`): over with the slice, or when `limit` bytes were sent."""

    slice_: Slice
    limit: int
    _began: int = attrs.field(default=attrs.Factory(lambda self: self.slice_.bytes_left(), takes_self=True), init=False)

    @property
    def used(self) -> int:
        """Bytes sent so far, also over lanes."""
        return self._began - self.slice_.bytes_left()

    def bytes_left(self) -> int:
        """Bytes that may still be sent."""
        return min(self.slice_.bytes_left(), self.limit - self.used)

    def over(self) -> bool:
        """Whether the handler must return now."""
        return self.slice_.over() or self.used >= self.limit


class Turns:
    """Shares the link among handlers. One thread."""

    def __init__(self) -> None:
        self._sent: dict[IterableHandler, int] = {}  # what each has sent, or could have: only differences count

    def next(self, waiting: Sequence[IterableHandler], slice_: Slice) -> tuple[IterableHandler, Slice]:
        """Which of `waiting` (at least one, all with something pending) is to send, and how much."""
        ready = [handler for handler in waiting if handler.ready()] if len(waiting) > 1 else waiting
        if len(ready) <= 1:
            self._sent.clear()
            return (ready or waiting)[0], slice_
        # Who joins begins where the one is that has sent least: what was not used is lost.
        least = min((self._sent[handler] for handler in ready if handler in self._sent), default=0)
        self._sent = {handler: self._sent.get(handler, least) for handler in ready}
        first, second = sorted(ready, key=self._sent.__getitem__)[:2]
        return first, Turn(slice_, self._sent[second] - self._sent[first] + QUANTUM)

    def taken(self, handler: IterableHandler, turn: Slice) -> None:
        """`handler` has returned from its turn."""
        if isinstance(turn, Turn):
            self._sent[handler] += turn.used
