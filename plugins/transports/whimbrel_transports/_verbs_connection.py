"""Connections of the emulated verbs: a device for each, and what is made from it and closed with it."""

from __future__ import annotations

import itertools
import select
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from whimbrel.errors import ChannelClosed, ConnectError, StateError, StreamError
from whimbrel.verbs import (
    MAX_PRIVATE_DATA,
    CmEvent,
    CmEventType,
    CompletionChannel,
    CompletionQueue,
    ConnectionId,
    ConnectRejected,
    Context,
    DeviceAttributes,
    ProtectionDomain,
    QueuePair,
)
from whimbrel_transports._sockets import SLICE, reason
from whimbrel_transports._verbs_completions import Channel, Queue
from whimbrel_transports._verbs_frames import (
    HEADER,
    MAX_BATCH,
    MAX_MESSAGE,
    MAX_REGIONS,
    MAX_WRITE,
    Frame,
    Kind,
    pack,
    parse,
)
from whimbrel_transports._verbs_line import Line
from whimbrel_transports._verbs_memory import MAX_REGION, Domain, Regions
from whimbrel_transports._verbs_pair import NO_END, Pair
from whimbrel_transports._verbs_shared import SharedMemory

if TYPE_CHECKING:
    from whimbrel.abc import Patience

__all__ = ["Connection", "Device", "receive_exactly"]

_numbers: Final = itertools.count(1)  # of queue pairs, in this process


class Device(Context):
    """The device of one connection."""

    def __init__(self, name: str, *, applies_unasked: bool) -> None:
        self.attributes = DeviceAttributes(
            name=name,
            max_mr_size=MAX_REGION,
            max_mr=MAX_REGIONS,
            max_qp_wr=1 << 14,
            max_cqe=1 << 20,
            max_msg_size=MAX_MESSAGE,
            max_write_batch=MAX_BATCH,
            max_write_size=MAX_WRITE,
            applies_unasked=applies_unasked,
        )
        self.regions = Regions()
        self._made: list[CompletionChannel | CompletionQueue] = []
        self._closed = False

    def alloc_pd(self) -> ProtectionDomain:
        """Make a protection domain."""
        self._check()
        return Domain(self, self.regions)

    def create_comp_channel(self) -> CompletionChannel:
        """Make a completion channel."""
        self._check()
        channel = Channel()
        self._made.append(channel)
        return channel

    def create_cq(self, cqe: int, channel: CompletionChannel | None = None) -> CompletionQueue:
        """Make a completion queue, as `Context.create_cq` says."""
        self._check()
        if not 0 < cqe <= self.attributes.max_cqe:
            raise ValueError(f"a completion queue has room for 1 to {self.attributes.max_cqe}, not for {cqe}")
        if channel is not None and not isinstance(channel, Channel):
            raise TypeError("the completion channel is another provider's")
        queue = Queue(cqe, channel)
        self._made.append(queue)
        return queue

    def close(self) -> None:
        """Close the queues and channels; the regions are gone already."""
        self._closed = True
        for made in self._made:
            made.close()

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed("the verbs context was closed")


