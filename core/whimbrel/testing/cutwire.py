"""Links that break behind a chosen byte: inside of this process (`CutNetwork`), and as a real proxy (`CutProxy`).

::

    network = CutNetwork()
    plugins.register(network.plugin())              # "memory:NAME", as with MemoryNetwork
    network.lay(Cut(Way.FORTH, 40_000, Action.RESET))

    with CutProxy("tcp:127.0.0.1:4444", [Cut(Way.BACK, 24, Action.HOLE)]) as proxy:
        source.migrate(proxy.uri)

A link passes on exactly `at` bytes that go one way, and with the last of them does what its action says:

========= ======================================================================================================
action    what the two ends see
========= ======================================================================================================
reset     what was passed on, and then that the connection broke
close     what was passed on, and then an orderly end; who sends learns that nobody is there
half      who was listening sees an orderly end; the other way goes on, and what is still sent that way is lost
hole      nothing more on any connection, for ever, and no new connection either
detour    nothing more on the connections there are; a new one goes through
dribble   all of it, but from there on a byte at a time, both ways
========= ======================================================================================================

`forth` is from who connects to who listens. Connections count from 0 in the order in which they are made, and each may
have a cut of its own. Nothing here sleeps or draws lots: the same cut of the same bytes is the same.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import attrs

from whimbrel.abc import Channel, Patience
from whimbrel.errors import ConfigError
from whimbrel.testing.memory import MemoryChannel, MemoryNetwork, Pipe

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ACTIONS", "Action", "Cut", "CutNetwork", "CutProxy", "Way"]

_CHUNK: Final = 1 << 16
_AT_ONCE: Final = struct.pack("ii", 1, 0)  # what SO_LINGER takes for a reset in place of an end
_PATIENCE: Final = 60.0  # seconds to connect, and to pass a piece on; only what hangs ever waits so long


class Way(StrEnum):
    """Which way bytes go."""

    FORTH = "forth"
    BACK = "back"


class Action(StrEnum):
    """What becomes of a link at its cut; see the module's table."""

    RESET = "reset"
    CLOSE = "close"
    HALF = "half"
    HOLE = "hole"
    DETOUR = "detour"
    DRIBBLE = "dribble"


ACTIONS: Final = tuple(Action)


@attrs.frozen
class Cut:
    """Behind the `at`-th byte that goes `way` on connection `connection`, `action` is done.

    With a `mark`, which only a `CutProxy` looks for, bytes are counted from where it begins.
    """

    way: Way
    at: int
    action: Action
    connection: int = 0
    mark: bytes = b""

    def __str__(self) -> str:
        where = f" of connection {self.connection}" if self.connection else ""
        where += " from the mark" if self.mark else ""
        return f"{self.way}+{self.at}{where} {self.action}"


# ----------------------------------------------------------------------------------------------- inside of this process


class _CutPipe(Pipe):
    """One way of a connection, with what becomes of it. Guarded by the lock of the connection, as its base is."""

    def __init__(self, lock: threading.Lock, capacity: int, way: Way) -> None:
        super().__init__(lock, capacity)
        self.way = way
        self.passed = 0  # bytes
        self.kept = bytearray()
        self.sent: list[int] = []  # where each `put` began
        self.line: _Line | None = None
        self.at: int | None = None  # where the cut is, until it is made
        self.swallows = False  # what is sent gets lost, and the sender does not learn of it
        self.crumbs = False

    def put(self, data: memoryview) -> int:
        """Take as much of `data` as there is room for before the cut; behind it, all or nothing."""
        if self.swallows:
            return len(data)
        if self.at is not None:
            data = data[: self.at - self.passed]
        self.sent.append(self.passed)
        count = super().put(data)
        self.kept += data[:count]
        self.passed += count
        self.cut_if_due()
        return count

    def get(self, into: memoryview) -> int:
        """Move what is there into `into`, or a byte of it."""
        return super().get(into[:1] if self.crumbs else into)

    def cut_if_due(self) -> None:
        """Make the cut, if this is where it is."""
        if self.at == self.passed and self.line is not None:
            self.at = None
            self.line.cut(self)

    def end(self) -> None:
        """Let the reader come to an end."""
        self.ended = True
        self.changed.notify_all()


