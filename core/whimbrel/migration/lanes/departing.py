"""The source's lanes: a queue of packets, and for each lane a thread that takes from it and sends.

A packet goes to whichever lane is free first. A sync divides the queue: each lane says SYNC behind what it has taken
from before the division, and before it takes anything from behind it. As no lane goes past a division while there is
something before it, nobody waits for anybody else here; the destination does.

Bytes are not copied: the kernel takes them from the guest's memory, where it gathers. What a guest writes meanwhile is
found dirty later and sent again. For a codec they are copied first, for it must not see a page change.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import attrs
import numpy as np

from whimbrel.abc import ByteArray, Channel, Codec, GatheringChannel, IndexArray
from whimbrel.errors import MigrationError, Place
from whimbrel.migration.attempt import unexpected
from whimbrel.migration.lanes.method import Method
from whimbrel.migration.quietly import quietly
from whimbrel.wire import multifd
from whimbrel.wire.multifd import HEADER_SIZE, PAGES_MAX, LaneMode
from whimbrel.wire.ram import PAGE_SIZE, as_slice

QUEUED: Final = 32  # packets that wait at most, 16 MiB: two batches of whoever finds them


@attrs.frozen(eq=False)
class _Job:
    """A packet to be made; `division` is how many syncs came before it."""

    division: int
    block: str
    memory: ByteArray
    pages: IndexArray
    zeros: IndexArray

    @property
    def expected(self) -> int:
        """Its bytes if nothing is encoded."""
        return HEADER_SIZE + len(self.pages) * PAGE_SIZE


class Departing:
    """`DepartingLanes` over connected channels, which have had their first bytes; `close` ends it.

    `on_failure` is called once, on the thread of the lane that failed first, when `failure` is there.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        mode: LaneMode,
        method: Method,
        *,
        on_failure: Callable[[], object],
    ) -> None:
        self.failure: MigrationError | None = None
        """Why a lane has failed, if one has."""
        self._mode, self._on_failure = mode, on_failure
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._division = 0
        self._closed = False
        self._waiting = 0  # bytes of the packets in the queue and in the making, as far as is known
        self._sent = 0
        self._numbers = itertools.count()
        self._lanes = [_Lane(number, channel, method) for number, channel in enumerate(channels)]
        self._busy = 0  # lanes that are making or sending a packet
        self._synced = [0] * len(self._lanes)  # how many divisions each lane has said SYNC at
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"whimbrel-lane-{lane.number}", daemon=True)
            for lane in self._lanes
        ]

    def start(self) -> None:
        """Begin to send."""
        for thread in self._threads:
            thread.start()

    # -------------------------------------------------------------------------------------- what handlers call

    @property
    def sync_each_body(self) -> bool:
        """Whether every body ends with a `sync`."""
        return self._mode.sync_each_body

    @property
    def take_zeros(self) -> bool:
        """Whether zero pages go over lanes."""
        return self._mode.takes_zeros

    def send(self, block: str, memory: ByteArray, indices: IndexArray, zeros: IndexArray) -> None:
        """Queue pages, as `DepartingLanes.send` says."""
        jobs = [_Job(self._division, block, memory, pages, zeros[:0]) for pages in _parts(indices)]
        jobs += [_Job(self._division, block, memory, indices[:0], pages) for pages in _parts(zeros)]
        for first in range(0, len(jobs), QUEUED):
            self._queue(jobs[first : first + QUEUED])

    def _queue(self, jobs: list[_Job]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._jobs) < QUEUED)
            self.check()
            self._jobs.extend(jobs)
            self._waiting += sum(job.expected for job in jobs)
            self._changed.notify_all()

    def sync(self) -> None:
        """Divide what is before from what is behind; returns at once."""
        with self._changed:
            self.check()
            self._division += 1
            self._changed.notify_all()

    # ----------------------------------------------------------------------------------- what the engine calls

    @property
    def sent(self) -> int:
        """Bytes that have gone so far. Any thread."""
        return self._sent

    @property
    def committed(self) -> int:
        """Bytes that have gone or will, as far as is known. Any thread."""
        with self._changed:
            return self._sent + self._waiting

    def check(self) -> None:
        """Raise the failure of a lane, if one has failed."""
        if self.failure is not None:
            raise self.failure

    def drain(self) -> None:
        """Wait until everything queued, and every SYNC, has gone. Raises ChannelError."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._over or (not self._jobs and not self._busy and min(self._synced) == self._division)
            )
            self.check()

    def close(self) -> None:
        """End all lanes, and wait for their threads. The channels are closed; twice is fine. Raises nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for lane in self._lanes:
            quietly(lane.channel.close, "closing a lane")
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    @property
    def _over(self) -> bool:
        return self._closed or self.failure is not None

    # ---------------------------------------------------------------------------------------- a lane's thread

    def _run(self, lane: _Lane) -> None:
        try:
            while (step := self._next(lane)) is not None:
                self._do(lane, step)
        except MigrationError as exc:
            self._fail(exc.at(lane.place))
        except BaseException as exc:  # noqa: BLE001 - a codec's or our own bug must not leave the migration waiting
            self._fail(unexpected(exc).at(lane.place))

    def _next(self, lane: _Lane) -> _Job | int | None:
        """The next packet, or the division that is due to be said, or None at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._over or self._due(lane) or self._may_take(lane))
                if self._over:
                    return None
                if self._may_take(lane):
                    self._busy += 1
                    job = self._jobs.popleft()
                    self._changed.notify_all()
                    return job
                return self._synced[lane.number] + 1

    def _may_take(self, lane: _Lane) -> bool:
        return bool(self._jobs) and self._jobs[0].division == self._synced[lane.number]

    def _due(self, lane: _Lane) -> bool:
        """Whether all before the lane's next division is taken."""
        mine = self._synced[lane.number]
        return mine < (self._jobs[0].division if self._jobs else self._division)

    def _do(self, lane: _Lane, step: _Job | int) -> None:
        number = next(self._numbers)
        if isinstance(step, int):
            size = lane.sync(number)
            with self._changed:
                self._sent += size
                self._synced[lane.number] = step
                self._changed.notify_all()
            return
        size = lane.send(number, step)
        with self._changed:
            self._busy -= 1
            self._sent += size
            self._waiting -= step.expected
            self._changed.notify_all()

    def _fail(self, failure: MigrationError) -> None:
        with self._changed:
            if self._over:
                return
            self.failure = failure
            self._changed.notify_all()
        self._on_failure()


