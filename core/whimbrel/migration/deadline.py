"""A time by which something must be over, held by closing the channel that it may be blocked in."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from whimbrel.abc import Channel
from whimbrel.migration.quietly import quietly


class Deadline:
    """Closes `channel` after `seconds`, unless it is lifted before. A context manager, or `start` and `lift`.

    Any thread. `passed` says whether it was the deadline that closed the channel.
    """

    def __init__(self, seconds: float, channel: Channel) -> None:
        self.seconds = seconds
        self.passed = False
        self._channel = channel
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.name, self._timer.daemon = "whimbrel-watchdog", True

    def start(self) -> Self:
        """Begin to count."""
        self._timer.start()
        return self

    def lift(self) -> None:
        """What had to be over is over. Twice is fine."""
        self._timer.cancel()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.lift()

    def _pass(self) -> None:
        self.passed = True
        quietly(self._channel.close, "closing the channel")
