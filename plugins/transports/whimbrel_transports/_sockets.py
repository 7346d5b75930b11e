"""What the socket transports share: a channel, a listener and a connect that hold to `whimbrel.abc`.

The rules it lives by:

* **A descriptor is closed only when nobody is inside it.** `close` first shuts the socket down, which wakes whoever
  is blocked, and then waits for them to leave: otherwise another thread's next file could get the number that a
  reader is about to read from.
* **Each direction breaks by itself.** When the peer is gone a send fails at once, while its last words may still be
  waiting to be read. Once broken, or at its end, a direction stays so.
* **An OSError is translated once**, here, with the original as its cause.
* Buffer sizes are the kernel's business: setting them by hand turns its autotuning off.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import Channel, Listener, Patience
from whimbrel.errors import ChannelClosed, ChannelLost, ConnectError
from whimbrel_transports._gather import recv_scattered, send_gathered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

__all__ = [
    "BACKLOG",
    "SLICE",
    "SocketChannel",
    "SocketListener",
    "connect_socket",
    "connecting",
    "is_exposed",
    "is_loopback",
    "listening",
    "reason",
    "tune_tcp",
    "watch_tcp",
]

SLICE: Final = 0.05  # seconds a wait may last before the patience is asked again
SILENCE: Final = 10.0  # seconds, of a channel that nobody tells otherwise
PATIENCE: Final = 60.0
ASKS: Final = 6  # how often a silent host is asked before it is given up
KEEPALIVE_MAX: Final = 32767  # what the system takes
BACKLOG: Final = 128  # the channels of a multifd migration knock all at once


@attrs.define(eq=False)
class _Direction:
    lock: Lock = attrs.field(factory=Lock)
    lost: str = ""  # why nothing goes this way any more
    ended: bool = False


class SocketChannel(Channel):
    """A connected stream socket, which it takes over; of either family, from either end."""

    duplex = True

    def __init__(self, connected: socket.socket, peer: str) -> None:
        connected.settimeout(None)
        self.peer = peer
        self.exposed = is_exposed(connected)
        self._socket = connected
        self._in, self._out = _Direction(), _Direction()
        self._closing = Lock()
        self._closed = False

    def recv_into(self, buffer: Buffer) -> int:
        """Wait for at least one byte, as `Channel.recv_into` says."""
        with self._inside(self._in):
            if self._in.ended:
                return 0
            count = self._socket.recv_into(buffer)
            if count == 0:
                if self._closed:  # this is how the system wakes a reader
                    raise self._we_closed()
                if memoryview(buffer).nbytes == 0:
                    raise ValueError("a buffer to receive into must not be empty")
                self._in.ended = True
        return count

    def recv_scattered(self, vectors: npt.NDArray[np.uint64]) -> None:
        """Receive into memory by address, as `ScatteringChannel.recv_scattered` says."""
        with self._inside(self._in):
            if self._in.ended or not recv_scattered(self._socket.fileno(), vectors):
                if self._closed:
                    raise self._we_closed()
                self._in.ended = True
                raise ChannelLost(f"the bytes of {self.peer} ended where more were expected")

    def send(self, data: Buffer) -> None:
        """Send all of `data`, as `Channel.send` says."""
        with self._inside(self._out):
            if self._out.ended:
                raise ChannelClosed(f"writing to {self.peer} was ended")
            self._socket.sendall(data)

    def send_gathered(self, vectors: npt.NDArray[np.uint64]) -> None:
        """Send memory by address, as `GatheringChannel.send_gathered` says."""
        with self._inside(self._out):
            if self._out.ended:
                raise ChannelClosed(f"writing to {self.peer} was ended")
            send_gathered(self._socket.fileno(), vectors)

    def end_writing(self) -> None:
        """Shut our direction down, as `Channel.end_writing` says."""
        with self._inside(self._out):
            if not self._out.ended:
                self._socket.shutdown(socket.SHUT_WR)
                self._out.ended = True

    def watch(self, silence: float, patience: float) -> None:
        """Find out that a peer's host is gone, as `WatchfulChannel.watch` says; a socket that is not TCP's knows it."""
        with self._inside(self._out):
            watch_tcp(self._socket, silence, patience)

    def close(self) -> None:
        """Wake whoever is blocked, wait for them to leave and close the socket."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            with suppress(OSError):  # the peer may have reset it
                self._socket.shutdown(socket.SHUT_RDWR)
            with self._in.lock, self._out.lock:
                self._socket.close()

    @contextmanager
    def _inside(self, direction: _Direction) -> Iterator[None]:
        with direction.lock:
            if self._closed:
                raise self._we_closed()
            if direction.lost:
                raise ChannelLost(direction.lost)
            try:
                yield
            except OSError as error:
                if self._closed:
                    raise self._we_closed() from error
                direction.lost = f"the connection to {self.peer} broke: {reason(error)}"
                raise ChannelLost(direction.lost) from error

    def _we_closed(self) -> ChannelClosed:
        return ChannelClosed(f"the connection to {self.peer} was closed on this side")


