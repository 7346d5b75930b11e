"""Sources that play a script over a socket, and a terminal to sit at."""

from __future__ import annotations

import os
import pty
import re
import select
import socket
import struct
import threading

LONG = 60.0  # seconds; only what hangs ever waits so long

SHUT, PONG = 1, 2


class Peer:
    """One end of a link. `uri` names the other, which is handed over; whoever takes it closes it.

    `play` is done on a thread of its own, with this; what it raises is raised by `join`.
    """

    def __init__(self, play=lambda peer: None):
        self.socket, other = socket.socketpair()
        self.socket.settimeout(LONG)
        os.set_inheritable(other.fileno(), True)
        self.descriptor = other.detach()
        self.uri = f"fd:{self.descriptor}"
        self.heard = []
        self._play = play
        self._error = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self._play(self)
        except BaseException as exc:
            self._error = exc
        finally:
            self.socket.close()

    def join(self):
        self._thread.join(LONG)
        assert not self._thread.is_alive(), "the source waits for something that does not come"
        if self._error is not None:
            raise self._error

    def send(self, data):
        self.socket.sendall(data)

    def hear(self):
        """The next message, as (kind, value); None at the link's end, however it ends."""
        head = self._take(4)
        if head is None:
            return None
        kind, length = struct.unpack(">HH", head)
        assert length == 4
        self.heard.append((kind, int.from_bytes(self._take(4), "big")))
        return self.heard[-1]

    def hear_until(self, *messages):
        """Listen until one of these comes, and return it; None is the link's end."""
        while (heard := self.hear()) not in messages:
            assert heard is not None, f"the link ended; heard {self.heard}"
        return heard

    def _take(self, size):
        data = b""
        while len(data) < size:
            try:
                piece = self.socket.recv(size - len(data))
            except ConnectionError:
                return None
            if not piece:
                assert not data, "half a message"
                return None
            data += piece
        return data


class Terminal:
    """The screen and the keyboard of a pseudo terminal whose other end is `end`, a descriptor."""

    def __init__(self):
        self.screen, self.end = pty.openpty()
        self.seen = ""

    def wait(self, pattern):
        """Read until `pattern` is found in what has not been waited for yet; returns the match."""
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.screen], [], [], LONG)
            assert ready, self.seen
            self.seen += os.read(self.screen, 1 << 16).decode()
        self.seen = self.seen[found.end() :]
        return found

    def type(self, text):
        os.write(self.screen, text.encode())

    def hand_over(self):
        """Somebody else has the other end now."""
        os.close(self.end)
        self.end = -1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.end >= 0:
            os.close(self.end)
        os.close(self.screen)
