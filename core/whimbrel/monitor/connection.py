"""One client's connection to a monitor: a thread that reads and carries out, a thread that writes, a queue between.

Rules of this module:

* Whoever has something for a client puts it into its `Outbox` and never waits for the client. A client that does not
  read is hung up on once `MOST_WAITING` lines or `MOST_BYTES` wait for it; one that only asks and does not read is
  read no more. One that does not negotiate within `NEGOTIATION_TIME` makes room for another.
* The reading thread owns the connection: it alone ends it, and closes the socket when the writer is gone.
* What is queued when the end comes is still written, for at most `LINGER` seconds: a client that has closed its
  half gets its answers, and one that is hung up on learns why.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from whimbrel.monitor import protocol
from whimbrel.monitor.descriptors import receive
from whimbrel.monitor.session import NEGOTIATION, Session

__all__ = ["Connection", "Outbox"]

MOST_WAITING: Final = 1000  # lines
MOST_BYTES: Final = 4 << 20  # in those lines
ENOUGH_WAITING: Final = 100  # lines; no further command is taken before there are fewer
ENOUGH_BYTES: Final = 1 << 20  # in those lines
NEGOTIATION_TIME: Final = 10.0  # seconds
LINGER: Final = 1.0  # seconds
CHUNK: Final = 1 << 16

_log = logging.getLogger("whimbrel.monitor")


class Outbox:
    """The lines that wait for one client. Any thread."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._size = 0  # bytes in them
        self._changed = threading.Condition()
        self._writing = False
        self._ended = False

    def put(self, line: bytes) -> bool:
        """Queue `line`; False if there is no room. What comes after the end is dropped."""
        with self._changed:
            if len(self._lines) >= MOST_WAITING or self._size >= MOST_BYTES:
                return False
            if not self._ended:
                self._lines.append(line)
                self._size += len(line)
                self._changed.notify_all()
            return True

    def take(self) -> bytes:
        """Wait for lines and return them all, in order; empty at the end. What was taken before is written then."""
        with self._changed:
            self._writing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._lines or self._ended)
            taken = b"".join(self._lines)
            self._lines.clear()
            self._size = 0
            self._writing = bool(taken)
            return taken

    def wait_room(self, seconds: float | None) -> bool:
        """Wait until little is left; False at the end, and if that takes longer than `seconds`."""
        with self._changed:
            return self._changed.wait_for(self._has_room, seconds) and not self._ended

    def _has_room(self) -> bool:
        return self._ended or (len(self._lines) < ENOUGH_WAITING and self._size < ENOUGH_BYTES)

    def wait_written(self, seconds: float) -> bool:
        """Wait until all lines are written; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._writing, seconds)

    def end(self) -> None:
        """Take no more lines; those that wait are still to be taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Connection:
    """A connected client, whose socket it takes over. `on_end` is called once it is over, on the reading thread."""

    def __init__(
        self, connected: socket.socket, name: str, session: Session, on_end: Callable[[Connection], object]
    ) -> None:
        connected.settimeout(None)
        self._socket, self._session, self._on_end = connected, session, on_end
        self._outbox = Outbox()
        self._hears = False
        self._name = name
        self._reader = threading.Thread(target=self._read, name=f"{name}-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name=f"{name}-writer", daemon=True)

    def start(self) -> None:
        """Greet, and listen; called once."""
        self._writer.start()
        self._reader.start()

    def tell(self, line: bytes) -> None:
        """Send an event, if the client has negotiated; a client for which too many wait is hung up on."""
        if self._hears and not self._outbox.put(line):
            _log.warning("%s: too many lines wait and the client does not read; hung up", self._name)
            self._hears = False
            self._break()

    def end(self) -> None:
        """Take nothing more from the client and let it go; returns at once."""
        self._outbox.end()
        self._shut(socket.SHUT_RD)

    def join(self) -> None:
        """Wait until the connection is over. From within one of its own commands this returns at once."""
        if threading.current_thread() is not self._reader:
            self._reader.join()

    # ---------------------------------------------------------------------------------------- the reader

    def _read(self) -> None:
        last = False
        try:
            self._outbox.put(protocol.encode(protocol.greeting()))
            last = self._converse()
        except OSError as exc:
            _log.debug("%s: %s", self._name, exc)
        except Exception:  # noqa: BLE001 - the program's own `on_quit` may raise anything
            _log.exception("%s: hung up", self._name)
        finally:
            self._session.end()
            self._hang_up(listen_on=last)
            self._on_end(self)

    def _converse(self) -> bool:
        """Carry out what comes until it ends; whether it was we who ended it."""
        until = time.monotonic() + NEGOTIATION_TIME
        while self._hears or self._has_come(until - time.monotonic()):
            data, descriptors = receive(self._socket, CHUNK)
            if not data:
                return False
            for answer in self._session.receive(data, descriptors):
                if not self._outbox.put(answer.line):
                    return True
                # Only behind the answer to the negotiation: events must not come before it.
                self._hears = self._session.negotiated
                if answer.then is not None:
                    self._outbox.wait_written(LINGER)
                    answer.then()
                left = None if self._hears else max(0.0, until - time.monotonic())
                if answer.last or not self._outbox.wait_room(left):
                    return True
        late = f"no {NEGOTIATION} came within {NEGOTIATION_TIME:g} s"
        self._outbox.put(protocol.encode(protocol.error(late)))
        return True

    def _has_come(self, seconds: float) -> bool:
        """Whether something comes in time; without a timeout of the socket, which would be the writer's as well."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return seconds > 0 and bool(poll.poll(seconds * 1000))

    def _hang_up(self, *, listen_on: bool) -> None:
        self._outbox.end()
        deadline = time.monotonic() + LINGER
        self._writer.join(LINGER)
        if listen_on:
            self._listen_on(deadline)
        self._break()
        self._writer.join()
        self._socket.close()

    def _listen_on(self, deadline: float) -> None:
        """A connection closed over unread bytes is reset, and what was said last is lost: read them."""
        self._shut(socket.SHUT_WR)
        with suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(CHUNK):
                    return

    # ---------------------------------------------------------------------------------------- the writer

    def _write(self) -> None:
        try:
            while lines := self._outbox.take():
                self._socket.sendall(lines)
        except OSError as exc:
            _log.debug("%s: %s", self._name, exc)
            self._break()
        finally:
            self._outbox.end()

    def _break(self) -> None:
        """Wake both threads."""
        self._outbox.end()
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        with suppress(OSError):
            self._socket.shutdown(how)
