"""The channels of `rdma:`: a stream each way, over a connection each, and RAM that is written past them.

A QEMU gives every direction of the stream a connection of its own: the source's, and the return path's. The RAM goes
over the source's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from whimbrel.abc import (
    BoolArray,
    ByteArray,
    Channel,
    IndexArray,
    MemoryRegion,
    RamControl,
    RemoteMemory,
)
from whimbrel.errors import ChannelClosed, ChannelError, ChannelLost, StreamError
from whimbrel.wire.rdma import STREAM_MAX, ControlType
from whimbrel_transports._rdma_link import Link, ReceivingLink, SendingLink
from whimbrel_transports._rdma_serving import Serving
from whimbrel_transports._rdma_writing import Writing

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ArrivingChannel", "DepartingChannel"]


class _RdmaChannel(Channel):
    """A stream over `out` and one over `back`; takes both over."""

    def __init__(self, out: SendingLink | None, back: ReceivingLink | None, peer: str, *, exposed: bool) -> None:
        self.peer = peer
        self.exposed = exposed
        self.duplex = out is not None and back is not None
        self._out, self._back = out, back
        self._sending, self._receiving, self._closing = (threading.Lock() for _ in range(3))
        self._ended = False
        self._closed = False
        self._lost = ""  # why nothing can be sent any more

    def recv_into(self, buffer: Buffer) -> int:
        """Wait for at least one byte, as `Channel.recv_into` says."""
        with self._receiving:
            self._check_open()
            if self._back is None:
                raise ChannelError(f"{self.peer} has no way back")
            return self._back.recv_into(buffer)

    def send(self, data: Buffer) -> None:
        """Send all of `data`, as `Channel.send` says."""
        with self._sending:
            out = self._way_out()
            if not memoryview(data).nbytes:
                return
            whole = np.frombuffer(memoryview(data), np.uint8)
            for first in range(0, len(whole), STREAM_MAX):
                self._tell(out, whole[first : first + STREAM_MAX])

    def end_writing(self) -> None:
        """Disconnect our direction, as `Channel.end_writing` says."""
        with self._sending:
            self._check_open()
            if self._out is not None and not self._ended:
                self._ended = True
                self._out.disconnect()

    def close(self) -> None:
        """Tell the peer if we have failed, disconnect, and release everything."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            link = self._failing()
            if link is not None:
                link.tell_error()
            for each in (self._out, self._back):
                if each is not None:
                    each.close()

    def _failing(self) -> Link | None:
        """The link of which the peer must be told that we have failed, if we have."""
        return None

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the connection to {self.peer} was closed on this side")

    def _way_out(self) -> SendingLink:
        self._check_open()
        if self._lost:
            raise ChannelLost(self._lost)
        if self._ended:
            raise ChannelClosed(f"writing to {self.peer} was ended")
        if self._out is None:
            raise ChannelError(f"{self.peer} has no way back")
        return self._out

    def _tell(self, out: SendingLink, piece: ByteArray) -> None:
        try:
            out.tell(ControlType.QEMU_FILE, piece.data)
        except (ChannelLost, StreamError) as exc:
            self._lost = exc.message
            if isinstance(exc, StreamError):
                raise ChannelLost(exc.message) from exc
            raise


class DepartingChannel(_RdmaChannel):
    """The source's end: a `RemoteWritingChannel`."""

    def __init__(self, out: SendingLink, back: ReceivingLink | None, *, pin_all: bool, exposed: bool) -> None:
        super().__init__(out, back, out.peer, exposed=exposed)
        self._source = out
        self._writing = Writing(out, pin_all=pin_all)

    @property
    def ram_written(self) -> int:
        """Bytes of RAM that were taken care of."""
        return self._writing.written

    def ram_control_before_iterate(self, flags: RamControl, regions: Sequence[MemoryRegion]) -> None:
        """A body begins, as `RemoteWritingChannel` says."""
        with self._sending:
            self._way_out()
            self._writing.before(flags, regions)

    def ram_save_pages(self, region: int, memory: ByteArray, indices: IndexArray, zero: BoolArray) -> int:
        """Write pages, as `RemoteWritingChannel` says."""
        with self._sending:
            self._way_out()
            return self._writing.save(region, memory, indices, zero)

    def ram_control_after_iterate(self, flags: RamControl) -> None:
        """A body ends, as `RemoteWritingChannel` says."""
        with self._sending:
            self._way_out()
            self._writing.after(flags)

    def _failing(self) -> Link | None:
        return self._source if self._writing.open else None


class ArrivingChannel(_RdmaChannel):
    """The destination's end: a `RemotelyWrittenChannel`."""

    def __init__(self, out: SendingLink | None, back: ReceivingLink, *, pin_all: bool, exposed: bool) -> None:
        super().__init__(out, back, back.peer, exposed=exposed)
        self._stream = back
        self._serving = Serving(back, pin_all=pin_all)

    def ram_load_hook(self, flags: RamControl, memory: RemoteMemory) -> None:
        """Serve the peer, as `RemotelyWrittenChannel` says."""
        with self._receiving:
            self._check_open()
            self._serving.serve(flags, memory)

    def ram_revoke(self) -> None:
        """End all registrations, as `RemotelyWrittenChannel` says."""
        self._serving.revoke()

    def _failing(self) -> Link | None:
        return self._stream if self._serving.open else None