class _CutEnd(MemoryChannel):
    """One end of a connection that may be cut. Behind a hole nobody learns what the other does."""

    def __init__(self, incoming: _CutPipe, outgoing: _CutPipe, peer: str) -> None:
        super().__init__(incoming, outgoing, peer)
        self._incoming, self._outgoing = incoming, outgoing
        self._own_end = False

    def send(self, data: Buffer) -> None:
        """Send all of `data`; a cut behind its last byte is noticed by the next who sends."""
        pipe = self._outgoing
        view = memoryview(data)
        rest = memoryview(b"") if view.nbytes == 0 else view.cast("B")
        with pipe.changed:
            self._check_sending(pipe)
            while rest:
                if pipe.swallows or pipe.size < pipe.capacity:
                    rest = rest[pipe.put(rest) :]
                else:
                    pipe.changed.wait()
                if rest:
                    self._check_sending(pipe)

    def end_writing(self) -> None:
        """Tell the peer that no more bytes come, if anything can be told."""
        with self._outgoing.changed:
            if self._outgoing.swallows and not self._closed:
                return
        super().end_writing()

    def _finish(self, broken: str) -> None:
        with self._outgoing.changed:
            self._closed = True
            if self._outgoing.swallows:
                self._outgoing.changed.notify_all()
            dark = self._outgoing.line is not None and self._outgoing.line.dark
            if dark:
                self._incoming.changed.notify_all()
        if not dark:
            super()._finish(broken)

    def _check_sending(self, pipe: Pipe) -> None:
        if self._outgoing.swallows and not self._closed:
            return
        super()._check_sending(pipe)


class _Line:
    """One connection: two ways, and its cut."""

    def __init__(self, network: CutNetwork, number: int, cut: Cut | None) -> None:
        self.dark = False
        self._network, self._cut = network, cut
        self._lock = threading.Lock()
        self.forth, self.back = (_CutPipe(self._lock, network.capacity, way) for way in (Way.FORTH, Way.BACK))
        for pipe in (self.forth, self.back):
            pipe.line = self
            if cut is not None and cut.way == pipe.way:
                pipe.at = cut.at
        self.number = number

    def ends(self, peer: str) -> tuple[MemoryChannel, MemoryChannel]:
        """The end of who connects, and of who listens."""
        ends = _CutEnd(self.back, self.forth, peer), _CutEnd(self.forth, self.back, peer)
        with self._lock:
            self.forth.cut_if_due()
            self.back.cut_if_due()
        return ends

    def cut(self, pipe: _CutPipe) -> None:
        """Do it; the lock is held."""
        assert self._cut is not None, "cut without a cut"
        match self._cut.action:
            case Action.RESET:
                for each in (self.forth, self.back):
                    each.broken = each.broken or "the connection was reset"
                    each.changed.notify_all()
            case Action.CLOSE:
                for each in (self.forth, self.back):
                    each.drained_away = True
                    each.end()
            case Action.HALF:
                pipe.swallows = True
                pipe.end()
            case Action.HOLE | Action.DETOUR:
                self.darken()
                self._network.darkened(self, new_too=self._cut.action is Action.HOLE)
            case Action.DRIBBLE:
                self.forth.crumbs = self.back.crumbs = True
        self._network.was_cut.set()

    def darken(self) -> None:
        """Pass nothing on from here, not even an end; the lock is held."""
        self.dark = True
        for pipe in (self.forth, self.back):
            pipe.swallows = True
            pipe.changed.notify_all()

    def darken_too(self) -> None:
        """The same, for the connections beside the one that is cut."""
        with self._lock:
            if not self.dark:
                self.darken()


class CutNetwork(MemoryNetwork):
    """`memory:NAME` over links that are cut. Any thread, but for `lay`.

    `was_cut` says whether a cut was made since the last `lay`.
    """

    def __init__(self, *, scheme: str = "memory") -> None:
        super().__init__(scheme=scheme)
        self.was_cut = threading.Event()
        self.lines: list[_Line] = []
        self._cuts: dict[int, Cut] = {}
        self._no_way = False

    def lay(self, *cuts: Cut) -> None:
        """From now on connections count from 0 again, and have these cuts. The old ones are forgotten."""
        self._cuts = _by_connection(cuts)
        if any(cut.mark for cut in cuts):
            raise ConfigError("a link inside of this process looks for no mark")
        self._no_way = False
        self.lines = []
        self.was_cut = threading.Event()

    def passed(self, way: Way, connection: int = 0) -> bytes:
        """What was passed on so far."""
        line = self.lines[connection]
        return bytes(line.forth.kept if way is Way.FORTH else line.back.kept)

    def connect(self, address: str, patience: Patience) -> Channel:
        """Connect, unless the link has become a hole: then nothing answers."""
        while self._no_way:
            patience.cancelled.wait(patience.remaining())
            patience.check(f"connecting to {address!r}")
        return super().connect(address, patience)

    def pair(self, uri: str) -> tuple[MemoryChannel, MemoryChannel]:
        """Both ends of a new connection, of who connects first."""
        line = _Line(self, len(self.lines), self._cuts.get(len(self.lines)))
        self.lines.append(line)
        return line.ends(uri)

    def darkened(self, where: _Line, *, new_too: bool) -> None:
        """A line has gone dark, and so do all."""
        self._no_way = new_too
        for line in self.lines:
            if line is not where:
                line.darken_too()