class SocketListener(Listener):
    """A listening socket, which it takes over.

    `welcome` makes a channel of an accepted socket and where it comes from, or returns None for a peer it refuses,
    which is then hung up on. `cleanup` removes what `listen` made besides the socket.
    """

    def __init__(
        self,
        listener: socket.socket,
        uri: str,
        welcome: Callable[[socket.socket, object], Channel | None],
        cleanup: Callable[[], None] = lambda: None,
    ) -> None:
        listener.setblocking(False)
        self.uri = uri
        self.exposed = is_exposed(listener)
        self._socket = listener
        self._welcome = welcome
        self._cleanup = cleanup
        self._accepting = Lock()
        self._closing = Lock()
        self._closed = False

    def accept(self, patience: Patience) -> Channel:
        """Wait for the next peer that is welcome, as `Listener.accept` says; ChannelClosed once it is closed."""
        what = f"waiting for a peer at {self.uri}"
        with self._accepting:
            while not self._closed:
                patience.check(what)
                if not _wait(self._socket, select.POLLIN, patience):
                    continue
                try:
                    accepted, address = self._socket.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue  # it changed its mind
                except OSError as error:
                    if self._closed:
                        break
                    raise ConnectError(f"{what} failed: {reason(error)}") from error
                channel = self._greet(accepted, address)
                if channel is not None:
                    return channel
        raise ChannelClosed(f"the listener at {self.uri} was closed")

    def close(self) -> None:
        """Wake a blocked `accept`, wait for it to leave, close the socket and clean up."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            with self._accepting:
                self._cleanup()
                self._socket.close()

    def _greet(self, accepted: socket.socket, address: object) -> Channel | None:
        channel = None
        try:
            with suppress(OSError):  # gone again already
                channel = self._welcome(accepted, address)
        finally:
            if channel is None:
                accepted.close()
        return channel


@contextmanager
def connecting(where: str) -> Iterator[None]:
    """Translate an OSError on the way to `where`, in QEMU's words."""
    with _mapped(f"Failed to connect to '{where}'"):
        yield


@contextmanager
def listening(where: str) -> Iterator[None]:
    """Translate an OSError while making a listener at `where`."""
    with _mapped(f"Failed to listen on '{where}'"):
        yield


def connect_socket(family: int, address: object, where: str, patience: Patience) -> socket.socket:
    """Connect a stream socket to `address`, called `where` in messages.

    Raises ConnectError and MigrationCancelled, leaving nothing behind.
    """
    what = f"connecting to '{where}'"
    with connecting(where):
        patience.check(what)
        fresh = socket.socket(family, socket.SOCK_STREAM)
        try:
            fresh.setblocking(False)
            code = fresh.connect_ex(address)  # type: ignore[arg-type] # of the family's own shape
            while code == errno.EAGAIN:  # a unix listener's queue is full, and nothing tells when it is not
                patience.check(what)
                patience.cancelled.wait(SLICE / 10)
                code = fresh.connect_ex(address)  # type: ignore[arg-type]
            if code == errno.EINPROGRESS:
                while not _wait(fresh, select.POLLOUT, patience):
                    patience.check(what)
                code = fresh.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            fresh.setblocking(True)
        except BaseException:
            fresh.close()
            raise
        return fresh


def is_exposed(opened: socket.socket) -> bool:
    """Whether what goes through this socket leaves the host, or comes from outside: TCP that is not all loopback."""
    if not _is_tcp(opened):
        return False
    ends = [opened.getsockname()]
    with suppress(OSError):  # one that listens has no peer
        ends.append(opened.getpeername())
    return not all(is_loopback(host) for host, *_ in ends)


def is_loopback(host: str) -> bool:
    """Whether an address (not a name) is of this host alone; an unspecified one is every address that there is."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def tune_tcp(connected: socket.socket) -> None:
    """Let small writes go out at once and dead peers be noticed; a socket that is none of TCP stays as it is."""
    if _is_tcp(connected):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        watch_tcp(connected, SILENCE, PATIENCE)


def watch_tcp(connected: socket.socket, silence: float, patience: float) -> None:
    """Have the system ask a silent peer's host whether it is there, and give up one that does not answer. In seconds.

    A host that died says nothing: without this the system would wait for two hours, with data or without.
    """
    if not _is_tcp(connected):
        return
    whole, asks = max(1, round(silence)), max(1, round(patience / ASKS))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(silence > 0))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(whole, KEEPALIVE_MAX))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, min(asks, KEEPALIVE_MAX))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, ASKS)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(patience * 1000))


def _is_tcp(opened: socket.socket) -> bool:
    return opened.family in {socket.AF_INET, socket.AF_INET6} and opened.proto in {0, socket.IPPROTO_TCP}


def _wait(waiting: socket.socket, events: int, patience: Patience) -> bool:
    poller = select.poll()
    poller.register(waiting, events)
    return bool(poller.poll(min(SLICE, patience.remaining()) * 1000))


@contextmanager
def _mapped(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConnectError(f"{what}: {reason(error)}") from error


def reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
