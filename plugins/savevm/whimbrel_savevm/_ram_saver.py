"""The source's side of RAM: dirty marks → batches of page numbers → zero test → a sender (`_ram_sending`).

Nothing here runs once per page. The rule of tracking: a mark is cleared before the page is read, so that a write
during the copy is seen in the next round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from whimbrel.abc import BoolArray, ByteArray, DirtyTracker, IndexArray, Progress, SectionKind, Slice, StreamWriter
from whimbrel.machine import RamBlock
from whimbrel.machine.bitmap import DirtyBitmap
from whimbrel.wire import ram as wire
from whimbrel_savevm._ram_sending import PageSender

BATCH: Final = 2048  # pages taken and tested at once: enough to hide what a batch costs by itself

_WORDS: Final = wire.PAGE_SIZE // 8


class RamSaver:
    """Saves some blocks; one use, on the migration thread. `tracker` is its own.

    Blocks that both ends share are listed, and neither tracked nor sent.
    """

    def __init__(self, blocks: list[RamBlock], tracker: DirtyTracker, progress: Progress, sender: PageSender) -> None:
        self._tracker, self._progress, self._sender = tracker, progress, sender
        self._listed = blocks
        self._blocks = [_TrackedBlock(block) for block in blocks if not block.shared]
        self._turn = 0  # the block whose dirty pages are being sent
        self._passes = 0

    def use(self, sender: PageSender) -> None:
        """Send by `sender` from now on, and no more by the one before; called before `start`."""
        self._sender.finish()
        self._sender = sender

    def start(self, out: StreamWriter) -> None:
        """Track from here on, mark everything dirty, and write the block list. Raises TrackerUnavailable."""
        self._tracker.start([tracked.block for tracked in self._blocks])
        for tracked in self._blocks:
            tracked.begin(self._tracker)
        self._progress.remaining = self.pending()
        out.write(wire.block_list(_listed(self._listed)))
        self._sender.end_body(out, SectionKind.START)
        out.write(wire.EOS_RECORD)

    def sync(self) -> None:
        """Mark dirty what was written since the last sync. Raises TrackerUnavailable if that cannot be told."""
        new = sum(tracked.collect(self._tracker) for tracked in self._blocks)
        self._progress.synced_dirty += new * wire.PAGE_SIZE
        self._progress.remaining = self.pending()
        self._turn = 0
        self._passes += 1
        self._sender.begin_pass(self._passes)

    def pending(self) -> int:
        """Bytes marked dirty."""
        return sum(tracked.dirty.count for tracked in self._blocks) * wire.PAGE_SIZE

    def part(self, out: StreamWriter, slice_: Slice) -> None:
        """Send dirty pages while the slice lasts and there are any."""
        before = out.offset
        while not slice_.over() and self._send_batch(out, min(BATCH, slice_.bytes_left() // wire.PAGE_STRIDE + 1)):
            pass
        self._end_body(out, SectionKind.PART, before)

    def end(self, out: StreamWriter) -> None:
        """Send all dirty pages."""
        before = out.offset
        self._sender.begin_last()
        while self._send_batch(out, BATCH):
            pass
        self._end_body(out, SectionKind.END, before)

    def statistics(self) -> Mapping[str, Mapping[str, object]]:
        """What the sender counts beside the progress. Any thread."""
        return self._sender.statistics()

    def finish(self) -> None:
        """End the tracking, and release what was needed for sending."""
        self._tracker.stop()
        self._sender.finish()

    def _end_body(self, out: StreamWriter, kind: SectionKind, before: int) -> None:
        self._sender.end_body(out, kind)
        out.write(wire.EOS_RECORD)
        self._progress.transferred += out.offset - before
        self._progress.remaining = self.pending()

    def _send_batch(self, out: StreamWriter, limit: int) -> bool:
        """Send up to `limit` dirty pages of one block; False if there are none anywhere."""
        while self._turn < len(self._blocks):
            tracked = self._blocks[self._turn]
            if tracked.dirty.count:
                indices = tracked.dirty.take(limit)
                if len(indices):
                    self._send_pages(out, tracked, indices)
                    return True
            else:
                self._turn += 1
        return False

    def _send_pages(self, out: StreamWriter, tracked: _TrackedBlock, indices: IndexArray) -> None:
        block = tracked.block
        memory = self._tracker.pages(block)
        zero = tracked.zero_pages(memory, indices)
        zeros, normal = (indices[zero], indices[~zero]) if zero.any() else (indices[:0], indices)
        if len(zeros):
            self._sender.zeros(out, block, zeros)
        if len(normal):
            self._sender.pages(out, block, memory, normal)


def _listed(blocks: list[RamBlock]) -> list[wire.ListedBlock]:
    """What START says of the blocks: if any of them has an address, all are written with one."""
    addressed = any(block.guest_address is not None for block in blocks)
    return [
        wire.ListedBlock(block.name, block.size, (block.guest_address or 0) if addressed else None) for block in blocks
    ]


class _TrackedBlock:
    """A block with its dirty pages and those that are known to be zero without a look."""

    def __init__(self, block: RamBlock) -> None:
        self.block = block
        self.dirty = DirtyBitmap(block.pages)
        self._untouched: BoolArray | None = None
        self._mostly_zero = False  # the last batch was

    def begin(self, tracker: DirtyTracker) -> None:
        """Everything is dirty; `tracker` has just been started."""
        untouched = tracker.untouched(self.block)
        self._untouched = None if untouched is None else untouched.copy()  # it changes here, and the tracker's must not
        self.dirty.set_all()

    def collect(self, tracker: DirtyTracker) -> int:
        """Mark dirty what `tracker` saw written; returns how many pages are new."""
        if self._untouched is None:
            return self.dirty.collect(tracker, self.block)
        written = np.zeros(self.block.pages, np.bool_)
        tracker.collect(self.block, written)
        self._untouched &= ~written
        return self.dirty.or_pages(written)

    def zero_pages(self, memory: ByteArray, indices: IndexArray) -> BoolArray:
        """Which of the pages at `indices` are zero. One that was written meanwhile is dirty again, and comes again."""
        if self._untouched is None:
            zero = zero_pages(memory, indices, probe=not self._mostly_zero)
        else:
            zero = self._untouched[indices]
            if not zero.all():
                zero[~zero] = zero_pages(memory, indices[~zero], probe=not self._mostly_zero)
        self._mostly_zero = 2 * int(np.count_nonzero(zero)) > len(zero)
        return zero


def zero_pages(memory: ByteArray, indices: IndexArray, *, probe: bool = True) -> BoolArray:
    """Which of the pages at `indices` (ascending, shape (n,)) of `memory` (shape (size,)) are all zero, shape (n,).

    Most pages that are not zero show it in their first word, so with `probe` only the others are read whole. Where most
    are zero the probe costs as much again, a cache miss a page, and is better left out.
    """
    words: npt.NDArray[np.uint64] = memory.view(np.uint64).reshape(-1, _WORDS)
    run = wire.as_slice(indices)
    if not probe:
        whole: BoolArray = np.bitwise_or.reduce(words[indices if run is None else run], axis=1) == 0
        return whole
    maybe: BoolArray = words[indices if run is None else run, 0] == 0
    if maybe.any():
        maybe[maybe] = zero_pages(memory, indices[maybe], probe=False)
    return maybe
