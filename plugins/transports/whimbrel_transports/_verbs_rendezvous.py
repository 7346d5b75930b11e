"""How two ends of emulated verbs meet: over TCP, and from there through shared memory where they are on one host.

Who connects sends a greeting (what it can do, and the boot it lives in) over TCP; who listens answers with the way to
take. `SHARED` goes with the path of a unix socket and a token: whoever connects there and shows the token is on this
host, and of this user or root by the kernel's word, and the TCP connection is dropped. Where that path leads nowhere
(another file system, another network of containers), the greeting comes again, without SHARED. The socket is in a
folder of mode 0700, which goes with the listener.

Strangers who knock cost a place among the waiting, for a while: all are heard by whoever calls `get_request`, none of
them is waited for.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from enum import IntFlag
from pathlib import Path
from typing import Any, Final

import attrs

from whimbrel.abc import Patience
from whimbrel.errors import ChannelClosed, ConfigError, ConnectError, StreamError
from whimbrel.verbs import CmListener, ConnectionId, VerbsProvider
from whimbrel_transports._hosts import LOOPBACK, look_up_patiently
from whimbrel_transports._sockets import BACKLOG, SLICE, connect_socket, connecting, listening, reason, tune_tcp
from whimbrel_transports._verbs_connection import Connection, receive_exactly
from whimbrel_transports._verbs_frames import HEADER, Kind, parse

__all__ = ["Emulation", "Ways"]

_MAGIC: Final = b"whimverb"
_VERSION: Final = 1
_GREETING: Final = struct.Struct("!8sII16s")  # magic, version, ways, boot
_ANSWER: Final = struct.Struct("!8sIIH108s16s")  # magic, version, way, bytes of the path, path, token
_TOKEN: Final = struct.Struct("!8s16s")
_CREDENTIALS: Final = struct.Struct("iII")
_LONGEST: Final = 107
_KNOCKING: Final = 10.0  # seconds a stranger may take to say what it wants
_MOST: Final = 256  # strangers at once


class Ways(IntFlag):
    """How two ends can be connected."""

    SOCKET = 1
    SHARED = 2


class Emulation(VerbsProvider):
    """Verbs in software, over the ways it was made with; where both ends have both, the faster one that works."""

    def __init__(self, ways: Ways) -> None:
        self._ways = ways

    def listen(self, host: str, port: int) -> CmListener:
        """Listen on TCP, as `VerbsProvider.listen` says."""
        _check_address(host, port)
        where = f"{host}:{port}"
        failure = ConnectError(f"Failed to listen on '{where}': it has no address")
        for family, address in _look_up(host, port, where, flags=socket.AI_PASSIVE):
            try:
                with listening(where):
                    return _Listener(family, address, self._ways)
            except ConnectError as error:
                failure = error
        raise failure

    def resolve(self, host: str, port: int, patience: Patience) -> ConnectionId:
        """Connect and agree on the way, as `VerbsProvider.resolve` says; waits for the peer's `get_request`."""
        _check_address(host, port)
        where = f"{host}:{port}"
        if port == 0:
            raise ConfigError(f"cannot connect to {where!r}: port 0 is for listening on a free one")
        failure = ConnectError(f"Failed to connect to '{where}': it has no address")
        looked_up = look_up_patiently(lambda: _look_up(host or LOOPBACK, port, where), host or LOOPBACK, patience)
        for family, address in looked_up:
            try:
                connected = connect_socket(family, address, where, patience)
            except ConnectError as error:
                if patience.remaining() <= 0:
                    raise
                failure = error
                continue
            return _greet(connected, where, self._ways, patience)
        raise failure


def _greet(connected: socket.socket, where: str, ways: Ways, patience: Patience) -> Connection:
    """Agree with who listens; takes the socket over."""
    try:
        with connecting(where):
            if connected.getsockname() == connected.getpeername():
                raise ConnectionRefusedError("Connection refused")
            tune_tcp(connected)
            way, path, token = _ask(connected, ways, patience)
            if way is Ways.SHARED:
                line = _knock(path, token, where, patience)
                if line is not None:
                    connected.close()
                    return Connection(line, f"{where} (shared memory)")
                if Ways.SOCKET in ways:
                    way, _, _ = _ask(connected, Ways.SOCKET, patience)
            if way is not Ways.SOCKET:
                raise ConnectError(
                    f"{where} and this process have no way in common: this one offers {_named(ways)}",
                    hint="shared memory needs one host, one user and one file system; `verbs-provider` chooses",
                )
        return Connection(connected, f"{where} (TCP)")
    except StreamError as error:
        connected.close()
        raise ConnectError(f"Failed to connect to '{where}': no emulated verbs there: {error}") from error
    except BaseException:
        connected.close()
        raise


