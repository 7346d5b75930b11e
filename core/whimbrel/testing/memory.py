"""Connections inside one process: two ends (`memory_pair`), a scheme (`MemoryNetwork`), a recording (`ReplayChannel`).

::

    network = MemoryNetwork()
    plugins = PluginManager()
    plugins.register(network.plugin())        # the same network for both machines
    destination.incoming("memory:nest")
    source.migrate("memory:nest")

It behaves like a local socket where that matters for tests: a bounded buffer, so that a sender blocks; what was sent
before the end still arrives; and an end that `reset` instead of closing looks broken, not finished, to its peer. It
differs in one point: `connect` waits for `accept`, so that a listener that never accepts is a peer that never answers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from whimbrel.abc import Channel, Listener, Patience, Transport, TransportSpec
from whimbrel.errors import ChannelClosed, ChannelLost, ConfigError, ConnectError
from whimbrel.hookspecs import hookimpl

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MemoryChannel", "MemoryNetwork", "ReplayChannel", "memory_pair"]

_SLICE: Final = 0.05  # seconds a wait may last before the patience is asked again
_CAPACITY: Final = 1 << 20  # bytes on their way in one direction


class Pipe:
    """One direction: bytes that were sent and not received yet. Guarded by the lock of its connection."""

    def __init__(self, lock: threading.Lock, capacity: int) -> None:
        self.changed = threading.Condition(lock)
        self.capacity = capacity
        self.chunks: deque[memoryview] = deque()
        self.size = 0
        self.ended = False  # no more bytes will come
        self.broken = ""  # why no more bytes go through, other than by an end
        self.drained_away = False  # nobody will read any more

    def put(self, data: memoryview) -> int:
        """Take as much of `data` as there is room for; returns how much."""
        count = min(len(data), self.capacity - self.size)
        self.chunks.append(memoryview(bytes(data[:count])))
        self.size += count
        self.changed.notify_all()
        return count

    def get(self, into: memoryview) -> int:
        """Move what is there into `into`; returns how much."""
        have = 0
        while self.chunks and have < len(into):
            chunk = self.chunks.popleft()
            count = min(len(chunk), len(into) - have)
            into[have : have + count] = chunk[:count]
            have += count
            if count < len(chunk):
                self.chunks.appendleft(chunk[count:])
        self.size -= have
        self.changed.notify_all()
        return have


class MemoryChannel(Channel):
    """One end of a connection made by `memory_pair`."""

    def __init__(self, incoming: Pipe | None, outgoing: Pipe | None, peer: str) -> None:
        self.peer = peer
        self.duplex = incoming is not None and outgoing is not None
        self._in, self._out = incoming, outgoing
        self._closed = False

    def recv_into(self, buffer: Buffer) -> int:
        """Wait for at least one byte, as `Channel.recv_into` says."""
        pipe = self._existing(self._in)
        view = memoryview(buffer)
        if view.nbytes == 0:
            raise ValueError("a buffer to receive into must not be empty")
        with pipe.changed:
            pipe.changed.wait_for(lambda: self._closed or pipe.chunks or pipe.ended or pipe.broken)
            if self._closed:
                raise self._we_closed()
            if pipe.chunks:
                return pipe.get(view.cast("B"))
            if pipe.broken:
                raise ChannelLost(pipe.broken)
            return 0

    def send(self, data: Buffer) -> None:
        """Send all of `data`, as `Channel.send` says."""
        pipe = self._existing(self._out)
        view = memoryview(data)
        rest = memoryview(b"") if view.nbytes == 0 else view.cast("B")
        with pipe.changed:
            while True:
                self._check_sending(pipe)
                if not rest:
                    return
                if pipe.size < pipe.capacity:
                    rest = rest[pipe.put(rest) :]
                else:
                    pipe.changed.wait()

    def end_writing(self) -> None:
        """Tell the peer that no more bytes come."""
        pipe = self._existing(self._out)
        with pipe.changed:
            if self._closed:
                raise self._we_closed()
            if pipe.broken:
                raise ChannelLost(pipe.broken)
            pipe.ended = True
            pipe.changed.notify_all()

    def close(self) -> None:
        """Close this end: the peer receives what was sent, and then the end."""
        self._finish("")

    def reset(self) -> None:
        """Break the connection: the peer receives what was sent, and then ChannelLost, as from a host that crashed."""
        self._finish(f"the connection to {self.peer} was reset")

    def _finish(self, broken: str) -> None:
        for pipe in (self._in, self._out):
            if pipe is None:
                continue
            with pipe.changed:
                self._closed = True
                pipe.broken = pipe.broken or broken
                if pipe is self._out:
                    pipe.ended = True
                else:
                    pipe.drained_away = True
                pipe.changed.notify_all()

    def _check_sending(self, pipe: Pipe) -> None:
        if self._closed:
            raise self._we_closed()
        if pipe.broken or pipe.drained_away:
            raise ChannelLost(pipe.broken or f"{self.peer} has gone")
        if pipe.ended:
            raise ChannelClosed(f"writing to {self.peer} was ended")

    def _existing(self, pipe: Pipe | None) -> Pipe:
        if self._closed:
            raise self._we_closed()
        if pipe is None:
            raise ChannelClosed(f"the connection to {self.peer} goes the other way only")
        return pipe

    def _we_closed(self) -> ChannelClosed:
        return ChannelClosed(f"the connection to {self.peer} was closed on this side")


def memory_pair(
    peer: str = "memory:pair", *, duplex: bool = True, capacity: int = _CAPACITY
) -> tuple[MemoryChannel, MemoryChannel]:
    """Make both ends of a connection; without `duplex` only the first can send. `capacity` is in bytes a direction."""
    lock = threading.Lock()
    there, back = Pipe(lock, capacity), Pipe(lock, capacity) if duplex else None
    return MemoryChannel(back, there, peer), MemoryChannel(there, back, peer)


class ReplayChannel(Channel):
    """Plays `data` to its reader, and then ends or, `broken`, breaks; what is sent is kept in `sent`. One thread."""

    def __init__(self, data: Buffer, *, broken: bool = False, duplex: bool = True) -> None:
        self.peer = "replay"
        self.duplex = duplex
        self.sent = bytearray()
        self._rest = memoryview(data)
        self._broken = broken

    def recv_into(self, buffer: Buffer) -> int:
        """Receive as much as fits of what is left."""
        view = memoryview(buffer)
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        if count == 0 and self._broken:
            raise ChannelLost("the recording breaks off here")
        return count

    def send(self, data: Buffer) -> None:
        """Keep `data`."""
        if not self.duplex:
            raise ChannelClosed("a recording of one direction")
        self.sent += memoryview(data)

    def end_writing(self) -> None:
        """Nothing to end."""

    def close(self) -> None:
        """Nothing to close."""


class _Call:
    """A `connect` that waits to be accepted."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.refused = False


