"""Reads chunks of drives ahead of the stream: several at once, handed out in the order in which they were asked for.

The order is what keeps a chunk that was read twice from going out with its older contents last. Memory is bounded by
the buffers, which are lent out and come back.
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
IN_FLIGHT: Final = 16  # chunks that are being read, or were read and wait to be sent


@attrs.define(eq=False)
class Read:
    """Chunk `number` of a drive; `data` has `CHUNK` bytes once it was read, padded with zeros. `zero` if all are."""

    drive: Drive
    number: int
    data: memoryview
    zero: bool = False


class ReadAhead:
    """Reads chunks; one thread asks and takes. With `find_zeros` each chunk is looked at for zeros, as it is read.

    The part of a chunk that a drive may end with is looked at in any case.
    """

    def __init__(self, *, find_zeros: bool) -> None:
        self._find_zeros = find_zeros
        self._free: list[memoryview] = []
        self._made = 0
        self._queue: deque[Future[Read]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """How many chunks were asked for and not taken."""
        return len(self._queue)

    @property
    def room(self) -> int:
        """How many more may be asked for now."""
        return len(self._free) + IN_FLIGHT - self._made

    def ask(self, drive: Drive, number: int) -> None:
        """Have a chunk read; there is `room`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(READERS, "whimbrel-block")
        if not self._free:
            self._free.append(memoryview(bytearray(CHUNK)))
            self._made += 1
        self._queue.append(self._pool.submit(self._read, Read(drive, number, self._free.pop())))

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
        return read

    def give_back(self, read: Read) -> None:
        """The caller has done with a chunk."""
        self._free.append(read.data)

    def close(self) -> None:
        """Read nothing more; returns when nobody reads. Twice is fine."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._queue.clear()

    def _read(self, read: Read) -> Read:
        offset = read.number * CHUNK
        size = min(CHUNK, read.drive.size - offset)
        try:
            read.drive.device.read_into(offset, read.data[:size])
        except OSError as exc:
            raise MigrationError(
                f"drive {read.drive.name!r} cannot be read at {offset}: {exc}", place=Place(block=read.drive.name)
            ) from exc
        read.data[size:] = bytes(CHUNK - size)
        looked_at = self._find_zeros or size < CHUNK
        read.zero = looked_at and not any(read.data[:8]) and not np.frombuffer(read.data, np.uint64).any()
        return read
