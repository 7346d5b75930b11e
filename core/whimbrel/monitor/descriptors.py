"""Descriptors that a client passes with its messages (SCM_RIGHTS, over a unix socket), for migrations over `fd:NAME`.

They come with the bytes of a message, without a name, and wait until `getfd` gives the first of them one. What nobody
has named is closed when others come or the client goes, and so is what was named and not used. Both are bounded, for a
client can cost us no more than it could cost itself.

**Ownership moves once.** A migration is given the number; whoever makes its channel takes it from there. To say that it
was passed on purpose it is made inheritable for that moment, as a descriptor is that comes from a parent process.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from whimbrel.errors import MonitorError

if TYPE_CHECKING:
    from whimbrel.monitor.context import Context

__all__ = ["MOST_AT_ONCE", "MOST_NAMED", "Descriptors", "closefd", "getfd", "receive"]

MOST_AT_ONCE: Final = 16  # with one message, as in QEMU; the system closes those beyond
MOST_NAMED: Final = 64
LONGEST_NAME: Final = 255  # characters
_SPACE: Final = socket.CMSG_SPACE(MOST_AT_ONCE * array.array("i").itemsize)


def receive(connected: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Receive bytes and the descriptors that came with them, at most MOST_AT_ONCE, closed on exec. Raises OSError."""
    if connected.family != socket.AF_UNIX:
        return connected.recv(size), []
    data, ancillary, _, _ = connected.recvmsg(size, _SPACE, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
    return data, list(numbers)


class Descriptors:
    """What one client has passed. One thread."""

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._named: dict[str, int] = {}

    def came(self, numbers: Iterable[int]) -> None:
        """These came with a message; those that came before and have no name yet are closed."""
        _close(self._waiting)
        self._waiting = list(numbers)

    def name(self, name: str) -> None:
        """Name the first that waits; what had that name is closed. Raises MonitorError."""
        if not self._waiting:
            raise MonitorError("No file descriptor supplied via SCM_RIGHTS")
        number = self._waiting.pop(0)
        try:
            self._check(name)
        except MonitorError:
            os.close(number)
            raise
        if name in self._named:
            os.close(self._named[name])
        self._named[name] = number

    def _check(self, name: str) -> None:
        if name[:1] in _DIGITS:
            raise MonitorError("Parameter 'fdname' expects a name not starting with a digit")
        if len(name) > LONGEST_NAME:
            raise MonitorError(f"Parameter 'fdname' expects a name of at most {LONGEST_NAME} characters")
        if name not in self._named and len(self._named) >= MOST_NAMED:
            raise MonitorError(f"there are {MOST_NAMED} named file descriptors already, the most there may be")

    def close(self, name: str) -> None:
        """Close the one of that name. Raises MonitorError."""
        try:
            number = self._named.pop(name)
        except KeyError:
            raise MonitorError(f"File descriptor named '{name}' not found") from None
        os.close(number)

    @contextmanager
    def handed_over(self, uri: str, *, numbers: bool) -> Iterator[str]:
        """A migration's URI, with the number of the descriptor for its name. Raises MonitorError for an unknown name.

        Within, whoever is given the URI takes the descriptor, or leaves it and raises: then it keeps its name. With
        `numbers` one that begins with a digit is none of ours, but inherited.
        """
        name = uri.removeprefix("fd:")
        if name == uri or (numbers and name[:1] in _DIGITS):
            yield uri
            return
        if name not in self._named:
            raise MonitorError(f"File descriptor named '{name}' has not been found")
        number = self._named[name]
        os.set_inheritable(number, True)
        identity = _identity(number)
        try:
            yield f"fd:{number}"
        except BaseException:
            if _identity(number) == identity:
                os.set_inheritable(number, False)
            else:
                del self._named[name]
            raise
        del self._named[name]

    def end(self) -> None:
        """The client is gone: close everything. Twice is fine."""
        _close([*self._waiting, *self._named.values()])
        self._waiting.clear()
        self._named.clear()


_DIGITS: Final = frozenset("0123456789")


def getfd(context: Context, fdname: str) -> dict[str, Any]:
    """getfd: name a descriptor that was passed."""
    context.descriptors.name(fdname)
    return {}


def closefd(context: Context, fdname: str) -> dict[str, Any]:
    """closefd: close one that has a name."""
    context.descriptors.close(fdname)
    return {}


def _close(numbers: Iterable[int]) -> None:
    for number in numbers:
        with suppress(OSError):  # the end of its file may have an error to tell
            os.close(number)


def _identity(number: int) -> tuple[int, int, bool] | None:
    """What a number stands for, and whether it is closed on exec or was passed; None if nothing."""
    try:
        found = os.fstat(number)
        return found.st_dev, found.st_ino, os.get_inheritable(number)
    except OSError:
        return None
