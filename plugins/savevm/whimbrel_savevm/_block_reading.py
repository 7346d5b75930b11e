"""Reads chunks of drives for the stream: at once, or several ahead of it; handed out in the order of asking.

What the kernel has in memory is read by whoever asks, just before it is sent: one chunk stays in the processor's cache
from the reading to the sending, and no thread has to be woken. What the storage has to be waited for is read ahead, on
threads of their own. The order is what keeps a chunk that was read twice from going out with its older contents last.
Memory is bounded by the buffers, which are lent out and come back.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Final

import attrs
import numpy as np

from whimbrel.errors import MigrationError, Place
from whimbrel.machine import Drive
from whimbrel.wire.block import CHUNK

READERS: Final = 4  # threads
HEAD: Final = 512  # bytes of room in front of a chunk's, for the words of its record
IN_FLIGHT: Final = 16  # chunks that are being read, or were read and wait to be sent


@attrs.define(eq=False)
class Read:
    """Chunk `number` of a drive; `data` has `CHUNK` bytes once it was read, padded with zeros. `zero` if all are."""

    drive: Drive
    number: int
    buffer: memoryview
    zero: bool = False
    ahead: bool = False
    """Whether a thread has read it."""

    @property
    def data(self) -> memoryview:
        """What was read."""
        return self.buffer[HEAD:]

    def behind(self, words: bytes) -> memoryview:
        """`words` (up to `HEAD` bytes) and then `data`, in one piece."""
        start = HEAD - len(words)
        self.buffer[start:HEAD] = words
        return self.buffer[start:]


class ReadAhead:
    """Reads chunks; one thread asks and takes. With `find_zeros` each chunk is looked at for zeros, as it is read.

    The part of a chunk that a drive may end with is looked at in any case.
    """

    def __init__(self, *, find_zeros: bool) -> None:
        self._find_zeros = find_zeros
        self._free: list[memoryview] = []
        self._made = 0
        self._queue: deque[Future[Read]] = deque()
        self._ahead = 0  # of the queue, those that threads have read or will
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """How many chunks were asked for and not taken."""
        return len(self._queue)

    @property
    def room(self) -> int:
        """How many more may be asked for now: where nothing has to be waited for, the one that is sent next."""
        if self._ahead:
            return len(self._free) + IN_FLIGHT - self._made
        return 0 if self._queue else 1

    def ask(self, drive: Drive, number: int) -> None:
        """Have a chunk read; there is `room`."""
        if not self._free:
            self._free.append(memoryview(bytearray(HEAD + CHUNK)))
            self._made += 1
        read = Read(drive, number, self._free.pop())
        if drive.device.read_at_once(number * CHUNK, read.data[: _size(read)]):
            done: Future[Read] = Future()
            done.set_result(self._looked_at(read))
            self._queue.append(done)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(READERS, "whimbrel-block")
        self._queue.append(self._pool.submit(self._read, read))
        self._ahead += 1

    def ready(self) -> bool:
        """Whether `take` has something at once."""
        return bool(self._queue) and self._queue[0].done()

    def take(self, timeout: float | None) -> Read | None:
        """The chunk that was asked for first; None if it was not read within `timeout` seconds.

        Its buffer is the caller's until `give_back`. Raises MigrationError if it cannot be read.
        """
        try:
            read = self._queue[0].result(timeout)
        except NotYet:
            return None
        self._queue.popleft()
        self._ahead -= read.ahead
        return read

    def give_back(self, read: Read) -> None:
        """The caller has done with a chunk."""
        self._free.append(read.buffer)

    def close(self) -> None:
        """Read nothing more; returns when nobody reads. Twice is fine."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._queue.clear()
        self._ahead = 0

    def _read(self, read: Read) -> Read:
        offset = read.number * CHUNK
        read.ahead = True
        try:
            read.drive.device.read_into(offset, read.data[: _size(read)])
        except OSError as exc:
            raise MigrationError(
                f"drive {read.drive.name!r} cannot be read at {offset}: {exc}", place=Place(block=read.drive.name)
            ) from exc
        return self._looked_at(read)

    def _looked_at(self, read: Read) -> Read:
        size, data = _size(read), read.data
        if size < CHUNK:
            data[size:] = bytes(CHUNK - size)
        if self._find_zeros or size < CHUNK:
            read.zero = not any(data[:8]) and not np.frombuffer(data, np.uint64).any()
        return read


def _size(read: Read) -> int:
    """How many bytes of the drive the chunk is."""
    return min(CHUNK, read.drive.size - read.number * CHUNK)
