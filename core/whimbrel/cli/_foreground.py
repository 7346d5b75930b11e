"""Holds a machine in the foreground: says what happens to it, and decides when the process ends and how.

Everything that may happen (an event of the machine's, a signal, the monitor's `quit`) is put into one queue, and the
main thread alone takes from it.
"""

from __future__ import annotations

import signal
import time
from enum import Enum
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from whimbrel.cli._output import complain, note
from whimbrel.errors import GuestError, WhimbrelError
from whimbrel.events import Arrived, MigrationFinished, RunStateChanged
from whimbrel.machine import RunState
from whimbrel.migration import IncomingMigration, Machine, MigrationStatus
from whimbrel.units import format_seconds

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from whimbrel.monitor import MonitorServer

LINGER: Final = 2.0  # seconds that the monitor answers on after the machine has moved away or its guest has failed


class Word(Enum):
    """What is put into the queue besides events and signals."""

    QUIT = "quit"


class Foreground:
    """One machine's time in the foreground; a context manager, which hears its events meanwhile. The main thread.

    With `stay` a machine that has moved away is kept until told to quit. Behind a monitor (`monitored_by`) the process
    ends only when the monitor's clients have had time to learn how it ended.
    """

    def __init__(self, machine: Machine, *, stay: bool) -> None:
        self._machine, self._stay = machine, stay
        self._monitor: MonitorServer | None = None
        self._happened: SimpleQueue[object] = SimpleQueue()
        self._expected: IncomingMigration | None = None

    def monitored_by(self, server: MonitorServer) -> None:
        """Heed the clients of this monitor."""
        self._monitor = server

    def quit(self) -> None:
        """End the process, with status 0. Any thread."""
        self._happened.put(Word.QUIT)

    def interrupt(self, number: signal.Signals) -> None:
        """End the process as a signal does. Any thread."""
        self._happened.put(number)

    def expect(self, arriving: IncomingMigration) -> None:
        """Take the end of this wait for a machine for the process's own if it fails."""
        self._expected = arriving

    def stay_until_the_end(self) -> int:
        """Wait until the process should end; returns its exit status. Raises GuestError if the guest fails."""
        while True:
            status = self._react(self._happened.get())
            if status is not None:
                return status

    def __enter__(self) -> Self:
        self._machine.notifiers.add(self._happened.put)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._machine.notifiers.remove(self._happened.put)

    # ----------------------------------------------------------------------------------------- what happened

    def _react(self, happened: object) -> int | None:
        """Say what is to be said, and return the exit status if this is the end."""
        match happened:
            case signal.Signals():
                note(f"{happened.name}: the machine is stopped and ends here")
                return 128 + happened
            case Word.QUIT | RunStateChanged(new=RunState.SHUTDOWN):
                return 0
            case RunStateChanged(new=RunState.INTERNAL_ERROR):
                self._linger()
                raise self._machine.failure or GuestError(f"the guest failed: {self._machine.guest.failure!r}")
            case Arrived(running=running):
                note(f"the machine has arrived and {'runs here' if running else 'is paused here'}")
            case MigrationFinished(role="source"):
                return self._moved(happened)
            case MigrationFinished(role="destination"):
                return self._received(happened)
        return None

    def _moved(self, end: MigrationFinished) -> int | None:
        if end.status == MigrationStatus.CANCELLED:
            note("the migration was cancelled; the machine goes on here")
        elif end.status == MigrationStatus.FAILED and self._machine.run_state is RunState.POSTMIGRATE:
            complain(f"{end.error}; {self._held('x-whimbrel-reclaim and then cont')}")
        elif end.status == MigrationStatus.FAILED:
            complain(f"the migration failed: {end.error}; the machine goes on here")
        else:
            downtime = "" if end.downtime is None else f" (downtime {format_seconds(end.downtime)})"
            note(f"the machine has moved away{downtime}")
            if not self._stay:
                # Whoever starts another machine here may want the address at once.
                if self._monitor is not None:
                    self._monitor.stop_listening()
                self._linger()
                return 0
        return None

    def _held(self, commands: str) -> str:
        how = (
            f"by QMP that is {commands}"
            if self._monitor is not None
            else "without --qmp there is no telling this process"
        )
        return f"{how}; meanwhile it is held here, stopped"

    def _linger(self) -> None:
        """Give the monitor's clients time to ask how it ended."""
        until = time.monotonic() + LINGER
        try:
            while self._monitor is not None:
                happened = self._happened.get(timeout=max(0.0, until - time.monotonic()))
                if happened is Word.QUIT or isinstance(happened, signal.Signals):
                    break
        except Empty:
            pass

    def _received(self, end: MigrationFinished) -> int | None:
        if end.status == MigrationStatus.COMPLETED:
            return None
        arriving = self._expected if self._expected is not None else self._machine.migration
        if isinstance(arriving, IncomingMigration) and arriving.ownership == "owner":
            return None  # an operator has adopted it
        if isinstance(arriving, IncomingMigration) and arriving.ownership == "prepared":
            complain(f"{end.error}; {self._held('x-whimbrel-adopt, or x-whimbrel-discard')}")
            return None
        if self._expected is None:
            complain(f"{end.error}; waiting to be told where the next one arrives")
            return None
        complain(end.error)
        error = self._expected.error
        return error.exit_code if isinstance(error, WhimbrelError) else 1
