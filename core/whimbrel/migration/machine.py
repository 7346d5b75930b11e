"""`Machine`: a bare machine and the means to move it. What people import."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from uuid import UUID

from whimbrel.errors import ConfigError, ConnectError, MigrationRefused, StateError, UnknownNameError
from whimbrel.machine import BareMachine, RunState
from whimbrel.machine.drives import Leaving
from whimbrel.migration.desk import Desk
from whimbrel.migration.globalstate import GlobalStateHandler, RunStateCarrier
from whimbrel.migration.handover import HandoverTiming
from whimbrel.migration.incoming import IncomingMigration
from whimbrel.migration.journal import Journal, Record
from whimbrel.migration.lanes import Method
from whimbrel.migration.lanes.connecting import missing_lanes
from whimbrel.migration.outgoing import OutgoingMigration
from whimbrel.migration.refusals import refuse_if_impossible
from whimbrel.migration.savevm import Registry
from whimbrel.migration.standing import Standing, Verdict, desk_for, owner, settle
from whimbrel.migration.uri import Destination, resolve
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings

_log = logging.getLogger("whimbrel")


class Machine(BareMachine):
    """A machine that can be migrated away and can wait for one to arrive. Methods from any thread but the guest's.

    `plugins` is this machine's plugin manager; without one a manager of its own is made from the settings. Use it as
    a context manager, or `close` it.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: Settings | None = None,
        plugins: PluginManager | None = None,
        uuid: UUID | str | None = None,
    ) -> None:
        settings = settings if settings is not None else Settings()
        self.plugins = plugins if plugins is not None else manager_for(settings)
        super().__init__(
            name,
            settings=settings,
            uuid=uuid,
            tracker_specs=self.plugins.dirty_trackers,
            codec_spec=self.plugins.codec,
        )
        self.notifiers.add(self.plugins.notify)
        self._outgoing: OutgoingMigration | None = None
        self._incoming: IncomingMigration | None = None
        self._telling: list[OutgoingMigration] = []  # earlier ones that still tell their destination that they failed
        self._closing = False
        self._journal = Journal()
        self._epoch = 0
        self._standing = Standing.of(self._journal)
        self._desk: Desk | None = None  # for a source of an earlier process's

    @property
    def migration(self) -> OutgoingMigration | IncomingMigration | None:
        """The current migration, or the last one, or None."""
        return self._outgoing or self._incoming

    @property
    def journal(self) -> Journal:
        """The records of who owned this machine when; in memory, unless `keep_journal` was called."""
        return self._journal

    @property
    def owner(self) -> str:
        """Who owns this machine now, as far as this side knows, for people; empty if nobody does yet."""
        return owner(self._journal.last)

    @property
    def standing(self) -> Standing:
        """What the journal said of this machine when it was opened."""
        return self._standing

    @property
    def epoch(self) -> int:
        """The epoch in which this machine is owned here, or last was; 0 before. It grows with every change of owner."""
        with self.lock:
            return self._epoch

    def keep_journal(self, folder: Path | str) -> Standing:
        """Write down in `folder`, durably, who owns this machine, so that a crash does not forget it.

        Returns what is written there already; a machine that may not start by that raises StateError at `start`.
        Raises StateError once it has started or waits for another, JournalError if another process holds the journal,
        if it is damaged or if the storage fails.
        """
        with self.lock:
            self.check_may_change()
            journal = Journal.open(Path(folder), self.name)
            self._journal.close()
            self._journal = journal
            self._standing = Standing.of(journal)
            self._epoch = journal.epoch
            return self._standing

    def start_afresh(self) -> None:
        """An operator's word that no other copy of this machine runs or ever will: start it, whatever is written."""
        with self.lock:
            self._standing = Standing(Verdict.FRESH)
            self.start()

    def settle_standing(self, stopped: threading.Event) -> Standing:
        """Where the journal says that somebody has to be asked, ask until there is an answer, or until `stopped`.

        That is the destination, in pairs: what was being handed over is gone here, with its process; if the
        destination holds it whole, it is ordered to run it. Or it is the witness, if the two had left it to one.
        A machine that arrived here before its process ended is answered for, until this one is closed, at the address
        at which it arrived, if that is free: its source may be asking still.

        Returns what stands from then on, which is written down; unchanged if nobody was asked or nobody has answered.
        Raises ConfigError if the destination's URI is not one any more, or no witness is named. Blocks; any thread.
        """
        standing = settle(self._standing, self._journal, self.plugins, self.settings, stopped)
        with self.lock:
            self._standing = standing
            if self._desk is None and not self._closing:
                self._desk = self._answering(standing)
        return standing

    def _answering(self, standing: Standing) -> Desk | None:
        try:
            desk = desk_for(standing, self._journal, self.plugins, self.settings)
        except (ConnectError, ConfigError) as exc:
            _log.warning("a source that has not heard that the machine is here cannot be answered: %s", exc)
            return None
        if desk is not None:
            desk.open()
        return desk

    def start(self) -> None:
        """Run the machine, as `BareMachine.start` says.

        Raises StateError also where the journal says that it is not, or may not be, this side's; JournalError, and it
        does not run, where it cannot be written down that it does.
        """
        with self.lock:
            last = self._journal.last
            if self.run_state is RunState.PAUSED and (last is None or last.ownership != "owner"):
                self._own("started")
            super().start()

    def power_on(self) -> None:
        """Fill a fresh machine, once, if the journal says that it may start here."""
        with self.lock:
            if not self._powered:
                self._standing.check_may_start()
                self._own("powered on")
            super().power_on()

    def reclaim(self) -> None:
        """An operator's word that no other copy of this machine runs or ever will: postmigrate becomes paused.

        The destination's answer is not waited for any longer then.
        """
        outgoing = self._outgoing
        if outgoing is not None:
            outgoing.give_up()
        with self.lock:
            super().reclaim()
            self._own("an operator has said so")

    def _own(self, why: str) -> None:
        """Write down that this side owns the machine, in a new epoch. Raises JournalError."""
        epoch = self._journal.epoch + 1
        self._journal.append(Record(mid="", role="machine", ownership="owner", epoch=epoch, why=why))
        self._epoch = epoch

    def migrate(self, uri: str, *, block: bool = False, incremental: bool = False,
                handover: str = HandoverTiming.AUTO) -> OutgoingMigration:  # fmt: skip
        """Begin to move this machine to `uri`; returns at once.

        With `block` its drives go along, with `incremental` only what is allocated of them, since the destination has
        the rest; the capability `block` and the parameter `block-incremental` mean the same. Without, both sides must
        have the same images, and only their locks pass.

        `handover` is "auto" (as safely as the destination can: between two whimbrels in pairs, where the order to start
        is repeated until it is answered, and by proof with a QEMU), "proof" (the destination proves over this one
        connection that it holds everything before it may run), or "qemu": QEMU's own timing, in which a destination
        that fails late has lost the machine.

        Raises StateError while another migration runs or where there is nothing to move, ConfigError for a URI that
        cannot be, MigrationRefused with every reason against it. Nothing has been touched then. A machine that was
        never started is powered on first, and arrives paused.
        """
        with self.lock:
            self._refuse_a_second()
            timing = _timing(handover)
            destination = resolve(uri, self.plugins)
            connector = destination.connector(self.settings)
            self.drives.leaving = self._what_leaves(block=block, incremental=incremental)
            registry, global_state = self._leaving()
            try:
                refuse_if_impossible(self, self.plugins, destination, registry)
                self.power_on()
            except BaseException:
                registry.finish()
                raise
            if self._outgoing is not None:
                self._telling = [each for each in (*self._telling, self._outgoing) if each.telling]
            self._outgoing = OutgoingMigration(
                self,
                self.plugins,
                destination,
                registry,
                global_state,
                self._journal,
                epoch=self._epoch,
                on_epoch=self._now_in,
                timing=timing,
                connector=connector,
            )
            self._outgoing.start()
            return self._outgoing

    def incoming(self, uri: str, *, start: bool | None = None) -> IncomingMigration:
        """Wait for a machine at `uri`; returns at once, with the URI to migrate to in `.uri`.

        `start`: None starts the guest if the source's ran and the handover was proved; True even without proof, where
        the transport has no way back; False leaves it paused. Raises StateError unless this machine is fresh or waits
        already without a migration in progress, ConfigError or ConnectError for the URI.
        """
        with self.lock:
            if self._closing:
                raise StateError("the machine is being closed")
            if self.run_state not in (RunState.PRELAUNCH, RunState.INMIGRATE):
                raise StateError(f"only a fresh machine can be the destination; this one is {self.run_state}")
            if self._incoming is not None and not self._incoming.status.finished:
                raise StateError("The incoming migration has already been started")
            if self._incoming is not None and self._incoming.ownership == "prepared":
                raise StateError(
                    "a machine that arrived whole waits for a decision here", hint="adopt() or discard() it first"
                )
            destination = resolve(uri, self.plugins)
            self._refuse_without_lanes(destination)
            listener = destination.listen(self.settings)
            try:
                self.expect_arrival()
            except BaseException:
                listener.close()
                raise
            if self._incoming is not None:
                self._incoming.close()
            self._incoming = IncomingMigration(
                self,
                self.plugins,
                listener,
                self._register,
                self._journal,
                start=start,
                several=destination.spec.several,
                on_epoch=self._now_in,
            )
            self._incoming.start()
            return self._incoming

    def cancel_migration(self) -> bool:
        """Cancel whatever migration runs (migrate_cancel); False if none does or it is too late."""
        migration = self.migration
        return migration is not None and migration.cancel()

    def close(self) -> None:
        """Cancel a migration that runs, shut the machine down and release its memory. Twice is fine.

        A migration that can no longer be cancelled is cut off, and ends undecided.
        """
        with self.lock:
            self._closing = True  # from here on none begins
            attempts = (*self._telling, self._outgoing, self._incoming)
        for attempt in attempts:
            if attempt is not None:
                attempt.close()
        if self._desk is not None:
            self._desk.close()
        super().close()
        self._journal.close()

    def _now_in(self, epoch: int) -> None:
        self._epoch = epoch

    def _refuse_without_lanes(self, destination: Destination) -> None:
        if self.settings.capabilities.multifd:
            if problems := missing_lanes(destination):
                raise ConfigError("; ".join(problems))
            Method.of(self.settings.parameters, self.plugins)

    def _refuse_a_second(self) -> None:
        if self._outgoing is not None and not self._outgoing.status.finished:
            raise StateError("There's a migration process in progress")
        if self.run_state is RunState.INMIGRATE:
            raise StateError("Guest is waiting for an incoming migration")
        if self.run_state is RunState.POSTMIGRATE:
            raise StateError("Can't migrate the vm that was paused due to previous migration")
        if self.run_state in (RunState.INTERNAL_ERROR, RunState.SHUTDOWN):
            raise MigrationRefused(f"a machine in {self.run_state} cannot be migrated")
        if self._closing:
            raise StateError("the machine is being closed")

    def _what_leaves(self, *, block: bool, incremental: bool) -> Leaving:
        if not (block or incremental or self.settings.capabilities.block):
            return Leaving.NOTHING
        allocated = incremental or (not block and self.settings.parameters.block_incremental)
        return Leaving.ALLOCATED if allocated else Leaving.EVERYTHING

    def _leaving(self) -> tuple[Registry, RunStateCarrier]:
        """The handlers that save this machine, and what is told its run state."""
        return self._register()

    def _register(self) -> tuple[Registry, GlobalStateHandler]:
        """This machine's handlers, made afresh for one migration."""
        global_state = GlobalStateHandler()
        specs = self.plugins.savevm_handlers(self, self.settings.plugins.savevm)
        handlers = [handler for spec in specs for handler in spec.create()]
        registry = Registry([*handlers, global_state])
        registry.refuse_namesakes()
        return registry, global_state


def _timing(name: str) -> HandoverTiming:
    try:
        return HandoverTiming(name)
    except ValueError:
        raise UnknownNameError("handover", name, HandoverTiming) from None


def manager_for(settings: Settings) -> PluginManager:
    """A plugin manager as `[plugins]` and `[backends]` say."""
    chosen = settings.plugins
    return PluginManager(
        disable=chosen.disable,
        active=chosen.active,
        notifiers=chosen.notifiers,
        prefer=chosen.prefer,
        verbs_provider=settings.backends.verbs_provider,
    )
