"""An incoming migration: waits for one source, loads its machine, and takes it over.

After a failure the machine is as it was before and waits for the next `incoming`. There is one exception, and it is a
promise: once this side has proved that it holds everything, the source may have let go, so a link that dies *then*
leaves the machine here whole and stopped (`HandoverUndecided`). `adopt` runs it, `discard` drops it; both are an
operator's word about the source.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hmac import compare_digest
from typing import Final

from whimbrel.abc import Channel, Listener, Patience, RemotelyWrittenChannel
from whimbrel.errors import (
    ChannelError,
    ChannelLost,
    HandoverUndecided,
    JournalError,
    MigrationCancelled,
    MigrationError,
    PeerRefused,
    Place,
    StateError,
    StreamError,
    WhimbrelError,
)
from whimbrel.events import Arrived
from whimbrel.machine import BareMachine, RunState
from whimbrel.migration.announce import Announcer
from whimbrel.migration.answers import LINGER, answerer, refuse
from whimbrel.migration.attempt import Attempt
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.desk import Desk, HeldListener
from whimbrel.migration.globalstate import GlobalStateHandler
from whimbrel.migration.handover import DestinationOwnership, Reason, destination_handover, last_word_timeout
from whimbrel.migration.journal import Journal, new_mid
from whimbrel.migration.keeper import WITNESSED, Keeper
from whimbrel.migration.lanes import Arriving, Expected, Gathered, accept, connecting
from whimbrel.migration.loader import StreamLoader
from whimbrel.migration.orders import Orders
from whimbrel.migration.quietly import quietly
from whimbrel.migration.savevm import Registry
from whimbrel.migration.standing import answer_from
from whimbrel.migration.statistics import MigrationInfo
from whimbrel.migration.status import DESTINATION_MOVES, MigrationStatus
from whimbrel.migration.witnessing import DESTINATION, SOURCE, ask, destination_meets, witness_of
from whimbrel.plugins import PluginManager
from whimbrel.stream import Reader, Replay
from whimbrel.wire import handover, multifd
from whimbrel.wire.commands import Attempt as AttemptCommand
from whimbrel.wire.handover import Word, WordKind
from whimbrel.wire.return_path import Message, Shut
from whimbrel.witness import Witness

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
        self._listener, self._register, self._start = HeldListener(listener), register, start
        self._several = several
        self._ownership = destination_handover()
        self._journal = journal
        self._keeper = Keeper(journal, role=self.role, mid=new_mid(), peer=listener.uri, epoch=journal.epoch + 1)
        self._ownership.on_move, self._on_epoch = self._ownership_moves, on_epoch
        self._agreed: AttemptCommand | None = None
        self._orders = Orders()
        self._witness: Witness | None = None
        self._decided = threading.Event()  # an operator has, and nobody else is asked
        self._resolved = threading.Event()  # no longer PREPARED, or never to be
        self._desk: Desk | None = None
        self._patience = Patience(FOR_EVER)
        self._registry: Registry | None = None
        self._loader: StreamLoader | None = None
        self._reader: Reader | None = None
        self._global_state: GlobalStateHandler | None = None
        self._order: Deadline | None = None  # by which the order to start must have come
        self._announcer: Announcer | None = None
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
        return self._ownership.now

    @property
    def info(self) -> MigrationInfo:
        """What is known now."""
        return MigrationInfo(
            status=self._status.now,
            error="" if self._error is None else str(self._error),
            error_code="" if self._error is None else self._error.code,
            ownership=str(self._ownership.now),
            failed_notifiers=self._failed_notifiers(),
        )

    def cancel(self) -> bool:
        """Stop waiting or loading. False if it is too late: prepared, or ended. Returns at once."""
        with self._deciding:
            if self._settled or self._ownership.now is not DestinationOwnership.LOADING:
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
        self._decide(lambda: self._take_over(None, Reason.OPERATOR))

    def discard(self) -> None:
        """An operator's word that the source has the machine: drop the prepared one; incoming may be tried again.

        Waits no longer for the order to start, as `adopt`; raises as it does.
        """
        self._decide(lambda: self._refuse(Reason.OPERATOR))

    def close(self) -> None:
        """End everything that still runs for this migration: the wait, the load, the announcing."""
        if not self.cancel():
            self._decided.set()
            self._orders.give(None)
            self._hang_up()
        self._thread.join()
        if self._desk is not None:
            self._desk.close()
        if self._announcer is not None:
            self._announcer.close()

    def _decide(self, action: Callable[[], None]) -> None:
        if self._ownership.now is DestinationOwnership.PREPARED and not self._status.now.finished:
            self._decided.set()
            self._orders.give(None)
            self._hang_up()
            self._thread.join()
        with self._machine.lock, self._deciding:
            if not self._status.now.finished or self._ownership.now is not DestinationOwnership.PREPARED:
                raise StateError(f"nothing is left undecided: this side's ownership is {self._ownership.now}")
            action()

    # --------------------------------------------------------------------------------- the incoming thread

    def _work(self) -> None:
        registry, self._global_state = self._register()
        self._registry = registry
        self._receive(registry)

    def _receive(self, registry: Registry) -> None:
        gathered = self._connected()
        channel = gathered.main
        reader = self._reader = Reader(Replay(gathered.head, channel) if gathered.head else channel)
        answer = answerer(channel) if channel.duplex else None
        if gathered.method is not None:
            self._lanes = Arriving(gathered.lanes, gathered.method, on_failure=partial(self._lane_failed, answer))
            for _, handler in registry.iterable:
                handler.await_lanes(self._lanes)
        if isinstance(channel, RemotelyWrittenChannel):
            for _, handler in registry.iterable:
                handler.await_remote_writing(channel)
        loader = self._loader = StreamLoader(
            self._machine,
            registry,
            reader,
            answer,
            on_prepared=self._prepared,
            on_attempt=partial(self._begin, gathered),
            on_meet=self._meet,
            method=gathered.method,
        )
        try:
            self._load_header(loader, channel)
            self._move(MigrationStatus.ACTIVE)
            if self._load(loader):
                self._conclude(loader, channel, answer)
        except MigrationError as exc:
            reason = self._lane_failure(exc)
            raise reason.at(Place(peer=channel.peer)) from reason.__cause__

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

    def _begin(self, gathered: Gathered, attempt: AttemptCommand) -> None:
        """The source offers to hand over in pairs, and says which attempt it is: the lanes have to be of it."""
        if gathered.lanes and not compare_digest(gathered.token, multifd.token_of(attempt.mid)):
            raise StreamError(
                "the lanes are not of the attempt that the main channel is of",
                hint="somebody else has connected here: with tls-creds at both ends he cannot",
            )
        self._keeper = Keeper(
            self._journal,
            role=self.role,
            mid=attempt.mid,
            peer=self._listener.uri,
            epoch=attempt.epoch + 1,
            deal="pairwise",
        )
        self._keeper.begin(DestinationOwnership.LOADING)
        self._agreed = attempt

    def _meet(self) -> bool:
        """Whether the source is at our witness too."""
        assert self._agreed is not None, "met outside of an attempt"
        witness = self._witness = witness_of(self._machine.settings, self._plugins)
        return witness is not None and destination_meets(witness, self._agreed.mid, self._patience.cancelled)

    def _ask_the_witness(self) -> None:
        """Do with the prepared machine what the witness says: it is ours, or it is gone."""
        assert self._agreed is not None, "asked outside of an attempt"
        assert self._witness is not None, "asked without having met"
        self._stop_waiting_for_the_order()
        try:
            self._machine.drives.take_over()  # before it is asked: what it has given cannot be given back
        except StateError:
            self._refuse(Reason.FAILED)
            raise
        match ask(self._witness, self._agreed.mid, DESTINATION, self._decided):
            case found if found == DESTINATION:
                self._take_over(self._start, Reason.WITNESS)
            case found if found == SOURCE:
                self._machine.drives.release()
                self._refuse(Reason.WITNESS)
                raise PeerRefused(
                    "the witness has given the machine back to the source, and what was loaded here is gone",
                    hint="the source has waited too long for this side's word; the machine goes on there",
                )
            case _:
                raise ChannelLost("nobody waits for the witness any longer")

    def _load(self, loader: StreamLoader) -> bool:
        """Load everything; whether it is this connection that has brought the order to start."""
        try:
            loader.load()
        except ChannelError as exc:
            if self._agreed is None or self._ownership.now is not DestinationOwnership.PREPARED:
                raise
            if loader.witnessed:
                self._ask_the_witness()
                return False
            _log.warning("the link has broken with the machine here, whole and stopped (%s): waiting for word", exc)
            self._obey(self._orders.wait())
            return False
        return True

    def _obey(self, order: WordKind | None) -> None:
        """Do with the prepared machine what the source has ordered over whatever connection."""
        match order:
            case WordKind.COMMIT:
                self._take_over(self._start, Reason.ORDERED)
            case WordKind.ABORT:
                self._refuse(Reason.ABORTED)
                raise PeerRefused(
                    "the source has taken the machine back, and what was loaded here is gone",
                    hint="its own error says why; the machine goes on there",
                )
            case _:
                raise ChannelLost("nobody waits for the order to start any longer")

    def _answer_word(self, word: Word) -> Word | None:
        """What to say to a word that came over a connection of its own. The desk's threads."""
        agreed = self._agreed
        if agreed is None or word.mid != agreed.mid:
            return answer_from(self._journal, word)
        if word.kind is WordKind.DONE:
            if self._desk is not None:
                self._desk.end()
            return None
        if self._ownership.now is DestinationOwnership.LOADING:
            self._hang_up()  # the source has no more to say there
        else:
            self._orders.give(word.kind)
            if not self._resolved.is_set():
                self._hang_up()  # the order has come another way
        self._resolved.wait(self._machine.settings.limits.header_timeout)
        return self._standing(word)

    def _standing(self, word: Word) -> Word | None:
        match self._ownership.now:
            case DestinationOwnership.OWNER:
                return Word(WordKind.RUNNING, word.mid, self._keeper.epoch)
            case DestinationOwnership.REFUSED:
                return Word(WordKind.REFUSE, word.mid, word.epoch)
        return None

    def _conclude(self, loader: StreamLoader, channel: Channel, answer: Callable[[Message], None] | None) -> None:
        """EOF has come: take over in the way that the source hands over (`whimbrel.migration.handover`)."""
        if self._agreed is not None:
            self._conclude_pairwise(loader, channel, answer)
            return
        if loader.proved:
            # The source wrote EOF only after our proof: it is the order to start.
            self._take_over(self._start, Reason.ORDERED)
            with Deadline(LINGER, channel):
                _try_to(lambda: answer(Shut(0)) if answer else None)
                _try_to(loader.load_description)
            return
        if answer is None or not loader.return_path_open:
            # Nobody listens to us, so nothing can be proved.
            _try_to(loader.load_description)
            if not channel.duplex:
                # What brought the stream may still say that it was not the whole one: a program by its exit status.
                self._expect_hang_up(channel)
            self._take_over(bool(self._start), Reason.UNPROVED)
            return
        # A source that asked for no proof (QEMU) lets go by itself: it has, once it hangs up in order behind our SHUT,
        # and not if it does so before.
        loader.load_description()
        answer(Shut(0))
        self._expect_hang_up(channel)
        self._take_over(self._start, Reason.ORDERED)

    def _conclude_pairwise(
        self, loader: StreamLoader, channel: Channel, answer: Callable[[Message], None] | None
    ) -> None:
        """EOF is an order like the others. Say what has become of it, and hear that it was heard."""
        assert answer is not None, "agreed without a way back"
        agreed, reader = self._agreed, self._reader
        assert agreed is not None, "concluded without an agreement"
        assert reader is not None, "concluded before anything was read"
        try:
            if loader.witnessed:
                self._ask_the_witness()
            else:
                self._obey(self._orders.give(WordKind.COMMIT))
        finally:
            if (word := self._standing(Word(WordKind.COMMIT, agreed.mid, agreed.epoch))) is not None:
                _try_to(lambda: answer(word))
                _try_to(lambda: answer(Shut(0 if word.kind is WordKind.RUNNING else 1)))
        with Deadline(LINGER, channel):
            _try_to(loader.load_description)
            with suppress(ChannelError, StreamError):
                self._answer_word(reader.parse(handover.parse_word()))

    def _expect_hang_up(self, channel: Channel) -> None:
        """Wait until the peer hangs up in order. Raises StreamError for more bytes, ChannelError if the link breaks."""
        assert self._reader is not None, "hung up on before anything was read"
        if len(self._reader.window(0)) or channel.recv_into(memoryview(bytearray(1))):
            raise StreamError("bytes came behind the end of the stream", place=Place(offset=self._reader.offset))

    def _take_over(self, start: bool | None, why: Reason) -> None:
        """The machine is ours: start it, or leave it paused.

        In pairs a machine that cannot be ours is refused, which the source will hear.
        """
        self._stop_waiting_for_the_order()
        assert self._global_state is not None, "taken over before anything was loaded"
        came = self._global_state.run_state
        goes_on = RunState.PAUSED if start is False else came
        try:
            self._machine.drives.take_over()
        except StateError:
            if self._agreed is not None and why is Reason.ORDERED:
                self._refuse(Reason.FAILED)
            raise
        self._ownership.move(DestinationOwnership.OWNER, why)
        self._machine.arrive(goes_on)
        running = goes_on is RunState.RUNNING
        self._machine.notifiers.emit(Arrived(running=running))
        if running:
            self._announcer = Announcer(self._machine.guest, self._machine.settings.parameters)
            self._announcer.start()

    def _prepared(self) -> None:
        with self._deciding:
            if self._patience.cancelled.is_set():
                raise MigrationCancelled("cancelled before everything was here")
            if self._loader is not None and self._loader.proved:
                self._machine.drives.refuse_unsent()
            if self._loader is not None and self._loader.witnessed:
                self._keeper.deal = WITNESSED
            self._ownership.move(DestinationOwnership.PREPARED, Reason.LOADED)
        # From here on nobody runs, so the order must come soon, or somebody has to decide.
        assert self._channel is not None, "prepared without a channel"
        seconds = last_word_timeout(self._machine.settings.limits.handover_timeout)
        self._order = Deadline(seconds, self._channel).start()

    def _stop_waiting_for_the_order(self) -> None:
        if self._order is not None:
            self._order.lift()

    # --------------------------------------------------------------------------------------------- the end

    def _settle(self, error: WhimbrelError | None, *, cancelled: bool) -> WhimbrelError | None:
        self._stop_waiting_for_the_order()
        if self._ownership.now is not DestinationOwnership.OWNER or self._agreed is None:
            quietly(self._listener.let_go, "closing the listener")
            if self._desk is not None:
                self._desk.end()
        if self._lanes is not None:
            self._lanes.close()  # nothing is put back while they write
        if error is not None and self._ownership.now is DestinationOwnership.LOADING:
            self._refuse(Reason.FAILED)
            if self._channel is not None and not cancelled:
                quietly(partial(refuse, self._channel), "the channel")
        self._hang_up()
        if self._witness is not None:
            quietly(self._witness.close, "closing the witness")
        if self._registry is not None:
            self._registry.finish()
        return None if error is None else self._judge(error)

    def _refuse(self, why: Reason) -> None:
        """Throw away what is here, for good."""
        if self._loader is not None:
            self._loader.rollback()
        self._ownership.move(DestinationOwnership.REFUSED, why)

    def _ownership_moves(self, old: DestinationOwnership, new: DestinationOwnership, why: Reason) -> None:
        self._keeper.move(old, new, why)
        if new is DestinationOwnership.OWNER:
            self._on_epoch(self._keeper.epoch)
        if new is not DestinationOwnership.PREPARED:
            self._resolved.set()

    def _downtime(self) -> float | None:
        return None

    def _judge(self, error: WhimbrelError) -> WhimbrelError:
        """After the proof was sent the source may have let go: what is here is kept, and that is the error."""
        if self._ownership.now is not DestinationOwnership.PREPARED:
            return error
        if isinstance(error, StateError | JournalError):
            undecided = HandoverUndecided(
                f"the machine is here, whole and stopped, and may not run: {error.message}",
                hint="once that is mended adopt() starts it here; if the source runs, discard() it",
            )
            undecided.__cause__ = error
            return undecided
        reason = "it took too long" if self._order is not None and self._order.passed else error
        undecided = HandoverUndecided(
            f"the machine is here, whole and stopped, and the source's order to start it has not come ({reason})",
            hint="ask the source: if it does not run and never will, adopt() starts it here; if it runs, discard() it",
            place=getattr(error, "place", None) or Place(),
        )
        undecided.__cause__ = error
        return undecided


def _try_to(action: Callable[[], object]) -> None:
    """Behind the end of the stream nothing on the link changes what is here."""
    try:
        action()
    except (ChannelError, StreamError) as exc:
        _log.warning("behind the end of the stream: %s", exc)
