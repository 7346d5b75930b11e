"""The source's side of RAM: dirty marks → batches of page numbers → zero test → records.

Nothing here runs once per page. The rule of tracking: a mark is cleared before the page is read, so that a write
during the copy is seen in the next round.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from whimbrel.abc import BoolArray, ByteArray, DirtyTracker, IndexArray, Progress, Slice, StreamWriter
from whimbrel.machine import RamBlock
from whimbrel.machine.bitmap import DirtyBitmap
from whimbrel.wire import ram as wire

BATCH: Final = 256  # pages: a stage of 1 MiB stays in the second-level cache

_WORDS: Final = wire.PAGE_SIZE // 8


class RamSaver:
    """Saves some blocks; one use, on the migration thread. `tracker` is its own."""

    def __init__(self, blocks: list[RamBlock], tracker: DirtyTracker, progress: Progress) -> None:
        self._blocks, self._tracker, self._progress = blocks, tracker, progress
        self._bitmaps = [DirtyBitmap(block.pages) for block in blocks]
        self._stage = wire.RecordStage(BATCH)
        self._turn = 0  # the block whose dirty pages are being sent
        self._named: str | None = None  # the block that the last record was in

    def start(self, out: StreamWriter) -> None:
        """Track from here on, mark everything dirty, and write the block list. Raises TrackerUnavailable."""
        self._tracker.start(self._blocks)
        for bitmap in self._bitmaps:
            bitmap.set_all()
        self._progress.remaining = self.pending()
        out.write(wire.block_list([(block.name, block.size) for block in self._blocks]))
        out.write(wire.EOS_RECORD)

    def sync(self) -> None:
        """Mark dirty what was written since the last sync."""
        new = sum(
            bitmap.collect(self._tracker, block) for bitmap, block in zip(self._bitmaps, self._blocks, strict=True)
        )
        self._progress.synced_dirty += new * wire.PAGE_SIZE
        self._progress.remaining = self.pending()
        self._turn = 0

    def pending(self) -> int:
        """Bytes marked dirty."""
        return sum(bitmap.count for bitmap in self._bitmaps) * wire.PAGE_SIZE

    def part(self, out: StreamWriter, slice_: Slice) -> None:
        """Send dirty pages while the slice lasts and there are any."""
        before = out.offset
        while not slice_.over() and self._send_batch(out, min(BATCH, slice_.bytes_left() // wire.PAGE_STRIDE + 1)):
            pass
        self._end_body(out, before)

    def end(self, out: StreamWriter) -> None:
        """Send all dirty pages."""
        before = out.offset
        while self._send_batch(out, BATCH):
            pass
        self._end_body(out, before)

    def finish(self) -> None:
        """End the tracking."""
        self._tracker.stop()

    def _end_body(self, out: StreamWriter, before: int) -> None:
        out.write(wire.EOS_RECORD)
        self._progress.transferred += out.offset - before
        self._progress.remaining = self.pending()

    def _send_batch(self, out: StreamWriter, limit: int) -> bool:
        """Send up to `limit` dirty pages of one block; False if there are none anywhere."""
        while self._turn < len(self._blocks):
            bitmap, block = self._bitmaps[self._turn], self._blocks[self._turn]
            if bitmap.count:
                indices = bitmap.take(limit)
                if len(indices):
                    self._send_pages(out, block, indices)
                    return True
            else:
                self._turn += 1
        return False

    def _send_pages(self, out: StreamWriter, block: RamBlock, indices: IndexArray) -> None:
        memory = self._tracker.pages(block)
        zero = zero_pages(memory, indices)
        zeros, normal = (indices[zero], indices[~zero]) if zero.any() else (indices[:0], indices)
        if len(zeros):
            self._write_run(out, self._stage.zeros(zeros, self._name_for(block)))
        if len(normal):
            self._write_run(out, self._stage.pages(memory, normal, self._name_for(block)))
        self._progress.duplicate += len(zeros)
        self._progress.normal += len(normal)

    def _write_run(self, out: StreamWriter, run: tuple[bytes, memoryview]) -> None:
        head, rest = run
        if head:
            out.write(head)
        out.write(rest)

    def _name_for(self, block: RamBlock) -> str | None:
        if self._named == block.name:
            return None
        self._named = block.name
        return block.name


def zero_pages(memory: ByteArray, indices: IndexArray) -> BoolArray:
    """Which of the pages at `indices` (ascending, shape (n,)) of `memory` (shape (size,)) are all zero, shape (n,).

    Most pages that are not zero show it in their first word, so only the others are read whole.
    """
    words: npt.NDArray[np.uint64] = memory.view(np.uint64).reshape(-1, _WORDS)
    maybe: BoolArray = words[indices, 0] == 0
    candidates = indices[maybe]
    if len(candidates) == 0:
        return maybe
    run = wire.as_slice(candidates)
    maybe[maybe] = np.bitwise_or.reduce(words[candidates if run is None else run], axis=1) == 0
    return maybe