def _ask(connected: socket.socket, ways: Ways, patience: Patience) -> tuple[Ways, bytes, bytes]:
    connected.sendall(_GREETING.pack(_MAGIC, _VERSION, ways, _boot()))
    data = receive_exactly(connected, _ANSWER.size, patience, "agreeing on a way")
    magic, version, way, length, path, token = _ANSWER.unpack(data)
    if magic != _MAGIC or version != _VERSION or way not in (0, 1, 2) or length > _LONGEST:
        raise StreamError(f"it answered with {data[:16]!r}…")
    if way and not ways & way:
        raise StreamError(f"it chose a way that was not offered ({way})")
    return Ways(way), path[:length], token


def _knock(path: bytes, token: bytes, where: str, patience: Patience) -> socket.socket | None:
    """The socket at the other end of shared memory, or None where there is no way to it."""
    try:
        line = connect_socket(socket.AF_UNIX, os.fsdecode(path), where, patience)
    except ConnectError:
        patience.check("connecting to shared memory")
        return None
    try:
        if _user_of(line) in {os.geteuid(), 0}:
            line.sendall(_TOKEN.pack(_MAGIC, token))
            return line
    except OSError:
        pass
    except BaseException:
        line.close()
        raise
    line.close()
    return None


@attrs.define(eq=False)
class _Stranger:
    """Somebody who has connected and not yet asked for a connection."""

    socket: socket.socket
    dialogue: Generator[int, bytes, Connection | None]
    wanted: int = 0
    data: bytearray = attrs.field(factory=bytearray)
    until: float = attrs.field(factory=lambda: time.monotonic() + _KNOCKING)


