"""Says words about ownership over connections made for nothing else, again and again until they are answered."""

from __future__ import annotations

import logging
import threading
from typing import Final

from whimbrel.abc import Channel, Patience
from whimbrel.errors import MigrationError, StreamError
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.quietly import quietly
from whimbrel.migration.security import Connector
from whimbrel.stream import Reader
from whimbrel.wire import handover
from whimbrel.wire.handover import FROM_SOURCE, Word, WordKind

_log = logging.getLogger("whimbrel")

FIRST_PAUSE: Final = 0.05  # seconds between two tries, which double
LONGEST_PAUSE: Final = 1.0


class Messenger:
    """A way to one destination; `seconds` is how long one try may take. Any thread, one `say` at a time."""

    def __init__(self, connector: Connector, seconds: float) -> None:
        self._connector, self._seconds = connector, seconds
        self.tries = 0

    def say(self, word: Word, stopped: threading.Event, *, within: float = float("inf")) -> Word | None:
        """Say `word` until there is an answer, which is returned; None once `stopped`, or `within` seconds."""
        pause, whole = FIRST_PAUSE, Patience(within, stopped)
        while not stopped.is_set() and whole.remaining() > 0:
            self.tries += 1
            try:
                return self._try(word, stopped)
            except MigrationError as exc:
                _log.debug("%s was not answered: %s", word.kind.name, exc)
            stopped.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return None

    def _try(self, word: Word, stopped: threading.Event) -> Word:
        patience = Patience(self._seconds, stopped)
        channel = self._connector.connect(patience)
        try:
            with Deadline(patience.remaining(), channel):
                channel.send(handover.encode(word))
                answer = hear(channel)
                if answer.mid != word.mid or answer.kind in FROM_SOURCE:
                    raise StreamError(
                        f"the answer to {word.kind.name} is {answer.kind.name}, of another attempt or side"
                    )
                if answer.kind is WordKind.RUNNING:
                    channel.send(handover.encode(Word(WordKind.DONE, word.mid, word.epoch)))
                return answer
        finally:
            quietly(channel.close, "closing a connection")


def hear(channel: Channel) -> Word:
    """The word that comes next on `channel`. Raises ChannelError and StreamError."""
    return Reader(channel, capacity=handover.SIZE).parse(handover.parse_word())
