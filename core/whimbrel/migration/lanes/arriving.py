"""The destination's lanes: for each a thread that receives packets into memory.

A lane stops at its SYNC until everybody has come to theirs and the incoming thread, which waits for that in `sync`,
has let all go on. Where pages come as they are they are received straight into the machine's memory.

The first lane that fails fails the migration. The incoming thread may be waiting for the main channel then, on which
nothing needs to come any more: it is given a moment to notice by itself, and then `on_failure` is called.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from whimbrel.abc import ByteArray, Channel, Codec, IndexArray, PageSink, ScatteringChannel
from whimbrel.errors import ChannelError, ChannelLost, MigrationError, Place, StreamError
from whimbrel.migration.attempt import unexpected
from whimbrel.migration.lanes.method import Method
from whimbrel.migration.quietly import quietly
from whimbrel.wire import multifd
from whimbrel.wire.multifd import HEADER_SIZE, PAGES_MAX, Packet
from whimbrel.wire.ram import PAGE_SIZE

_log = logging.getLogger("whimbrel")

NOTICE: Final = 0.2  # seconds the incoming thread has to notice a failure by itself
FEW: Final = 4  # runs of pages that are received one by one where a channel cannot scatter


class Arriving:
    """`ArrivingLanes` over connected channels, whose first bytes were read; in the order of their numbers."""

    def __init__(self, channels: Sequence[Channel], method: Method, *, on_failure: Callable[[], object]) -> None:
        self.failure: MigrationError | None = None
        """Why a lane has failed, if one has before the last page was here."""
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._noticed = threading.Event()
        self._closed = False
        self._complete = False  # no page may come any more
        self._released = 0  # syncs at which all were let go on
        self._lanes = [_Lane(number, channel, method) for number, channel in enumerate(channels)]
        self._threads: list[threading.Thread] = []

    # -------------------------------------------------------------------------------------- what handlers call

    def begin(self, sink: PageSink) -> None:
        """Let pages come, as `ArrivingLanes.begin` says."""
        self._threads = [
            threading.Thread(target=self._run, args=(lane, sink), name=f"whimbrel-lane-{lane.number}", daemon=True)
            for lane in self._lanes
        ]
        for thread in self._threads:
            thread.start()

    def sync(self) -> None:
        """Wait for all lanes, as `ArrivingLanes.sync` says."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._over or all(lane.ended or lane.reached > self._released for lane in self._lanes)
            )
            self._check()
            for lane in self._lanes:
                if lane.reached <= self._released:
                    raise lane.lost("a SYNC was")
            self._released += 1
            self._changed.notify_all()

    def complete(self) -> None:
        """Take no more pages, as `ArrivingLanes.complete` says."""
        with self._changed:
            self._check()
            for lane in self._lanes:
                if lane.unsynced:
                    raise StreamError("pages came behind the last sync", place=lane.place)
            self._complete = True

    def _check(self) -> None:
        if self.failure is not None:
            self._noticed.set()
            raise self.failure
        if self._closed:
            raise ChannelLost("the lanes were closed on this side")

    # ------------------------------------------------------------------------------------- what the engine calls

    def close(self) -> None:
        """End all lanes and wait for their threads: nothing is written any more then. Twice is fine; raises nothing."""
        self._noticed.set()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for lane in self._lanes:
            quietly(lane.channel.close, "closing a lane")
        for thread in self._threads:
            thread.join()

    @property
    def _over(self) -> bool:
        return self._closed or self.failure is not None

    # ---------------------------------------------------------------------------------------- a lane's thread

    def _run(self, lane: _Lane, sink: PageSink) -> None:
        try:
            while lane.receive_header() and self._take(lane, sink):
                pass
            self._ended(lane)
        except MigrationError as exc:
            self._fail(exc.at(lane.place))
        except BaseException as exc:  # noqa: BLE001 - a codec's or our own bug must not leave the migration waiting
            self._fail(unexpected(exc).at(lane.place))

    def _take(self, lane: _Lane, sink: PageSink) -> bool:
        """Take the packet whose header has come; False if there is no point in going on."""
        packet = lane.parse()
        lane.check_fresh(packet)
        if packet.block:
            # Pages that no SYNC follows as yet keep RAM from being complete, so the first of them looks for all.
            if not lane.unsynced:
                self._begin_pages(lane)
            try:
                lane.take(packet, sink)
            except MigrationError as exc:
                raise exc.at(
                    Place(section=f"lane {lane.number}, packet {packet.number}", block=packet.block)
                ) from exc.__cause__
        return self._stop_at_sync(lane) if packet.sync else True

    def _begin_pages(self, lane: _Lane) -> None:
        with self._changed:
            if self._complete:
                raise StreamError("pages came behind the end of RAM")
            lane.unsynced = True

    def _stop_at_sync(self, lane: _Lane) -> bool:
        with self._changed:
            lane.unsynced = False
            lane.reached += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._over or self._released >= lane.reached)
            return not self._over

    def _ended(self, lane: _Lane) -> None:
        """The peer has hung up. Behind a SYNC that may be in order: whoever waits for another one will tell."""
        with self._changed:
            lane.ended = True
            self._changed.notify_all()
            if lane.unsynced and not self._over:
                raise lane.lost("a SYNC was")

    def _fail(self, failure: MigrationError) -> None:
        with self._changed:
            if self._complete and not self._closed and not isinstance(failure, ChannelError):
                _log.warning("behind the last page: %s", failure)
            if self._over or self._complete:
                return
            self.failure = failure
            self._changed.notify_all()
        if not self._noticed.wait(NOTICE):
            self._on_failure()


