"""`unix:PATH`, as QEMU writes it: a socket in the file system.

Listening makes a socket file of mode 0600 and, on close, removes the file it made and no other. A socket file that
nobody listens on is replaced, anything else in that place is left alone. Only processes of the same user, or of
root, are let in: the mode of a socket file is not heeded everywhere.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from whimbrel.abc import Channel, Listener, Patience, Transport, TransportSpec
from whimbrel.errors import ConfigError
from whimbrel.hookspecs import hookimpl
from whimbrel_transports._sockets import BACKLOG, SocketChannel, SocketListener, connect_socket, listening

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["UnixTransport", "whimbrel_transports"]

_LONGEST: Final = 107  # bytes; sun_path has 108, the last of them a zero
_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: process, user, group

_log = logging.getLogger("whimbrel.transports.unix")


@hookimpl
def whimbrel_transports() -> Sequence[TransportSpec]:
    """Offer `unix:`."""
    return [
        TransportSpec(name="unix", summary="a socket in the file system, unix:PATH", create=UnixTransport, several=True)
    ]


class UnixTransport(Transport):
    """Channels over sockets in the file system."""

    def connect(self, address: str, patience: Patience) -> Channel:
        """Connect to the socket at `address`. Raises ConfigError, ConnectError and MigrationCancelled."""
        _check(address)
        return SocketChannel(connect_socket(socket.AF_UNIX, address, address, patience), f"unix:{address}")

    def listen(self, address: str) -> Listener:
        """Listen at `address`.

        Raises ConfigError where something else than a socket is and ConnectError where somebody listens already or
        no file can be made; what is there is left alone then.
        """
        _check(address)
        path = Path(address)
        with listening(address):
            _make_room(path)
            fresh = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            made: _Made | None = None
            try:
                # The mode of the file comes from the socket's, so there is no moment in which it is wider.
                os.fchmod(fresh.fileno(), 0o600)
                fresh.bind(address)
                made = _Made(path)
                fresh.listen(BACKLOG)
            except BaseException:
                if made is not None:
                    made.remove()
                fresh.close()
                raise
        return SocketListener(fresh, f"unix:{address}", lambda accepted, _: _welcome(accepted, address), made.remove)


class _Made:
    """The socket file that this process made."""

    def __init__(self, path: Path) -> None:
        # Of an absolute path, for the working directory may have changed when it is removed.
        self._path = path.absolute()
        self._identity = self._look()

    def remove(self) -> None:
        with suppress(OSError):
            if self._look() == self._identity:
                self._path.unlink()

    def _look(self) -> tuple[int, int]:
        found = self._path.lstat()
        return found.st_dev, found.st_ino


def _check(address: str) -> None:
    if not address or "\0" in address:
        raise ConfigError(f"the path of a unix socket is {address!r}; expected unix:PATH")
    length = len(os.fsencode(address))
    if length > _LONGEST:
        message = f"the path of a unix socket is {length} bytes long; the system's limit is {_LONGEST}: {address!r}"
        raise ConfigError(message, hint="use a shorter one, perhaps relative to the working directory")


def _make_room(path: Path) -> None:
    """Remove a socket that nobody listens on. Raises ConfigError for what is no socket, OSError for one in use."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"cannot listen at {str(path)!r}: it exists and is not a socket")
    # A datagram socket cannot connect to one of streams, but is told whether it is alive; a stream would be taken for
    # a peer by whoever listens.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    path.unlink(missing_ok=True)


def _welcome(accepted: socket.socket, address: str) -> Channel | None:
    process, user = _credentials(accepted)
    if user not in {os.geteuid(), 0}:
        _log.warning("unix:%s: refused process %d of user %d", address, process, user)
        return None
    return SocketChannel(accepted, f"unix:{address} (process {process})")


def _credentials(accepted: socket.socket) -> tuple[int, int]:
    """Process and user of the peer, as they were when it connected; the kernel's word."""
    raw = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(raw)
    return process, user
