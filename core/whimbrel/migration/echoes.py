"""What the destination was asked by PINGs, and how soon it answered.

A PING is answered when everything before it has been loaded. So an echo tells when bytes have arrived, which nothing
else does: the system takes MiB of them before one has gone.

The values that are in use: `FIRST_PING`, `ROUND_PING` + n and `PROOF` (handover), and the two here, each of which is
asked again and again, but never while its answer is out. A QEMU echoes whatever it is sent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import attrs

from whimbrel.errors import StreamError

BURST_BEGINS: Final = 2  # ahead of a burst: its echo has nothing to wait for but the way
BURST_ENDS: Final = 3  # behind it


@attrs.define
class Echoes:
    """PINGs that are out, and answers that came. The caller holds a lock where several threads use it."""

    clock: Callable[[], float] = time.monotonic
    _asked: dict[int, float] = attrs.field(factory=dict, init=False)
    _came: dict[int, float] = attrs.field(factory=dict, init=False)
    _quickest: float = attrs.field(default=math.inf, init=False)

    def asked(self, value: int) -> None:
        """A PING of `value` is about to be sent."""
        self._came.pop(value, None)
        self._asked[value] = self.clock()

    def came(self, value: int) -> None:
        """Its PONG has come; raises StreamError if nobody waits for one."""
        now = self.clock()
        if value not in self._asked:
            raise StreamError(f"the destination answered a PING that was never sent ({value:#x})")
        self._quickest = min(self._quickest, now - self._asked.pop(value))
        self._came[value] = now

    def when(self, value: int) -> float | None:
        """The clock's time at which the last PING of `value` was answered; None while it is out, or never was sent."""
        return self._came.get(value)

    def out(self, value: int) -> bool:
        """Whether a PING of `value` waits for its answer."""
        return value in self._asked

    def forget(self, value: int) -> None:
        """Nobody will ask when `value` was answered."""
        self._came.pop(value, None)

    @property
    def round_trip(self) -> float:
        """How long an answer takes, in seconds: no longer than the quickest so far did, what went before it included.

        0 before the first.
        """
        return self._quickest if math.isfinite(self._quickest) else 0.0


class Bursts:
    """Times what goes between one wait for `max-bandwidth` and the next, by the destination's echo.

    `sent()` counts bytes, `ask(value)` sends a PING, `answered(value)` is the clock's time at which it was answered, or
    None; `round_trip()` how long an answer takes by itself. There is one burst at a time: while the end of one is not
    answered the next goes unmeasured, and so there are two PINGs for each window of the pacer at most. On the
    migration thread; raises what `ask` raises.
    """

    def __init__(
        self,
        sent: Callable[[], int],
        ask: Callable[[int], object],
        answered: Callable[[int], float | None],
        round_trip: Callable[[], float],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sent, self._ask, self._answered, self._round_trip = sent, ask, answered, round_trip
        self._clock = clock
        self._began: float | None = None
        self._size = 0  # bytes: of the stream before it while it goes on, its own once it has ended
        self._ended = False
        self._measured: list[tuple[int, float]] = []

    def begin(self) -> None:
        """Sending goes on after a wait."""
        self._collect()
        if self._ended:
            return
        if self._began is None or self._answered(BURST_BEGINS) is not None:
            self._ask(BURST_BEGINS)
        self._began, self._size = self._clock(), self._sent()

    def end(self) -> None:
        """The window is full, or the round is over. Nothing happens if no burst goes on."""
        if self._began is None or self._ended:
            return
        self._ended, self._size = True, self._sent() - self._size
        self._ask(BURST_ENDS)

    def measured(self) -> list[tuple[int, float]]:
        """The bytes and seconds of each burst that has arrived since the last call."""
        self._collect()
        measured, self._measured = self._measured, []
        return measured

    def _collect(self) -> None:
        arrived = self._answered(BURST_ENDS) if self._ended else None
        if arrived is None:
            return
        assert self._began is not None, "a burst that has ended has begun"
        taken = arrived - self._began
        # What is known of the round trip may be too long by now; at least half of the time was the bytes'.
        self._measured.append((self._size, max(taken - self._round_trip(), taken / 2, 1e-6)))
        self._began, self._ended = None, False
