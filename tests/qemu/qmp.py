"""QMP as it is said and heard: a client that hides nothing, and what can be asked of whoever has a monitor.

It is not `whimbrel.monitor.MonitorClient`, since it is what that one's server is judged with.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

__all__ = ["PATIENCE", "Monitored", "Qmp", "QmpError", "spell"]

PATIENCE: Final = 60.0  # seconds; only a hang ever waits so long
CHUNK: Final = 1 << 20


class QmpError(Exception):
    """A command that was refused: `error_class` and `desc` are QMP's."""

    def __init__(self, error: Mapping[str, str]) -> None:
        super().__init__(f"{error['class']}: {error['desc']}")
        self.error_class, self.desc = error["class"], error["desc"]


class Qmp:
    """A client of a monitor, a QEMU's or whimbrel's, that shows everything as it came. One thread.

    `events` holds all events so far, in order; `wait` goes through them and never back. Methods raise EOFError when
    the other side is gone, and TimeoutError.
    """

    def __init__(self, connected: socket.socket, *, negotiate: bool = True) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = connected
        self._data = b""
        self._waited = 0
        self.greeting = self._next(time.monotonic() + PATIENCE)
        if negotiate:
            self.execute("qmp_capabilities")

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """Carry out `command` and return what it returned; ``_`` in an argument's name is sent as ``-``."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        reply = self.ask({"execute": command, **({"arguments": named} if named else {})})
        if "error" in reply:
            raise QmpError(reply["error"])
        return reply["return"]

    def ask(self, message: bytes | Mapping[str, Any]) -> dict[str, Any]:
        """Say `message`, as it is, and return the reply to it, as it is."""
        self.say(message)
        return self.reply()

    def say(self, message: bytes | Mapping[str, Any]) -> None:
        """Send `message` and wait for nothing."""
        self._socket.settimeout(PATIENCE)
        self._socket.sendall(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    def pass_descriptor(self, name: str, descriptor: int) -> None:
        """Pass an open file for `fd:NAME` (getfd); the caller keeps its own."""
        command = {"execute": "getfd", "arguments": {"fdname": name}}
        socket.send_fds(self._socket, [json.dumps(command).encode() + b"\n"], [descriptor])
        if "error" in (reply := self.reply()):
            raise QmpError(reply["error"])

    def reply(self) -> dict[str, Any]:
        """Wait for the next reply."""
        deadline = time.monotonic() + PATIENCE
        while "event" in (message := self._next(deadline)):
            self.events.append(message)
        return message

    def wait(self, name: str, **data: Any) -> dict[str, Any]:
        """Wait for the next event `name` whose data has what `data` says, and return it. Those before it are passed."""
        return self.wait_for(lambda event: event["event"] == name and data.items() <= event.get("data", {}).items())

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for the next event that is `wanted` and return it. Those before it are passed."""
        deadline = time.monotonic() + PATIENCE
        while True:
            while self._waited < len(self.events):
                event = self.events[self._waited]
                self._waited += 1
                if wanted(event):
                    return event
            message = self._next(deadline)
            if "event" not in message:
                raise AssertionError(f"a reply that nobody asked for: {message}")
            self.events.append(message)

    def forget(self) -> None:
        """Begin anew with no events."""
        self.events.clear()
        self._waited = 0

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._data:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._socket.recv(CHUNK)
            except TimeoutError:
                raise TimeoutError(f"the monitor says nothing more; events so far: {spell(self.events)}") from None
            if not data:
                raise EOFError("the monitor hung up")
            self._data += data
        line, _, self._data = self._data.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message


def spell(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Events in a word or two each, as the wire format's tables of orders have them (section 10.5)."""
    return [_spelled(event["event"], event.get("data", {})) for event in events]


def _spelled(name: str, data: Mapping[str, Any]) -> str:
    if name == "MIGRATION":
        return str(data["status"])
    return f"PASS {data['pass']}" if name == "MIGRATION_PASS" else name


class Monitored:
    """Something with a monitor, a QEMU or a machine of whimbrel's. Its `events` must be on for `wait_status`."""

    qmp: Qmp

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """Carry out a command of the monitor; see `Qmp.execute`."""
        return self.qmp.execute(command, **arguments)

    def switch_on(self, *capabilities: str) -> None:
        """Switch migration capabilities on."""
        wanted = [{"capability": name, "state": True} for name in capabilities]
        self.execute("migrate-set-capabilities", capabilities=wanted)

    def migrate(self, uri: str, **arguments: Any) -> None:
        """Begin a migration to `uri`; returns at once."""
        self.execute("migrate", uri=uri, **arguments)

    def wait_status(self, *statuses: str) -> str:
        """Wait until the migration comes to one of `statuses`, from where was waited last; returns which."""
        event = self.qmp.wait_for(
            lambda event: event["event"] == "MIGRATION" and event.get("data", {}).get("status") in statuses
        )
        return str(event["data"]["status"])

    def run_state(self) -> str:
        """The run state, as query-status has it."""
        return str(self.execute("query-status")["status"])

    def wait_run_state(self, state: str) -> None:
        """Wait until the run state is `state`."""
        deadline = time.monotonic() + PATIENCE
        pause = threading.Event()
        while (found := self.run_state()) != state:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run state is {found}, and never becomes {state}")
            pause.wait(0.002)
