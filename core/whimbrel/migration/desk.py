"""Where a destination hears words about ownership that come over connections of their own.

The listener that the source has connected to stays open, once both sides have agreed on an attempt: until the source
says DONE, or the attempt ends without the machine, or the machine is closed. Whoever connects says one word and is
answered; he knows the id of the attempt, or he learns nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import attrs

from whimbrel.abc import Channel, Listener, Patience
from whimbrel.errors import ChannelClosed, MigrationCancelled, MigrationError, StreamError
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.messenger import hear
from whimbrel.migration.quietly import quietly
from whimbrel.wire import handover
from whimbrel.wire.handover import FROM_SOURCE, Word, WordKind

_log = logging.getLogger("whimbrel")

FOR_EVER: Final = float("inf")
EXPECTANT: Final = 0.25  # seconds behind a connection: it was mostly the last one, and soon says so
OFTEN: Final = 0.002  # seconds
AT_ONCE: Final = 8  # connections that are heard at the same time; more wait

Answer = Callable[[Word], Word | None]
"""Answers a word: None says nothing, and the source will ask again. On a thread of the connection's own."""


class HeldListener(Listener):
    """A listener whose end ends the waiting, and not the listening: `let_go` does. Any thread."""

    def __init__(self, inner: Listener) -> None:
        self.inner = inner
        self.uri, self.exposed = inner.uri, inner.exposed
        self._ended = threading.Event()
        self._expectant = 0.0  # until when the end of the waiting is near

    def accept(self, patience: Patience) -> Channel:
        """Wait for the next peer, until `close`."""
        mine = _Expectant(patience.remaining(), self._ended, until=self._expectant)
        try:
            channel = self.inner.accept(mine)
        except MigrationCancelled as exc:
            patience.check("waiting for a connection")
            raise ChannelClosed("no further connection is waited for") from exc
        self._expectant = time.monotonic() + EXPECTANT
        return channel

    def close(self) -> None:
        """End the waiting. Twice is fine."""
        self._ended.set()

    def let_go(self) -> None:
        """End the listening. Twice is fine."""
        self._ended.set()
        self.inner.close()


@attrs.define(eq=False)
class _Expectant(Patience):
    """One that is asked often until a moment: a listener that waits notices its end no sooner than it asks."""

    _until: float = attrs.field(default=0.0, kw_only=True)

    def remaining(self) -> float:
        """Seconds until it wants to be asked again; none are left if none are."""
        left = Patience.remaining(self)
        return min(left, OFTEN) if time.monotonic() < self._until else left


class Desk:
    """Hears words at `listener`, and lets `answer` answer them; `seconds` is how long a peer may take for one."""

    def __init__(self, listener: Listener, answer: Answer, seconds: float) -> None:
        self._listener, self._answer, self._seconds = listener, answer, seconds
        self._closed = threading.Event()
        self._turns = threading.Semaphore(AT_ONCE)
        self._connections: dict[Channel, threading.Thread] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="whimbrel-desk", daemon=True)

    def open(self) -> None:
        """Begin to hear."""
        self._thread.start()

    def close(self) -> None:
        """Hear nobody any more, and stop listening; returns when it is so. Not on a connection's own thread."""
        self.end()
        with self._lock:
            connections = dict(self._connections)
        for channel in connections:
            quietly(channel.close, "closing a connection")
        for thread in (self._thread, *connections.values()):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()

    def end(self) -> None:
        """Hear nobody new any more, and stop listening. Any thread; returns at once."""
        self._closed.set()
        quietly(self._listener.close, "closing the listener")

    def attend(self, channel: Channel, word: Word | None = None) -> None:
        """Hear and answer one peer, and hang up. `word` is what was heard already."""
        try:
            with Deadline(self._seconds, channel):
                answer = self._answer(_from_source(hear(channel) if word is None else word))
                if answer is None:
                    return
                channel.send(handover.encode(answer))
                if answer.kind is WordKind.RUNNING:
                    # It says DONE when it has heard that, and hangs up.
                    self._answer(_from_source(hear(channel)))
        except MigrationError as exc:
            _log.debug("a word about ownership from %s came to nothing: %s", channel.peer, exc)
        finally:
            quietly(channel.close, "closing a connection")

    # ------------------------------------------------------------------------------------------ the threads

    def _listen(self) -> None:
        patience = Patience(FOR_EVER, self._closed)
        while not self._closed.is_set():
            try:
                channel = self._listener.accept(patience)
            except (ChannelClosed, MigrationCancelled):
                return
            except MigrationError as exc:
                _log.debug("a connection did not come to be: %s", exc)
                if self._closed.wait(0.05):
                    return
                continue
            self._turns.acquire()
            thread = threading.Thread(target=self._serve, args=(channel,), name="whimbrel-desk-word", daemon=True)
            with self._lock:
                self._connections[channel] = thread
            thread.start()

    def _serve(self, channel: Channel) -> None:
        try:
            self.attend(channel)
        finally:
            with self._lock:
                self._connections.pop(channel, None)
            self._turns.release()


def _from_source(word: Word) -> Word:
    if word.kind not in FROM_SOURCE:
        raise StreamError(f"{word.kind.name} came from a source, and only a destination says it")
    return word
