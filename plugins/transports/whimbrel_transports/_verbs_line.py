"""The line between two emulated queue pairs: a stream socket that two kinds of senders share and one thread reads.

The rules it lives by:

* **The reader never waits to send.** What it has to say (acknowledgements) is kept until the socket takes it: were both
  readers to wait for room, nobody would make any. Whoever posts, on the other hand, may wait, for the peer's reader
  always reads.
* Acknowledgements are cumulative, so one number stands for all that are due, however many a peer provokes.
* **Shut down, then closed**: `hang_up` wakes everybody inside, `close` waits for them to leave.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from whimbrel.errors import ChannelLost, StreamError
from whimbrel_transports._gather import recv_scattered, send_gathered
from whimbrel_transports._verbs_copy import memory_at
from whimbrel_transports._verbs_frames import HEADER, Frame, Kind, pack, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Line"]

_ROOM: Final = 4096  # bytes of the reader's own frames that wait at most before acknowledgements wait as numbers
_SCRAP: Final = 1 << 16


class Line:
    """One connected socket, which it takes over."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(None)
        self._socket = connected
        self._passes_files = connected.family == socket.AF_UNIX
        self._sending = threading.Lock()  # held while a frame is under way
        self._waiting = threading.Lock()  # of what follows, for moments only
        self._words = bytearray()
        self._acknowledged = 0
        self._due = 0
        self._stuck = False
        self._wakener = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._hung_up = False
        self.files: list[int] = []
        """Descriptors that came and that nobody has taken; whoever takes one removes it."""

    # ------------------------------------------------------------------------------------------- whoever posts

    def send(self, frame: Frame, body: bytes = b"", *, files: Sequence[int] = ()) -> None:
        """Send a frame whole, behind what the reader has to say; waits for room. Raises OSError."""
        with self._sending:
            self._say_all()
            data = memoryview(pack(frame) + body)
            if files:
                data = data[socket.send_fds(self._socket, [data], files) :]
            self._socket.sendall(data)
        self._flush()

    def send_memory(self, frame: Frame, body: bytes, pieces: npt.NDArray[np.uint64]) -> None:
        """Send a frame, `body`, and behind it memory by address and length, shape (n, 2). Raises OSError."""
        head = np.frombuffer(pack(frame) + body, np.uint8)
        vectors = np.empty((len(pieces) + 1, 2), np.uint64)
        vectors[0] = head.ctypes.data, head.size
        vectors[1:] = pieces
        with self._sending:
            self._say_all()
            send_gathered(self._socket.fileno(), vectors)
        self._flush()

    # ------------------------------------------------------------------------------------------- the reader

    def acknowledge(self, number: int) -> None:
        """Tell the peer that its requests up to this one are done. Waits for nothing."""
        with self._waiting:
            self._due = number
        self._flush()

    def say(self, frame: Frame) -> None:
        """Send a short frame as soon as there is room. Waits for nothing; for a frame of which there are few."""
        with self._waiting:
            self._take_due()
            self._words += pack(frame)
        self._flush()

    def wait(self, seconds: float | None, *, reading: bool = True) -> bool:
        """Wait until something has come, somebody calls `wake` or the line breaks; whether something has come.

        Without `reading` only the latter two count. None waits without end.
        """
        poller = select.poll()
        poller.register(self._wakener, select.POLLIN)
        poller.register(
            self._socket,
            (select.POLLIN if reading else 0) | (select.POLLOUT if self._stuck else 0) | select.POLLRDHUP,
        )
        found = dict(poller.poll(None if seconds is None else max(0.0, seconds) * 1000))
        if self._wakener in found:
            with suppress(BlockingIOError):
                os.eventfd_read(self._wakener)
        events = found.get(self._socket.fileno(), 0)
        if events & select.POLLOUT:
            self._flush()
        if not reading and events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR):
            raise ChannelLost("the peer has gone")
        return bool(events & ~select.POLLOUT)

    def wake(self) -> None:
        """Have the reader look up. Any thread."""
        with self._waiting:
            if self._wakener >= 0:
                os.eventfd_write(self._wakener, 1)

    def receive_frame(self) -> Frame | None:
        """Read a header, and keep a descriptor that comes along in `files`; None at the end of the stream.

        Raises OSError, StreamError for what is no frame or ends within one.
        """
        data = bytearray(HEADER.size)
        view = memoryview(data)
        filled = 0
        while filled < HEADER.size:
            if self._passes_files:
                part, files, flags, _ = socket.recv_fds(self._socket, HEADER.size - filled, 4)
                self.files += files
                if len(self.files) > 1 or flags & socket.MSG_CTRUNC:
                    raise StreamError("a verbs peer passes more than one descriptor at a time")
                view[filled : filled + len(part)] = part
                count = len(part)
            else:
                count = self._socket.recv_into(view[filled:])
            if count == 0:
                if filled:
                    raise StreamError(f"a verbs peer's bytes end within a header, after {filled} of {HEADER.size}")
                return None
            filled += count
        return parse(data)

    def receive_bytes(self, size: int) -> bytearray:
        """Read what is behind a header. The size was checked. Raises OSError, StreamError at an early end."""
        data = bytearray(size)
        self._fill(memoryview(data))
        return data

    def receive_memory(self, address: int, length: int) -> None:
        """Read into memory by address. Raises as `receive_bytes` does."""
        if length:
            self._fill(memory_at(address, length))

    def receive_pieces(self, pieces: npt.NDArray[np.uint64]) -> None:
        """Read into many pieces of memory, shape (n, 2), which may be changed. Raises as `receive_bytes` does."""
        if not recv_scattered(self._socket.fileno(), pieces):
            raise StreamError("a verbs peer's bytes end within a write")

    def drain(self, seconds: float) -> None:
        """Say what is to be said, end our half, and throw away what still comes until the peer ends its own.

        A socket that is closed with bytes unread resets the connection, and our last word might be lost.
        """
        end = time.monotonic() + seconds
        with suppress(OSError):
            if self._sending.acquire(timeout=seconds):
                try:
                    self._socket.settimeout(seconds)
                    self._say_all()
                    self._socket.shutdown(socket.SHUT_WR)
                finally:
                    self._sending.release()
            while self._socket.recv(_SCRAP) and time.monotonic() < end:
                pass

    # ------------------------------------------------------------------------------------------- the end

    def hang_up(self) -> None:
        """End the connection both ways and wake whoever is inside. Any thread; twice is fine."""
        self._hung_up = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Release the descriptors. The reader has ended; those that send are waited for."""
        self.hang_up()
        with self._sending, self._waiting:
            self._socket.close()
            if self._wakener >= 0:
                os.close(self._wakener)
                self._wakener = -1
            while self.files:
                os.close(self.files.pop())

    # ------------------------------------------------------------------------------------------- within

    def _fill(self, view: memoryview) -> None:
        while len(view):
            count = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            if count == 0:
                raise StreamError(f"a verbs peer's bytes end where {len(view)} more were announced")
            view = view[count:]

    def _take_due(self) -> None:
        if self._due > self._acknowledged and len(self._words) < _ROOM:
            self._acknowledged = self._due
            self._words += pack(Frame(Kind.ACK, number=self._due))

    def _say_all(self) -> None:
        """Send what the reader has to say, waiting for room; `_sending` is held."""
        with self._waiting:
            self._take_due()
            words = bytes(self._words)
            self._words.clear()
        if words:
            self._socket.sendall(words)

    def _flush(self) -> None:
        """Send what is to be said and can be said now; who holds the socket does it when done."""
        while self._words or self._due > self._acknowledged:
            if not self._sending.acquire(blocking=False):
                return
            try:
                if self._hung_up:
                    return
                with self._waiting:
                    self._take_due()
                    words = bytes(self._words)
                try:
                    sent = self._socket.send(words, socket.MSG_DONTWAIT) if words else 0
                except BlockingIOError:
                    self._stuck = True
                    self.wake()
                    return
                except OSError:
                    return  # the reader will see that it broke
                with self._waiting:
                    del self._words[:sent]
                self._stuck = False
            finally:
                self._sending.release()
