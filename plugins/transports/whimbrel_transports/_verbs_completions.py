"""Completion queues and channels of the emulated verbs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from whimbrel.errors import ChannelClosed
from whimbrel.verbs import CompletionChannel, CompletionQueue, WorkCompletion
from whimbrel_transports._sockets import SLICE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from whimbrel.abc import Patience

__all__ = ["Channel", "Queue"]

_WHAT = "waiting for a completion"


class Channel(CompletionChannel):
    """One condition for all of its queues."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queues: list[Queue] = []
        self._closed = False

    def get_event(self, patience: Patience) -> CompletionQueue:
        """Wait for the first queue that has something."""
        with self.changed:
            _wait(self.changed, patience, self._ready)
            return next(queue for queue in self.queues if queue.filled)

    def close(self) -> None:
        """Wake whoever waits."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def _ready(self) -> bool:
        if self._closed:
            raise ChannelClosed("the completion channel was closed")
        return any(queue.filled for queue in self.queues)


class Queue(CompletionQueue):
    """Completions in a deque; a queue of a channel waits on the channel's condition."""

    def __init__(self, cqe: int, channel: Channel | None) -> None:
        self._changed = threading.Condition() if channel is None else channel.changed
        self._room = cqe
        self._done: deque[WorkCompletion] = deque()
        self._channel = channel
        self._closed = False
        if channel is not None:
            with self._changed:
                channel.queues.append(self)

    @property
    def filled(self) -> bool:
        """Whether there is something to poll."""
        return bool(self._done)

    def push(self, completions: Iterable[WorkCompletion]) -> bool:
        """Add completions; False if there was no room for all of them, and the last ones are lost."""
        with self._changed:
            for completion in completions:
                if len(self._done) >= self._room:
                    return False
                self._done.append(completion)
            self._changed.notify_all()
        return True

    def poll(self, count: int) -> Sequence[WorkCompletion]:
        """Take out the oldest."""
        with self._changed:
            self._check()
            return [self._done.popleft() for _ in range(min(count, len(self._done)))]

    def wait(self, patience: Patience) -> None:
        """Wait until there is something."""
        with self._changed:
            _wait(self._changed, patience, self._ready)

    def close(self) -> None:
        """Wake whoever waits, and forget what was not polled."""
        with self._changed:
            self._closed = True
            self._done.clear()
            if self._channel is not None and self in self._channel.queues:
                self._channel.queues.remove(self)
            self._changed.notify_all()

    def _ready(self) -> bool:
        self._check()
        return bool(self._done)

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed("the completion queue was closed")


def _wait(changed: threading.Condition, patience: Patience, ready: Callable[[], bool]) -> None:
    while not ready():
        patience.check(_WHAT)
        changed.wait(min(SLICE, patience.remaining()))
