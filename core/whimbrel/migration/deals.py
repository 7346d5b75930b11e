"""Deals: how a source proves, lets go and hears the answer, each for another kind of peer.

The migration thread goes the same way with all of them: `begin` while the guest still runs, `prove` behind the devices
with the guest stopped, then RELEASED (decided with any cancel, in `outgoing`), then `let_go`. Before RELEASED whatever
a deal raises thaws the guest; after it, it means undecided, unless the deal has moved ownership back to OWNER.

| deal | `begin` | `prove` | `let_go` |
| --- | --- | --- | --- |
| pairwise | says which attempt this is | digest, PING, PONG | EOF, then COMMIT over new connections until answered |
| witness | the same, and that both are at one witness | | digest, PING, EOF, then its cell |
| proof | | PING, PONG | EOF, SHUT |
| qemu | | | EOF, SHUT |
| one-way | | | EOF |
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar, Final

import attrs

from whimbrel.abc import Channel
from whimbrel.errors import (
    ChannelClosed,
    ChannelError,
    ChannelLost,
    HandoverTimeout,
    HandoverUndecided,
    MigrationError,
    PeerRefused,
    ProtocolError,
)
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.digest import StreamDigest
from whimbrel.migration.handover import PROOF, Handover, Reason, SourceOwnership
from whimbrel.migration.keeper import WITNESSED, Keeper
from whimbrel.migration.messenger import Messenger
from whimbrel.migration.return_path import ReturnPath
from whimbrel.migration.saver import StreamSaver
from whimbrel.migration.statistics import Cause
from whimbrel.migration.witnessing import DESTINATION, SOURCE, ask, source_meets
from whimbrel.stream import Writer
from whimbrel.wire import commands, handover
from whimbrel.wire.handover import Word, WordKind
from whimbrel.witness import Witness

_log = logging.getLogger("whimbrel")

LAST_WORDS: Final = 0.2  # seconds to let a destination that hung up say why
ABORT_FOR: Final = 300.0  # seconds after which a destination that cannot be told is left to its operator


@attrs.frozen(eq=False)
class Link:
    """What a deal has to do with: this attempt's stream, the way back, and what it tells of."""

    channel: Channel
    saver: StreamSaver
    out: Writer
    return_path: ReturnPath | None
    ownership: Handover[SourceOwnership]
    keeper: Keeper
    mark: Callable[[Cause], object]
    patience: float  # seconds to wait for the last word on this connection
    cancelled: threading.Event = attrs.field(factory=threading.Event)

    def ping(self, value: int) -> None:
        """Send a PING that will be answered."""
        assert self.return_path is not None, "a PING needs a way back"
        self.return_path.asking(value)
        self.saver.command(commands.Ping(value))

    def finish(self) -> None:
        """Write the end of the stream."""
        self.saver.finish()
        self.out.flush()
        self.mark(Cause.RELEASE)


class Deal(ABC):
    """One way to hand over; one attempt, the migration thread."""

    name: ClassVar[str]

    def __init__(self, link: Link) -> None:
        self._link = link

    def begin(self) -> Deal:
        """Say what the destination must know before the guest stops; returns the deal that it comes to."""
        return self

    @abstractmethod
    def prove(self) -> None:
        """Get everything out, and the destination's proof that it holds it; PREPARED then."""

    def let_go(self) -> None:
        """Tell the destination that the machine is its own, and hear that it is; DONE then, if it can be known."""
        with Deadline(self._link.patience, self._link.channel) as deadline:
            try:
                self._link.finish()
                self._hear()
            except ChannelError as exc:
                if not deadline.passed:
                    raise
                raise ChannelLost(
                    f"its last word has not come within {deadline.seconds:.3g} s", place=exc.place
                ) from exc

    def after(self, error: MigrationError) -> MigrationError | None:
        """What the end is after `error`, which came behind the release: None if the machine has arrived after all."""
        path = self._link.return_path
        if path is None or not isinstance(error, ChannelError):
            return error
        try:
            # Our last bytes were not all taken, and the destination may have what it needs.
            if path.wait_shut(timeout=LAST_WORDS):
                self._link.ownership.move(SourceOwnership.DONE, Reason.RUNNING)
                return None
        except ProtocolError as heard:
            return heard
        except MigrationError as heard:
            return heard if isinstance(error, ChannelClosed) else error
        return error

    @property
    def owes_a_word(self) -> bool:
        """Whether the destination may hold the machine whole, and can be told that it was taken back."""
        return False

    def thawed(self) -> None:
        """Tell the destination that the machine was taken back; takes as long as that takes. A thread of its own."""
        return

    def stop(self) -> None:
        """Wait no longer; somebody has decided. Any thread."""
        return

    def _hear(self) -> None:
        """Hear the destination's last word."""
        assert self._link.return_path is not None, "a last word needs a way back"
        self._link.return_path.wait_shut()
        self._link.ownership.move(SourceOwnership.DONE, Reason.RUNNING)

    def _flush(self) -> None:
        self._link.out.flush()
        self._link.mark(Cause.TRANSFER)


class OneWay(Deal):
    """To whoever reads; nobody answers."""

    name = "one-way"

    def prove(self) -> None:
        """Get everything out."""
        self._flush()

    def _hear(self) -> None:
        self._link.channel.end_writing()


class QemuTiming(Deal):
    """To a QEMU, as a QEMU: a destination that refuses what it has read is heard when it is too late."""

    name = "qemu"

    def prove(self) -> None:
        """Get everything out."""
        self._flush()