def _by_connection(cuts: Iterable[Cut]) -> dict[int, Cut]:
    by_connection: dict[int, Cut] = {}
    for cut in cuts:
        if cut.connection in by_connection:
            raise ConfigError(f"connection {cut.connection} has two cuts, {by_connection[cut.connection]} and {cut}")
        by_connection[cut.connection] = cut
    return by_connection


# ---------------------------------------------------------------------------------------------------- between processes


class _Joint:
    """Two connected sockets, and how far what goes through them has come. The proxy's thread alone."""

    def __init__(self, near: socket.socket, far: socket.socket, cut: Cut | None) -> None:
        self.near, self.far, self.cut = near, far, cut
        self.kept = {Way.FORTH: bytearray(), Way.BACK: bytearray()}
        self.lost: set[Way] = set()  # what is still sent that way is taken and thrown away
        self.crumbs = False
        self._held = b""  # has no mark, but may hold its beginning

    def sides(self, way: Way) -> tuple[socket.socket, socket.socket]:
        return (self.near, self.far) if way is Way.FORTH else (self.far, self.near)

    def room(self, way: Way) -> int:
        """How many bytes may be passed on at once."""
        if self.crumbs:
            return 1
        if self.cut is None or self.cut.way is not way or self.cut.mark:
            return _CHUNK
        return min(_CHUNK, self.cut.at - len(self.kept[way]))

    def due(self, way: Way) -> bool:
        cut = self.cut
        return cut is not None and cut.way is way and not cut.mark and len(self.kept[way]) == cut.at

    def let_pass(self, way: Way, data: bytes) -> bytes:
        """What of `data`, which has come, and of what was held back may be passed on; nothing has come at the end."""
        cut = self.cut
        if cut is None or cut.way is not way or not cut.mark:
            return data
        held = self._held + data
        found = held.find(cut.mark)
        if found >= 0:
            self.cut = attrs.evolve(cut, at=len(self.kept[way]) + found + cut.at, mark=b"")
            self._held = b""
            return held[: self.room(way)]
        # No more than may be its beginning: who has sent the rest may wait for the answer.
        ends = (size for size in range(len(cut.mark) - 1, 0, -1) if data and held.endswith(cut.mark[:size]))
        passed = len(held) - next(ends, 0)
        self._held = held[passed:]
        return held[:passed]