class _Listener(CmListener):
    """Two listening sockets: TCP for whoever comes, and a unix one for those who are on this host."""

    def __init__(self, family: int, address: Any, ways: Ways) -> None:
        self._ways = ways
        self._tokens: dict[bytes, float] = {}  # given out, and until when they are good
        self._strangers: dict[int, _Stranger] = {}
        self._asking = threading.Lock()
        self._closing = threading.Lock()
        self._closed = False
        self._folder = ""
        self._unix: socket.socket | None = None
        self._tcp = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._tcp.bind(address)
            self._tcp.listen(BACKLOG)
            self._tcp.setblocking(False)
            self.host, self.port = self._tcp.getsockname()[:2]
            if Ways.SHARED in ways:
                self._listen_here()
        except BaseException:
            self._release()
            raise

    def _listen_here(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="whimbrel-verbs-")  # of mode 0700
        path = str(Path(self._folder) / "socket")
        if len(os.fsencode(path)) > _LONGEST:
            return  # then there is no way but TCP
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unix.bind(path)
        self._unix.listen(BACKLOG)
        self._unix.setblocking(False)

    def get_request(self, patience: Patience) -> ConnectionId:
        """Hear strangers until one has asked for a connection, as `CmListener.get_request` says."""
        what = f"waiting for a request at {self.host}:{self.port}"
        with self._asking:
            while not self._closed:
                patience.check(what)
                found = self._hear(min(SLICE, patience.remaining()))
                if found is not None:
                    return found
        raise ChannelClosed(f"the listener at {self.host}:{self.port} was closed")

    def close(self) -> None:
        """Wake a blocked `get_request`, wait for it to leave, and release everything."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            with suppress(OSError):
                self._tcp.shutdown(socket.SHUT_RDWR)
            with self._asking:
                self._release()

    def _release(self) -> None:
        for stranger in list(self._strangers.values()):
            self._dismiss(stranger)
        self._tcp.close()
        if self._unix is not None:
            self._unix.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _hear(self, seconds: float) -> Connection | None:
        poller = select.poll()
        doors = {door.fileno(): door for door in (self._tcp, self._unix) if door is not None}
        for descriptor in (*doors, *self._strangers):
            poller.register(descriptor, select.POLLIN)
        for descriptor, _ in poller.poll(seconds * 1000):
            if descriptor in doors:
                self._open(doors[descriptor])
                continue
            found = self._listen_to(self._strangers[descriptor])
            if found is not None:
                return found
        now = time.monotonic()
        for stranger in [one for one in self._strangers.values() if one.until < now]:
            self._dismiss(stranger)
        self._tokens = {token: until for token, until in self._tokens.items() if until >= now}
        return None

    def _open(self, door: socket.socket) -> None:
        try:
            fresh, _ = door.accept()
        except OSError:
            return  # it changed its mind, or we have no descriptors left; the next look will tell
        if len(self._strangers) >= _MOST:
            self._dismiss(min(self._strangers.values(), key=lambda one: one.until))
        fresh.setblocking(False)
        dialogue = self._known(fresh) if door is self._unix else self._greeted(fresh)
        stranger = _Stranger(fresh, dialogue)
        self._strangers[fresh.fileno()] = stranger
        stranger.wanted = next(dialogue)

    def _listen_to(self, stranger: _Stranger) -> Connection | None:
        """Read what has come; the connection, if that was the last word of a request."""
        try:
            part = stranger.socket.recv(stranger.wanted - len(stranger.data))
            if not part:
                raise StreamError("it hung up")
            stranger.data += part
            while len(stranger.data) == stranger.wanted:
                data, stranger.data = bytes(stranger.data), bytearray()
                stranger.wanted = stranger.dialogue.send(data)
        except BlockingIOError:
            pass
        except StopIteration as end:
            found: Connection | None = end.value
            if found is None:
                self._dismiss(stranger)
            else:
                del self._strangers[stranger.socket.fileno()]
            return found
        except (OSError, StreamError):
            self._dismiss(stranger)
        return None

    def _dismiss(self, stranger: _Stranger) -> None:
        self._strangers.pop(stranger.socket.fileno(), None)
        stranger.dialogue.close()
        stranger.socket.close()

    def _greeted(self, fresh: socket.socket) -> Generator[int, bytes, Connection | None]:
        """What is said over TCP: a greeting, or two, and the request if it stays."""
        tune_tcp(fresh)
        host, port = fresh.getpeername()[:2]
        token = b""
        while True:
            data = yield _GREETING.size
            magic, version, ways, boot = _GREETING.unpack(data)
            if magic != _MAGIC or version != _VERSION:
                raise StreamError("no greeting of emulated verbs")
            common = self._ways & Ways(ways & 3)
            way = 0
            if Ways.SHARED in common and self._unix is not None and boot == _boot() and not token:
                way, token = Ways.SHARED, secrets.token_bytes(16)
                self._tokens[token] = time.monotonic() + _KNOCKING
            elif Ways.SOCKET in common:
                way = Ways.SOCKET
            path = os.fsencode(self._unix.getsockname()) if way == Ways.SHARED and self._unix is not None else b""
            _send_whole(fresh, _ANSWER.pack(_MAGIC, _VERSION, way, len(path), path, token))
            if way == 0:
                return None
            if way == Ways.SOCKET:
                return (yield from _requested(fresh, f"{host}:{port} (TCP)"))

    def _known(self, fresh: socket.socket) -> Generator[int, bytes, Connection | None]:
        """What is said over the unix socket: the token that TCP gave, and the request."""
        process, user = _credentials(fresh)
        if user not in {os.geteuid(), 0}:
            yield 1
            return None
        data = yield _TOKEN.size
        magic, token = _TOKEN.unpack(data)
        if magic != _MAGIC or self._tokens.pop(token, 0.0) < time.monotonic():
            return None
        return (yield from _requested(fresh, f"process {process} (shared memory)"))


def _requested(fresh: socket.socket, peer: str) -> Generator[int, bytes, Connection | None]:
    frame = parse((yield HEADER.size))
    if frame.kind is not Kind.REQUEST:
        raise StreamError(f"a verbs peer says {frame.kind.name} before it asks for a connection")
    data = (yield frame.size) if frame.size else b""
    fresh.setblocking(True)
    return Connection(fresh, peer, data)


def _send_whole(fresh: socket.socket, data: bytes) -> None:
    # A fresh socket has room for a few words; one that has not is hung up on.
    if fresh.send(data) != len(data):
        raise StreamError("it does not listen")


def _credentials(connected: socket.socket) -> tuple[int, int]:
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(raw)
    return process, user


def _user_of(connected: socket.socket) -> int:
    return _credentials(connected)[1]


def _boot() -> bytes:
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return bytes.fromhex(text.replace("-", ""))[:16]
    except (OSError, ValueError):
        return secrets.token_bytes(16)  # like nobody else's


def _named(ways: Ways) -> str:
    return " and ".join(way.name.lower() for way in Ways if way in ways and way.name)


def _check_address(host: str, port: int) -> None:
    if not 0 <= port <= 65535 or "\0" in host:
        raise ConfigError(f"the address {host!r}, port {port}, cannot be; expected a host and a port from 0 to 65535")


def _look_up(host: str, port: int, where: str, *, flags: int = 0) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags | socket.AI_NUMERICSERV)
    except UnicodeError as error:
        raise ConfigError(f"the address {where!r} has a host that cannot be: {error}") from error
    except OSError as error:
        raise ConnectError(f"address resolution failed for {where}: {reason(error)}") from error
    return [(family, address) for family, _, _, _, address in found]
