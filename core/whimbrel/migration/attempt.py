"""What both sides of a migration have in common: a thread, a status, a channel, and an end that always comes.

How an end comes about, whichever: something raises on the thread, is caught in `_run` and nowhere else, and the side's
own `_settle` brings machine, channel and handlers to rest. Whatever is raised counts, SystemExit out of a device's hook
too: a guest must not be left standing still because a plugin wanted to leave.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from typing import ClassVar

from whimbrel.abc import Channel
from whimbrel.errors import MigrationCancelled, MigrationError, WhimbrelError
from whimbrel.events import MigrationFinished, StateChanged
from whimbrel.machine import BareMachine
from whimbrel.migration.quietly import quietly
from whimbrel.migration.statistics import MigrationInfo
from whimbrel.migration.status import MigrationStatus, Moves, StatusMachine
from whimbrel.plugins import PluginManager

_log = logging.getLogger("whimbrel")


class Attempt(ABC):
    """One side of one migration. Public methods from any thread."""

    role: ClassVar[str]

    def __init__(self, machine: BareMachine, plugins: PluginManager, moves: Moves, thread: str) -> None:
        self._machine, self._plugins = machine, plugins
        self._status = StatusMachine(moves, self._status_moved)
        self._deciding = threading.Lock()  # a cancel, the handover, the end and an operator's word exclude each other
        self._settled = False
        self._channel: Channel | None = None
        self._error: WhimbrelError | None = None
        self._thread = threading.Thread(target=self._run, name=thread, daemon=True)

    @property
    def status(self) -> MigrationStatus:
        """How far it is."""
        return self._status.now

    @property
    def error(self) -> WhimbrelError | None:
        """Why it did not succeed, once it has ended."""
        return self._error

    @property
    @abstractmethod
    def info(self) -> MigrationInfo:
        """Everything that is known now."""

    def start(self) -> None:
        """Begin; called once."""
        self._status.move(MigrationStatus.SETUP)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> MigrationInfo:
        """Wait for the end and return what is known then.

        Raises TimeoutError if it has not come within `timeout` seconds (the migration goes on), MigrationCancelled,
        or whatever made it fail. Notifiers have heard of the end, unless one takes longer than a second.
        """
        if not self._status.wait_finished(timeout):
            raise TimeoutError(f"the {self.role}'s migration is still {self.status} after {timeout:g} s")
        self._thread.join()
        self._machine.notifiers.drain(timeout=1.0)
        if self._error is not None:
            raise self._error
        return self.info

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    @abstractmethod
    def cancel(self) -> bool:
        """End it, as long as that is possible; False if it is too late. Returns at once."""

    def close(self) -> None:
        """End it whatever that means, and wait for its thread: the machine is about to go away."""
        if not self.cancel():
            self._hang_up()
        self._thread.join()

    @abstractmethod
    def _work(self) -> None:
        """Do all of it. On the thread."""

    @abstractmethod
    def _settle(self, error: WhimbrelError | None, *, cancelled: bool) -> WhimbrelError | None:
        """Bring everything to rest after `error`, or success; returns what is the matter in the end. On the thread."""

    @abstractmethod
    def _downtime(self) -> float | None:
        """The blackout in seconds, as far as this side knows."""

    def _run(self) -> None:
        error: WhimbrelError | None = None
        try:
            self._work()
        except WhimbrelError as exc:
            error = exc
        except BaseException as exc:  # noqa: BLE001 - see the module's first lines
            error = unexpected(exc)
        with self._deciding:
            self._settled = True
            cancelled = self._status.now is MigrationStatus.CANCELLING
        try:
            error = self._settle(error, cancelled=cancelled)
        except BaseException as exc:  # noqa: BLE001 - the status must come to its end all the same
            error = error or unexpected(exc)
        self._finish(MigrationCancelled(self._cancelled_text) if cancelled else error, cancelled=cancelled)

    _cancelled_text: ClassVar[str]

    def _finish(self, error: WhimbrelError | None, *, cancelled: bool) -> None:
        self._error = error
        end = MigrationStatus.CANCELLED if cancelled else MigrationStatus.FAILED if error else MigrationStatus.COMPLETED
        downtime = None if error is not None else self._downtime()
        reason = "" if error is None else str(error)
        self._machine.notifiers.emit(MigrationFinished(role=self.role, status=end, downtime=downtime, error=reason))
        self._status.move(end)

    def _hang_up(self) -> None:
        """Close the channel, if there is one: whoever is blocked in it wakes."""
        if self._channel is not None:
            quietly(self._channel.close, "closing the channel")

    def _move(self, to: MigrationStatus) -> None:
        if not self._status.try_move(to):
            raise MigrationCancelled(f"cancelled before {to}")

    def _status_moved(self, old: MigrationStatus, new: MigrationStatus) -> None:
        self._machine.notifiers.emit(StateChanged(role=self.role, old=old, new=new))

    def _failed_notifiers(self) -> tuple[str, ...]:
        failures = (f"{failure.plugin}: {failure.error}" for failure in self._plugins.failures)
        return (*self._machine.notifiers.failures, *failures)


def unexpected(exc: BaseException) -> MigrationError:
    """Make the error of a migration in which something was raised that nobody planned; the log has where."""
    _log.error("the migration failed unexpectedly", exc_info=exc)
    error = MigrationError(f"unexpected {type(exc).__name__}: {exc}", hint="this is a bug; the log has its place")
    error.__cause__ = exc
    return error