class CutProxy:
    """Listens, joins each who connects with who listens at `to` ("tcp:HOST:PORT" or "unix:PATH"), and cuts.

    Real sockets and one thread. It listens at a port of 127.0.0.1, or with `path` at a unix socket; `uri` says where.
    A reset is one over TCP; over a unix socket it is an end. A context manager: its end hangs up on everybody, so that
    a hole lasts until then, and waits for the thread.
    """

    def __init__(self, to: str, cuts: Iterable[Cut] = (), *, path: str = "") -> None:
        self._to = _address(to)
        self._cuts = _by_connection(cuts)
        self._was_cut = threading.Event()
        self._joints: list[_Joint] = []
        self._dark = self._no_way = False
        self._selector = selectors.DefaultSelector()
        self._stack = ExitStack()
        self._listener = _listener(path)
        self._stack.callback(self._listener.close)
        host_port = self._listener.getsockname()
        self.uri = f"unix:{path}" if path else f"tcp:{host_port[0]}:{host_port[1]}"
        self._wake, self._waker = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="cutwire")
        self._thread.start()

    @property
    def was_cut(self) -> bool:
        """Whether a cut was made."""
        return self._was_cut.is_set()

    def wait_cut(self, timeout: float = _PATIENCE) -> None:
        """Wait until a cut was made; TimeoutError if it is not."""
        if not self._was_cut.wait(timeout):
            went = [{way: len(data) for way, data in joint.kept.items()} for joint in self._joints]
            raise TimeoutError(f"never cut: {', '.join(map(str, self._cuts.values()))}; passed on: {went}")

    def passed(self, way: Way, connection: int = 0) -> bytes:
        """What was passed on so far."""
        return bytes(self._joints[connection].kept[way]) if connection < len(self._joints) else b""

    def end(self) -> None:
        """Hang up on everybody and wait until that is done. Twice is fine."""
        self._waker.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    # --------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        with self._stack, self._wake, self._selector:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._wake:
                        return
                    if key.fileobj is self._listener:
                        self._join()
                    elif key.fileobj in self._selector.get_map():  # not if a cut has just taken it away
                        joint, way = key.data
                        self._pass_on(joint, way)

    def _join(self) -> None:
        near, _ = self._listener.accept()
        self._stack.callback(near.close)
        if self._no_way:
            return  # it is answered, and that is all
        try:
            far = _connected(self._to)
        except OSError:
            _reset(near)
            return
        self._stack.callback(far.close)
        joint = _Joint(near, far, self._cuts.get(len(self._joints)))
        self._joints.append(joint)
        for each in (near, far):
            each.settimeout(_PATIENCE)
            if each.family == socket.AF_INET:
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(near, selectors.EVENT_READ, (joint, Way.FORTH))
        self._selector.register(far, selectors.EVENT_READ, (joint, Way.BACK))
        for way in Way:
            if joint.due(way):
                self._cut(joint, way)

    def _pass_on(self, joint: _Joint, way: Way) -> None:
        from_, to = joint.sides(way)
        try:
            data = from_.recv(_CHUNK if way in joint.lost else joint.room(way))
            if way in joint.lost:
                if not data:
                    self._forget(from_)
                return
            passed = joint.let_pass(way, data)
            joint.kept[way] += passed
            to.sendall(passed)
            if not data:
                self._forget(from_)
                to.shutdown(socket.SHUT_WR)
                return
        except OSError:  # one of them broke it, and the other shall know
            self._break(joint)
            return
        if joint.due(way):
            self._cut(joint, way)

    def _cut(self, joint: _Joint, way: Way) -> None:
        assert joint.cut is not None, "cut without a cut"
        action, joint.cut = joint.cut.action, None
        match action:
            case Action.RESET:
                self._break(joint)
            case Action.CLOSE:
                self._end(joint)
            case Action.HALF:
                joint.lost.add(way)
                with suppress(OSError):
                    joint.sides(way)[1].shutdown(socket.SHUT_WR)
            case Action.HOLE | Action.DETOUR:
                self._no_way = action is Action.HOLE
                for each in self._joints:
                    self._forget(each.near)
                    self._forget(each.far)
            case Action.DRIBBLE:
                joint.crumbs = True
        self._was_cut.set()

    def _end(self, joint: _Joint) -> None:
        """Both come to an end; what they still say is taken: a socket that is closed with something in it resets."""
        for way in Way:
            joint.lost.add(way)
            with suppress(OSError):
                joint.sides(way)[1].shutdown(socket.SHUT_WR)

    def _break(self, joint: _Joint) -> None:
        for each in (joint.near, joint.far):
            self._forget(each)
            _reset(each)

    def _forget(self, each: socket.socket) -> None:
        with suppress(KeyError, ValueError):  # it was forgotten, or closed, before
            self._selector.unregister(each)


def _reset(each: socket.socket) -> None:
    with suppress(OSError):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    each.close()


def _address(uri: str) -> tuple[str, int] | str:
    scheme, _, address = uri.partition(":")
    host, _, port = address.rpartition(":")
    if scheme == "unix" and address:
        return address
    if scheme != "tcp" or not host or not port.isdecimal():
        raise ConfigError(f"a proxy leads to tcp:HOST:PORT or unix:PATH, got {uri!r}")
    return host, int(port)


def _listener(path: str) -> socket.socket:
    if not path:
        return socket.create_server(("127.0.0.1", 0))
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _connected(to: tuple[str, int] | str) -> socket.socket:
    if not isinstance(to, str):
        return socket.create_connection(to, _PATIENCE)
    far = socket.socket(socket.AF_UNIX)
    try:
        far.settimeout(_PATIENCE)
        far.connect(to)
    except OSError:
        far.close()
        raise
    return far
