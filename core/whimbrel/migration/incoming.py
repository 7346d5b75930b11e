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
from functools import partial
from typing import Final

from whimbrel.abc import Channel, Listener, Patience
from whimbrel.errors import (
    ChannelError,
    HandoverUndecided,
    MigrationCancelled,
    MigrationError,
    Place,
    StateError,
    StreamError,
    WhimbrelError,
)
from whimbrel.events import Arrived, MigrationFinished, StateChanged
from whimbrel.machine import BareMachine, RunState
from whimbrel.migration.announce import Announcer
from whimbrel.migration.globalstate import GlobalStateHandler
from whimbrel.migration.handover import DestinationOwnership, destination_handover, last_word_timeout
from whimbrel.migration.loader import StreamLoader
from whimbrel.migration.quietly import quietly
from whimbrel.migration.savevm import Registry
from whimbrel.migration.statistics import MigrationInfo
from whimbrel.migration.status import DESTINATION_MOVES, MigrationStatus, StatusMachine
from whimbrel.plugins import PluginManager
from whimbrel.stream import Reader
from whimbrel.wire.return_path import Message, Shut, encode

_log = logging.getLogger("whimbrel")

FOR_EVER: Final = float("inf")
LINGER: Final = 2.0  # seconds a refused source is listened to, so that it hears why before the connection goes

Registration = Callable[[], tuple[Registry, GlobalStateHandler]]


