"""What moves: RAM, devices, drives, a guest and a run state. `whimbrel.Machine` adds the means to move it.

One re-entrant lock guards the run state and the guest with it: whoever starts, stops, freezes or lets go of the
machine holds it, so that between two moves of the run state the guest does what the state says. Reading `run_state`
needs no lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self
from uuid import UUID

from whimbrel.abc import Codec, CodecSpec, DeltaCodec, DirtyTracker, DirtyTrackerSpec, Guest
from whimbrel.errors import ConfigError, GuestError, StateError, UnknownNameError, WhimbrelError
from whimbrel.events import GuestStarted, GuestStopped, RunStateChanged
from whimbrel.machine.blockers import Blockers
from whimbrel.machine.devices import Devices
from whimbrel.machine.dirty import choose, with_guests
from whimbrel.machine.drives import Drives
from whimbrel.machine.guest import IdleGuest
from whimbrel.machine.notices import Notices
from whimbrel.machine.ram import Ram
from whimbrel.machine.runstate import RunState, check_move
from whimbrel.settings import Settings
from whimbrel.wire.form import Form
from whimbrel.wire.skeleton import Configuration

TrackerSpecs = Callable[[], Sequence[DirtyTrackerSpec]]
CodecOfName = Callable[[str], CodecSpec]


class BareMachine:
    """A machine that can run and be described, but not moved. Methods from any thread but the guest's own.

    `name` is told to the other side, which must have the same. `uuid` is compared too if the capability
    `validate-uuid` is on. `tracker_specs` says which dirty trackers there are, `codec_spec` finds a codec by its name;
    without it there are none.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: Settings | None = None,
        uuid: UUID | str | None = None,
        tracker_specs: TrackerSpecs = tuple,
        codec_spec: CodecOfName | None = None,
    ) -> None:
        if not (name.isascii() and name.isprintable() and 1 <= len(name) <= 255):
            raise ConfigError(f"a machine's name has 1 to 255 printable ASCII characters, got {name!r}")
        self.name = name
        self.uuid = UUID(uuid) if isinstance(uuid, str) else uuid
        self.settings = settings if settings is not None else Settings()
        self.ram = Ram(self.settings.backends.memory, self.check_may_change)
        self.devices = Devices(self.check_may_change)
        self.drives = Drives(self.check_may_change)
        self.blockers = Blockers()
        self.notifiers = Notices()
        self.lock = threading.RLock()
        self.failure: GuestError | None = None
        self._guest: Guest = IdleGuest()
        self._run_state = RunState.PRELAUNCH
        self._prepared = False
        self._powered = False
        self._tracker_specs = tracker_specs
        self._codec_spec = codec_spec

    # ------------------------------------------------------------------------------------------- parts

    @property
    def guest(self) -> Guest:
        """What runs in the machine; set it before the first start."""
        return self._guest

    @guest.setter
    def guest(self, guest: Guest) -> None:
        with self.lock:
            self.check_may_change()
            self._guest = guest
            guest.on_failure = self._guest_failed

    @property
    def run_state(self) -> RunState:
        """What the machine is doing."""
        return self._run_state

    def check_may_change(self) -> None:
        """Raise StateError unless parts may still be added: before the first start and not while arriving."""
        if self._run_state is not RunState.PRELAUNCH:
            raise StateError(
                f"the machine is {self._run_state}: its parts are fixed", hint="add them before start() or incoming()"
            )

    def new_dirty_tracker(self) -> tuple[str, DirtyTracker]:
        """A tracker for one migration, as `[backends] dirty-tracker` says, and its name.

        Where the guest writes from a process of its own, it is a tracker of both, or one that sees both. Raises
        TrackerUnavailable or UnknownNameError.
        """
        guests = self._guest.dirty_tracker()
        specs = with_guests(self._tracker_specs(), guests)
        spec, _ = choose(self.settings.backends.dirty_tracker, specs, list(self.ram))
        together = guests is not None and not spec.sees_other_processes
        return f"{spec.name}+{guests.name}" if guests and together else spec.name, spec.create()

    def new_codec(self, name: str) -> Codec | DeltaCodec:
        """A codec for one migration. Raises UnknownNameError, or PluginError where the plugin is at fault."""
        if self._codec_spec is None:
            raise UnknownNameError("codec", name, ())
        return self._codec_spec(name).create()

    def form(self) -> Form:
        """What this machine's streams consist of around their sections."""
        with_uuid = self.uuid is not None and self.settings.capabilities.validate_uuid
        return Form(Configuration(self.name, uuid=self.uuid.bytes if with_uuid and self.uuid else None))

    # --------------------------------------------------------------------------------------- operation

    def start(self) -> None:
        """Run the machine: power it on if it is fresh, or let it go on. Already running is fine.

        Raises StateError where it may not run: while it waits for another machine, while it is handed over (only
        `thaw` leads back from there), and after it was let go of.
        """
        with self.lock:
            if self._run_state is RunState.RUNNING:
                return
            if self._run_state is RunState.INMIGRATE:
                raise StateError("the machine is waiting for an incoming migration and cannot be started")
            if self._run_state is RunState.FINISH_MIGRATE:
                raise StateError("Migration is not finalized yet")
            if self._run_state is RunState.POSTMIGRATE:
                raise StateError(
                    "the machine was handed over and never runs here again by itself",
                    hint="if you know that no other copy runs or will, reclaim() brings it back",
                )
            check_move(self._run_state, RunState.RUNNING)
            self.power_on()
            self.resume(RunState.RUNNING)

    def stop(self) -> None:
        """Pause the machine; returns when no guest code runs. A machine that does not run is left as it is.

        Raises StateError in the last part of a migration, when what the machine is next is being decided.
        """
        with self.lock:
            if self._run_state is RunState.FINISH_MIGRATE:
                raise StateError("Migration is not finalized yet")
            if self._run_state is RunState.RUNNING:
                self._stop_guest()
                self._move(RunState.PAUSED if self._guest.failure is None else RunState.INTERNAL_ERROR)
            elif self._run_state is RunState.PRELAUNCH:
                self._move(RunState.PAUSED)

    def close(self) -> None:
        """Shut the machine down and release its memory; views of its RAM must not be used after. Twice is fine."""
        with self.lock:
            if self._run_state is RunState.SHUTDOWN:
                return
            if self._run_state is RunState.RUNNING:
                self._stop_guest()
            self._set(RunState.SHUTDOWN)
        try:
            # Without the lock: a guest that has just failed waits for it on its own thread, to say so.
            self._guest.close()
        finally:
            self.drives.close()
            self.notifiers.drain(timeout=1.0)
            self.ram.close()

    def reclaim(self) -> None:
        """An operator's word that no other copy of this machine runs or ever will: postmigrate becomes paused."""
        with self.lock:
            if self._run_state is not RunState.POSTMIGRATE:
                raise StateError(f"only a machine that was handed over can be reclaimed; this one is {self._run_state}")
            self._move(RunState.PAUSED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------- what the migration engine does with it

    def power_on(self) -> None:
        """Fill a fresh machine, once; anything else is left as it is. A guest that raises leaves it fresh."""
        with self.lock:
            self.drives.acquire()
            if not self._powered:
                self._prepare_guest()
                try:
                    with self.drives.admitted():
                        self._guest.power_on()
                except Exception as exc:
                    raise GuestError(f"the guest failed to power on: {exc!r}") from exc
                self._powered = True
                if self._run_state is RunState.PRELAUNCH:
                    self._move(RunState.PAUSED)

    def expect_arrival(self) -> None:
        """Wait for another machine: prelaunch becomes inmigrate. Raises what a guest raises that cannot run here."""
        with self.lock:
            if self._run_state is not RunState.INMIGRATE:
                check_move(self._run_state, RunState.INMIGRATE)
                self._prepare_guest()
                self._move(RunState.INMIGRATE)

    def freeze(self) -> RunState:
        """Stop the guest for the last part of a migration; returns the state to thaw to.

        From here the machine is `finish-migrate`, and only `thaw` or `let_go` leads out. Raises GuestError if the
        guest has failed: its machine is in `internal-error` then.
        """
        with self.lock:
            before = self._run_state
            if before is RunState.RUNNING:
                self._stop_guest()
                if self._guest.failure is not None:
                    self._move(RunState.INTERNAL_ERROR)
            if self._run_state is RunState.INTERNAL_ERROR:
                raise GuestError(f"the guest failed: {self._guest.failure!r}") from self._guest.failure
            self._move(RunState.FINISH_MIGRATE)
            return before

    def thaw(self, to: RunState) -> None:
        """Go on as before `freeze`: the machine is still ours. Raises as `resume` does."""
        self.resume(to)

    def let_go(self) -> None:
        """The machine is somebody else's: finish-migrate becomes postmigrate."""
        with self.lock:
            self._move(RunState.POSTMIGRATE)

    def resume(self, to: RunState) -> None:
        """Become `to` (running or paused); the guest is started for running. Never powers on.

        Raises whatever is wrong with a guest that does not start, as GuestError unless it is an error of ours. The
        machine is paused then, and `start` may be tried again.
        """
        with self.lock:
            check_move(self._run_state, to)
            if to is RunState.RUNNING:
                self._start_guest()
            self._set(to)
            if to is RunState.RUNNING:
                self.notifiers.emit(GuestStarted())

    def arrive(self, to: RunState) -> None:
        """Become what the source was (running or paused), with everything loaded: inmigrate ends.

        Raises as `resume` does.
        """
        with self.lock:
            self._powered = True
            self.resume(to)

    # ---------------------------------------------------------------------------------------- internals

    def _prepare_guest(self) -> None:
        if not self._prepared:
            try:
                self._guest.use_drives(list(self.drives))
                self._guest.prepare(list(self.ram))
            except Exception as exc:
                if isinstance(exc, WhimbrelError):
                    raise
                raise GuestError(f"the guest failed to get ready: {exc!r}") from exc
            self._prepared = True

    def _start_guest(self) -> None:
        try:
            self.drives.acquire()
            self.drives.admit()
            self._guest.start()
        except BaseException as exc:
            self.drives.bar()
            if self._run_state is not RunState.PAUSED:
                self._move(RunState.PAUSED)
            if isinstance(exc, WhimbrelError) or not isinstance(exc, Exception):
                raise
            raise GuestError(f"the guest failed to start: {exc!r}") from exc

    def _stop_guest(self) -> None:
        self._guest.stop()
        self.drives.bar()
        self.notifiers.emit(GuestStopped())

    def _move(self, to: RunState) -> None:
        check_move(self._run_state, to)
        self._set(to)

    def _set(self, to: RunState) -> None:
        old, self._run_state = self._run_state, to
        self.notifiers.emit(RunStateChanged(old=old, new=to))

    def _guest_failed(self, exc: BaseException) -> None:
        with self.lock:
            self.failure = GuestError(f"the guest failed: {exc!r}")
            self.failure.__cause__ = exc
            if self._run_state is RunState.RUNNING:
                self.drives.bar()
                self.notifiers.emit(GuestStopped())
                self._move(RunState.INTERNAL_ERROR)
