"""A link that has fallen silent: it takes no byte, and no answer comes.

Only the time counts in which the source does nothing but wait for the link (`with watch:`): a sync, a guest that is
being stopped and the pauses of `max-bandwidth` say nothing about it. A piece of several MiB is taken as a whole here,
whatever of it the link has taken already; so a link that is slower than one such piece in the time looks silent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from whimbrel.abc import Channel
from whimbrel.migration.quietly import quietly

LOOKS: Final = 8  # in the time after which a link is silent: it is noticed that much later at most


class IdleWatch:
    """Closes `channel` when for `seconds` nothing has moved on a link that is waited for; 0 for never.

    `moved()` tells how far it is: anything that is another whenever a byte was taken or an answer came. It is asked on
    the watch's own thread, which `start` starts and `end` ends. The block of a `with` waits for the link; one thread.
    `passed` says whether it was the watch that closed the channel.
    """

    def __init__(
        self,
        seconds: float,
        channel: Channel,
        moved: Callable[[], object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self.passed = False
        self._channel, self._moved, self._clock = channel, moved, clock
        self._turns = 0  # waits that have begun or ended: odd while there is one
        self._seen: object = None
        self._since = clock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="whimbrel-idle", daemon=True)

    def start(self) -> Self:
        """Begin to look."""
        if self.seconds:
            self._thread.start()
        return self

    def end(self) -> None:
        """Stop looking, and wait for the thread. Twice is fine."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self._turns += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._turns += 1

    def silent(self) -> bool:
        """Whether the link is, as far as the looks until now have shown."""
        now, seen = self._clock(), (self._turns, self._moved())
        if seen != self._seen or not self._turns % 2:
            self._seen, self._since = seen, now
        return now - self._since >= self.seconds

    def _watch(self) -> None:
        while not self._ended.wait(self.seconds / LOOKS):
            if self.silent():
                self.passed = True
                quietly(self._channel.close, "closing the channel")
                return
