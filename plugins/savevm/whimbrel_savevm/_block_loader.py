"""The destination's side of drives: chunks go into the images of the machine's own drives, inside of their bounds.

Before the first byte of any image changes, all of them are known to be there and ours: locked, and what the system
remembers of them forgotten. An image is marked as incomplete before its own first byte changes, and stays so until
the machine is taken over. What arrives is written back to the disk as it comes, so that little is left to be flushed
while the guest stands still.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np

from whimbrel.abc import BoolArray, SectionKind, StreamReader
from whimbrel.errors import IncompatibleError, MigrationError, Place, StateError, StreamError
from whimbrel.machine import Drive
from whimbrel.wire import block as wire

PIECE: Final = 64 << 10  # bytes; where as many are zero, there is a hole
FLUSH: Final = 32 << 20  # bytes written before they are flushed in the background
BACKLOG: Final = 256 << 20  # bytes written and not known to be on the disk, at most

IDLE_BODIES: Final = 20_000  # that may come with nothing in them before the first chunk does

_PIECES: Final = wire.CHUNK // PIECE


class BlockLoader:
    """Loads the drives of one machine; one use, on the incoming thread."""

    def __init__(self, drives: list[Drive]) -> None:
        self._drives = {drive.name: drive for drive in drives}
        self._sizes = {drive.name: drive.size for drive in drives}
        self._came: dict[str, BoolArray] = {}  # chunks of the drives that were written into
        self._were_incomplete: set[str] = set()
        self._percent: int | None = None  # how far the source said that it was, before its last word
        self._idle = 0  # bodies that came before anything else, and had nothing in them
        self._buffer = memoryview(bytearray(wire.CHUNK))
        self._flusher = _Flusher(drives)

    def load(self, reader: StreamReader, kind: SectionKind) -> None:
        """Load one body up to and including its EOS. Raises StreamError, IncompatibleError or MigrationError."""
        if kind is SectionKind.FULL:
            raise StreamError("the block section came as FULL, expected START, PART and END")
        if kind is SectionKind.START:
            self._make_ours()
        told: int | None = None  # the last word of progress, while nothing has come behind it
        came = False
        while not isinstance(record := reader.parse(wire.parse_record(self._sizes)), wire.End):
            came = came or not isinstance(record, wire.Progress) or record.percent > 0
            if told is not None:
                self._percent, told = told, None
            if isinstance(record, wire.Progress):
                told = record.percent
                continue
            drive = self._drives[record.device]
            if not record.zero:
                reader.read_into(self._buffer)
            self._load_chunk(drive, record)
        if kind is SectionKind.END:
            self._check_complete()
            return
        if told is not None:
            self._percent = told
        self._count_idle(came=came)

    def chunks_come(self, name: str) -> int:
        """How many chunks of drive `name` came so far, each counted once."""
        came = self._came.get(name)
        return 0 if came is None else int(np.count_nonzero(came))

    def came(self) -> dict[str, int]:
        """How many chunks of each drive came, each counted once; of those of which any did."""
        return {name: int(np.count_nonzero(came)) for name, came in self._came.items()}

    def commit(self) -> None:
        """Flush everything. Raises MigrationError."""
        self._flusher.finish()
        for name, came in self._came.items():
            drive = self._drives[name]
            if name in self._were_incomplete and not came.all():
                raise IncompatibleError(
                    f"the image of drive {name!r} was not whole before, and this stream brought only "
                    f"{int(came.sum())} of its {drive.chunks} chunks",
                    hint="load all of it, without inc",
                )
            try:
                drive.flush()
            except OSError as exc:
                raise _failed(drive, "flushed", exc) from exc

    def rollback(self) -> None:
        """Let go of the images; those that were written into stay marked as incomplete."""
        self.finish()
        for drive in self._drives.values():
            drive.let_go()

    def finish(self) -> None:
        """End the flushing in the background."""
        self._flusher.close()

    def _check_complete(self) -> None:
        """See whether the source has really come to the end of its drives, for a QEMU may stop before and say nothing.

        It tells how far it is by the chunks that it has come to, and so says never that it is through the last one of
        any drive; the last word of all is 100 in any case. There are at least as many chunks as the highest numbers
        that came say.
        """
        chunks = sum(int(np.flatnonzero(came)[-1]) + 1 for came in self._came.values())
        if self._percent is not None and chunks and self._percent < (chunks - len(self._came)) * 100 // chunks:
            raise StreamError(
                f"the source has ended its drives when it was {self._percent} per cent through",
                hint="a QEMU 7.2 does so where much fits into its downtime-limit: set that to 1 and try again",
            )

    def _count_idle(self, *, came: bool) -> None:
        """Give up a source that sends bodies for ever and no chunk: it would never come to an end."""
        if came or self._idle < 0:
            self._idle = -1
            return
        self._idle += 1
        if self._idle > IDLE_BODIES:
            raise StreamError(
                f"the source has sent {self._idle} bodies of its block section, and no chunk of a drive in them",
                hint="a QEMU 7.2 whose max-bandwidth is 0 never sends one: set it to a large number there",
            )

    def _make_ours(self) -> None:
        for drive in self._drives.values():
            try:
                drive.device.acquire()
                drive.device.invalidate()
            except (StateError, OSError) as exc:
                raise IncompatibleError(
                    f"drive {drive.name!r} cannot be loaded: {exc}",
                    hint="if both sides have the same image, migrate without block (blk)",
                ) from exc

    def _begin(self, drive: Drive) -> None:
        if drive.device.incomplete:
            self._were_incomplete.add(drive.name)
        drive.begin_load()
        self._came[drive.name] = np.zeros(drive.chunks, np.bool_)

    def _load_chunk(self, drive: Drive, record: wire.Chunk) -> None:
        offset = record.number * wire.CHUNK
        size = min(wire.CHUNK, drive.size - offset)  # the last one is padded on the wire
        try:
            if drive.name not in self._came:
                self._begin(drive)
            self._came[drive.name][record.number] = True
            if record.zero:
                drive.device.discard(offset, size)
            else:
                _store(drive, offset, size, self._buffer)
        except OSError as exc:
            raise _failed(drive, f"written at {offset}", exc) from exc
        self._flusher.written(0 if record.zero else size)


def _store(drive: Drive, offset: int, size: int, buffer: memoryview) -> None:
    """Write a chunk, of which `size` bytes are inside of the drive; holes where it is zero."""
    data = buffer[:size]
    pieces = np.frombuffer(buffer, np.uint64).reshape(_PIECES, -1)[: -(-size // PIECE)]
    filled: BoolArray = (pieces[:, 0] | pieces[:, -1]) != 0  # most that are not zero show it there
    if not filled.all():
        filled[~filled] = np.bitwise_or.reduce(pieces[~filled], axis=1) != 0
    if filled.all():
        drive.device.write(offset, data)
        return
    edges = np.flatnonzero(np.diff(filled)) + 1
    for first, stop in zip((0, *edges.tolist()), (*edges.tolist(), len(filled)), strict=True):
        start, end = first * PIECE, min(stop * PIECE, size)
        if filled[first]:
            drive.device.write(offset + start, data[start:end])
        else:
            drive.device.discard(offset + start, end - start)


class _Flusher:
    """Flushes drives on a thread of its own, again and again, while more and more is written."""

    def __init__(self, drives: list[Drive]) -> None:
        self._drives = drives
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None
        self._since = 0  # bytes written since the last flush began
        self._before = 0  # bytes written that it is about

    def written(self, size: int) -> None:
        """So much more was written; waits while too much is. Raises MigrationError if a flush has failed."""
        self._since += size
        if self._running is not None and (self._running.done() or self._since + self._before >= BACKLOG):
            self._running.result()
            self._running = None
        if self._running is None and self._since >= FLUSH:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "whimbrel-block-flush")
            self._running = self._pool.submit(self._flush)
            self._before, self._since = self._since, 0

    def finish(self) -> None:
        """Wait for the flush that runs. Raises MigrationError if it has failed."""
        if self._running is not None:
            self._running.result()
        self.close()

    def close(self) -> None:
        """End the thread. Twice is fine."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _flush(self) -> None:
        for drive in self._drives:
            try:
                drive.flush()
            except OSError as exc:
                raise _failed(drive, "flushed", exc) from exc


def _failed(drive: Drive, what: str, exc: OSError) -> MigrationError:
    return MigrationError(
        f"drive {drive.name!r} cannot be {what}: {exc}",
        hint="its image is not whole now; load it again",
        place=Place(block=drive.name),
    )
