"""The source's side of drives: which chunks are to be sent, and sending them as they are read.

A chunk's mark is cleared before it is read, so that a write meanwhile sends it again. What was not allocated when
tracking began, and not written since, is zero without a look.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np

from whimbrel.abc import BoolArray, Progress, Slice, StreamWriter
from whimbrel.machine import Drive
from whimbrel.machine.bitmap import DirtyBitmap
from whimbrel.wire import block as wire
from whimbrel_savevm._block_reading import IN_FLIGHT, ReadAhead

WAIT: Final = 0.05  # seconds to wait for the storage, at most, before others get their turn

_ZEROS: Final = bytes(wire.CHUNK)
_PAGES: Final = wire.CHUNK // 4096  # in a chunk; statistics count pages


class BlockSaver:
    """Saves some drives; one use, on the migration thread.

    With `zero_blocks` a chunk of zeros is a mark; the part of a chunk that a drive may end with is one in any case, for
    a QEMU 7.2 writes chunks that are no marks beyond the end, and fails. With `allocated_only` the destination has the
    rest already: what is not allocated when it begins is not sent.
    """

    def __init__(self, drives: list[Drive], progress: Progress, *, zero_blocks: bool, allocated_only: bool) -> None:
        self._drives = [_TrackedDrive(drive) for drive in drives]
        self._progress = progress
        self._zero_blocks, self._allocated_only = zero_blocks, allocated_only
        self._reads = ReadAhead(find_zeros=zero_blocks)
        self._taken: deque[tuple[_TrackedDrive, int]] = deque()  # no longer marked, and not looked at yet
        self._holes: deque[tuple[_TrackedDrive, int]] = deque()  # looked at, not sent, and zero
        self._first_time = self._first_sent = 0  # chunks that everybody waits for once
        self._told = -1  # per cent

    def start(self, out: StreamWriter) -> None:
        """Track from here on, and mark what is to be sent."""
        for tracked in self._drives:
            tracked.begin(allocated_only=self._allocated_only)
            self._first_time += tracked.dirty.count
        self._progress.remaining = self.pending()
        out.write(wire.EOS_RECORD)

    def sync(self) -> None:
        """Mark what was written since the last sync."""
        new = sum(tracked.collect() for tracked in self._drives)
        self._progress.synced_dirty += new * wire.CHUNK
        self._progress.remaining = self.pending()

    def pending(self) -> int:
        """Bytes of the chunks that are marked, or being read."""
        marked = sum(tracked.dirty.count for tracked in self._drives)
        return (marked + len(self._taken) + len(self._holes) + len(self._reads)) * wire.CHUNK

    def ready(self) -> bool:
        """Whether there is a chunk to send now; has more read in any case."""
        self._ask()
        return bool(self._holes) or self._reads.ready()

    def part(self, out: StreamWriter, slice_: Slice) -> None:
        """Send chunks as they are read, while the slice lasts; waits for none but the first."""
        before = out.offset
        patience = WAIT
        while not slice_.over() and self._send_next(out, patience):
            patience = 0.0
        self._end_body(out, before)

    def end(self, out: StreamWriter) -> None:
        """Send all that is left."""
        before = out.offset
        while self._send_next(out, None):
            pass
        out.write(self._told_of(100))
        self._end_body(out, before)

    def sent(self) -> dict[str, int]:
        """How many chunks of each drive have gone, each counted once; of those of which any have."""
        counts = {tracked.drive.name: int(np.count_nonzero(tracked.sent)) for tracked in self._drives}
        return {name: count for name, count in counts.items() if count}

    def finish(self) -> None:
        """End the reading and the tracking."""
        self._reads.close()
        for tracked in self._drives:
            tracked.drive.untrack()

    def _end_body(self, out: StreamWriter, before: int) -> None:
        out.write(wire.EOS_RECORD)
        self._progress.transferred += out.offset - before
        self._progress.remaining = self.pending()

    def _send_next(self, out: StreamWriter, patience: float | None) -> bool:
        """Send one chunk that was read, or some that are zero; False if there is none within `patience` seconds."""
        self._ask()
        if self._holes:
            self._send_holes(out)
            return True
        if not len(self._reads):
            return False
        read = self._reads.take(patience)
        if read is None:
            return False
        words = self._words(self._of(read.drive), read.number, zero=read.zero)
        out.write(words if read.zero else read.behind(words))
        self._reads.give_back(read)
        return True

    def _ask(self) -> None:
        """Have as much read as there is room for; what needs no reading is put aside."""
        while self._reads.room and not self._holes and (self._taken or self._take()):
            tracked, number = self._taken.popleft()
            if tracked.holes[number]:
                self._holes.append((tracked, number))
            else:
                self._reads.ask(tracked.drive, number)

    def _take(self) -> bool:
        """Take some marked chunks out; False if none is."""
        for tracked in self._drives:
            while tracked.dirty.count and not self._taken:
                # An empty answer means that there is nothing up to the end: the next one begins at the front.
                self._taken.extend((tracked, number) for number in tracked.dirty.take(IN_FLIGHT).tolist())
        return bool(self._taken)

    def _send_holes(self, out: StreamWriter) -> None:
        tracked, number = self._holes.popleft()
        zero = self._zero_blocks or (number + 1) * wire.CHUNK > tracked.drive.size
        out.write(self._words(tracked, number, zero=zero))
        if not zero:
            out.write(_ZEROS)

    def _words(self, tracked: _TrackedDrive, number: int, *, zero: bool) -> bytes:
        """What goes before the bytes of a chunk, which is counted; and of the progress, if it is the first time."""
        if zero:
            self._progress.duplicate += _PAGES
        else:
            self._progress.normal += _PAGES
        tracked.sent[number] = True
        chunk = wire.chunk(tracked.drive.name, number, zero=zero)
        if not tracked.waiting[number]:
            return chunk
        tracked.waiting[number] = False
        self._first_sent += 1
        return self._told_of(self._first_sent * 100 // self._first_time) + chunk

    def _told_of(self, percent: int) -> bytes:
        """The word of progress, or nothing if it was said."""
        if percent == self._told:
            return b""
        self._told = percent
        return wire.progress(percent)

    def _of(self, drive: Drive) -> _TrackedDrive:
        return next(tracked for tracked in self._drives if tracked.drive is drive)


class _TrackedDrive:
    """A drive, and which chunks are to be sent, wait to be sent for the first time, are holes, and have been sent."""

    def __init__(self, drive: Drive) -> None:
        self.drive = drive
        self.dirty = DirtyBitmap(drive.chunks)
        self.holes: BoolArray = np.zeros(drive.chunks, np.bool_)
        self.waiting: BoolArray = np.zeros(drive.chunks, np.bool_)
        self.sent: BoolArray = np.zeros(drive.chunks, np.bool_)

    def begin(self, *, allocated_only: bool) -> None:
        """Track the drive; what it holds now is dirty."""
        self.drive.track()
        allocated = self.drive.allocated()
        if allocated_only:
            self.dirty.or_pages(allocated)
        else:
            self.dirty.set_all()
            self.holes = ~allocated
        self.waiting = self.dirty.bits.copy()

    def collect(self) -> int:
        """Mark dirty what was written; returns how many chunks are new."""
        written = self.drive.collect()
        self.holes &= ~written
        return self.dirty.or_pages(written)
