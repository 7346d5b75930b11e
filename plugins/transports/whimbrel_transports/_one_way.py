"""What the transports share whose bytes go one way: a channel over a descriptor, and a listener with one peer.

The rules it lives by are those of `_sockets`: a descriptor is closed only when nobody is inside it, a failure stays, an
OSError is translated once. There is no shutdown to wake whoever is blocked in a pipe, so nobody ever blocks in one:
reads and writes do not wait, and what waits, waits with poll(2) in slices.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from whimbrel.abc import Channel, Listener, Patience
from whimbrel.errors import ChannelClosed, ChannelLost, ConnectError
from whimbrel_transports._gather import write_gathered
from whimbrel_transports._sockets import SLICE, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

__all__ = ["LARGEST_PIPE", "OnceListener", "OneWayChannel", "PipeChannel", "widen"]

LARGEST_PIPE: Final = 1 << 20  # bytes; the most that a process without privileges may ask for


class OneWayChannel(Channel):
    """A channel over `descriptor`, which it takes over: its writing end if it `writes`, else its reading end."""

    duplex = False

    def __init__(self, descriptor: int, peer: str, *, writes: bool) -> None:
        self.peer = peer
        self._descriptor, self._writes = descriptor, writes
        self._inside_lock = Lock()
        self._closing = Lock()
        self._closed = self._ended = False
        self._lost = ""  # why nothing goes through any more
        self._done = 0  # bytes that have gone through

    def recv_into(self, buffer: Buffer) -> int:
        """Wait for at least one byte, as `Channel.recv_into` says."""
        with self._inside(writing=False):
            if memoryview(buffer).nbytes == 0:
                raise ValueError("a buffer to receive into must not be empty")
            if self._ended:
                return 0
            count = self._read(buffer)
            if count == 0:
                self._at_end()
                self._ended = True
            self._done += count
            return count

    def send(self, data: Buffer) -> None:
        """Send all of `data`, as `Channel.send` says."""
        with self._inside(writing=True):
            self._refuse_after_end()
            whole = memoryview(data)
            if not whole.nbytes:
                return
            # Whatever the shape and the items of the buffer; `cast` does not know them all.
            rest = np.frombuffer(whole, np.uint8).data
            while rest.nbytes:
                self._check_open()
                count = self._write(rest)
                self._went(count)
                rest = rest[count:]

    def send_gathered(self, vectors: npt.NDArray[np.uint64]) -> None:
        """Send memory by address, as `GatheringChannel.send_gathered` says."""
        with self._inside(writing=True):
            self._refuse_after_end()
            start = self._done

            def before(count: int) -> None:
                self._check_open()
                self._went(start + count - self._done)

            size = int(vectors[:, 1].sum())
            write_gathered(self._descriptor, vectors, before, self._blocked)
            self._went(start + size - self._done)

    def end_writing(self) -> None:
        """Say that no more bytes come, as `Channel.end_writing` says; returns when they are safe at the other end."""
        with self._inside(writing=True):
            if not self._ended:
                self._finish()
                self._ended = True

    def close(self) -> None:
        """Wake whoever is blocked, wait for them to leave, and release everything."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._wake()
            with self._inside_lock:
                self._release()

    # --------------------------------------------------------------------------- what a subclass may say

    def _read(self, buffer: Buffer) -> int:
        """Wait for bytes and store them; 0 at the end."""
        return os.readv(self._descriptor, [buffer])

    def _write(self, data: memoryview) -> int:
        """Write some of `data`, which is not empty; may wait."""
        return os.write(self._descriptor, data)

    def _blocked(self) -> None:
        """Nothing could be written; wait until something can."""
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _went(self, count: int) -> None:
        """`count` more bytes were written."""
        self._done += count

    def _at_end(self) -> None:
        """The last byte was read. Raises ChannelLost if that was no end in order."""
        return

    def _finish(self) -> None:
        """Bring what was written to its end."""
        return

    def _wake(self) -> None:
        """End what somebody may be blocked in for longer than a slice. `close` has begun."""
        return

    def _release(self) -> None:
        """Close everything; nobody is inside. Must not raise."""
        with suppress(OSError):
            os.close(self._descriptor)

    def _reason(self, error: OSError) -> str:
        """What an error of the system's means here."""
        return f"the connection to {self.peer} broke: {reason(error)}"

    # ---------------------------------------------------------------------------------------- internals

    def _check_open(self) -> None:
        if self._closed:
            raise self._we_closed()

    def _refuse_after_end(self) -> None:
        if self._ended:
            raise ChannelClosed(f"writing to {self.peer} was ended")

    def _we_closed(self) -> ChannelClosed:
        return ChannelClosed(f"the connection to {self.peer} was closed on this side")

    @contextmanager
    def _inside(self, *, writing: bool) -> Iterator[None]:
        with self._inside_lock:
            self._check_open()
            if writing != self._writes:
                way = "written to" if self._writes else "read from"
                raise ChannelClosed(f"the connection to {self.peer} goes one way only: it can be {way}")
            if self._lost:
                raise ChannelLost(self._lost)
            try:
                yield
            except ChannelLost as lost:
                self._lost = lost.message
                raise
            except OSError as error:
                if self._closed:
                    raise self._we_closed() from error
                self._lost = self._reason(error)
                raise ChannelLost(self._lost) from error