class Proof(Deal):
    """To a QEMU, more safely than a QEMU: its PONG behind the devices proves that it has loaded them."""

    name = "proof"

    def prove(self) -> None:
        """Wait for the PONG."""
        link = self._link
        assert link.return_path is not None, "a proof needs a way back"
        link.ping(PROOF)
        self._flush()
        link.return_path.wait_pong(PROOF)
        link.mark(Cause.CONFIRM)
        link.ownership.move(SourceOwnership.PREPARED, Reason.PROVED)


class Pairwise(Proof):
    """To a whimbrel: the attempt has an id, and the order to start is repeated until it is answered.

    `messenger` says words over connections of their own; None where there can be but the one.
    """

    name = "pairwise"

    def __init__(
        self,
        link: Link,
        attempt: commands.Attempt,
        digest: StreamDigest,
        messenger: Messenger | None,
        witness: Witness | None = None,
    ) -> None:
        super().__init__(link)
        self._attempt, self._digest, self._messenger = attempt, digest, messenger
        self._witness = witness
        self._stopped = threading.Event()
        self._asked = False  # for the proof: the destination may be PREPARED

    def begin(self) -> Deal:
        """Say which attempt this is, which the destination writes down before the guest stops."""
        self._link.saver.command(self._attempt)
        self._link.out.flush()
        witness = self._witness
        if witness is None or not source_meets(witness, self._attempt.mid, self._link.cancelled):
            return self
        path = self._link.return_path
        assert path is not None, "a witness is agreed on over a way back"
        self._link.ping(handover.MEET)
        self._link.out.flush()
        path.wait_pong(handover.MEET)
        return Witnessed(self._link, self._attempt, self._digest, witness) if path.met else self

    def prove(self) -> None:
        """Say what everything amounts to, and wait for the PONG, which says that it does."""
        self._link.keeper.settle()
        self._asked = True
        self._link.saver.command(self._digest.of_what_was_sent(self._link.out.offset))
        super().prove()

    def _hear(self) -> None:
        assert self._link.return_path is not None, "a last word needs a way back"
        self._heed(self._link.return_path.wait_word())
        # Courtesy: it need not listen for us any longer then.
        with suppress(ChannelError):
            self._link.channel.send(handover.encode(self._word(WordKind.DONE)))

    def after(self, error: MigrationError) -> MigrationError | None:
        """Say COMMIT again, over new connections, until there is an answer or somebody has decided."""
        if self._link.ownership.now is not SourceOwnership.RELEASED or isinstance(error, HandoverUndecided):
            return error
        if self._messenger is None:
            return error
        _log.warning("the machine was let go of, and the answer is missing (%s): asking again until it comes", error)
        answer = self._messenger.say(self._word(WordKind.COMMIT), self._stopped)
        if answer is None:
            return error
        try:
            self._heed(answer)
        except MigrationError as exc:
            return exc
        return None

    @property
    def owes_a_word(self) -> bool:
        """Whether the destination may hold the machine whole, and can be told that it was taken back."""
        return self._asked and self._messenger is not None

    def thawed(self) -> None:
        """Say ABORT, over new connections, until there is an answer or it has taken too long."""
        if self._messenger is not None:
            answer = self._messenger.say(self._word(WordKind.ABORT), self._stopped, within=ABORT_FOR)
            if answer is None and not self._stopped.is_set():
                _log.warning("the destination was not told that the machine is back here; it may hold a copy, stopped")

    def stop(self) -> None:
        """Say it no more."""
        self._stopped.set()

    def _heed(self, answer: Word) -> None:
        ownership = self._link.ownership
        match answer.kind:
            case WordKind.RUNNING:
                ownership.move(SourceOwnership.DONE, Reason.RUNNING)
            case WordKind.REFUSE:
                ownership.move(SourceOwnership.OWNER, Reason.REFUSE)
                raise PeerRefused(
                    "the destination had everything and could not take the machine over; it has not run there",
                    hint="its own log says why; the machine goes on here",
                )
            case _:
                raise HandoverUndecided(
                    "the destination does not know of this attempt any more, so it may have run the machine",
                    hint="look whether it runs there; if it does not and never will, reclaim() brings it back here",
                )

    def _word(self, kind: WordKind) -> Word:
        return Word(kind, self._attempt.mid, self._attempt.epoch)


class Witnessed(Pairwise):
    """To a whimbrel that is at the same witness: whoever writes the cell of the attempt first has the machine.

    The source lets go before the digest, without which the destination cannot be PREPARED and claims nothing.
    """

    name = WITNESSED

    def __init__(self, link: Link, attempt: commands.Attempt, digest: StreamDigest, witness: Witness) -> None:
        super().__init__(link, attempt, digest, None)
        self._decides = witness

    def prove(self) -> None:
        """Get everything out but the digest."""
        self._link.keeper.settle()
        self._flush()

    def let_go(self) -> None:
        """Say what everything amounts to, and that the witness decides; hear how it did."""
        with Deadline(self._link.patience, self._link.channel):
            self._link.saver.command(self._digest.of_what_was_sent(self._link.out.offset))
            self._link.ping(handover.WITNESSED)
            self._link.finish()
            self._hear()

    def after(self, error: MigrationError) -> MigrationError | None:
        """Ask the witness until it is known whose the machine is, or somebody has decided."""
        if self._link.ownership.now is not SourceOwnership.RELEASED:
            return error
        _log.warning("the machine was let go of, and the answer is missing (%s): asking the witness", error)
        match ask(self._decides, self._attempt.mid, SOURCE, self._stopped):
            case found if found == SOURCE:
                self._link.ownership.move(SourceOwnership.OWNER, Reason.WITNESS)
                return HandoverTimeout(
                    f"the destination has not said that it runs ({error}), and the witness has given the machine back",
                    hint="the machine goes on here; the destination drops what it has",
                    place=error.place,
                )
            case found if found == DESTINATION:
                self._link.ownership.move(SourceOwnership.DONE, Reason.WITNESS)
                return None
        return error
