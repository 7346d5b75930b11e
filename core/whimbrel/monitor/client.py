"""A QMP client: asks a machine in another process, one command at a time, and keeps the events that come between.

It speaks to a monitor of whimbrel's and to a QEMU's alike.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from whimbrel.errors import MonitorError
from whimbrel.monitor import protocol
from whimbrel.monitor.addresses import parse_address

__all__ = ["MonitorClient"]

LONGEST_LINE: Final = 16 << 20  # bytes; a QEMU's answers can be long
MOST_EVENTS: Final = 10_000  # kept for somebody who never asks for them; the oldest go first
CHUNK: Final = 1 << 16


class MonitorClient:
    """A connection to a monitor, made by `connect`; for one thread. Use it as a context manager, or `close` it.

    Every method but `close` raises MonitorError once the other side is gone; the machine itself may well run on.
    """

    def __init__(self, connected: socket.socket, address: str, timeout: float) -> None:
        self.address = address
        self.timeout = timeout
        self.greeting: Mapping[str, Any] = {}
        self._socket = connected
        self._framer = protocol.Framer(LONGEST_LINE)
        self._replies: deque[dict[str, Any]] = deque()
        self._events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self._number = 0

    @classmethod
    def connect(cls, address: str, timeout: float = 10.0) -> Self:
        """Connect to the monitor at `address` and negotiate.

        `timeout` is how long to wait for the connection and for each answer, in seconds. Raises ConfigError for what
        is no address, and MonitorError where no monitor answers; nothing is left behind.
        """
        connected = _connected(address, timeout)
        try:
            client = cls(connected, address, timeout)
            client._negotiate()
        except BaseException:
            connected.close()
            raise
        return client

    def getfd(self, fdname: str, descriptor: int) -> None:
        """Pass a descriptor and name it, for `migrate` to ``fd:NAME`` and its like; ours stays ours, and open.

        Over a unix socket. Raises MonitorError as `execute` does.
        """
        self._execute("getfd", {"fdname": fdname}, [descriptor])

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """Carry out `command` and return what it returns; ``_`` in an argument's name is sent as ``-``.

        Raises MonitorError, with QMP's `error_class`, if the machine refuses, and without an answer within the timeout
        (it may still be carried out then).
        """
        return self._execute(command, {name.replace("_", "-"): value for name, value in arguments.items()}, ())

    def events(self) -> list[dict[str, Any]]:
        """The events that have come since they were last asked for, oldest first; does not wait."""
        try:
            while self._receive(0):
                pass
        except MonitorError:
            if not self._events:
                raise
        events = list(self._events)
        self._events.clear()
        return events

    def wait_event(self, names: str | Collection[str], timeout: float | None = None) -> dict[str, Any] | None:
        """Wait for the first event of one of `names` and return it; None if none comes within `timeout` seconds.

        One that has come already counts. The others are kept for `events`.
        """
        wanted = {names} if isinstance(names, str) else set(names)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            for event in self._events:
                if event["event"] in wanted:
                    self._events.remove(event)
                    return event
            if not self._receive(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return None

    def close(self) -> None:
        """Hang up; twice is fine."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --------------------------------------------------------------------------------------- internals

    def _execute(self, command: str, arguments: Mapping[str, Any], descriptors: Sequence[int]) -> Any:
        self._number += 1
        self._send(protocol.encode(protocol.command(command, arguments, self._number)), descriptors)
        deadline = time.monotonic() + self.timeout
        while True:
            reply = self._next_reply(deadline, f"to {command}")
            # An answer to a command that was given up on, or to none (an error without an id), is nobody's.
            if reply.get("id") == self._number:
                break
        if "error" in reply:
            raise _refusal(reply["error"])
        return reply.get("return")

    def _negotiate(self) -> None:
        first = self._next_reply(time.monotonic() + self.timeout, "that greets as a QMP monitor does")
        if "error" in first:
            raise _refusal(first["error"])
        if not isinstance(first.get("QMP"), dict):
            raise MonitorError(f"what listens at {self.address} is no QMP monitor", hint="is that the migration's URI?")
        self.greeting = first["QMP"]
        self.execute("qmp_capabilities")

    def _send(self, line: bytes, descriptors: Sequence[int]) -> None:
        self._socket.settimeout(self.timeout)
        if descriptors and self._socket.family != socket.AF_UNIX:
            raise MonitorError(f"a descriptor cannot be passed over {self.address}", hint="use a unix socket")
        try:
            sent = socket.send_fds(self._socket, [line], descriptors) if descriptors else 0
            self._socket.sendall(line[sent:])
        except OSError as exc:
            raise self._gone(exc.strerror or str(exc)) from exc

    def _next_reply(self, deadline: float, what: str) -> dict[str, Any]:
        while not self._replies:
            if not self._receive(max(0.0, deadline - time.monotonic())):
                raise MonitorError(
                    f"no answer {what} came from {self.address} within {self.timeout:g} s",
                    hint="a machine is busy or its process stopped, or that is no monitor",
                )
        return self._replies.popleft()

    def _receive(self, seconds: float | None) -> bool:
        """Take what comes within `seconds`; False if nothing does."""
        self._socket.settimeout(seconds)
        try:
            data = self._socket.recv(CHUNK)
        except (TimeoutError, BlockingIOError):
            return False
        except OSError as exc:
            raise self._gone(exc.strerror or str(exc)) from exc
        if not data:
            raise self._gone("it hung up")
        for line in self._framer.feed(data):
            message = protocol.parse(line)
            if not isinstance(message, dict):
                raise MonitorError(f"what listens at {self.address} is no QMP monitor: it said {line[:60]!r}")
            (self._events if "event" in message else self._replies).append(message)
        return True

    def _gone(self, reason: str) -> MonitorError:
        return MonitorError(
            f"the machine at {self.address} is gone: {reason}", hint="its process has ended, or closed its monitor"
        )


def _connected(address: str, timeout: float) -> socket.socket:
    where = parse_address(address)
    try:
        return where.connect(timeout)
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        raise MonitorError(
            f"no machine listens at {address}", hint=f"`whimbrel run APP --qmp {address}` runs one that does"
        ) from exc
    except OSError as exc:
        raise MonitorError(f"cannot connect to {address}: {exc.strerror or exc}") from exc


def _refusal(error: object) -> MonitorError:
    fields = error if isinstance(error, dict) else {}
    return MonitorError(str(fields.get("desc", error)), error_class=str(fields.get("class", protocol.GENERIC_ERROR)))