class _MemoryListener(Listener):
    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self.uri = f"{network.scheme}:{name}"
        self._network, self._name = network, name
        self._calls: deque[_Call] = deque()
        self._closed = False

    def accept(self, patience: Patience) -> Channel:
        """Wait for the next `connect`."""
        network = self._network
        with network.changed:
            while not self._calls:
                if self._closed:
                    raise ChannelClosed(f"the listener at {self.uri} was closed")
                patience.check(f"waiting for a peer at {self.uri}")
                network.changed.wait(min(_SLICE, patience.remaining()))
            near, far = network.pair(self.uri)
            self._calls.popleft().channel = near
            network.changed.notify_all()
            return far

    def close(self) -> None:
        """Refuse whoever waits, and free the name."""
        with self._network.changed:
            if not self._closed:
                self._closed = True
                self._network.forget(self._name)
                for call in self._calls:
                    call.refused = True
                self._calls.clear()
                self._network.changed.notify_all()

    def call(self, call: _Call) -> None:
        self._calls.append(call)

    def hang_up(self, call: _Call) -> None:
        if call in self._calls:
            self._calls.remove(call)


class MemoryNetwork(Transport):
    """Names in one process, and the transport `memory:NAME` between them. Any thread.

    One network is one world: what listens in one cannot be reached from another. Without `duplex` only the end that
    connects can send. `capacity` is how many bytes may be on their way in each direction.
    """

    def __init__(self, *, scheme: str = "memory", duplex: bool = True, capacity: int = _CAPACITY) -> None:
        self.scheme, self.duplex, self.capacity = scheme, duplex, capacity
        self.changed = threading.Condition()
        self._listeners: dict[str, _MemoryListener] = {}

    def connect(self, address: str, patience: Patience) -> Channel:
        """Connect to the listener `address` and wait to be accepted. Raises as `Transport.connect` says."""
        _check(address)
        what = f"connecting to '{address}'"
        with self.changed:
            patience.check(what)
            listener = self._listeners.get(address)
            if listener is None:
                raise ConnectError(f"Failed to connect to '{address}': nobody listens there")
            call = _Call()
            listener.call(call)
            self.changed.notify_all()
            try:
                while call.channel is None:
                    if call.refused:
                        raise ConnectError(f"Failed to connect to '{address}': the listener went away")
                    patience.check(what)
                    self.changed.wait(min(_SLICE, patience.remaining()))
            finally:
                listener.hang_up(call)
            return call.channel

    def listen(self, address: str) -> Listener:
        """Listen at the name `address`. Raises ConfigError, and ConnectError where somebody does already."""
        _check(address)
        with self.changed:
            if address in self._listeners:
                raise ConnectError(f"Failed to listen on '{address}': somebody listens there already")
            listener = self._listeners[address] = _MemoryListener(self, address)
            return listener

    def pair(self, uri: str) -> tuple[MemoryChannel, MemoryChannel]:
        """Make both ends of a connection to `uri`, that of who connects first; called once for each."""
        return memory_pair(uri, duplex=self.duplex, capacity=self.capacity)

    def forget(self, name: str) -> None:
        """Free a name; called by its listener."""
        del self._listeners[name]

    def spec(self) -> TransportSpec:
        """The offer of this network under its scheme."""
        return TransportSpec(
            name=self.scheme,
            summary="a connection inside of this process",
            create=lambda: self,
            duplex=self.duplex,
            several=True,
        )

    def plugin(self) -> object:
        """A plugin with this offer, to be registered with a PluginManager."""
        return _MemoryPlugin(self.spec())


class _MemoryPlugin:
    def __init__(self, spec: TransportSpec) -> None:
        self._spec = spec

    @hookimpl
    def whimbrel_transports(self) -> Sequence[TransportSpec]:
        """Offer the network."""
        return [self._spec]


def _check(address: str) -> None:
    if not address:
        raise ConfigError("the name of a memory connection is empty; expected memory:NAME")
