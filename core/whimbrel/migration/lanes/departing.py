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
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import ByteArray, Channel, Codec, GatheringChannel, IndexArray
from whimbrel.errors import MigrationError, Place
from whimbrel.migration.attempt import unexpected
from whimbrel.migration.lanes.method import Method
from whimbrel.migration.quietly import quietly
from whimbrel.wire import multifd
from whimbrel.wire.multifd import HEADER_SIZE, PAGES_MAX, LaneMode
from whimbrel.wire.ram import PAGE_SIZE, as_slice

QUEUED: Final = 32  # packets that wait at most, 16 MiB: two batches of whoever finds them
AT_ONCE: Final = 4  # packets that a lane takes and sends together, where there is enough for all lanes


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

    `flush` is called before anybody waits here: the destination's lanes may wait for what the main channel holds back.
    `on_failure` is called once, on the thread of the lane that failed first, when `failure` is there.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        mode: LaneMode,
        method: Method,
        *,
        on_failure: Callable[[], object],
        flush: Callable[[], object] = lambda: None,
    ) -> None:
        self.failure: MigrationError | None = None
        """Why a lane has failed, if one has."""
        self._mode, self._on_failure, self._flush = mode, on_failure, flush
        # One lock; who waits for what is woken by itself, for each waking costs as much as a packet.
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # lanes: something to send, or to end for
        self._room = threading.Condition(self._lock)  # who fills the queue: room, or a failure
        self._idle = threading.Condition(self._lock)  # who drains it: nothing left, or a failure
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
        if len(self._jobs) >= QUEUED:
            self._flush()
        with self._lock:
            self._room.wait_for(lambda: self._over or len(self._jobs) < QUEUED)
            self.check()
            self._jobs.extend(jobs)
            self._waiting += sum(job.expected for job in jobs)
            self._work.notify(len(jobs))

    def sync(self) -> None:
        """Divide what is before from what is behind; returns at once."""
        with self._lock:
            self.check()
            self._division += 1
            self._work.notify_all()

    # ----------------------------------------------------------------------------------- what the engine calls

    @property
    def sent(self) -> int:
        """Bytes that have gone so far. Any thread."""
        return self._sent

    @property
    def committed(self) -> int:
        """Bytes that have gone or will, as far as is known. Any thread."""
        with self._lock:
            return self._sent + self._waiting

    def check(self) -> None:
        """Raise the failure of a lane, if one has failed."""
        if self.failure is not None:
            raise self.failure

    def drain(self) -> None:
        """Wait until everything queued, and every SYNC, has gone. Raises ChannelError."""
        self._flush()
        with self._lock:
            self._idle.wait_for(lambda: self._over or self._drained)
            self.check()

    def close(self) -> None:
        """End all lanes, and wait for their threads. The channels are closed; twice is fine. Raises nothing."""
        with self._lock:
            self._closed = True
            self._wake_all()
        for lane in self._lanes:
            quietly(lane.channel.close, "closing a lane")
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    @property
    def _over(self) -> bool:
        return self._closed or self.failure is not None

    @property
    def _drained(self) -> bool:
        return not self._jobs and not self._busy and min(self._synced) == self._division

    def _wake_all(self) -> None:
        for condition in (self._work, self._room, self._idle):
            condition.notify_all()

    # ---------------------------------------------------------------------------------------- a lane's thread

    def _run(self, lane: _Lane) -> None:
        try:
            while (step := self._next(lane)) is not None:
                if isinstance(step, int):
                    self._say_sync(lane, step)
                else:
                    self._send(lane, step)
        except MigrationError as exc:
            self._fail(exc.at(lane.place))
        except BaseException as exc:  # noqa: BLE001 - a codec's or our own bug must not leave the migration waiting
            self._fail(unexpected(exc).at(lane.place))

    def _next(self, lane: _Lane) -> list[_Job] | int | None:
        """The next packets, or the division that is due to be said, or None at the end."""
        with self._lock:
            self._work.wait_for(lambda: self._over or self._may_take(lane) or self._due(lane))
            if self._over:
                return None
            if not self._may_take(lane):
                return self._synced[lane.number] + 1
            self._busy += 1
            jobs = [self._jobs.popleft()]
            most = min(AT_ONCE, len(self._jobs) // len(self._lanes))
            while len(jobs) < most and self._may_take(lane):
                jobs.append(self._jobs.popleft())
            if len(self._jobs) < QUEUED // 2:
                self._room.notify()
            return jobs

    def _may_take(self, lane: _Lane) -> bool:
        return bool(self._jobs) and self._jobs[0].division == self._synced[lane.number]

    def _due(self, lane: _Lane) -> bool:
        """Whether all before the lane's next division is taken."""
        mine = self._synced[lane.number]
        return mine < (self._jobs[0].division if self._jobs else self._division)

    def _say_sync(self, lane: _Lane, division: int) -> None:
        size = lane.sync(next(self._numbers))
        with self._lock:
            self._sent += size
            self._synced[lane.number] = division
            self._tell_if_idle()

    def _send(self, lane: _Lane, jobs: list[_Job]) -> None:
        size = lane.send(self._numbers, jobs)
        with self._lock:
            self._busy -= 1
            self._sent += size
            self._waiting -= sum(job.expected for job in jobs)
            self._tell_if_idle()

    def _tell_if_idle(self) -> None:
        if self._drained:
            self._idle.notify_all()

    def _fail(self, failure: MigrationError) -> None:
        with self._lock:
            if self._over:
                return
            self.failure = failure
            self._wake_all()
        self._on_failure()


class _Lane:
    """One connection and what it needs to send; its own thread alone."""

    def __init__(self, number: int, channel: Channel, method: Method) -> None:
        self.number, self.channel = number, channel
        self._bits = method.bits
        self._codec: Codec | None = method.new_codec()
        self._send_vectors = channel.send_gathered if isinstance(channel, GatheringChannel) else None
        self._stages = [multifd.PacketStage() for _ in range(AT_ONCE)]
        self._vectors = np.empty((AT_ONCE * (1 + PAGES_MAX), 2), np.uint64)
        self._copy: ByteArray | None = None
        self._sent = multifd.INIT_SIZE

    @property
    def place(self) -> Place:
        """Where messages say that it is."""
        return Place(section=f"lane {self.number}", offset=self._sent, peer=self.channel.peer)

    def sync(self, number: int) -> int:
        """Say SYNC; returns the bytes sent."""
        self._stages[0].sync(number)
        self.channel.send(self._stages[0].header.data)
        self._sent += HEADER_SIZE
        return HEADER_SIZE

    def send(self, numbers: Iterator[int], jobs: list[_Job]) -> int:
        """Make packets and send them; returns their bytes. Raises ChannelError, and what a codec raises."""
        number = next(numbers)
        try:
            if self._codec is None and self._send_vectors is not None:
                size = self._send_gathered(number, numbers, jobs, self._send_vectors)
            else:
                size = self._send_copy(number, jobs[0])
                for job in jobs[1:]:
                    number = next(numbers)
                    size += self._send_copy(number, job)
        except MigrationError as exc:
            place = Place(section=f"lane {self.number}, packet {number}", block=jobs[0].block)
            raise exc.at(place) from exc.__cause__
        self._sent += size
        return size

    def _send_gathered(
        self, number: int, numbers: Iterator[int], jobs: list[_Job], send: Callable[[npt.NDArray[np.uint64]], None]
    ) -> int:
        """Headers and pages by address, all in one call."""
        count = size = 0
        for stage, job in zip(self._stages, jobs, strict=False):
            if count:
                number = next(numbers)
            pages = job.pages
            stage.pages(number, job.block, self._bits, len(pages) * PAGE_SIZE, pages, job.zeros)
            self._vectors[count] = stage.address, HEADER_SIZE
            count += 1
            if len(pages):
                count = self._add_pages(count, job.memory.ctypes.data, pages)
            size += job.expected
        send(self._vectors[:count])
        return size

    def _add_pages(self, count: int, base: int, pages: IndexArray) -> int:
        """Pages by address, those in a row as one piece; returns how many pieces there are then."""
        run = as_slice(pages)
        if run is not None:
            self._vectors[count] = base + run.start * PAGE_SIZE, len(pages) * PAGE_SIZE
            return count + 1
        stop = count + len(pages)
        self._vectors[count:stop, 0] = pages.astype(np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(base)
        self._vectors[count:stop, 1] = PAGE_SIZE
        return stop

    def _send_copy(self, number: int, job: _Job) -> int:
        """A copy of the pages, encoded or as it is."""
        stage, count = self._stages[0], len(job.pages)
        if not count:
            stage.pages(number, job.block, self._bits, 0, job.pages, job.zeros)
            self.channel.send(stage.header.data)
            return HEADER_SIZE
        if self._copy is None:
            self._copy = np.empty((PAGES_MAX, PAGE_SIZE), np.uint8)
        run, copy = as_slice(job.pages), self._copy[:count]
        copy[...] = job.memory.reshape(-1, PAGE_SIZE)[job.pages if run is None else run]
        payload = copy.reshape(-1) if self._codec is None else np.frombuffer(self._codec.encode(copy), np.uint8)
        if len(payload) > multifd.PAYLOAD_MAX:
            raise MigrationError(
                f"the codec made {len(payload)} bytes of {count} pages, at most {multifd.PAYLOAD_MAX} may follow"
            )
        stage.pages(number, job.block, self._bits, len(payload), job.pages, job.zeros)
        if self._send_vectors is None:
            self.channel.send(stage.header.data)
            self.channel.send(payload.data)
        else:
            self._vectors[0] = stage.address, HEADER_SIZE
            self._vectors[1] = payload.ctypes.data, len(payload)
            self._send_vectors(self._vectors[:2])
        return HEADER_SIZE + len(payload)


def _parts(indices: IndexArray) -> list[IndexArray]:
    return [indices[first : first + PAGES_MAX] for first in range(0, len(indices), PAGES_MAX)]
