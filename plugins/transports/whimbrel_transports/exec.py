"""`exec:COMMAND`: a program that takes the stream or gives it.

Connecting starts COMMAND and gives it the stream on standard input; listening starts it and reads the stream from its
standard output. So bytes go one way, and there is no proof from the other end. The command is split into words and
there is no shell: `exec:sh -c '...'` has one.

How the program ends counts. If it ends before its time, or with a status other than 0, that is the error, with what it
said last. `end_writing` returns when it has ended well, and a reader is told of the end only then. `close` ends it, and
all that it has started in its process group, whether or not it is done.

It runs with this process's own environment and working directory, in a session of its own: Ctrl-C does not reach it.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Final

from whimbrel.abc import Channel, Listener, Patience, Transport, TransportSpec
from whimbrel.errors import ChannelLost
from whimbrel.hookspecs import hookimpl
from whimbrel_transports._one_way import OnceListener, PipeChannel, widen
from whimbrel_transports._program import Program
from whimbrel_transports._sockets import SLICE, connecting, listening
from whimbrel_transports._words import split

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ExecTransport", "whimbrel_transports"]

SETTLING: Final = 1.0  # seconds that a program which takes no more may take to end and so to say why


@hookimpl
def whimbrel_transports() -> Sequence[TransportSpec]:
    """Offer `exec:`."""
    return [
        TransportSpec(
            name="exec",
            summary="a program that takes or gives the stream, exec:COMMAND",
            create=ExecTransport,
            duplex=False,
            runs_programs=True,
        )
    ]


class ExecTransport(Transport):
    """Channels to programs that it starts."""

    def connect(self, address: str, patience: Patience) -> Channel:
        """Start the command `address`, to write to it. Raises ConfigError, ConnectError and MigrationCancelled."""
        words = split(address)
        patience.check(f"starting '{address}'")
        with connecting(address):
            return _started(words, f"exec:{address}", writes=True)

    def listen(self, address: str) -> Listener:
        """Start the command `address`, to read from it. Raises ConfigError and ConnectError, leaving nothing."""
        words, uri = split(address), f"exec:{address}"
        with listening(address):
            channel = _started(words, uri, writes=False)
        return OnceListener(uri, channel.ready, lambda: channel, channel.close)


class _ExecChannel(PipeChannel):
    """Our end of a pipe to a program, which it takes over; it fails as the program does."""

    def __init__(self, program: Program, descriptor: int, peer: str, *, writes: bool) -> None:
        super().__init__(descriptor, peer, writes=writes)
        self._program = program

    def ready(self, seconds: float) -> bool:
        """Wait so long at most for the first byte, or the end."""
        self._program.wait(seconds, self._descriptor, select.POLLIN)
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        return bool(poller.poll(0))

    def _wait(self, events: int) -> None:
        self._program.wait(SLICE, self._descriptor, events)
        self._check_open()
        # What it has left behind may well hold the other end of the pipe, and never touch it. To a reader that is
        # told behind the last byte.
        if self._writes and self._program.status:
            raise ChannelLost(self._program.describe())

    def _at_end(self) -> None:
        self._wait_for_its_end()

    def _finish(self) -> None:
        super()._finish()
        self._wait_for_its_end()

    def _wait_for_its_end(self) -> None:
        while self._program.status is None:
            self._program.wait(SLICE)
            self._check_open()
        if self._program.status:
            raise ChannelLost(self._program.describe(early=False))

    def _reason(self, error: OSError) -> str:
        if not isinstance(error, BrokenPipeError):
            return super()._reason(error)
        deadline = monotonic() + SETTLING
        while self._program.status is None and not self._closed and (left := deadline - monotonic()) > 0:
            self._program.wait(min(SLICE, left))
        return self._program.describe()

    def _release(self) -> None:
        # Before the pipe is closed: what was written so far must not look like a whole stream to it.
        self._program.end()
        super()._release()


def _started(words: Sequence[str], uri: str, *, writes: bool) -> _ExecChannel:
    """Start a program with a pipe to it. Raises OSError, leaving nothing behind."""
    read, write = os.pipe2(os.O_CLOEXEC)
    ours, theirs = (write, read) if writes else (read, write)
    nothing = -1
    try:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.set_blocking(ours, False)
        widen(ours)
        ends = {"stdin": theirs, "stdout": nothing} if writes else {"stdin": nothing, "stdout": theirs}
        return _ExecChannel(Program(words, **ends), ours, uri, writes=writes)
    except BaseException:
        os.close(ours)
        raise
    finally:
        for descriptor in (theirs, nothing):
            with suppress(OSError):
                os.close(descriptor)
