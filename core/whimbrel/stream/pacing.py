"""Holds a bandwidth limit in windows of 100 ms (`max-bandwidth`), and cuts sending into slices.

Each window of a fixed grid grants `limit / 10` bytes. What a slice sends beyond its grant is owed to the next
windows, and a window that begins late counts from where the grid says, so the rate holds however coarse the writes
and the timer are. What a window does not send is lost: after a pause there is one window's grant and no more. The
limit is read anew for each window, which is how it can be changed while a migration runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import attrs

WINDOW: Final = 0.1  # seconds
SLICE: Final = 0.05  # seconds a handler may go on before it returns
UNLIMITED: Final = 1 << 62


@attrs.define
class Pacer:
    """Grants slices. `limit()` is in bytes per second, 0 for none; `sent()` counts bytes written so far.

    `wait(seconds)` sleeps, or returns early because the migration is to stop; `stopping()` tells whether it is, and
    `check()` raises the reason. One thread.
    """

    limit: Callable[[], int]
    sent: Callable[[], int]
    wait: Callable[[float], object]
    stopping: Callable[[], bool]
    check: Callable[[], None]
    clock: Callable[[], float] = time.monotonic
    pauses: int = attrs.field(default=0, init=False)  # how often a window had to be waited for
    _window: float = attrs.field(default=-math.inf, init=False)  # when the current window began
    # Bytes that may be sent until it ends; owed where negative. A fraction counts, or a limit below 10 would not hold.
    _grant: float = attrs.field(default=0.0, init=False)
    _accounted: int = attrs.field(default=0, init=False)  # of `sent`, what has been taken off the grant

    def next_slice(self) -> PacedSlice:
        """Wait until something may be sent and grant a slice. Raises what `check` raises."""
        while True:
            self.check()
            self._settle()
            if self._grant > 0:
                return PacedSlice(self, self.clock() + SLICE)
            self.pauses += 1
            self.wait(max(0.0, self._window + WINDOW - self.clock()))

    def bytes_left(self) -> int:
        """What is left of the window's grant, now."""
        return math.ceil(self._grant - (self.sent() - self._accounted))

    def _settle(self) -> None:
        now, sent, limit = self.clock(), self.sent(), self.limit()
        self._grant -= sent - self._accounted
        self._accounted = sent
        if limit == 0:
            self._window, self._grant = now, UNLIMITED
            return
        share = limit * WINDOW
        self._grant = min(self._grant, share)  # the limit may have been lifted or lowered meanwhile
        if now < self._window + WINDOW:
            return
        begun = max(1, int(min((now - self._window) / WINDOW, 1 << 30)))  # windows, with this one
        left = self._grant + (begun - 1) * share
        if begun > 1 and left >= 0:
            # After a pause (a sync, the start) the grid begins anew: what was not sent then is not caught up.
            self._window, self._grant = now, share
        else:
            self._window, self._grant = self._window + begun * WINDOW, min(left, 0.0) + share


@attrs.frozen
class PacedSlice:
    """One slice of a Pacer's window (`whimbrel.abc.Slice`)."""

    pacer: Pacer
    deadline: float

    def bytes_left(self) -> int:
        """Bytes that may still be sent."""
        return self.pacer.bytes_left()

    def over(self) -> bool:
        """Whether the handler must return now."""
        return self.pacer.stopping() or self.pacer.bytes_left() <= 0 or self.pacer.clock() >= self.deadline