class _Lane:
    """One connection and what it needs to receive; its own thread, but for `reached`, `unsynced` and `ended`."""

    def __init__(self, number: int, channel: Channel, method: Method) -> None:
        self.number, self.channel = number, channel
        self.reached = 0  # syncs
        self.unsynced = False  # pages came since the last sync
        self.ended = False
        self._bits = method.bits
        self._codec: Codec | None = method.new_codec()
        self._recv_vectors = channel.recv_scattered if isinstance(channel, ScatteringChannel) else None
        self._header = memoryview(bytearray(HEADER_SIZE))
        self._header_address = np.frombuffer(self._header, np.uint8).ctypes.data
        self._ahead = False  # the next header has come, with the pages before it
        self._vectors = np.empty((PAGES_MAX + 1, 2), np.uint64)
        self._room: ByteArray | None = None  # for an encoded payload, or for pages that lie apart
        self._pages: ByteArray | None = None
        self._received = multifd.INIT_SIZE
        self._number = -1  # of the last packet that said anything

    @property
    def place(self) -> Place:
        """Where messages say that it is."""
        return Place(section=f"lane {self.number}", offset=self._received, peer=self.channel.peer)

    def lost(self, expected: str) -> ChannelLost:
        """What an end is where more was expected."""
        return ChannelLost(
            f"the lane ended where {expected} expected",
            hint="the peer has hung up: its own error says why",
            place=self.place,
        )

    def receive_header(self) -> bool:
        """Receive the header of a packet; False at the end of the lane. Raises ChannelLost in the middle."""
        if self._ahead:
            self._ahead = False
            return True
        return self._fill(self._header, may_end=True)

    def parse(self) -> Packet:
        """The packet whose header has come. Raises StreamError."""
        return multifd.parse_packet(self._header, self._bits)

    def check_fresh(self, packet: Packet) -> None:
        """Raise StreamError for a packet that has come already: numbers rise on each lane.

        One that says nothing is passed over: a QEMU 7.2 sends such with the number of the one before.
        """
        if not packet.block and not packet.sync:
            return
        if packet.number <= self._number:
            raise StreamError(
                f"packet {packet.number} came behind packet {self._number}", hint="a packet may come once, in order"
            )
        self._number = packet.number

    def take(self, packet: Packet, sink: PageSink) -> None:
        """Receive the payload and put all pages where they belong. Raises StreamError and ChannelError."""
        memory = sink.memory(packet.block)
        packet.check_inside(len(memory))
        if len(packet.zeros):
            sink.zeros(packet.block, packet.zeros)
        if not len(packet.pages):
            return
        sink.arriving(packet.block, packet.pages)
        if self._codec is not None:
            self._decode(packet, memory, self._codec)
        elif self._recv_vectors is not None:
            self._scatter(packet, memory.ctypes.data, self._recv_vectors)
        else:
            self._receive_apart(packet.pages, memory)

    def _scatter(self, packet: Packet, base: int, receive: Callable[[npt.NDArray[np.uint64]], None]) -> None:
        """Pages into their places, those in a row as one piece, and the next header, in one call.

        Behind pages there is always another packet, a SYNC at least; behind a SYNC there need not be.
        """
        pages, run = packet.pages, packet.run
        count = len(pages) if run is None else 1
        if run is None:
            self._vectors[:count, 0] = pages.astype(np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(base)
            self._vectors[:count, 1] = PAGE_SIZE
        else:
            self._vectors[0] = base + run.start * PAGE_SIZE, packet.size
        if not packet.sync:
            self._vectors[count] = self._header_address, HEADER_SIZE
            count += 1
        receive(self._vectors[:count])
        self._ahead = not packet.sync
        self._received += len(pages) * PAGE_SIZE + HEADER_SIZE * self._ahead

    def _receive_apart(self, pages: IndexArray, memory: ByteArray) -> None:
        """Pages in few runs are received in their places, others in a room of their own first."""
        breaks = np.flatnonzero(pages[1:] != pages[:-1] + 1) + 1
        if len(breaks) < FEW:
            for run in np.split(pages, breaks):
                self._fill(memory[int(run[0]) * PAGE_SIZE : (int(run[-1]) + 1) * PAGE_SIZE].data)
            return
        room = self._make_pages()[: len(pages)]
        self._fill(room.reshape(-1).data)
        memory.reshape(-1, PAGE_SIZE)[pages] = room

    def _decode(self, packet: Packet, memory: ByteArray, codec: Codec) -> None:
        if self._room is None:
            self._room = np.empty(multifd.PAYLOAD_MAX, np.uint8)
        payload = self._room[: packet.size].data
        if packet.size:
            self._fill(payload)
        pages = packet.pages
        if packet.run is not None:
            codec.decode(payload, memory.reshape(-1, PAGE_SIZE)[packet.run])
            return
        decoded = self._make_pages()[: len(pages)]
        codec.decode(payload, decoded)
        memory.reshape(-1, PAGE_SIZE)[pages] = decoded

    def _make_pages(self) -> ByteArray:
        if self._pages is None:
            self._pages = np.empty((PAGES_MAX, PAGE_SIZE), np.uint8)
        return self._pages

    def _fill(self, buffer: memoryview, *, may_end: bool = False) -> bool:
        """Receive until `buffer` is full; False where the lane ends instead, before its first byte, and may."""
        if self._recv_vectors is not None and not may_end:
            self._vectors[0] = np.frombuffer(buffer, np.uint8).ctypes.data, len(buffer)
            self._recv_vectors(self._vectors[:1])
            self._received += len(buffer)
            return True
        have = 0
        while have < len(buffer):
            count = self.channel.recv_into(buffer[have:] if have else buffer)
            if count == 0:
                if may_end and not have:
                    return False
                raise self.lost(f"at least {len(buffer) - have} more bytes were")
            have += count
            self._received += count
        return True
