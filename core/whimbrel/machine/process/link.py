"""Letters between a machine's process and its guest's: a JSON object each, with descriptors where one needs them.

The socket keeps letters apart (SOCK_SEQPACKET). Whoever waits for one also waits for the end of the other process, by
its pidfd: the end of the socket alone would not do, since a process that either side has forked off may hold it open.
"""

from __future__ import annotations

import json
import os
import select
import socket
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from whimbrel.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Letter: TypeAlias = dict[str, Any]

LIMIT: Final = 1 << 17  # bytes of a letter; the system's send buffer takes a little more
_DESCRIPTORS: Final = 2  # with one letter


class Link:
    """One end of a socket, and who is at the other. Any thread may send; one thread at a time receives.

    `peer` is a pidfd, which belongs to the caller; the socket belongs to the Link.
    """

    def __init__(self, end: socket.socket, peer: int) -> None:
        self._socket, self._peer = end, peer
        self._either = select.poll()
        self._either.register(end, select.POLLIN)
        self._either.register(peer, select.POLLIN)

    def send(self, letter: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a letter; the descriptors stay ours too. Raises OSError if the other side is gone.

        Raises ConfigError for a letter that is too long.
        """
        data = json.dumps(letter).encode()
        if len(data) > LIMIT:
            raise ConfigError(f"{len(data)} bytes are too many for the guest's process, which takes {LIMIT} at once")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[Letter, list[int]] | None:
        """Wait for the next letter and its descriptors, which are the caller's then; None if there will be none."""
        ready = {descriptor for descriptor, _ in self._either.poll()}
        if self._socket.fileno() not in ready:
            return None
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._socket, LIMIT, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return None
        if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            close_all(descriptors)
            return None
        return json.loads(data), descriptors

    def close(self) -> None:
        """Close the socket. Twice is fine."""
        self._socket.close()


def is_there(process: int) -> bool:
    """Whether the process of a pidfd has not ended yet."""
    ended = select.poll()
    ended.register(process, select.POLLIN)
    return not ended.poll(0)


def wait_for_end(process: int, seconds: float) -> bool:
    """Wait for the process of a pidfd to end; False if it does not in that time."""
    ended = select.poll()
    ended.register(process, select.POLLIN)
    return bool(ended.poll(seconds * 1000))


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that came with a letter and are not needed."""
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)
