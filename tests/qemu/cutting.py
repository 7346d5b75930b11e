"""A link that breaks behind a byte that was chosen, and stays broken.

::

    with Wire(address_of_the_destination, Cut("forth", 40_000, "reset")) as wire:
        source.migrate(wire.uri)

Real sockets, one thread: what one side sent is passed on, byte for byte, up to the cut and not a byte further.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import attrs

from .qmp import PATIENCE

__all__ = ["HOWS", "WHOLE", "Cut", "Wire"]

HOWS: Final = ("reset", "close", "half", "hole")
"""Both get a reset; both see an orderly end; the one who was listening sees one; nobody sees anything any more."""

CHUNK: Final = 1 << 16
_AT_ONCE: Final = struct.pack("ii", 1, 0)


@attrs.frozen
class Cut:
    """Behind the `at`-th byte that goes `way` ("forth" or "back"), `how` is done; see `HOWS`.

    With a `mark`, bytes are counted from where it begins; `at` may be -1 then.
    """

    way: str
    at: int
    how: str
    mark: bytes = b""

    def __str__(self) -> str:
        return f"{self.way}{self.at:+}{' of the mark' if self.mark else ''}-{self.how}"


WHOLE: Final = Cut("forth", 1 << 40, "hole")
"""No cut."""


class Wire:
    """Listens at `uri` for one peer, and joins it with who listens at `to`, until the cut.

    `forth` and `back` are what was passed on to who listens, and to who connected. A context manager; its end hangs
    up, if nothing has before.
    """

    def __init__(self, to: tuple[str, int], cut: Cut) -> None:
        self.forth, self.back = bytearray(), bytearray()
        self._to, self._cut = to, cut
        self._done = threading.Event()
        self._held = b""  # has no mark, but may hold its beginning, or the cut before it
        self._base = None if cut.mark else 0  # where in what is passed on bytes are counted from
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = "tcp:{}:{}".format(*self._listener.getsockname())
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="wire")
        self._thread.start()

    @property
    def was_cut(self) -> bool:
        """Whether it was."""
        return self._done.is_set()

    def wait_cut(self) -> None:
        """Wait until it is cut."""
        if not self._done.wait(PATIENCE):
            raise TimeoutError(f"never cut: {self._cut}; {len(self.forth)} went forth and {len(self.back)} back")

    def end(self) -> None:
        """Hang up, if nothing has before, and wait until that is done. Twice is fine."""
        self._waker.close()
        self._thread.join()
        self._wake.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    # --------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        with self._listener:
            if self._wake in self._ready(self._listener):
                return
            near, _ = self._listener.accept()
        with near, socket.create_connection(self._to, PATIENCE) as far:
            for each in (near, far):
                each.settimeout(PATIENCE)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                if not self._cut.mark and self._cut.at == 0:
                    self._break(near, far)
                else:
                    self._join(near, far)
            except OSError:  # one of them broke it, and the other shall know
                _reset(near, far)

    def _ready(self, *sockets: socket.socket) -> list[socket.socket]:
        return select.select([*sockets, self._wake], [], [])[0]

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        """Pass on what comes, until both have ended or the cut is reached."""
        sides = {near: (far, "forth"), far: (near, "back")}
        while sides:
            for side in self._ready(*sides):
                if side is self._wake:
                    return
                to, way = sides[side]
                data = side.recv(CHUNK)
                passed = self._before_the_cut(data) if way == self._cut.way else data
                if not data:
                    passed, self._held = self._held if way == self._cut.way else b"", b""
                if passed:
                    getattr(self, way).extend(passed)
                    to.sendall(passed)
                if way == self._cut.way and self._reached():
                    self._break(near, far)
                    return
                if not data:
                    del sides[side]
                    to.shutdown(socket.SHUT_WR)

    def _before_the_cut(self, data: bytes) -> bytes:
        """What of `data`, and of what was held back, may be passed on."""
        so_far = len(getattr(self, self._cut.way))
        self._held += data
        if self._base is None:
            found = self._held.find(self._cut.mark)
            if found < 0:
                keep = len(self._cut.mark)
                passed, self._held = self._held[:-keep], self._held[-keep:]
                return passed
            self._base = so_far + found
        passed, self._held = self._held[: self._base + self._cut.at - so_far], b""
        return passed

    def _reached(self) -> bool:
        return self._base is not None and len(getattr(self, self._cut.way)) == self._base + self._cut.at

    def _break(self, near: socket.socket, far: socket.socket) -> None:
        speaker, listener = (near, far) if self._cut.way == "forth" else (far, near)
        self._done.set()
        match self._cut.how:
            case "reset":
                _reset(near, far)
            case "close":
                for each in (near, far):
                    with suppress(OSError):
                        each.shutdown(socket.SHUT_WR)
                self._swallow({near: None, far: None})
            case "half":
                listener.shutdown(socket.SHUT_WR)
                self._swallow({speaker: None, listener: speaker})
            case "hole":
                self._ready()
            case _:
                raise AssertionError(self._cut.how)

    def _swallow(self, sides: dict[socket.socket, socket.socket | None]) -> None:
        """Take what still comes, and pass on what has somewhere to go."""
        while sides:
            for side in self._ready(*sides):
                if side is self._wake:
                    return
                to, data = sides[side], side.recv(CHUNK)
                if to is not None and data:
                    getattr(self, "back" if self._cut.way == "forth" else "forth").extend(data)
                    to.sendall(data)
                if not data:
                    if to is not None:
                        to.shutdown(socket.SHUT_WR)
                    del sides[side]


def _reset(*sockets: socket.socket) -> None:
    for each in sockets:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        each.close()