class Connection(ConnectionId):
    """A connected socket that is to be, or is, the line of a queue pair; takes it over."""

    def __init__(self, connected: socket.socket, peer: str, private_data: bytes | None = None) -> None:
        shared = connected.family == socket.AF_UNIX
        self.peer, self.private_data = peer, private_data or b""
        self.context = self._device = Device("shared" if shared else "socket", applies_unasked=shared)
        self._asked = private_data is not None  # by the peer
        self._socket = connected
        self._line: Line | None = None
        self._shared: SharedMemory | None = None
        self._pair: Pair | None = None
        self._established = False
        self._changed = threading.Condition()
        self._closing = threading.Lock()
        self._ended = self._told = self._closed = False

    # ------------------------------------------------------------------------------------------- making it

    def create_qp(
        self,
        pd: ProtectionDomain,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        *,
        max_send_wr: int,
        max_recv_wr: int,
    ) -> QueuePair:
        """Make the queue pair, as `ConnectionId.create_qp` says."""
        self._check()
        if self._pair is not None:
            raise StateError("the connection has a queue pair already")
        most = self._device.attributes.max_qp_wr
        if not (0 < max_send_wr <= most and 0 < max_recv_wr <= most):
            raise ValueError(f"a queue has room for 1 to {most} requests, not for {max_send_wr} and {max_recv_wr}")
        if not isinstance(pd, Domain) or pd.context is not self._device:
            raise ValueError("the protection domain is of another context")
        if not isinstance(send_cq, Queue) or not isinstance(recv_cq, Queue):
            raise TypeError("the completion queues are another provider's")
        regions = self._device.regions
        self._line = Line(self._socket)
        if self._socket.family == socket.AF_UNIX:
            self._shared = SharedMemory(self._line, self._socket, regions)
            self._shared.pd = pd
            regions.on_remove = self._shared.revoke
            regions.on_add = self._shared.keep
            for region in regions.alive():
                self._shared.keep(region)
        self._pair = Pair(
            next(_numbers), pd, regions, send_cq, recv_cq, self._line, self._shared,
            max_send_wr=max_send_wr, max_recv_wr=max_recv_wr,
        )  # fmt: skip
        self._pair.on_end = self._has_ended
        regions.cut = self._pair.disconnect
        return self._pair

    def connect(self, private_data: bytes, patience: Patience, *, rnr_retry: int = NO_END) -> bytes:
        """Ask for the connection, as `ConnectionId.connect` says."""
        pair = self._ready(private_data, rnr_retry, asked=False)
        try:
            self._say(Kind.REQUEST, private_data)
            answer, said = self._hear(patience, f"waiting for {self.peer} to accept", Kind.ACCEPT, Kind.REJECT)
            if answer is Kind.REJECT:
                raise ConnectRejected(f"{self.peer} rejected the connection", said)
            self.private_data = said
            self._say(Kind.READY)
            self._establish(pair, rnr_retry)
        except BaseException:
            self.disconnect()
            raise
        return said

    def accept(self, private_data: bytes, patience: Patience, *, rnr_retry: int = NO_END) -> None:
        """Agree to a request, as `ConnectionId.accept` says."""
        pair = self._ready(private_data, rnr_retry, asked=True)
        try:
            self._say(Kind.ACCEPT, private_data)
            self._hear(patience, f"waiting for {self.peer} to be ready", Kind.READY)
            self._establish(pair, rnr_retry)
        except BaseException:
            self.disconnect()
            raise

    def reject(self, private_data: bytes = b"") -> None:
        """Refuse a request, and close."""
        _check_private(private_data)
        self._check()
        try:
            if self._asked and not self._established:
                self._say(Kind.REJECT, private_data)
        finally:
            self.close()

    def _ready(self, private_data: bytes, rnr_retry: int, *, asked: bool) -> Pair:
        _check_private(private_data)
        if not 0 <= rnr_retry <= NO_END:
            raise ValueError(f"rnr_retry is 0 to {NO_END}, not {rnr_retry}")
        self._check()
        if self._pair is None:
            raise StateError("the connection has no queue pair yet")
        if self._established or asked is not self._asked:
            raise StateError("the connection is made already" if self._established else "it is for the peer to ask")
        return self._pair

    def _establish(self, pair: Pair, rnr_retry: int) -> None:
        with self._changed:
            self._established = True
        pair.start(rnr_retry)

    def _say(self, kind: Kind, data: bytes = b"") -> None:
        try:
            self._socket.sendall(pack(Frame(kind, size=len(data))) + data)
        except OSError as error:
            self._check()
            raise ConnectError(f"the connection to {self.peer} broke: {reason(error)}") from error

    def _hear(self, patience: Patience, what: str, *expected: Kind) -> tuple[Kind, bytes]:
        try:
            frame = parse(receive_exactly(self._socket, HEADER.size, patience, what))
            if frame.kind not in expected:
                raise StreamError(f"{self.peer} says {frame.kind.name}; expected {' or '.join(_names(expected))}")
            return frame.kind, receive_exactly(self._socket, frame.size, patience, what)
        except (OSError, StreamError) as error:
            self._check()
            raise ConnectError(f"the connection to {self.peer} failed while {what}: {error}") from error

    # ------------------------------------------------------------------------------------------- ending it

    def get_event(self, patience: Patience) -> CmEvent:
        """Wait for the end of the connection."""
        with self._changed:
            while not self._ended:
                self._check()
                patience.check("waiting for an event of a connection")
                self._changed.wait(min(SLICE, patience.remaining()))
            if self._told:
                raise ChannelClosed(f"the connection to {self.peer} has ended, and was said to have")
            self._told = True
            return CmEvent(CmEventType.DISCONNECTED)

    def disconnect(self) -> None:
        """End the connection at both ends."""
        if self._pair is not None:
            self._pair.disconnect()
        else:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Disconnect and close all that was made from it."""
        with self._closing:
            if self._closed:
                return
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self.disconnect()
            if self._pair is not None:
                self._pair.close()
            self._device.regions.close()
            self._device.close()
            if self._shared is not None:
                self._shared.release()
            self._socket.close()

    def _has_ended(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the connection to {self.peer} was closed on this side")


def receive_exactly(connected: socket.socket, size: int, patience: Patience, what: str) -> bytes:
    """Receive `size` bytes within the patience. Raises OSError, StreamError at an early end, and of `patience`."""
    data = bytearray()
    poller = select.poll()
    poller.register(connected, select.POLLIN)
    while len(data) < size:
        patience.check(what)
        if poller.poll(min(SLICE, patience.remaining()) * 1000):
            part = connected.recv(size - len(data))
            if not part:
                raise StreamError("it hung up")
            data += part
    return bytes(data)


def _names(kinds: tuple[Kind, ...]) -> list[str]:
    """Kinds of frames, for messages."""
    return [kind.name for kind in kinds]


def _check_private(data: bytes) -> None:
    if len(data) > MAX_PRIVATE_DATA:
        raise ValueError(f"private data have {len(data)} bytes; at most {MAX_PRIVATE_DATA} fit")
