"""Where the pages of a batch go at the source: `PageSender`, and the plain one, which writes records of whole pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Final

from whimbrel.abc import ByteArray, IndexArray, Progress, SectionKind, StreamWriter
from whimbrel.machine import RamBlock
from whimbrel.wire import ram as wire

STAGE: Final = 512  # pages sent at once: with a word each they fill the longest vector that the kernel takes


class PageSender(ABC):
    """Sends what the saver has found dirty, and counts it in `progress`. One stream, one thread.

    A page comes here at most once in a body. Arrays of indices are ascending and not empty.
    """

    def begin_pass(self, number: int) -> None:  # noqa: B027 - not every sender tells passes apart
        """The dirty marks have been read for the `number`-th time."""

    def begin_last(self) -> None:  # noqa: B027
        """What comes from here on is the last of it: the guest stands still."""

    @abstractmethod
    def zeros(self, out: StreamWriter, block: RamBlock, indices: IndexArray) -> None:
        """Send pages that are all zero."""

    @abstractmethod
    def pages(self, out: StreamWriter, block: RamBlock, memory: ByteArray, indices: IndexArray) -> None:
        """Send pages of `memory` (shape (block.size,)), which the guest may be writing to."""

    def end_body(self, out: StreamWriter, kind: SectionKind) -> None:  # noqa: B027 - mostly nothing is left
        """The body's EOS is about to be written."""

    def statistics(self) -> Mapping[str, Mapping[str, object]]:
        """What it counts beside `progress`, as `IterableHandler.statistics` says. Any thread."""
        return {}

    def finish(self) -> None:  # noqa: B027
        """Release what it needed for sending. Nothing comes any more."""


class PlainSender(PageSender):
    """Writes PAGE and ZERO records, by address where the stream can; room for `zeros` zero pages at once."""

    def __init__(self, progress: Progress, *, zeros: int) -> None:
        self._progress = progress
        self._stage = wire.RecordStage(pages=STAGE, zeros=zeros)
        self._named: str | None = None  # the block that the last record was in

    def zeros(self, out: StreamWriter, block: RamBlock, indices: IndexArray) -> None:
        """Write ZERO records."""
        self._write_run(out, self._stage.zeros(indices, self.name_for(block)))
        self._progress.duplicate += len(indices)

    def pages(
        self,
        out: StreamWriter,
        block: RamBlock,
        memory: ByteArray,
        indices: IndexArray,
        *,
        at: IndexArray | None = None,
    ) -> None:
        """Write PAGE records. `at` says which pages of `memory` they are, if those are not at their own place."""
        for first in range(0, len(indices), STAGE):
            some = slice(first, first + STAGE)
            self._write_pages(out, memory, indices[some], None if at is None else at[some], self.name_for(block))
        self._progress.normal += len(indices)

    def name_for(self, block: RamBlock) -> str | None:
        """The name that the next record needs, or None if it continues the block of the one before."""
        if self._named == block.name:
            return None
        self._named = block.name
        return block.name

    def _write_pages(
        self, out: StreamWriter, memory: ByteArray, indices: IndexArray, at: IndexArray | None, name: str | None
    ) -> None:
        if not out.gathers:
            self._write_run(out, self._stage.pages(memory, indices, name, at=at))
            return
        head, vectors = self._stage.gathered(memory, indices, name, at=at)
        if head:
            out.write(head)
        out.write_gathered(vectors)

    def _write_run(self, out: StreamWriter, run: tuple[bytes, memoryview]) -> None:
        head, rest = run
        if head:
            out.write(head)
        out.write(rest)
