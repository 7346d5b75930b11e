"""Takings: how a destination takes over what it holds whole, each for another way in which its source lets go.

They are the other half of `whimbrel.migration.deals`. The incoming thread loads the stream; at its end the taking that
fits concludes it.

| taking | the source | the machine is this side's |
| --- | --- | --- |
| `Ordered` | had its proof over this connection | at EOF |
| `HungUp` | a QEMU, which waits for SHUT | when it has hung up in order behind SHUT |
| `Unproved` | has no way back, or has not opened it | at EOF, or when what brought it has ended in order |
| `Pairwise` | has said which attempt it is | at EOF or COMMIT over any connection, whichever comes first |
| | and leaves it to a witness | when the witness says so |
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

import attrs

from whimbrel.abc import Channel
from whimbrel.errors import ChannelError, ChannelLost, PeerRefused, Place, StateError, StreamError
from whimbrel.migration.answers import LINGER
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.handover import DestinationOwnership, Reason
from whimbrel.migration.holding import Holding
from whimbrel.migration.loader import StreamLoader
from whimbrel.migration.orders import Orders
from whimbrel.migration.quietly import quietly
from whimbrel.migration.witnessing import DESTINATION, SOURCE, ask, destination_meets
from whimbrel.stream import Reader
from whimbrel.wire import handover
from whimbrel.wire.commands import Attempt
from whimbrel.wire.handover import Word, WordKind
from whimbrel.wire.return_path import Message, Shut
from whimbrel.witness import Witness

_log = logging.getLogger("whimbrel")


@attrs.frozen(eq=False)
class Arrival:
    """What a taking has to do with: the connection, what reads from it, and the machine that came."""

    channel: Channel
    reader: Reader
    loader: StreamLoader
    holding: Holding
    answer: Callable[[Message], None] | None  # says something on the way back, if there is one


class Taking(ABC):
    """One way to take over; one attempt, the incoming thread."""

    def __init__(self, arrival: Arrival) -> None:
        self._arrival = arrival

    @abstractmethod
    def conclude(self) -> None:
        """EOF has come: take the machine over, or raise why not."""

    def _expect_hang_up(self) -> None:
        """Wait until the peer hangs up in order. Raises StreamError for more bytes, ChannelError if the link breaks."""
        reader = self._arrival.reader
        if len(reader.window(0)) or self._arrival.channel.recv_into(memoryview(bytearray(1))):
            raise StreamError("bytes came behind the end of the stream", place=Place(offset=reader.offset))

    def _say(self, message: Message) -> None:
        if self._arrival.answer is not None:
            self._arrival.answer(message)


class Ordered(Taking):
    """From a source that wrote EOF only after our proof: it is the order to start."""

    def conclude(self) -> None:
        """Take over, and say so."""
        self._arrival.holding.take_over(Reason.ORDERED)
        with Deadline(LINGER, self._arrival.channel):
            _try_to(lambda: self._say(Shut(0)))
            _try_to(self._arrival.loader.load_description)


class Unproved(Taking):
    """From a source that does not listen, so that nothing can be proved to it."""

    def conclude(self) -> None:
        """Take over; the guest is started only if this side was told to do so even without proof."""
        _try_to(self._arrival.loader.load_description)
        if not self._arrival.channel.duplex:
            # What brought the stream may still say that it was not the whole one: a program by its exit status.
            self._expect_hang_up()
        self._arrival.holding.take_over(Reason.UNPROVED)


class HungUp(Taking):
    """From a source that asked for no proof and lets go by itself, a QEMU.

    It has once it hangs up in order behind our SHUT, and not if it does so before.
    """

    def conclude(self) -> None:
        """Say that everything is here, and wait for that."""
        self._arrival.loader.load_description()
        self._say(Shut(0))
        self._expect_hang_up()
        self._arrival.holding.take_over(Reason.ORDERED)


class Pairwise(Taking):
    """From a whimbrel: it orders the start, or takes the machine back, over whatever connection, until it is answered.

    It begins when the source says which attempt this is, and `answer`s words over other connections from then on, on
    their threads. `witness` makes ours, if one is named, once the source asks whether it is there too. `heeded` is
    called when the source needs no answer any more.
    """

    def __init__(
        self,
        arrival: Arrival,
        attempt: Attempt,
        witness: Callable[[], Witness | None],
        *,
        hang_up: Callable[[], object],
        heeded: Callable[[], object],
        patience: float,
    ) -> None:
        super().__init__(arrival)
        self._attempt, self._named = attempt, witness
        self._witness: Witness | None = None
        self._hang_up, self._heeded, self._patience = hang_up, heeded, patience
        self._orders = Orders()
        self._given_up = threading.Event()
        arrival.holding.begin(attempt)

    @property
    def mid(self) -> bytes:
        """The id of the attempt."""
        return self._attempt.mid

    def meets(self, cancelled: threading.Event) -> bool:
        """Whether the source is at our witness too. Raises ConfigError and PluginError for one that cannot be."""
        self._witness = self._named()
        return self._witness is not None and destination_meets(self._witness, self.mid, cancelled)

    def conclude(self) -> None:
        """EOF is an order like the others. Do as ordered, say what has become of it, and hear that it was heard."""
        arrival = self._arrival
        try:
            if arrival.loader.witnessed:
                self._ask_the_witness()
            else:
                self._obey(self._orders.give(WordKind.COMMIT))
        finally:
            if (word := self._standing(Word(WordKind.COMMIT, self.mid, self._attempt.epoch))) is not None:
                _try_to(lambda: self._say(word))
                _try_to(lambda: self._say(Shut(0 if word.kind is WordKind.RUNNING else 1)))
        with Deadline(LINGER, arrival.channel):
            _try_to(arrival.loader.load_description)
            with suppress(ChannelError, StreamError):
                if (last := arrival.reader.parse(handover.parse_word())).mid == self.mid:
                    self.answer(last)

    def conclude_without_it(self, broken: ChannelError) -> None:
        """The link has broken with the machine here: whoever decides now says so over another."""
        if self._arrival.loader.witnessed:
            self._ask_the_witness()
            return
        _log.warning("the link has broken with the machine here, whole and stopped (%s): waiting for word", broken)
        self._obey(self._orders.wait())

    def answer(self, word: Word) -> Word | None:
        """What to say to a word of this attempt's, once it is known. Any thread."""
        if word.kind is WordKind.DONE:
            self._heeded()
            return None
        if self._arrival.holding.now is DestinationOwnership.LOADING:
            self._hang_up()  # the source has no more to say there
        else:
            self._orders.give(word.kind)
            if not self._arrival.holding.settled.is_set():
                self._hang_up()  # the order has come another way
        self._arrival.holding.settled.wait(self._patience)
        return self._standing(word)

    def give_up(self) -> None:
        """Wait for nobody's word any longer: an operator's counts. Any thread."""
        self._given_up.set()
        self._orders.give(None)

    def close(self) -> None:
        """Let go of the witness."""
        if self._witness is not None:
            quietly(self._witness.close, "closing the witness")

    def _obey(self, order: WordKind | None) -> None:
        """Do with the machine what the source has ordered; what cannot be taken over is refused, which it will hear."""
        holding = self._arrival.holding
        match order:
            case WordKind.COMMIT:
                try:
                    holding.take_over(Reason.ORDERED)
                except StateError:
                    holding.refuse(Reason.FAILED)
                    raise
            case WordKind.ABORT:
                holding.refuse(Reason.ABORTED)
                raise PeerRefused(
                    "the source has taken the machine back, and what was loaded here is gone",
                    hint="its own error says why; the machine goes on there",
                )
            case _:
                raise ChannelLost("nobody waits for the order to start any longer")

    def _ask_the_witness(self) -> None:
        """Do with the machine what the witness says: it is ours, or it is gone."""
        assert self._witness is not None, "asked without having met"
        holding = self._arrival.holding
        holding.await_no_order()
        try:
            holding.take_drives()  # before it is asked: what it has given cannot be given back
        except StateError:
            holding.refuse(Reason.FAILED)
            raise
        match ask(self._witness, self.mid, DESTINATION, self._given_up):
            case found if found == DESTINATION:
                holding.take_over(Reason.WITNESS)
            case found if found == SOURCE:
                holding.leave_drives()
                holding.refuse(Reason.WITNESS)
                raise PeerRefused(
                    "the witness has given the machine back to the source, and what was loaded here is gone",
                    hint="the source has waited too long for this side's word; the machine goes on there",
                )
            case _:
                raise ChannelLost("nobody waits for the witness any longer")

    def _standing(self, word: Word) -> Word | None:
        match self._arrival.holding.now:
            case DestinationOwnership.OWNER:
                return Word(WordKind.RUNNING, word.mid, self._arrival.holding.epoch)
            case DestinationOwnership.REFUSED:
                return Word(WordKind.REFUSE, word.mid, word.epoch)
        return None


def taking_for(arrival: Arrival) -> Taking:
    """The one for a source that has not said which attempt it is."""
    if arrival.loader.proved:
        return Ordered(arrival)
    if arrival.answer is None or not arrival.loader.return_path_open:
        return Unproved(arrival)
    return HungUp(arrival)


def _try_to(action: Callable[[], object]) -> None:
    """Behind the end of the stream nothing on the link changes what is here."""
    try:
        action()
    except (ChannelError, StreamError) as exc:
        _log.warning("behind the end of the stream: %s", exc)
