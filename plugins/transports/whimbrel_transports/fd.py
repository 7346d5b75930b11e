"""`fd:NUMBER`: a descriptor that this process was given: a connected stream socket, or one end of a pipe.

It must have been passed on purpose, and is taken once. What this process opens by itself is closed on exec, what it
inherits or is handed (`os.set_inheritable`) is not: so only a descriptor that is not closed on exec is taken. Taking it
moves it to a number of our own and closes NUMBER at once, whatever comes of it; a second use finds a number that is not
open, or one that by now means something of our own, and is refused.

A socket carries bytes both ways; a pipe one way, so that there is no proof from the other end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Final

from whimbrel.abc import Channel, Listener, Patience, Transport, TransportSpec
from whimbrel.errors import ConfigError
from whimbrel.hookspecs import hookimpl
from whimbrel_transports._one_way import OnceListener, PipeChannel, widen
from whimbrel_transports._sockets import SocketChannel, connecting, is_exposed, listening, tune_tcp

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FdTransport", "whimbrel_transports"]

STANDARD: Final = 3  # descriptors below are the process's standard input, output and errors
LARGEST: Final = (1 << 31) - 1
_EXPECTED: Final = f"expected fd:NUMBER, a descriptor from {STANDARD} that was passed to this process"

_taking = Lock()  # looking at a number, moving and closing it are one step


@hookimpl
def whimbrel_transports() -> Sequence[TransportSpec]:
    """Offer `fd:`."""
    return [
        TransportSpec(
            name="fd",
            summary="a socket or a pipe that was passed to this process, fd:NUMBER",
            create=FdTransport,
            duplex_at=has_way_back,
            exposed_at=is_exposed_at,
        )
    ]


class FdTransport(Transport):
    """Channels over descriptors that were passed; it takes them over."""

    def connect(self, address: str, patience: Patience) -> Channel:
        """Take the socket, or the writing end of a pipe, `address`.

        Raises ConfigError for what is no such thing, ConnectError for a number that is not open or was not passed, and
        MigrationCancelled. The descriptor is closed then, unless it was not passed.
        """
        number = _parse(address)
        with connecting(f"fd:{address}"):
            descriptor = _take(number)
            try:
                patience.check(f"taking descriptor {number}")
                return _channel(descriptor, address, writes=True)
            except BaseException:
                os.close(descriptor)
                raise

    def listen(self, address: str) -> Listener:
        """Take the socket, or the reading end of a pipe, `address`. Raises as `connect` does."""
        number, uri = _parse(address), f"fd:{address}"
        with listening(uri):
            descriptor = _take(number)
            try:
                _judge(descriptor, address, writes=False)
            except BaseException:
                os.close(descriptor)
                raise
        return OnceListener(
            uri,
            lambda seconds: bool(_polled(descriptor, select.POLLIN, seconds)),
            lambda: _channel(descriptor, address, writes=False),
            lambda: os.close(descriptor),
        )


def has_way_back(address: str) -> bool:
    """Whether the descriptor there is none of a pipe, as far as can be told without taking it."""
    with suppress(OSError, ConfigError):
        return not stat.S_ISFIFO(os.fstat(_parse(address)).st_mode)
    return True


def is_exposed_at(address: str) -> bool:
    """Whether the descriptor there is a socket that leads out of this host, as far as can be told without taking it."""
    with suppress(OSError, ConfigError):
        number = _parse(address)
        if stat.S_ISSOCK(os.fstat(number).st_mode):
            with socket.socket(fileno=os.dup(number)) as found:
                return is_exposed(found)
    return False


def _parse(address: str) -> int:
    if not (address.isascii() and address.isdigit() and len(address) <= 10 and int(address) <= LARGEST):
        raise ConfigError(f"the descriptor {address!r} is no number; {_EXPECTED}")
    if int(address) < STANDARD:
        raise ConfigError(f"the descriptor {address} is this process's standard input or output; {_EXPECTED}")
    return int(address)


def _take(number: int) -> int:
    """Move the descriptor to a number of our own, closed on exec. Raises OSError if it is not there to be taken."""
    with _taking:
        try:
            flags = fcntl.fcntl(number, fcntl.F_GETFD)
        except OSError as error:
            raise OSError(error.errno, f"descriptor {number} is not open, or was taken already") from error
        if flags & fcntl.FD_CLOEXEC:
            raise PermissionError(
                f"descriptor {number} was not passed to this process but is its own, being closed on exec; "
                f"os.set_inheritable({number}, True) says that it may be taken"
            )
        descriptor = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, STANDARD)
        os.close(number)
        return descriptor


def _judge(descriptor: int, address: str, *, writes: bool) -> bool:
    """Whether it is a socket, and not a pipe. Raises ConfigError for what is neither, or goes the wrong way."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        _judge_socket(descriptor, address)
        return True
    if not stat.S_ISFIFO(mode):
        hint = "write file:PATH for a file" if stat.S_ISREG(mode) else ""
        raise ConfigError(f"descriptor {address} is {_kind(mode)}; expected a socket or a pipe", hint=hint)
    access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    if access not in {os.O_RDWR, os.O_WRONLY if writes else os.O_RDONLY}:
        needed, came = ("writing", "reading") if writes else ("reading", "writing")
        raise ConfigError(f"descriptor {address} is the {came} end of a pipe; expected the {needed} end")
    return False


def _judge_socket(descriptor: int, address: str) -> None:
    found = socket.socket(fileno=descriptor)
    try:
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
            raise ConfigError(f"descriptor {address} is a socket of messages; expected one of streams")
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError(f"descriptor {address} is a listening socket; expected a connected one")
        try:
            found.getpeername()
        except OSError as error:
            raise ConfigError(f"descriptor {address} is a socket that is not connected: {error.strerror}") from error
    finally:
        found.detach()


def _kind(mode: int) -> str:
    for is_it, name in (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if is_it(mode):
            return name
    return "neither a socket, a pipe nor a file"


def _channel(descriptor: int, address: str, *, writes: bool) -> Channel:
    """A channel over `descriptor`, which it takes over unless it raises ConfigError or OSError."""
    peer = f"fd:{address}"
    if _judge(descriptor, address, writes=writes):
        connected = socket.socket(fileno=descriptor)
        try:
            tune_tcp(connected)
            return SocketChannel(connected, peer)
        except BaseException:
            connected.detach()
            raise
    if writes and _polled(descriptor, 0, 0.0):
        raise BrokenPipeError(errno.EPIPE, "nobody has the reading end of the pipe any more")
    own = _reopened(descriptor, os.O_WRONLY if writes else os.O_RDONLY)
    os.close(descriptor)
    widen(own)
    return PipeChannel(own, peer, writes=writes)


def _reopened(descriptor: int, access: int) -> int:
    """The pipe opened anew, not to block: with `descriptor` whoever else holds it would no longer block as well."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", access | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):  # there is no /proc, or it is the pipe of another user
        own = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, STANDARD)
        os.set_blocking(own, False)
        return own


def _polled(descriptor: int, events: int, seconds: float) -> int:
    """Those of `events` that have come, and whether the other end is gone; 0 if nothing comes in time."""
    poller = select.poll()
    poller.register(descriptor, events)
    found = poller.poll(seconds * 1000)
    return found[0][1] if found else 0