class IncomingMigration:
    """The wait for a machine, and its arrival; made and started by `Machine.incoming`. Any thread.

    `start` says whether the guest is started: None as the source was, if the handover was proved; True as the source
    was, even without proof (a transport without a way back); False not at all.
    """

    def __init__(self, machine: BareMachine, plugins: PluginManager, listener: Listener, register: Registration, *,
                 start: bool | None) -> None:  # fmt: skip
        self._machine, self._plugins, self._listener = machine, plugins, listener
        self._register, self._start = register, start
        self._status = StatusMachine(DESTINATION_MOVES, self._status_moved)
        self._ownership = destination_handover()
        self._patience = Patience(FOR_EVER)
        self._deciding = threading.Lock()  # a cancel, the proof, the end and an operator's word exclude each other
        self._settled = False
        self._watchdog: threading.Timer | None = None
        self._late = threading.Event()  # the watchdog has closed the channel
        self._channel: Channel | None = None
        self._loader: StreamLoader | None = None
        self._global_state: GlobalStateHandler | None = None
        self._announcer: Announcer | None = None
        self._reader: Reader | None = None
        self._error: WhimbrelError | None = None
        self._thread = threading.Thread(target=self._run, name="whimbrel-incoming", daemon=True)

    # --------------------------------------------------------------------------------- what people call

    @property
    def uri(self) -> str:
        """The URI to migrate to, with what the system chose filled in."""
        return self._listener.uri

    @property
    def status(self) -> MigrationStatus:
        """How far it is."""
        return self._status.now

    @property
    def ownership(self) -> DestinationOwnership:
        """What this side may do with the machine."""
        return self._ownership.now

    @property
    def error(self) -> WhimbrelError | None:
        """Why it did not succeed, once it has ended."""
        return self._error

    @property
    def info(self) -> MigrationInfo:
        """What is known now."""
        return MigrationInfo(
            status=self._status.now,
            error="" if self._error is None else str(self._error),
            error_code="" if self._error is None else self._error.code,
            ownership=str(self._ownership.now),
            failed_notifiers=tuple(self._machine.notifiers.failures)
            + tuple(f"{failure.plugin}: {failure.error}" for failure in self._plugins.failures),
        )

    def start(self) -> None:
        """Begin to wait; called once."""
        self._status.move(MigrationStatus.SETUP)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> MigrationInfo:
        """Wait for the end and return what is known then.

        Raises TimeoutError if it has not come within `timeout` seconds (the wait goes on), MigrationCancelled, or
        whatever made it fail.
        """
        if not self._status.wait_finished(timeout):
            raise TimeoutError(f"the incoming migration is still {self.status} after {timeout:g} s")
        self._thread.join()
        self._machine.notifiers.drain(timeout=1.0)
        if self._error is not None:
            raise self._error
        return self.info

    def cancel(self) -> bool:
        """Stop waiting or loading. False if it is too late: prepared, or ended. Returns at once."""
        with self._deciding:
            if self._settled or self._ownership.now is not DestinationOwnership.LOADING:
                return False
            if not self._status.try_move(MigrationStatus.CANCELLING):
                return False
            self._patience.cancelled.set()
            channel = self._channel
        self._listener.close()
        if channel is not None:
            channel.close()
        return True

    def adopt(self) -> None:
        """An operator's word that the source does not run and never will: take the prepared machine and start it."""
        with self._deciding:
            self._expect_prepared()
            self._take_over(None)

    def discard(self) -> None:
        """An operator's word that the source has the machine: drop the prepared one; incoming may be tried again."""
        with self._deciding:
            self._expect_prepared()
            self._ownership.move(DestinationOwnership.REFUSED)
            assert self._loader is not None, "prepared without a loader"
            self._loader.rollback()

    def close(self) -> None:
        """End everything that still runs for this migration: the wait, the load, the announcing."""
        self.cancel()
        if self._channel is not None:
            self._channel.close()
        self._thread.join()
        if self._announcer is not None:
            self._announcer.close()

    def _expect_prepared(self) -> None:
        if not self._status.now.finished or self._ownership.now is not DestinationOwnership.PREPARED:
            raise StateError(f"nothing is left undecided: this side's ownership is {self._ownership.now}")

    # --------------------------------------------------------------------------------- the incoming thread

    def _run(self) -> None:
        error: WhimbrelError | None = None
        registry: Registry | None = None
        try:
            registry, self._global_state = self._register()
            self._receive(registry)
        except WhimbrelError as exc:
            error = exc
        except Exception as exc:  # noqa: BLE001 - a plugin's or our own bug must leave the machine clean as well
            _log.exception("the incoming migration failed unexpectedly")
            error = MigrationError(
                f"unexpected {type(exc).__name__}: {exc}", hint="this is a bug; the log has its place"
            )
            error.__cause__ = exc
        self._settle(error, registry)

    def _receive(self, registry: Registry) -> None:
        channel = self._listener.accept(self._patience)
        self._listener.close()
        with self._deciding:
            self._channel = channel
            if self._patience.cancelled.is_set():
                raise MigrationCancelled("cancelled while connecting")
        reader = self._reader = Reader(channel)
        answer = _answerer(channel) if channel.duplex else None
        loader = self._loader = StreamLoader(self._machine, registry, reader, answer, on_prepared=self._prepared)
        try:
            self._load_header(loader, channel)
            self._move(MigrationStatus.ACTIVE)
            loader.load()
            self._conclude(loader, channel, answer)
        except MigrationError as exc:
            raise exc.at(Place(peer=channel.peer)) from exc.__cause__

    def _load_header(self, loader: StreamLoader, channel: Channel) -> None:
        """A peer that connects and says nothing must not hold the place for ever."""
        seconds = self._machine.settings.limits.header_timeout
        late = threading.Event()
        watchdog = _close_after(seconds, channel, late)
        try:
            loader.load_header()
        except ChannelError as exc:
            if late.is_set() and not self._patience.cancelled.is_set():
                raise StreamError(
                    f"the peer sent no stream header within {seconds:g} s",
                    hint="[limits] header-timeout says how long to wait",
                    place=exc.place,
                ) from exc
            raise
        finally:
            watchdog.cancel()

    def _conclude(self, loader: StreamLoader, channel: Channel, answer: Callable[[Message], None] | None) -> None:
        """EOF has come: take over in the way that the source hands over (`whimbrel.migration.handover`)."""
        if loader.proved:
            # The source wrote EOF only after our proof: it is the order to start.
            self._take_over(self._start)
            _try_to(lambda: answer(Shut(0)) if answer else None)
            _try_to(loader.load_description)
            return
        if answer is None or not loader.return_path_open:
            # Nobody listens to us, so nothing can be proved.
            _try_to(loader.load_description)
            self._take_over(bool(self._start))
            return
        # A source that asked for no proof (QEMU) lets go by itself: it has, once it hangs up in order behind our SHUT,
        # and not if it does so before.
        loader.load_description()
        answer(Shut(0))
        self._expect_hang_up(channel)
        self._take_over(self._start)

    def _expect_hang_up(self, channel: Channel) -> None:
        """Wait until the peer hangs up in order. Raises StreamError for more bytes, ChannelError if the link breaks."""
        assert self._reader is not None, "hung up on before anything was read"
        if len(self._reader.window(0)) or channel.recv_into(memoryview(bytearray(1))):
            raise StreamError("bytes came behind the end of the stream", place=Place(offset=self._reader.offset))

    def _take_over(self, start: bool | None) -> None:
        """The machine is ours: start it, or leave it paused."""
        self._stop_watching()
        assert self._global_state is not None, "taken over before anything was loaded"
        came = self._global_state.run_state
        goes_on = RunState.PAUSED if start is False else came
        self._ownership.move(DestinationOwnership.OWNER)
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
            self._ownership.move(DestinationOwnership.PREPARED)
        # From here on nobody runs, so the order must come soon, or somebody has to decide.
        assert self._channel is not None, "prepared without a channel"
        seconds = last_word_timeout(self._machine.settings.limits.handover_timeout)
        self._watchdog = _close_after(seconds, self._channel, self._late)

    def _stop_watching(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()

    # --------------------------------------------------------------------------------------------- the end

    def _settle(self, error: WhimbrelError | None, registry: Registry | None) -> None:
        self._stop_watching()
        with self._deciding:
            self._settled = True
            cancelled = self._patience.cancelled.is_set()
        quietly(self._listener.close, "closing the listener")
        if cancelled:
            error = MigrationCancelled("the incoming migration was cancelled; the machine is as before")
        elif error is not None:
            error = self._judge(error)
        if error is not None and self._ownership.now is DestinationOwnership.LOADING:
            if self._loader is not None:
                self._loader.rollback()
            self._ownership.move(DestinationOwnership.REFUSED)
        if self._channel is not None:
            if error is not None and not cancelled and self._ownership.now is DestinationOwnership.REFUSED:
                quietly(partial(_refuse, self._channel), "the channel")
            quietly(self._channel.close, "closing the channel")
        if registry is not None:
            registry.finish()
        self._error = error
        end = MigrationStatus.CANCELLED if cancelled else MigrationStatus.FAILED if error else MigrationStatus.COMPLETED
        reason = "" if error is None else str(error)
        self._machine.notifiers.emit(MigrationFinished(role="destination", status=end, downtime=None, error=reason))
        self._status.move(end)

    def _judge(self, error: WhimbrelError) -> WhimbrelError:
        """After the proof was sent the source may have let go: what is here is kept, and that is the error."""
        if self._ownership.now is not DestinationOwnership.PREPARED:
            return error
        reason = "it took too long" if self._late.is_set() else error
        undecided = HandoverUndecided(
            f"the machine is here, whole and stopped, and the source's order to start it has not come ({reason})",
            hint="ask the source: if it does not run and never will, adopt() starts it here; if it runs, discard() it",
            place=getattr(error, "place", None) or Place(),
        )
        undecided.__cause__ = error
        return undecided

    def _move(self, to: MigrationStatus) -> None:
        if not self._status.try_move(to):
            raise MigrationCancelled(f"cancelled before {to}")

    def _status_moved(self, old: MigrationStatus, new: MigrationStatus) -> None:
        self._machine.notifiers.emit(StateChanged(role="destination", old=old, new=new))


def _answerer(channel: Channel) -> Callable[[Message], None]:
    return lambda message: channel.send(encode(message))


def _try_to(action: Callable[[], object]) -> None:
    """Behind the end of the stream nothing on the link changes what is here."""
    try:
        action()
    except (ChannelError, StreamError) as exc:
        _log.warning("behind the end of the stream: %s", exc)


def _refuse(channel: Channel) -> None:
    """Say SHUT 1 and listen on for a moment, so that the word is not lost in a reset."""
    if not channel.duplex:
        return
    watchdog = _close_after(LINGER, channel, threading.Event())
    sink = memoryview(bytearray(1 << 16))
    try:
        channel.send(encode(Shut(1)))
        channel.end_writing()
        while channel.recv_into(sink):
            pass
    except ChannelError:
        return
    finally:
        watchdog.cancel()


def _close_after(seconds: float, channel: Channel, late: threading.Event) -> threading.Timer:
    """Close `channel` after some time, unless the timer is cancelled before; `late` is set first."""

    def close() -> None:
        late.set()
        channel.close()

    watchdog = threading.Timer(seconds, close)
    watchdog.name, watchdog.daemon = "whimbrel-watchdog", True
    watchdog.start()
    return watchdog
