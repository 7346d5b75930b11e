"""The two processes of `whimbrel demo`: a records machine in each, driven by lines of JSON.

    python -m whimbrel_examples.roles --role destination --incoming tcp:127.0.0.1:0
    python -m whimbrel_examples.roles --role source

Commands come on standard input, one object a line: `{"do": "migrate", "uri": …, "parameters": {…}}`, `cancel`, `stop`
and `check`. What happens goes to standard output, one object a line with its name under `event`, the `operations` so
far and `at`, the system's monotonic clock in seconds; `tick` comes ten times a second. The end of standard input ends
the process, so none outlives the one that started it. Errors are a sentence on
standard error and the error's status.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

import whimbrel
from whimbrel.events import Event, RoundFinished
from whimbrel_examples import records

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TICK: Final = 0.1  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Be one of the two until standard input ends; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("source", "destination"), required=True)
    parser.add_argument("--size", type=int, default=records.SIZE)
    parser.add_argument("--seed", type=int, default=records.SEED)
    parser.add_argument("--rate", type=float, default=records.RATE)
    parser.add_argument("--guest", choices=("process", "thread"), default="thread")
    parser.add_argument("--incoming", default="tcp:127.0.0.1:0")
    asked = parser.parse_args(arguments)
    try:
        settings = whimbrel.Settings.load()
        shareable = asked.guest == "process" or (asked.incoming or "").startswith("rdma:")
        if shareable and settings.backends.memory == "anonymous":
            settings.backends.memory = "memfd"
        with records.machine(asked.size, asked.seed, asked.rate, settings, guest=asked.guest) as machine:
            role = Role(machine)
            role.begin(asked.incoming if asked.role == "destination" else None)
            role.serve()
    except whimbrel.WhimbrelError as exc:
        sys.stderr.write(f"{exc}\n")
        return exc.exit_code
    except BrokenPipeError:
        os._exit(1)  # nobody is left to tell, and flushing at exit would only raise again
    return 0


class Role:
    """One side of the demo. One thread."""

    def __init__(self, machine: whimbrel.Machine) -> None:
        self._machine = machine
        self._records = records.records_of(machine)
        self._migration: whimbrel.OutgoingMigration | None = None
        self._arriving: whimbrel.IncomingMigration | None = None
        machine.notifiers.add(self._notice)

    def begin(self, incoming: str | None) -> None:
        """Start working, or wait for a machine at `incoming`."""
        if incoming is None:
            self._machine.start()
            self._tell("ready")
        else:
            self._arriving = self._machine.incoming(incoming)
            self._tell("ready", uri=self._arriving.uri)

    def serve(self) -> None:
        """Obey commands and tell what happens until standard input ends."""
        for command in _commands():
            match command:
                case None:
                    self._tell("tick", **self._standing())
                case {"do": "migrate", "uri": str(uri), "parameters": dict(parameters)}:
                    self._machine.settings.parameters.update(parameters)
                    self._migration = self._machine.migrate(uri)
                    self._tell("migrating")
                case {"do": "cancel"}:
                    self._machine.cancel_migration()
                case {"do": "stop"}:
                    self._machine.stop()
                    self._tell("stopped")
                case {"do": "check"}:
                    self._tell("checked", **self._checked())
                case _:
                    raise whimbrel.errors.ConfigError(f"{command!r} is no command of the demo's")
            self._tell_of_ends()

    def _notice(self, event: Event) -> None:
        if isinstance(event, RoundFinished):
            self._tell("round", round=attrs.asdict(event.round))

    def _standing(self) -> dict[str, Any]:
        return {} if self._migration is None else {"migration": self._migration.info.as_dict()}

    def _tell_of_ends(self) -> None:
        if self._machine.failure is not None:
            raise self._machine.failure
        if self._migration is not None and self._migration.status.finished:
            migration, self._migration = self._migration, None
            migration.join()
            self._tell("ended", migration=migration.info.as_dict())
        if self._arriving is not None and self._arriving.status.finished:
            arriving, self._arriving = self._arriving, None
            arriving.wait()
            self._tell("arrived")

    def _checked(self) -> dict[str, Any]:
        """Compare every byte of the table with what as many operations from the same seed must have made of it."""
        table = self._records.table
        expected = records.replay(self._records.operations, self._records.seed, table.nbytes)
        differing = np.flatnonzero(table.view(np.uint8) != expected.view(np.uint8))
        first = int(differing[0]) if differing.size else None
        return {"bytes": table.nbytes, "differing": int(differing.size), "first": first}

    def _tell(self, event: str, **more: Any) -> None:
        told = {"event": event, "at": time.monotonic(), "operations": self._records.operations, **more}
        os.write(sys.stdout.fileno(), json.dumps(told).encode() + b"\n")


def _commands() -> Iterator[Any]:
    """The commands as they come, and None for every tick in between."""
    waiting, due = b"", time.monotonic() + TICK
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))
        if ready:
            came = os.read(sys.stdin.fileno(), 1 << 16)
            if not came:
                return
            *lines, waiting = (waiting + came).split(b"\n")
            yield from map(json.loads, lines)
        if time.monotonic() >= due:
            due = time.monotonic() + TICK
            yield None


if __name__ == "__main__":
    sys.exit(main())
