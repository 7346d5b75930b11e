"""Wrappers that break a channel on purpose: each is a `Channel` itself and can be put round any other.

::

    channel = FaultyChannel(channel, Faults(cut_sent=1000))          # the link dies behind the 1000th byte sent
    transport = FaultyTransport(transport, on_connect=lambda c: FaultyChannel(c, Faults(crumbs=1)))

Offsets count the bytes of one direction from 0, as this end sees them: `sent` is what it sends, `received` what it
receives. A cut lets exactly that many bytes through, and with the last of them both directions die, at both ends:

* a *reset* looks broken to either end (ChannelLost), as when a host crashes or a cable is pulled. To the peer it does
  only where the channel inside can `reset`; others can but close;
* an *orderly* cut looks like the end of the stream to whoever reads, as when a process is killed and its kernel says
  goodbye for it, and broken to whoever writes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import attrs

from whimbrel.abc import Channel, Listener, Patience, Transport
from whimbrel.errors import ChannelClosed, ChannelLost
from whimbrel.stream import ForwardingChannel

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ChannelWrapper", "Faults", "FaultyChannel", "FaultyTransport", "SupportsReset"]

_CHUNK: Final = 1 << 20  # bytes copied at a time where the bytes have to be changed


@runtime_checkable
class SupportsReset(Protocol):
    """A channel that can break itself so that its peer notices that it is no orderly end."""

    def reset(self) -> None:
        """Break the connection."""


class ChannelWrapper(ForwardingChannel):
    """A channel that is another channel, and can be broken; the base of wrappers."""

    def reset(self) -> None:
        """Break the channel inside, or close it where it cannot be broken."""
        if isinstance(self.inner, SupportsReset):
            self.inner.reset()
        else:
            self.inner.close()


@attrs.frozen(kw_only=True)
class Faults:
    """What is to go wrong; nothing by default.

    `cut_sent`, `cut_received`: how many bytes go through before the link dies; `orderly` says how. `stall_sent`,
    `stall_received`: before which byte everything stands still until `release`. `flip_sent`, `flip_received`: byte
    offset to the bits that are flipped there. `crumbs`: the most bytes that travel together, or are received at once.
    `speed`: how many bytes a second go through at most; 0 for any.
    """

    cut_sent: int | None = None
    cut_received: int | None = None
    orderly: bool = False
    stall_sent: int | None = None
    stall_received: int | None = None
    flip_sent: Mapping[int, int] = attrs.field(factory=dict)
    flip_received: Mapping[int, int] = attrs.field(factory=dict)
    crumbs: int = _CHUNK
    speed: float = 0.0


class _Direction:
    """What goes wrong in one direction, and how far it has come; one thread."""

    def __init__(self, cut: int | None, stall: int | None, flips: Mapping[int, int], crumbs: int) -> None:
        self.cut, self.stall, self.flips, self.crumbs = cut, stall, dict(flips), crumbs
        self.offset = 0

    @property
    def at_cut(self) -> bool:
        return self.cut is not None and self.offset >= self.cut

    def next_piece(self, size: int) -> int:
        """How many of `size` bytes may go before something happens; not 0 unless the cut is here."""
        size = min(size, self.crumbs)
        for stop in (self.cut, self.stall):
            if stop is not None and stop > self.offset:
                size = min(size, stop - self.offset)
        return size

    def passed(self, data: memoryview) -> None:
        """`data`, writable, has gone by: flip what is to be flipped in it."""
        for offset, bits in self.flips.items():
            if self.offset <= offset < self.offset + len(data):
                data[offset - self.offset] ^= bits
        self.offset += len(data)


class FaultyChannel(ChannelWrapper):
    """A channel to which `faults` happen. `stalled` is set while it stands still, `dead` once it was cut."""

    def __init__(self, inner: Channel, faults: Faults) -> None:
        super().__init__(inner)
        self.faults = faults
        self.stalled = threading.Event()
        self.dead = threading.Event()
        self._released = threading.Event()
        self._out = _Direction(faults.cut_sent, faults.stall_sent, faults.flip_sent, faults.crumbs)
        self._in = _Direction(faults.cut_received, faults.stall_received, faults.flip_received, faults.crumbs)
        self._closed = False
        self._through = 0.0  # when the last piece has gone through

    @property
    def sent(self) -> int:
        """Bytes that have gone through."""
        return self._out.offset

    @property
    def received(self) -> int:
        """Bytes that have come through."""
        return self._in.offset

    def release(self) -> None:
        """End the standstill, for good."""
        self._released.set()

    def recv_into(self, buffer: Buffer) -> int:
        """Receive, until something goes wrong."""
        view = memoryview(buffer).cast("B")
        self._stand_still(self._in)
        if self._in.at_cut:
            self.die()
        if self._dead_end():
            return 0
        size = self._in.next_piece(len(view))
        try:
            count = self.inner.recv_into(view[:size])
        except ChannelClosed:
            if self._dead_end():
                return 0
            raise
        self._in.passed(view[:count])
        if self._in.at_cut:
            self.die()
        return count

    def send(self, data: Buffer) -> None:
        """Send, until something goes wrong."""
        view = memoryview(data)
        rest = memoryview(b"") if view.nbytes == 0 else view.cast("B")
        if not rest:
            self.inner.send(rest)
        while rest:
            self._stand_still(self._out)
            if self._out.at_cut:
                self.die()
            if self.dead.is_set() and not self._closed:
                raise self._lost()
            piece = memoryview(bytearray(rest[: self._out.next_piece(len(rest))]))
            rest = rest[len(piece) :]
            self._out.passed(piece)
            self._take_time(len(piece))
            try:
                self.inner.send(piece)
            except ChannelClosed:
                if self.dead.is_set() and not self._closed:
                    raise self._lost() from None
                raise
        if self._out.at_cut:
            self.die()

    def end_writing(self) -> None:
        """End writing, unless the link is dead."""
        if self.dead.is_set() and not self._closed:
            raise self._lost()
        super().end_writing()

    def close(self) -> None:
        """Close, and wake who stands still."""
        self._closed = True
        self._released.set()
        super().close()

    def _stand_still(self, direction: _Direction) -> None:
        if direction.stall is not None and direction.offset >= direction.stall and not self._released.is_set():
            self.stalled.set()
            self._released.wait()
            self.stalled.clear()

    def _take_time(self, size: int) -> None:
        if self.faults.speed:
            now = time.monotonic()
            self._through = max(now, self._through) + size / self.faults.speed
            self._released.wait(self._through - now)

    def die(self) -> None:
        """Cut the link now, in the way that the faults say."""
        if not self.dead.is_set():
            self.dead.set()
            self._released.set()
            if self.faults.orderly:
                self.inner.close()
            else:
                self.reset()

    def _dead_end(self) -> bool:
        """Whether a reader finds the end here; raises ChannelLost if it finds the link broken."""
        if not self.dead.is_set() or self._closed:
            return False
        if self.faults.orderly:
            return True
        raise self._lost()

    def _lost(self) -> ChannelLost:
        return ChannelLost(f"the connection to {self.peer} was cut")


Wrap = Callable[[Channel], Channel]


class FaultyTransport(Transport):
    """A transport whose channels are wrapped as they are made, on either side."""

    def __init__(
        self,
        inner: Transport,
        *,
        on_connect: Wrap = lambda channel: channel,
        on_accept: Wrap = lambda channel: channel,
    ) -> None:
        self.inner = inner
        self.on_connect, self.on_accept = on_connect, on_accept

    def connect(self, address: str, patience: Patience) -> Channel:
        """Connect inside, and wrap what comes of it."""
        return self.on_connect(self.inner.connect(address, patience))

    def listen(self, address: str) -> Listener:
        """Listen inside; what is accepted will be wrapped."""
        return _FaultyListener(self.inner.listen(address), self.on_accept)


class _FaultyListener(Listener):
    def __init__(self, inner: Listener, wrap: Wrap) -> None:
        self.inner = inner
        self.uri = inner.uri
        self._wrap = wrap

    def accept(self, patience: Patience) -> Channel:
        """Accept inside, and wrap."""
        return self._wrap(self.inner.accept(patience))

    def close(self) -> None:
        """Close the listener inside."""
        self.inner.close()
