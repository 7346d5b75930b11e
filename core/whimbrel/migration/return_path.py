"""The source's ear: a thread that reads what the destination says, and calls that wait for it.

Whatever goes wrong here ends the migration: the failure is kept, `on_failure` wakes the migration thread, and every
wait raises it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from whimbrel.abc import Channel
from whimbrel.errors import MigrationError, PeerRefused, Place, StreamError
from whimbrel.migration.attempt import unexpected
from whimbrel.migration.echoes import Echoes
from whimbrel.stream import Reader
from whimbrel.wire.handover import ACCEPT, FROM_SOURCE, MEET, MET, OFFER, Word
from whimbrel.wire.return_path import Message, Pong, Shut, SwitchoverAck, parse_message


class ReturnPath:
    """Listens on the way back of a duplex channel from `start` until SHUT, a failure or the channel's end."""

    def __init__(self, channel: Channel, on_failure: Callable[[], object]) -> None:
        self._channel = channel
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._echoes = Echoes()
        self._acknowledged = False
        self._accepted = False
        self._met = False
        self._word: Word | None = None
        self._may_shut = False
        self._shut = False
        self._failure: MigrationError | None = None
        self.heard = 0
        """Messages that have come; any thread may read it."""
        self._thread = threading.Thread(target=self._listen, name="whimbrel-return-path", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread; the channel must be closed."""
        if self._thread.is_alive():
            self._thread.join()

    @property
    def failure(self) -> MigrationError | None:
        """What went wrong, if anything has."""
        return self._failure

    @property
    def round_trip(self) -> float:
        """How long an answer takes, in seconds, as `Echoes.round_trip` says."""
        return self._echoes.round_trip

    def asking(self, value: int) -> None:
        """A PING of `value` is about to be sent; only PONGs that were asked for are believed."""
        with self._changed:
            self._echoes.asked(value)

    @property
    def accepted(self) -> bool:
        """Whether the destination has accepted the OFFER; it has not, once the OFFER's own PONG is here without."""
        return self._accepted

    @property
    def met(self) -> bool:
        """Whether the destination has found us at its witness; it has not, once the PONG of MEET is here without."""
        return self._met

    def wait_acknowledged(self, timeout: float) -> bool:
        """Wait for the destination to say that it is ready for the switchover; False if it has not in time."""
        return self._wait(lambda: self._acknowledged, timeout)

    def may_shut(self) -> None:
        """From here on SHUT is expected; before, it is the destination giving up."""
        with self._changed:
            self._may_shut = True

    def answered(self, value: int) -> float | None:
        """When the last PING of `value` was answered, in monotonic seconds; None while it is out."""
        with self._changed:
            return self._echoes.when(value)

    def wait_pong(self, value: int) -> None:
        """Wait for the PONG of `value`, once. Raises the failure; a channel that is closed is one."""
        self._wait(lambda: self._echoes.when(value) is not None, None)
        with self._changed:
            self._echoes.forget(value)

    def wait_failure(self, timeout: float) -> None:
        """Wait until something goes wrong, or the last word comes; raises nothing."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._shut, timeout)

    def wait_shut(self, timeout: float | None = None) -> bool:
        """Wait for the destination's last word; False if it has not come in time. Raises the failure."""
        return self._wait(lambda: self._shut, timeout)

    def wait_word(self) -> Word:
        """Wait for the destination's word about ownership. Raises the failure, and StreamError for SHUT without one."""
        self._wait(lambda: self._word is not None or self._shut, None)
        if self._word is None:
            raise StreamError("the destination has ended the way back without a word about the machine")
        return self._word

    def _wait(self, done: Callable[[], bool], timeout: float | None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: done() or self._failure is not None, timeout)
            if done():
                return True
            if self._failure is not None:
                raise self._failure
            return False

    def _listen(self) -> None:
        reader = Reader(self._channel, capacity=4096)
        try:
            while not self._shut:
                self._hear(reader.parse(parse_message()))
        except MigrationError as exc:
            self._fail(exc.at(Place(offset=reader.offset)))
        except BaseException as exc:  # noqa: BLE001 - a transport's or our own bug must not leave the migration waiting
            self._fail(unexpected(exc))

    def _fail(self, failure: MigrationError) -> None:
        with self._changed:
            self._failure = failure.at(Place(section="return path", peer=self._channel.peer))
            self._changed.notify_all()
        self._on_failure()

    def _hear(self, message: Message) -> None:
        with self._changed:
            self.heard += 1
            match message:
                case Pong(value) if value == ACCEPT and self._echoes.out(OFFER):
                    self._accepted = True
                case Pong(value) if value == MET and self._echoes.out(MEET):
                    self._met = True
                case Word():
                    self._hear_word(message)
                case Pong(value):
                    self._echoes.came(value)
                case SwitchoverAck():
                    if self._acknowledged:
                        raise StreamError("the destination agreed to the switchover twice")
                    self._acknowledged = True
                case Shut(0) if self._may_shut:
                    self._shut = True
                case Shut(0):
                    raise StreamError("the destination said that it is through before it had everything")
                case Shut(value) if self._may_shut:
                    # A QEMU tells so of its end of the link, not of the machine, which it may run.
                    raise PeerRefused(
                        f"the destination has had an error by its last word (SHUT {value})",
                        hint="its own log says which",
                    )
                case Shut(value):
                    raise PeerRefused(
                        f"the destination failed (SHUT {value})", hint="its own error says why; the source goes on"
                    )
            self._changed.notify_all()

    def _hear_word(self, word: Word) -> None:
        if not (self._accepted and self._may_shut) or self._word is not None or word.kind in FROM_SOURCE:
            raise StreamError(f"the destination says {word.kind.name} out of its turn")
        self._word = word
