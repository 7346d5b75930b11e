"""The monitor's server: listens where it is told, and connects clients to a machine.

A unix socket file is of mode 0600 and removed at the end; one that nobody listens on any more is replaced. Over TCP
there is no telling who connects, so an address that is not this host's own is warned of.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from whimbrel.errors import ConfigError, StateError
from whimbrel.events import Event
from whimbrel.migration import Machine
from whimbrel.monitor import events, protocol
from whimbrel.monitor.addresses import Address, parse_address
from whimbrel.monitor.commands import COMMANDS
from whimbrel.monitor.connection import Connection
from whimbrel.monitor.context import Context
from whimbrel.monitor.session import Session

__all__ = ["MonitorServer"]

MOST_CLIENTS: Final = 16
BACKLOG: Final = 16
PAUSE: Final = 0.1  # seconds until the next try; the system may have no descriptor left

_log = logging.getLogger("whimbrel.monitor")


class MonitorServer:
    """Lets QMP clients command `machine` at `address` (`unix:/path` or `tcp:host:port`).

    `on_quit` is called when a client has said `quit` and was answered, on that client's thread: it should only set
    the end of the program going, and may call `close`. Without it `quit` is refused. Use it as a context manager, or
    `start` and `close` it, before the machine is closed. Methods from any thread.

    A client may name a program to run (`exec:`) only with `allow_exec`: else whoever reaches the monitor could do on
    this host whatever this process can.
    """

    def __init__(
        self,
        machine: Machine,
        address: str,
        *,
        on_quit: Callable[[], object] | None = None,
        allow_exec: bool = False,
    ) -> None:
        self._machine, self._on_quit, self._allow_exec = machine, on_quit, allow_exec
        self._wanted = parse_address(address)
        self._address = self._wanted
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._made: os.stat_result | None = None
        self._connections: set[Connection] = set()
        self._numbers = itertools.count(1)
        self._deaf = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="whimbrel-monitor-accept", daemon=True)

    @property
    def address(self) -> str:
        """Where it listens, as `MonitorClient.connect` takes it; from `start` on with the port the system chose."""
        return str(self._address)

    def start(self) -> None:
        """Listen, and take clients; returns at once.

        Raises ConfigError where it cannot listen (somebody does already, a file that is no socket is there, …), with
        nothing left behind, and StateError if it was started before.
        """
        with self._lock:
            if self._listener is not None or self._deaf.is_set():
                raise StateError("a monitor's server is started once")
            try:
                self._listener = self._listen()
            except OSError as exc:
                raise ConfigError(f"cannot listen at {self._wanted}: {exc.strerror or exc}") from exc
        self._machine.notifiers.add(self._notice)
        self._thread.start()

    def stop_listening(self) -> None:
        """Take no more clients and give the address back; those there are stay. Twice is fine."""
        with self._lock:
            self._deaf.set()
            listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._remove_file()
            listener.close()

    def close(self) -> None:
        """Let all clients go, end all threads and remove the socket; twice is fine.

        Clients get what was said to them already, if they read it within a second. Waits for commands that are being
        carried out; called from within one (`on_quit`) it does not wait for that one.
        """
        self._machine.notifiers.remove(self._notice)
        self.stop_listening()
        with self._lock:
            self._closed = True
            connections = set(self._connections)
        for connection in connections:
            connection.end()
        for connection in connections:
            connection.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --------------------------------------------------------------------------------------- listening

    def _listen(self) -> socket.socket:
        if self._wanted.path:
            _make_room(Path(self._wanted.path))
        family, where = self._wanted.resolved()
        fresh = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == socket.AF_UNIX:
                # The mode of the file comes from the socket's, so there is no moment in which it is wider.
                os.fchmod(fresh.fileno(), 0o600)
                fresh.bind(where)
                self._address = Address(path=str(Path(where).absolute()))
                self._made = Path(where).lstat()
            else:
                fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                fresh.bind(where)
                host, port = fresh.getsockname()[:2]
                self._address = Address(host=host, port=port)
                if not ip_address(host.partition("%")[0]).is_loopback:
                    _log.warning("whoever can reach %s commands the machine %r", self._address, self._machine.name)
            fresh.listen(BACKLOG)
        except BaseException:
            self._remove_file()
            fresh.close()
            raise
        return fresh

    def _remove_file(self) -> None:
        """Remove the socket file that we made, and no other that took its place."""
        made, self._made = self._made, None
        if made is not None:
            path = Path(self._address.path)
            with suppress(OSError):
                if os.path.samestat(path.lstat(), made):
                    path.unlink()

    # ----------------------------------------------------------------------------------------- clients

    def _accept(self) -> None:
        listener = self._listener
        while listener is not None and not self._deaf.is_set():
            try:
                accepted, _ = listener.accept()
            except OSError as exc:
                if not self._deaf.wait(PAUSE):
                    _log.warning("%s: accepting a client failed: %s", self.address, exc)
                continue
            self._connect(accepted)

    def _connect(self, accepted: socket.socket) -> None:
        if accepted.family != socket.AF_UNIX:
            with suppress(OSError):
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        context = Context(self._machine, self._quit if self._on_quit else None, self._allow_exec)
        session = Session(context, COMMANDS)
        name = f"whimbrel-monitor-{next(self._numbers)}"
        with self._lock:
            if self._closed:
                accepted.close()
                return
            if len(self._connections) >= MOST_CLIENTS:
                _refuse(accepted)
                return
            connection = Connection(accepted, name, session, self._ended)
            self._connections.add(connection)
            connection.start()

    def _ended(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _notice(self, event: Event) -> None:
        """Tell the clients; called on the thread that delivers notices, which must not be held up."""
        message = events.as_qmp(event, migration_events=self._machine.settings.capabilities.events)
        if message is not None:
            self._tell(protocol.encode(message))

    def _tell(self, line: bytes) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.tell(line)

    def _quit(self) -> None:
        self._tell(protocol.encode(events.shutdown()))
        if self._on_quit is not None:
            self._on_quit()


def _refuse(accepted: socket.socket) -> None:
    with accepted, suppress(OSError):
        accepted.setblocking(False)
        accepted.send(
            protocol.encode(protocol.error(f"there are {MOST_CLIENTS} clients already, the most there may be"))
        )


def _make_room(path: Path) -> None:
    """Remove a socket that nobody listens on. Raises ConfigError for what is no socket, OSError for one in use."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"cannot listen at unix:{path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    path.unlink(missing_ok=True)