class _Lane:
    """One connection and what it needs to send; its own thread alone."""

    def __init__(self, number: int, channel: Channel, method: Method) -> None:
        self.number, self.channel = number, channel
        self._bits = method.bits
        self._codec: Codec | None = method.new_codec()
        self._send_vectors = channel.send_gathered if isinstance(channel, GatheringChannel) else None
        self._stage = multifd.PacketStage()
        self._vectors = np.empty((1 + PAGES_MAX, 2), np.uint64)
        self._vectors[0] = self._stage.header.ctypes.data, HEADER_SIZE
        self._head = tuple(self._vectors[0].tolist())
        self._copy: ByteArray | None = None
        self._sent = 0

    @property
    def place(self) -> Place:
        """Where messages say that it is."""
        return Place(section=f"lane {self.number}", offset=self._sent, peer=self.channel.peer)

    def sync(self, number: int) -> int:
        """Say SYNC; returns the bytes sent."""
        self._stage.sync(number)
        self.channel.send(self._stage.header.data)
        self._sent += HEADER_SIZE
        return HEADER_SIZE

    def send(self, number: int, job: _Job) -> int:
        """Make a packet and send it; returns its bytes. Raises ChannelError, and what a codec raises."""
        try:
            size = self._send(number, job)
        except MigrationError as exc:
            raise exc.at(Place(section=f"lane {self.number}, packet {number}", block=job.block)) from exc.__cause__
        self._sent += size
        return size

    def _send(self, number: int, job: _Job) -> int:
        pages = job.pages
        if self._codec is not None and len(pages):
            return self._send_encoded(number, job, self._codec)
        size = len(pages) * PAGE_SIZE
        self._stage.pages(number, job.block, self._bits, size, pages, job.zeros)
        if not len(pages):
            self.channel.send(self._stage.header.data)
        elif self._send_vectors is None:
            copy = self._room()
            copy[:HEADER_SIZE] = self._stage.header
            copy[HEADER_SIZE : HEADER_SIZE + size].reshape(-1, PAGE_SIZE)[...] = _pages(job)
            self.channel.send(copy[: HEADER_SIZE + size].data)
        else:
            self._send_vectors(self._gathered(job))
        return HEADER_SIZE + size

    def _gathered(self, job: _Job) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
        """The header and the pages by address; pages in a row are one piece."""
        vectors, base = self._vectors, job.memory.ctypes.data
        vectors[0] = self._head
        run = as_slice(job.pages)
        if run is not None:
            vectors[1] = base + run.start * PAGE_SIZE, (run.stop - run.start) * PAGE_SIZE
            return vectors[:2]
        stop = 1 + len(job.pages)
        vectors[1:stop, 0] = job.pages.astype(np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(base)
        vectors[1:stop, 1] = PAGE_SIZE
        return vectors[:stop]

    def _send_encoded(self, number: int, job: _Job, codec: Codec) -> int:
        count = len(job.pages)
        copy = self._room()[HEADER_SIZE : HEADER_SIZE + count * PAGE_SIZE].reshape(count, PAGE_SIZE)
        copy[...] = _pages(job)
        payload = codec.encode(copy)
        if len(payload) > multifd.PAYLOAD_MAX:
            raise MigrationError(
                f"the codec made {len(payload)} bytes of {count} pages, at most {multifd.PAYLOAD_MAX} may follow"
            )
        self._stage.pages(number, job.block, self._bits, len(payload), job.pages, job.zeros)
        if self._send_vectors is None:
            self.channel.send(self._stage.header.data)
            self.channel.send(payload)
        else:
            self._vectors[0] = self._head
            self._vectors[1] = np.frombuffer(payload, np.uint8).ctypes.data, len(payload)
            self._send_vectors(self._vectors[:2])
        return HEADER_SIZE + len(payload)

    def _room(self) -> ByteArray:
        if self._copy is None:
            self._copy = np.empty(HEADER_SIZE + PAGES_MAX * PAGE_SIZE, np.uint8)
        return self._copy


def _parts(indices: IndexArray) -> list[IndexArray]:
    return [indices[first : first + PAGES_MAX] for first in range(0, len(indices), PAGES_MAX)]


def _pages(job: _Job) -> ByteArray:
    run = as_slice(job.pages)
    pages: ByteArray = job.memory.reshape(-1, PAGE_SIZE)[job.pages if run is None else run]
    return pages
