"""An incoming migration: waits for one source, loads its machine, and takes it over.

After a failure the machine is as it was before and waits for the next `incoming`. There is one exception, and it is a
promise: once this side has proved that it holds everything, the source may have let go, so a link that dies *then*
leaves the machine here whole and stopped (`HandoverUndecided`). `adopt` runs it, `discard` drops it; both are an
operator's word about the source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hmac import compare_digest
from typing import Final

from whimbrel.abc import Channel, Listener, Patience, RemotelyWrittenChannel
from whimbrel.errors import (
    ChannelError,
    HandoverUndecided,
    JournalError,
    MigrationCancelled,
    MigrationError,
    Place,
    StateError,
    StreamError,
    WhimbrelError,
)
from whimbrel.machine import BareMachine
from whimbrel.migration.answers import answerer, refuse
from whimbrel.migration.attempt import Attempt
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.desk import Desk, HeldListener
from whimbrel.migration.globalstate import GlobalStateHandler
from whimbrel.migration.handover import DestinationOwnership, Reason
from whimbrel.migration.holding import Holding
from whimbrel.migration.journal import Journal
from whimbrel.migration.lanes import Arriving, Expected, Gathered, accept, connecting
from whimbrel.migration.loader import StreamLoader
from whimbrel.migration.quietly import quietly
from whimbrel.migration.savevm import Registry
from whimbrel.migration.standing import answer_from
from whimbrel.migration.statistics import MigrationInfo
from whimbrel.migration.status import DESTINATION_MOVES, MigrationStatus
from whimbrel.migration.takings import Arrival, Pairwise, taking_for
from whimbrel.migration.witnessing import witness_of
from whimbrel.plugins import PluginManager
from whimbrel.stream import Reader, Replay
from whimbrel.wire import handover, multifd
from whimbrel.wire.commands import Attempt as AttemptCommand
from whimbrel.wire.handover import Word
from whimbrel.wire.return_path import Message, Shut

_log = logging.getLogger("whimbrel")

FOR_EVER: Final = float("inf")

Registration = Callable[[], tuple[Registry, GlobalStateHandler]]


class IncomingMigration(Attempt):
    """The wait for a machine, and its arrival; made and started by `Machine.incoming`. Any thread.

    `start` says whether the guest is started: None as the source was, if the handover was proved; True as the source
    was, even without proof (a transport without a way back); False not at all.
    """

    role = "destination"
    _cancelled_text = "the incoming migration was cancelled; the machine is as before"

    def __init__(self, machine: BareMachine, plugins: PluginManager, listener: Listener, register: Registration,
                 journal: Journal, *, start: bool | None, several: bool,
                 on_epoch: Callable[[int], object]) -> None:  # fmt: skip
        super().__init__(machine, plugins, DESTINATION_MOVES, "whimbrel-incoming")
        self._listener, self._register = HeldListener(listener), register
        self._several, self._journal = several, journal
        self._holding = Holding(machine, journal, peer=listener.uri, start=start, on_epoch=on_epoch)
        self._pairwise: Pairwise | None = None  # once the source has said which attempt this is
        self._desk: Desk | None = None
        self._patience = Patience(FOR_EVER)
        self._registry: Registry | None = None
        # As the settings are now: a source may come much later.
        self._expected = Expected.of(machine.settings, plugins)
        self._lanes: Arriving | None = None

    # --------------------------------------------------------------------------------- what people call

    @property
    def uri(self) -> str:
        """The URI to migrate to, with what the system chose filled in."""
        return self._listener.uri

    @property
    def ownership(self) -> DestinationOwnership:
        """What this side may do with the machine."""
        return self._holding.now

    @property
    def info(self) -> MigrationInfo:
        """What is known now."""
        return MigrationInfo(
            status=self._status.now,
            error="" if self._error is None else str(self._error),
            error_code="" if self._error is None else self._error.code,
            ownership=str(self._holding.now),
            failed_notifiers=self._failed_notifiers(),
        )

    def cancel(self) -> bool:
        """Stop waiting or loading. False if it is too late: prepared, or ended. Returns at once."""
        with self._deciding:
            if self._settled or self._holding.now is not DestinationOwnership.LOADING:
                return False
            if not self._status.try_move(MigrationStatus.CANCELLING):
                return False
            self._patience.cancelled.set()
            channel = self._channel
        self._listener.let_go()
        if channel is not None:
            channel.close()
        return True

    def adopt(self) -> None:
        """An operator's word that the source does not run and never will: take the prepared machine and start it.

        While the order to start may still come, this is also the word not to wait for it. Raises StateError if
        nothing is left undecided then: the order has come, or nothing was ever proved.
        """
        self._decide(self._holding.take_over)

    def discard(self) -> None:
        """An operator's word that the source has the machine: drop the prepared one; incoming may be tried again.

        Waits no longer for the order to start, as `adopt`; raises as it does.
        """
        self._decide(self._holding.refuse)

    def close(self) -> None:
        """End everything that still runs for this migration: the wait, the load, the announcing."""
        if not self.cancel():
            self._wait_no_longer()
        self._thread.join()
        if self._desk is not None:
            self._desk.close()
        self._holding.close()

    def _decide(self, action: Callable[[Reason], None]) -> None:
        if self._holding.now is DestinationOwnership.PREPARED and not self._status.now.finished:
            self._wait_no_longer()
            self._thread.join()
        with self._machine.lock, self._deciding:
            if not self._status.now.finished or self._holding.now is not DestinationOwnership.PREPARED:
                raise StateError(f"nothing is left undecided: this side's ownership is {self._holding.now}")
            action(Reason.OPERATOR)

    def _wait_no_longer(self) -> None:
        """For whoever decides elsewhere: somebody has."""
        if self._pairwise is not None:
            self._pairwise.give_up()
        self._hang_up()

    # --------------------------------------------------------------------------------- the incoming thread

    def _work(self) -> None:
        registry, global_state = self._register()
        self._registry = registry
        self._receive(registry, global_state)

    def _receive(self, registry: Registry, global_state: GlobalStateHandler) -> None:
        gathered = self._connected()
        channel = gathered.main
        reader = Reader(Replay(gathered.head, channel) if gathered.head else channel)
        answer = answerer(channel) if channel.duplex else None
        if gathered.method is not None:
            self._lanes = Arriving(gathered.lanes, gathered.method, on_failure=partial(self._lane_failed, answer))
            for _, handler in registry.iterable:
                handler.await_lanes(self._lanes)
        if isinstance(channel, RemotelyWrittenChannel):
            for _, handler in registry.iterable:
                handler.await_remote_writing(channel)
        loader = StreamLoader(
            self._machine,
            registry,
            reader,
            answer,
            on_prepared=self._prepared,
            on_attempt=lambda attempt: self._agree(arrival, gathered, attempt),
            on_meet=lambda: self._pairwise is not None and self._pairwise.meets(self._patience.cancelled),
            method=gathered.method,
        )
        self._holding.loaded_by(loader, global_state)
        arrival = Arrival(channel, reader, loader, self._holding, answer)
        try:
            self._load_header(loader, channel)
            self._move(MigrationStatus.ACTIVE)
            self._take(arrival)
        except MigrationError as exc:
            reason = self._lane_failure(exc)
            raise reason.at(Place(peer=channel.peer)) from reason.__cause__

    def _take(self, arrival: Arrival) -> None:
        """Load everything, and take it over as the source lets go of it."""
        try:
            arrival.loader.load()
        except ChannelError as exc:
            if self._pairwise is None or self._holding.now is not DestinationOwnership.PREPARED:
                raise
            self._pairwise.conclude_without_it(exc)
            return
        (self._pairwise or taking_for(arrival)).conclude()

    def _connected(self) -> Gathered:
        """Wait for the source, with all of its lanes; who asks about an earlier attempt meanwhile is answered."""
        seconds = self._machine.settings.limits.header_timeout
        desk = Desk(self._listener.inner, self._answer_word, seconds) if self._several else None
        gathered = accept(
            self._listener,
            self._patience,
            self._expected,
            uuid=connecting.uuid_of(self._machine),
            limits=self._machine.settings.limits,
            several=self._several,
            on_word=None if desk is None else lambda channel, word: desk.attend(channel, handover.decode(word)),
        )
        if desk is not None:
            self._desk = desk
            desk.open()
        else:
            self._listener.let_go()
        with self._deciding:
            self._channel = gathered.bundle()
            if self._patience.cancelled.is_set():
                raise MigrationCancelled("cancelled while connecting")
        return gathered

    def _lane_failed(self, answer: Callable[[Message], None] | None) -> None:
        """A lane is broken, and the incoming thread waits for bytes that need not come: say so, and wake it."""
        if answer is not None:
            with suppress(ChannelError):
                answer(Shut(1))
        self._hang_up()

    def _lane_failure(self, error: MigrationError) -> MigrationError:
        """What a lane has failed with, where a broken channel is but the effect of it."""
        failure = None if self._lanes is None else self._lanes.failure
        return failure if failure is not None and isinstance(error, ChannelError) else error

    def _load_header(self, loader: StreamLoader, channel: Channel) -> None:
        """A peer that connects and says nothing must not hold the place for ever."""
        seconds = self._machine.settings.limits.header_timeout
        with Deadline(seconds, channel) as deadline:
            try:
                loader.load_header()
            except ChannelError as exc:
                if not deadline.passed or self._patience.cancelled.is_set():
                    raise
                raise StreamError(
                    f"the peer sent no stream header within {seconds:g} s",
                    hint="[limits] header-timeout says how long to wait",
                    place=exc.place,
                ) from exc

    def _agree(self, arrival: Arrival, gathered: Gathered, attempt: AttemptCommand) -> None:
        """The source offers to hand over in pairs, and says which attempt it is: the lanes have to be of it."""
        if gathered.lanes and not compare_digest(gathered.token, multifd.token_of(attempt.mid)):
            raise StreamError(
                "the lanes are not of the attempt that the main channel is of",
                hint="somebody else has connected here: with tls-creds at both ends he cannot",
            )
        self._pairwise = Pairwise(
            arrival,
            attempt,
            lambda: witness_of(self._machine.settings, self._plugins),
            hang_up=self._hang_up,
            heeded=lambda: None if self._desk is None else self._desk.end(),
            patience=self._machine.settings.limits.header_timeout,
        )

    def _answer_word(self, word: Word) -> Word | None:
        """What to say to a word that came over a connection of its own. The desk's threads."""
        pairwise = self._pairwise
        if pairwise is None or word.mid != pairwise.mid:
            return answer_from(self._journal, word)
        return pairwise.answer(word)

    def _prepared(self) -> None:
        with self._deciding:
            if self._patience.cancelled.is_set():
                raise MigrationCancelled("cancelled before everything was here")
            self._holding.prepare()
        assert self._channel is not None, "prepared without a channel"
        self._holding.await_order(self._channel)

    # --------------------------------------------------------------------------------------------- the end

    def _settle(self, error: WhimbrelError | None, *, cancelled: bool) -> WhimbrelError | None:
        self._holding.await_no_order()
        if self._holding.now is not DestinationOwnership.OWNER or self._pairwise is None:
            quietly(self._listener.let_go, "closing the listener")
            if self._desk is not None:
                self._desk.end()
        if self._lanes is not None:
            self._lanes.close()  # nothing is put back while they write
        if error is not None and self._holding.now is DestinationOwnership.LOADING:
            self._holding.refuse(Reason.FAILED)
            if self._channel is not None and not cancelled:
                quietly(partial(refuse, self._channel), "the channel")
        self._hang_up()
        if self._pairwise is not None:
            self._pairwise.close()
        if self._registry is not None:
            self._registry.finish()
        return None if error is None else self._judge(error)

    def _downtime(self) -> float | None:
        return None

    def _judge(self, error: WhimbrelError) -> WhimbrelError:
        """After the proof was sent the source may have let go: what is here is kept, and that is the error."""
        if self._holding.now is not DestinationOwnership.PREPARED:
            return error
        if isinstance(error, StateError | JournalError):
            undecided = HandoverUndecided(
                f"the machine is here, whole and stopped, and may not run: {error.message}",
                hint="once that is mended adopt() starts it here; if the source runs, discard() it",
            )
            undecided.__cause__ = error
            return undecided
        reason = "it took too long" if self._holding.overdue else error
        undecided = HandoverUndecided(
            f"the machine is here, whole and stopped, and the source's order to start it has not come ({reason})",
            hint="ask the source: if it does not run and never will, adopt() starts it here; if it runs, discard() it",
            place=getattr(error, "place", None) or Place(),
        )
        undecided.__cause__ = error
        return undecided
