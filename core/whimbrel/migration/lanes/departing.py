"""The source's lanes: a queue of jobs, and for each lane a thread that takes one and sends it, as a few packets.

A job goes to whichever lane is free first. Where there is enough for all lanes, pages in a row are cut where huge
pages begin, so that each of those goes over one lane.

A sync divides the queue: each lane says SYNC behind what it has taken from before the division, and before it takes
anything from behind it. As no lane goes past a division while there is something before it, nobody waits for anybody
else here; the destination does.

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
AT_ONCE: Final = 4  # packets of a job, where there is enough for all lanes: a huge page


@attrs.frozen(eq=False)
class _Job:
    """Packets to be made, of pages or of zero pages; `division` is how many syncs came before them."""

    division: int
    block: str
    memory: ByteArray
    pages: IndexArray
    zeros: IndexArray

    @property
    def packets(self) -> int:
        """How many there are."""
        return -(-(len(self.pages) + len(self.zeros)) // PAGES_MAX)

    @property
    def expected(self) -> int:
        """Their bytes if nothing is encoded."""
        return self.packets * HEADER_SIZE + len(self.pages) * PAGE_SIZE


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
        self._queued = 0  # packets of the jobs in the queue
        self._division = 0
        self._closed = False
        self._waiting = 0  # bytes of the jobs in the queue and in the making, as far as is known
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
        jobs = [_Job(self._division, block, memory, pages, zeros[:0]) for pages in self._cut(indices)]
        jobs += [_Job(self._division, block, memory, indices[:0], pages) for pages in self._cut(zeros)]
        for first in range(0, len(jobs), QUEUED // AT_ONCE):
            self._queue(jobs[first : first + QUEUED // AT_ONCE])

    def _cut(self, indices: IndexArray) -> list[IndexArray]:
        share = len(indices) // (PAGES_MAX * len(self._lanes))  # packets for each lane
        return _parts(indices, PAGES_MAX * max(1, min(AT_ONCE, share)))

    def _queue(self, jobs: list[_Job]) -> None:
        if self._queued >= QUEUED:
            self._flush()
        with self._lock:
            self._room.wait_for(lambda: self._over or self._queued < QUEUED)
            self.check()
            self._jobs.extend(jobs)
            self._queued += sum(job.packets for job in jobs)
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

    def _next(self, lane: _Lane) -> _Job | int | None:
        """The next job, or the division that is due to be said, or None at the end."""
        with self._lock:
            self._work.wait_for(lambda: self._over or self._may_take(lane) or self._due(lane))
            if self._over:
                return None
            if not self._may_take(lane):
                return self._synced[lane.number] + 1
            self._busy += 1
            job = self._jobs.popleft()
            self._queued -= job.packets
            if self._queued < QUEUED // 2:
                self._room.notify()
            return job

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

    def _send(self, lane: _Lane, job: _Job) -> None:
        size = lane.send(self._numbers, job)
        with self._lock:
            self._busy -= 1
            self._sent += size
            self._waiting -= job.expected
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
        self._number = 0  # of the packet that is made

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

    def send(self, numbers: Iterator[int], job: _Job) -> int:
        """Make the packets of a job and send them; returns their bytes. Raises ChannelError, and what a codec does."""
        self._number = next(numbers)
        try:
            if self._codec is None and self._send_vectors is not None:
                size = self._send_gathered(numbers, job, self._send_vectors)
            else:
                size = self._send_copies(numbers, job)
        except MigrationError as exc:
            place = Place(section=f"lane {self.number}, packet {self._number}", block=job.block)
            raise exc.at(place) from exc.__cause__
        self._sent += size
        return size

    def _send_gathered(self, numbers: Iterator[int], job: _Job, send: Callable[[npt.NDArray[np.uint64]], None]) -> int:
        """Headers and pages by address, all in one call."""
        base, number, count = job.memory.ctypes.data, self._number, 0
        for stage, (pages, zeros) in zip(self._stages, _packets(job), strict=False):
            if count:
                number = next(numbers)
            stage.pages(number, job.block, self._bits, len(pages) * PAGE_SIZE, pages, zeros)
            self._vectors[count] = stage.address, HEADER_SIZE
            count += 1
            if len(pages):
                count = self._add_pages(count, base, pages)
        send(self._vectors[:count])
        return job.expected

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

    def _send_copies(self, numbers: Iterator[int], job: _Job) -> int:
        """Packet by packet, each with a copy of its pages, encoded or as it is."""
        size = 0
        for pages, zeros in _packets(job):
            if size:
                self._number = next(numbers)
            size += self._send_copy(job, pages, zeros)
        return size

    def _send_copy(self, job: _Job, pages: IndexArray, zeros: IndexArray) -> int:
        stage, count = self._stages[0], len(pages)
        if not count:
            stage.pages(self._number, job.block, self._bits, 0, pages, zeros)
            self.channel.send(stage.header.data)
            return HEADER_SIZE
        if self._copy is None:
            self._copy = np.empty((PAGES_MAX, PAGE_SIZE), np.uint8)
        run, copy = as_slice(pages), self._copy[:count]
        copy[...] = job.memory.reshape(-1, PAGE_SIZE)[pages if run is None else run]
        payload = copy.reshape(-1) if self._codec is None else np.frombuffer(self._codec.encode(copy), np.uint8)
        if len(payload) > multifd.PAYLOAD_MAX:
            raise MigrationError(
                f"the codec made {len(payload)} bytes of {count} pages, at most {multifd.PAYLOAD_MAX} may follow"
            )
        stage.pages(self._number, job.block, self._bits, len(payload), pages, zeros)
        if self._send_vectors is None:
            self.channel.send(stage.header.data)
            self.channel.send(payload.data)
        else:
            self._vectors[0] = stage.address, HEADER_SIZE
            self._vectors[1] = payload.ctypes.data, len(payload)
            self._send_vectors(self._vectors[:2])
        return HEADER_SIZE + len(payload)


def _parts(indices: IndexArray, most: int) -> list[IndexArray]:
    """Up to `most` of them each; those in a row up to where the next multiple of `most` begins."""
    if not len(indices):
        return []
    lead = int(indices[0]) % most if as_slice(indices) is not None else 0
    return [indices[max(0, first) : first + most] for first in range(-lead, len(indices), most)]


def _packets(job: _Job) -> Iterator[tuple[IndexArray, IndexArray]]:
    """The pages and the zero pages of each packet."""
    for first in range(0, len(job.pages) + len(job.zeros), PAGES_MAX):
        some = slice(first, first + PAGES_MAX)
        yield job.pages[some], job.zeros[some]
