"""What the link carries, as far as it has been seen, and how long a remainder takes over it.

The switchover is not held back by `max-bandwidth`, while the rounds are. So a round that had to wait for its windows
has measured the limit and not the link. What is known beyond it is *bursts*: what went between two such waits, until
the destination's echo (`whimbrel.migration.echoes`). The latest are taken together, so that one which was held up by
something else counts for its time. They are believed for as much as was seen in all of them, and at least for a few
times the largest, since a link may be fast for a moment only; the rest of a remainder is reckoned with the average,
which has been seen for long.

A remainder is counted in memory, a link in bytes. Pages that are zero or that shrink (delta encoding) go quicker than
the link says. So from the second round on, when the pages are those that the guest writes again and again, the speed at
which memory was got rid of counts too, by the slower of the last two rounds.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import attrs

RECENT: Final = 32  # bursts that count: some seconds
MEASURABLE: Final = 1 << 16  # bytes that must have gone for their speed to mean something
BELIEVED: Final = 8  # how many times the largest burst its speed is taken to hold


@attrs.define
class LinkSpeed:
    """Speeds in bytes per second, 0 for unknown; times in seconds. Written by one thread."""

    average: float = 0.0
    _bursts: deque[tuple[int, float]] = attrs.field(factory=lambda: deque(maxlen=RECENT), init=False)
    _handled: deque[float] = attrs.field(factory=lambda: deque(maxlen=2), init=False)

    def sent(self, size: int, span: float, *, held_back: bool = False) -> None:
        """`size` bytes went in a whole round, which `max-bandwidth` may have held back."""
        if size >= MEASURABLE or self.average == 0.0:
            self.average = size / span
            if not held_back:
                self._bursts.clear()  # there is nothing better to know than the round itself

    def burst(self, size: int, span: float) -> None:
        """`size` bytes went between two waits for a window."""
        self._bursts.append((size, span))

    def handled(self, memory: int, span: float) -> None:
        """A round, not the first, got rid of `memory` bytes of pages."""
        if memory >= MEASURABLE:
            self._handled.append(memory / span)

    def seconds_for(self, remaining: int) -> float:
        """How long `remaining` bytes of memory take when nothing holds them back; infinite where nothing is known."""
        average = max(self.average, min(self._handled, default=0.0))
        if not remaining or not average:
            return float("inf") if remaining else 0.0
        seen = sum(size for size, _ in self._bursts)
        speed = seen / sum(span for _, span in self._bursts) if seen >= MEASURABLE else 0.0
        largest = max((size for size, _ in self._bursts), default=0)
        quick = min(remaining, max(seen, BELIEVED * largest)) if speed > average else 0
        return (quick / speed if quick else 0.0) + (remaining - quick) / average