class PipeChannel(OneWayChannel):
    """One end of a pipe, whose descriptor does not block."""

    def _read(self, buffer: Buffer) -> int:
        while True:
            try:
                return super()._read(buffer)
            except BlockingIOError:
                self._wait(select.POLLIN)

    def _write(self, data: memoryview) -> int:
        while True:
            try:
                return super()._write(data)
            except BlockingIOError:
                self._blocked()

    def _blocked(self) -> None:
        self._wait(select.POLLOUT)

    def _wait(self, events: int) -> None:
        """Wait for one of `events`, for a slice at most. Raises ChannelClosed if we close meanwhile."""
        # Not longer, whatever comes: the reading end of a pipe that had lost its writers before it was opened here is
        # never told of it by poll, only by a read.
        poller = select.poll()
        poller.register(self._descriptor, events)
        poller.poll(SLICE * 1000)
        self._check_open()

    def _finish(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _release(self) -> None:
        if self._descriptor >= 0:
            super()._release()


class OnceListener(Listener):
    """Gives one channel, when the first byte is there for it: nobody connects to it, its peer is there already.

    `ready(seconds)` waits so long at most for that byte or the end, `make` makes the channel, once; `drop` puts away
    what was there to make it, and is called by `close` unless it was made. `ready` and `make` may raise OSError.
    """

    def __init__(
        self, uri: str, ready: Callable[[float], bool], make: Callable[[], Channel], drop: Callable[[], object]
    ) -> None:
        self.uri = uri
        self._ready, self._make, self._drop = ready, make, drop
        self._accepting, self._closing = Lock(), Lock()
        self._given = self._closed = False

    def accept(self, patience: Patience) -> Channel:
        """Wait for the first byte, as `Listener.accept` says; a second time it is a ConnectError."""
        what = f"waiting for a peer at {self.uri}"
        with self._accepting:
            while not self._closed:
                patience.check(what)
                if self._given:
                    raise ConnectError(f"{what} is in vain: it has one, which was accepted")
                try:
                    if self._ready(min(SLICE, patience.remaining())):
                        channel = self._make()
                        self._given = True
                        return channel
                except OSError as error:
                    raise ConnectError(f"{what} failed: {reason(error)}") from error
        raise ChannelClosed(f"the listener at {self.uri} was closed")

    def close(self) -> None:
        """Wake a blocked `accept`, wait for it to leave, and put away what nobody has taken."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            with self._accepting:
                if not self._given:
                    self._drop()


def widen(descriptor: int) -> None:
    """Let a pipe hold as much as it may, so that both ends sleep less often; as much as it did if that is refused."""
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, LARGEST_PIPE)
