"""An outgoing migration: one thread that takes a running machine through setup, rounds and the switchover.

Whatever raises on the migration thread ends it, and the ownership table says what that means: before RELEASED the
machine thaws and the migration is failed or cancelled; after it the machine is let go of and, without the destination's
last word, the end is undecided.

`cancel` is a flag, a status move and a closed channel: the closed channel wakes whatever the thread is blocked in.
The flag and the release are decided under one lock, so that a cancel is either in time or has no effect.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

from whimbrel.abc import IterableHandler, Patience, RemoteWritingChannel
from whimbrel.errors import (
    ChannelClosed,
    ChannelError,
    ChannelLost,
    HandoverTimeout,
    HandoverUndecided,
    IncompatibleError,
    JournalError,
    MigrationCancelled,
    MigrationError,
    MigrationRefused,
    Place,
    ProtocolError,
    StateError,
    WhimbrelError,
)
from whimbrel.events import GuestThrottled, Round, RoundStarted
from whimbrel.machine import BareMachine, RunState
from whimbrel.machine.drives import Leaving
from whimbrel.migration.attempt import Attempt, unexpected
from whimbrel.migration.convergence import Convergence
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.deals import LAST_WORDS, Deal, Link, OneWay, Pairwise, Proof, QemuTiming
from whimbrel.migration.echoes import Bursts
from whimbrel.migration.globalstate import RunStateCarrier
from whimbrel.migration.handover import (
    FIRST_PING,
    ROUND_PING,
    HandoverTiming,
    Reason,
    SourceOwnership,
    last_word_timeout,
    source_handover,
)
from whimbrel.migration.idle import IdleWatch
from whimbrel.migration.journal import Journal, new_mid
from whimbrel.migration.keeper import Keeper
from whimbrel.migration.lanes import Bundle, Departing, Method, connecting
from whimbrel.migration.messenger import Messenger
from whimbrel.migration.quietly import quietly
from whimbrel.migration.return_path import ReturnPath
from whimbrel.migration.rounds import Rounds
from whimbrel.migration.saver import StreamSaver
from whimbrel.migration.savevm import Registry
from whimbrel.migration.security import Connector
from whimbrel.migration.statistics import Cause, MigrationInfo, Statistics
from whimbrel.migration.status import SOURCE_MOVES, MigrationStatus
from whimbrel.migration.throttle import AutoConverge
from whimbrel.migration.uri import Destination
from whimbrel.migration.witnessing import witness_of
from whimbrel.plugins import PluginManager
from whimbrel.stream import Pacer, Writer
from whimbrel.wire import commands, handover, multifd
from whimbrel.witness import Witness

_log = logging.getLogger("whimbrel")

AGREEMENT: Final = 0.1  # seconds to wait after each round for the destination to agree to the switchover
IDLE: Final = 0.01  # seconds between rounds that have nothing to send


class OutgoingMigration(Attempt):
    """A migration from this machine to another process; made and started by `Machine.migrate`. Any thread."""

    role = "source"
    _cancelled_text = "the migration was cancelled; the machine goes on here"

    def __init__(self, machine: BareMachine, plugins: PluginManager, destination: Destination, registry: Registry,
                 global_state: RunStateCarrier, journal: Journal, *, epoch: int, on_epoch: Callable[[int], object],
                 connector: Connector, timing: HandoverTiming = HandoverTiming.AUTO) -> None:  # fmt: skip
        super().__init__(machine, plugins, SOURCE_MOVES, "whimbrel-migration")
        self._destination, self._registry, self._global_state = destination, registry, global_state
        self._connector = connector
        self._timing, self._form = timing, machine.form()
        # Capabilities are those of the start; parameters are read anew whenever they matter.
        self._capabilities = machine.settings.capabilities.copy()
        self._parameters = machine.settings.parameters
        self._limits = machine.settings.limits
        self._ownership = source_handover()
        self._mid = new_mid()
        self._keeper = Keeper(journal, role=self.role, mid=self._mid, peer=destination.uri, epoch=epoch)
        self._ownership.on_move, self._on_epoch = self._ownership_moves, on_epoch
        self._deal: Deal | None = None
        self._witness: Witness | None = None
        self._telling: threading.Thread | None = None
        self._patience = Patience(self._limits.connect_timeout)
        self._stopping = threading.Event()  # there is no point in sending on; `_check` says why
        self._proceed = threading.Event()
        self._out: Writer
        self._return_path: ReturnPath | None = None
        self._method = Method.of(self._parameters, plugins) if self._capabilities.multifd else None
        if self._method is not None:
            self._form = self._method.announced_in(self._form)
        self._lanes: Departing | None = None
        self._sent_beside: Callable[[], int] = lambda: 0
        self._idle: IdleWatch | None = None
        self._statistics = Statistics()
        throttle = AutoConverge(self._parameters, self._throttle) if self._capabilities.auto_converge else None
        self._convergence = Convergence(self._parameters, self._statistics, machine.notifiers.emit, throttle)
        self._thaw_to: RunState | None = None

    # --------------------------------------------------------------------------------- what people call

    @property
    def uri(self) -> str:
        """Where to."""
        return self._destination.uri

    @property
    def info(self) -> MigrationInfo:
        """Everything that is known now."""
        return self._statistics.info(
            self._status.now,
            error="" if self._error is None else str(self._error),
            error_code="" if self._error is None else self._error.code,
            cpu_throttle=self._convergence.cpu_throttle,
            ownership=str(self._ownership.now),
            failed_notifiers=self._failed_notifiers(),
        )

    def cancel(self) -> bool:
        """End it, with the guest running on here. False if it is too late: let go of, or ended.

        Returns at once; `wait` tells when the machine runs on.
        """
        with self._deciding:
            if self._settled or self._released or not self._status.try_move(MigrationStatus.CANCELLING):
                return False
            self._patience.cancelled.set()
            self._stopping.set()
            self._proceed.set()
            channel = self._channel
        if channel is not None:
            channel.close()
        return True

    def give_up(self) -> None:
        """An operator's word that the destination's answer is not waited for any longer; waits for the end.

        Only what comes behind the release is given up; before, this does nothing.
        """
        if self._released:
            self._stop_asking()
            self._thread.join()

    @property
    def telling(self) -> bool:
        """Whether it still tells the destination that the machine is back here."""
        return self._telling is not None and self._telling.is_alive()

    def close(self) -> None:
        """End it whatever that means, and wait for its thread."""
        if not self.cancel():
            self._stop_asking()
            self._hang_up()
        self._thread.join()
        self._stop_asking()
        if self._telling is not None:
            self._telling.join()

    def proceed(self) -> None:
        """Go on from pre-switchover (migrate-continue). Raises StateError in any other state."""
        if self._status.now is not MigrationStatus.PRE_SWITCHOVER:
            raise StateError(f"Migration not in expected state: {self._status.now}")
        self._proceed.set()

    # -------------------------------------------------------------------------------- the migration thread

    def _work(self) -> None:
        saver = self._setup()
        self._go_rounds(saver)
        self._switch_over(saver)

    def _setup(self) -> StreamSaver:
        """Connect, and send everything up to the START sections."""
        self._patience = Patience(self._limits.connect_timeout, self._patience.cancelled)
        channel = self._connector.connect(self._patience)
        bundle = Bundle(channel)
        with self._deciding:
            self._channel = bundle
            if self._patience.cancelled.is_set():
                raise MigrationCancelled("cancelled while connecting")
        if not channel.duplex and (problems := self._destination.missed_way_back(self._capabilities)):
            raise MigrationRefused("; ".join(problems))
        out = self._out = Writer(channel)
        idle = self._idle = IdleWatch(self._limits.idle_timeout, bundle, self._moved).start()
        saver = StreamSaver(self._registry, self._form, out)
        saver.header()
        if self._method is not None:
            out.flush()  # a QEMU 7.2 reads nothing more of it before all lanes are there
            self._lanes = self._connect_lanes(bundle, self._method)
        if channel.duplex:
            self._return_path = ReturnPath(channel, on_failure=self._link_failed)
            self._return_path.start()
            saver.command(commands.OpenReturnPath())
            self._ping(saver, FIRST_PING)
            if self._timing is HandoverTiming.AUTO:
                self._ping(saver, handover.OFFER)
        with idle:
            if self._lanes is not None:
                self._agree_on_method()
                for _, handler in self._registry.iterable:
                    handler.use_lanes(self._lanes)
                self._lanes.start()
            if isinstance(channel, RemoteWritingChannel):
                self._write_remotely(channel)
            saver.start()
            out.flush()
        handlers = [handler for _, handler in self._registry.iterable]
        keyed = {handler.statistics_key: handler.progress for handler in handlers if handler.statistics_key}
        self._statistics.setup_ended(
            lambda: out.offset,
            keyed,
            details=lambda: {name: members for h in handlers for name, members in h.statistics().items()},
            round_trip=lambda: 0.0 if self._return_path is None else self._return_path.round_trip,
            round_trips=self._round_trips(),
            stopping=self._stopping_time,
        )
        self._sync()
        self._move(MigrationStatus.ACTIVE)
        return saver

    def _write_remotely(self, channel: RemoteWritingChannel) -> None:
        """Pages go past the stream, and count as what is sent all the same."""
        self._sent_beside = lambda: channel.ram_written
        self._statistics.sends_beside(self._sent_beside)
        for _, handler in self._registry.iterable:
            handler.use_remote_writing(channel, self._out.flush)

    def _connect_lanes(self, bundle: Bundle, method: Method) -> Departing:
        channels = connecting.connect(
            self._connector,
            Patience(self._limits.connect_timeout, self._patience.cancelled),
            lanes=self._parameters.multifd_channels,
            uuid=connecting.uuid_of(self._machine),
            # Only a handover in pairs says which attempt it is; without, there is nothing to compare it with.
            token=multifd.token_of(self._mid) if self._timing is HandoverTiming.AUTO else b"",
            bundle=bundle,
        )
        mode = multifd.mode_of(self._machine.name)
        lanes = Departing(channels, mode, method, on_failure=self._lane_failed, flush=self._out.flush)
        self._statistics.sends_beside(lambda: lanes.sent)
        return lanes

    def _agree_on_method(self) -> None:
        """A codec that no QEMU has is named in the configuration: no page is sent before the destination took that."""
        if self._method is None or not self._method.announced:
            return
        assert self._return_path is not None, "refused without a way back"
        self._out.flush()
        try:
            self._return_path.wait_pong(FIRST_PING)
        except MigrationError as exc:
            if self._silent():
                raise
            raise IncompatibleError(
                f"the destination has not agreed to multifd-compression {self._method.name!r}: {exc}",
                hint="it must have that codec too, and be set to it; its own error says more",
                place=exc.place,
            ) from exc

    def _go_rounds(self, saver: StreamSaver) -> None:
        """Send what is dirty, again and again, until it is time to stop the guest."""
        out, idle = self._out, self._idle
        assert idle is not None, "rounds before the setup"
        pacer = Pacer(
            limit=lambda: self._parameters.max_bandwidth,
            sent=lambda: out.offset + (self._sent_beside() if self._lanes is None else self._lanes.committed),
            wait=self._stopping.wait,
            stopping=self._stopping.is_set,
            check=self._check,
        )
        rounds = Rounds(
            self._registry,
            saver,
            pacer,
            self._statistics,
            self._parameters,
            sync=self._sync,
            drain=partial(self._drain, saver),
            bursts=self._bursts(saver, pacer),
            within_rounds=self._lanes is None,  # else an echo says nothing of the lanes but behind a round's sync
            waiting=idle,
        )
        for round_ in rounds:
            self._convergence.heard(round_)
            if self._may_switch(round_):
                return
            if not round_.remaining:
                self._stopping.wait(IDLE)

    def _bursts(self, saver: StreamSaver, pacer: Pacer) -> Bursts | None:
        """What times the pacer's windows, if there is an answer to time them by."""
        if self._return_path is None:
            return None

        def ask(value: int) -> None:
            self._ping(saver, value)
            self._out.flush()

        path = self._return_path
        return Bursts(pacer.sent, ask, path.answered, lambda: path.round_trip)

    def _moved(self) -> object:
        """How far the link is, for the watch that looks whether it has fallen silent."""
        lanes, heard = self._lanes, self._return_path
        beside = self._sent_beside() if lanes is None else lanes.sent
        return self._out.offset, beside, 0 if heard is None else heard.heard

    def _silent(self) -> bool:
        """Whether the channel was closed because the link has fallen silent."""
        return self._idle is not None and self._idle.passed

    def _drain(self, saver: StreamSaver) -> None:
        """What the link's buffers hold is not yet there; with a way back, wait until it is."""
        self._check()
        if self._return_path is None:
            self._out.flush()
            if self._lanes is not None:
                self._lanes.drain()
            return
        value = ROUND_PING + self._statistics.rounds
        self._ping(saver, value)
        self._out.flush()
        self._return_path.wait_pong(value)

    def _round_trips(self) -> int:
        """How many of the destination's answers the switchover waits for: the proof, and its last word."""
        if self._return_path is None:
            return 0
        return 1 if self._timing is HandoverTiming.QEMU else 2

    def _stopping_time(self) -> float:
        return self._machine.guest.stopping_time() if self._machine.run_state is RunState.RUNNING else 0.0

    def _may_switch(self, round_: Round) -> bool:
        agreed = not self._capabilities.switchover_ack or self._agreed()
        choice = self._plugins.choose_switchover(round_) if agreed else None
        return self._convergence.decide(round_, choice=choice, agreed=agreed)

    def _throttle(self, percent: int) -> None:
        with self._machine.lock:
            self._machine.guest.throttle(percent)
        self._machine.notifiers.emit(GuestThrottled(percent=percent))

    def _agreed(self) -> bool:
        """Whether the destination is ready for the switchover; while it is not, rounds are in no hurry."""
        assert self._return_path is not None, "refused without a way back"
        if self._return_path.wait_acknowledged(AGREEMENT):
            return True
        if self._statistics.rounds == 1:
            _log.warning("the destination has not agreed to the switchover: switchover-ack must be on there too")
        return False

    def _switch_over(self, saver: StreamSaver) -> None:
        """Stop the guest, send the rest, and hand the machine over."""
        self._flush_shared_drives()  # what is left of it takes less time then, with the guest stopped
        deal = self._deal = self._strike_deal(saver)
        deal = self._deal = deal.begin()
        self._keeper.deal = deal.name
        if self._capabilities.pause_before_switchover:
            self._freeze()
            self._pause()
        with self._machine.notifiers.held():
            if self._thaw_to is None:
                self._freeze()
            self._send_rest(saver, deal)
            self._flush_shared_drives()
            self._release()
            failure = self._let_go(deal)
        if failure is not None:
            self._hang_up()  # whatever the destination still waits for on this connection does not come
            if (error := deal.after(failure)) is not None:
                raise error
        self._statistics.guest_resumed()

    def _strike_deal(self, saver: StreamSaver) -> Deal:
        """How the machine is handed over, as far as the destination goes along."""
        assert self._channel is not None, "a deal with nobody"
        link = Link(
            channel=self._channel,
            saver=saver,
            out=self._out,
            return_path=self._return_path,
            ownership=self._ownership,
            keeper=self._keeper,
            mark=self._statistics.mark,
            patience=last_word_timeout(self._limits.handover_timeout),
            cancelled=self._patience.cancelled,
        )
        deal: Deal
        if self._return_path is None:
            deal = OneWay(link)
        elif self._timing is HandoverTiming.QEMU:
            deal = QemuTiming(link)
        elif self._timing is HandoverTiming.AUTO and self._accepted(self._return_path):
            attempt = commands.Attempt(self._mid, self._keeper.epoch)
            again = Messenger(self._connector, self._limits.connect_timeout) if self._destination.spec.several else None
            self._witness = witness_of(self._machine.settings, self._plugins)
            deal = Pairwise(link, attempt, saver.digest, again, self._witness)
        else:
            deal = Proof(link)
        self._keeper.deal = deal.name
        return deal

    def _accepted(self, return_path: ReturnPath) -> bool:
        self._out.flush()
        return_path.wait_pong(handover.OFFER)
        return return_path.accepted

    def _freeze(self) -> None:
        self._statistics.guest_stopped()
        thaw_to = self._machine.freeze()
        self._thaw_to = thaw_to
        self._ownership.move(SourceOwnership.FROZEN, Reason.STOPPED)
        self._global_state.set(thaw_to)
        self._statistics.mark(Cause.STOP)

    def _pause(self) -> None:
        """Wait, with the guest stopped, until somebody says migrate-continue or cancel."""
        self._move(MigrationStatus.PRE_SWITCHOVER)
        self._proceed.wait()
        self._check()
        self._move(MigrationStatus.DEVICE)
        self._statistics.mark(Cause.PAUSE)

    def _send_rest(self, saver: StreamSaver, deal: Deal) -> None:
        """Send what is dirty and all devices, and have the destination prove that it holds them.

        The guest stands still, so there is a limit to it, however the destination or the link behave. It is the time
        for the proof and twice what the rest was expected to take.
        """
        assert self._channel is not None, "frozen without a channel"
        mark = self._statistics.mark
        expected = self._statistics.expected_downtime or 0.0
        seconds = self._machine.settings.handover_seconds() + (2 * expected if math.isfinite(expected) else 0.0)
        with Deadline(seconds, self._channel) as deadline:
            try:
                self._sync()
                saver.end(self._part_ended)
                saver.devices()
                if self._lanes is not None:
                    self._lanes.drain()
                mark(Cause.DEVICES)
                deal.prove()
            except MigrationError as exc:
                if not deadline.passed or self._patience.cancelled.is_set():
                    raise
                raise HandoverTimeout(
                    f"the destination has not proved within {seconds:.3g} s that it holds the whole machine",
                    hint="the source's guest goes on; [limits] handover-timeout says how long to wait",
                    place=exc.place,
                ) from exc

    def _part_ended(self, handler: IterableHandler) -> None:
        self._statistics.mark(Cause.DRIVES if handler.statistics_key == "disk" else Cause.RAM)

    def _let_go(self, deal: Deal) -> MigrationError | None:
        """Tell the destination that the machine is its own, and hear that it is; returns what went wrong."""
        try:
            deal.let_go()
        except MigrationError as exc:
            return exc
        return None

    def _release(self) -> None:
        """The point of no return: after this the machine never runs here by itself."""
        with self._deciding:
            self._check()
            if self._return_path is not None:
                self._return_path.may_shut()
            self._ownership.move(SourceOwnership.RELEASED, Reason.LET_GO)
            self._machine.drives.release()

    def _flush_shared_drives(self) -> None:
        """What was written to images that the destination has too must be in them; what is sent need not be."""
        if self._machine.drives.leaving is Leaving.NOTHING:
            try:
                self._machine.drives.flush()
            except OSError as exc:
                raise MigrationError(f"the drives cannot be flushed: {exc}") from exc

    # --------------------------------------------------------------------------------------------- the end

    def _settle(self, error: WhimbrelError | None, *, cancelled: bool) -> WhimbrelError | None:
        quietly(self._convergence.release, "letting the guest have all of its time again")
        if self._released:
            quietly(self._machine.let_go, "letting go of the machine")
        elif self._thaw_to is not None:
            refused = self._ownership.now is SourceOwnership.OWNER
            error = self._thaw(self._thaw_to) or error
            if not cancelled and not refused:
                error = self._best_reason(error)
                error = error if self._return_path is None else _unproved(error)
        elif not cancelled:
            error = self._best_reason(error)
        self._hang_up()
        if self._idle is not None:
            self._idle.end()
        if self._return_path is not None:
            self._return_path.join()
        if self._lanes is not None:
            self._lanes.close()
        if self._witness is not None:
            quietly(self._witness.close, "closing the witness")
        self._registry.finish()
        self._statistics.ended()
        self._tell_thawed()
        return _undecided(error) if error is not None and self._released else error

    def _tell_thawed(self) -> None:
        """A destination that may be prepared is told that the machine is back here, beside whatever comes next."""
        if self._deal is not None and self._deal.owes_a_word and self._ownership.now is SourceOwnership.OWNER:
            self._telling = threading.Thread(target=self._deal.thawed, name="whimbrel-abort", daemon=True)
            self._telling.start()

    def _ownership_moves(self, old: SourceOwnership, new: SourceOwnership, why: Reason) -> None:
        if new is SourceOwnership.OWNER and why in (Reason.REFUSE, Reason.WITNESS):
            self._keeper.epoch += 2  # the destination's would have been the next
            self._on_epoch(self._keeper.epoch)
        self._keeper.move(old, new, why)

    def _stop_asking(self) -> None:
        if self._deal is not None:
            self._deal.stop()

    def _downtime(self) -> float | None:
        return self._statistics.downtime

    def _thaw(self, to: RunState) -> WhimbrelError | None:
        try:
            if self._ownership.now is not SourceOwnership.OWNER:
                self._ownership.move(SourceOwnership.OWNER, Reason.THAWED)
            self._machine.thaw(to)
        except JournalError as exc:
            # It must not run before that is written down: a restart would take it for frozen.
            self._machine.thaw(RunState.PAUSED)
            return exc
        except WhimbrelError as exc:
            return exc
        except BaseException as exc:  # noqa: BLE001 - the rest of the end must come all the same
            return unexpected(exc)
        return None

    def _best_reason(self, error: WhimbrelError | None) -> WhimbrelError | None:
        """A broken channel is often the effect of what the return path has heard, or is about to hear."""
        if self._silent() and isinstance(error, ChannelError):
            return _fallen_silent(self._limits.idle_timeout, error.place)
        if self._lanes is not None and self._lanes.failure is not None and isinstance(error, ChannelError):
            error = self._lanes.failure
        if self._return_path is None or not isinstance(error, ChannelError):
            return error
        try:
            self._return_path.wait_shut(timeout=LAST_WORDS)
        except ProtocolError as heard:
            return heard
        except MigrationError as heard:
            return heard if isinstance(error, ChannelClosed) else error
        return error

    @property
    def _released(self) -> bool:
        return self._ownership.now in (SourceOwnership.RELEASED, SourceOwnership.DONE)

    def _check(self) -> None:
        """Raise if there is no point in going on: cancelled, or the way back is broken."""
        if self._patience.cancelled.is_set():
            raise MigrationCancelled("cancelled before the machine was let go of")
        if self._return_path is not None and self._return_path.failure is not None:
            raise self._return_path.failure
        if self._lanes is not None:
            self._lanes.check()

    def _lane_failed(self) -> None:
        """A lane is broken: wake the migration thread, once the destination has had a moment to say why."""
        self._stopping.set()
        if self._return_path is not None:
            self._return_path.wait_failure(LAST_WORDS)
        self._proceed.set()
        self._hang_up()

    def _link_failed(self) -> None:
        """The return path is broken: wake the migration thread wherever it is blocked."""
        self._stopping.set()
        self._proceed.set()
        self._hang_up()

    def _ping(self, saver: StreamSaver, value: int) -> None:
        assert self._return_path is not None, "a PING needs a way back"
        self._return_path.asking(value)
        saver.command(commands.Ping(value))

    def _sync(self) -> None:
        self._registry.sync()
        self._statistics.synced()
        self._machine.notifiers.emit(RoundStarted(number=self._statistics.syncs))


def _fallen_silent(seconds: float, place: Place) -> ChannelLost:
    return ChannelLost(
        f"the link has taken no byte and brought no answer for {seconds:.3g} s",
        hint="the guest goes on here; [limits] idle-timeout says how long to wait, and over a link that is only slow"
        " max-bandwidth makes the pieces smaller",
        place=place,
    )


def _unproved(error: WhimbrelError | None) -> WhimbrelError | None:
    """What the end of the link means before the proof: the destination has refused, or is gone, and has nothing."""
    if not isinstance(error, ChannelLost):
        return error
    return ChannelLost(
        f"the destination hung up before it proved that it holds the machine: {error.message}",
        hint="its own log says why",
        place=error.place,
    )


def _undecided(error: WhimbrelError) -> HandoverUndecided:
    undecided = HandoverUndecided(
        f"the machine was let go of, and the destination has not said that it runs ({error})",
        hint="ask the destination: if it does not run and never will, reclaim() brings the machine back here",
        place=getattr(error, "place", None) or Place(),
    )
    undecided.__cause__ = error
    return undecided
