"""RAM that the source writes straight into the destination's memory: the sender, and what the destination lets happen.

Each body begins with a HOOK word, behind which the channel's own words go on until it says that the body's pages are
there; then comes EOS. No page is a record of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from whimbrel.abc import (
    BoolArray,
    ByteArray,
    IndexArray,
    Progress,
    RamControl,
    RemotelyWrittenChannel,
    RemoteWritingChannel,
    SectionKind,
    StreamWriter,
)
from whimbrel.errors import MigrationError, StreamError
from whimbrel.machine import RamBlock
from whimbrel.wire import ram as wire
from whimbrel_savevm._ram_sending import PageSender

_CONTROLS: Final = {
    SectionKind.START: RamControl.SETUP,
    SectionKind.PART: RamControl.ROUND,
    SectionKind.END: RamControl.FINISH,
}


class HookedSender(PageSender):
    """Has `channel` write pages at the peer; `blocks` are as START lists them, `flush` empties the stream's buffer.

    The zero pages of a batch wait for its others, since what becomes of them depends on what is next to them.
    """

    def __init__(
        self, channel: RemoteWritingChannel, blocks: Sequence[RamBlock], progress: Progress, flush: Callable[[], None]
    ) -> None:
        self._channel, self._progress, self._flush = channel, progress, flush
        self._blocks = list(blocks)
        self._numbers = {block.name: number for number, block in enumerate(blocks)}
        self._body: RamControl | None = None  # the one that has begun
        self._last = False
        self._waiting: tuple[RamBlock, IndexArray] | None = None  # zero pages

    def begin_last(self) -> None:
        """The next body is END."""
        self._last = True

    def zeros(self, out: StreamWriter, block: RamBlock, indices: IndexArray) -> None:
        """Send zero pages, with the others of their batch."""
        self._begin_body(out, RamControl.FINISH if self._last else RamControl.ROUND)
        self._send_waiting()
        self._waiting = block, indices

    def pages(self, out: StreamWriter, block: RamBlock, memory: ByteArray, indices: IndexArray) -> None:
        """Send pages."""
        self._begin_body(out, RamControl.FINISH if self._last else RamControl.ROUND)
        if self._waiting is None or self._waiting[0] is not block:
            self._send_waiting()
            self._save(block, memory, indices, np.zeros(len(indices), np.bool_))
            return
        together = np.concatenate((self._waiting[1], indices))
        zero = np.zeros(len(together), np.bool_)
        zero[: len(self._waiting[1])] = True
        self._waiting = None
        order = np.argsort(together, kind="stable")
        self._save(block, memory, together[order], zero[order])

    def end_body(self, out: StreamWriter, kind: SectionKind) -> None:
        """Wait until all is at the peer."""
        self._begin_body(out, _CONTROLS[kind])
        self._send_waiting()
        self._channel.ram_control_after_iterate(_CONTROLS[kind])
        self._body = None

    def _begin_body(self, out: StreamWriter, flags: RamControl) -> None:
        if self._body is None:
            out.write(wire.HOOK_RECORD)
            self._flush()
            self._channel.ram_control_before_iterate(flags, self._blocks)
            self._body = flags

    def _send_waiting(self) -> None:
        if self._waiting is not None:
            (block, indices), self._waiting = self._waiting, None
            self._save(block, block.view, indices, np.ones(len(indices), np.bool_))

    def _save(self, block: RamBlock, memory: ByteArray, indices: IndexArray, zero: BoolArray) -> None:
        as_zeros = self._channel.ram_save_pages(self._numbers[block.name], memory, indices, zero)
        self._progress.duplicate += as_zeros
        self._progress.normal += len(indices) - as_zeros


class HookedLoader:
    """The HOOK words of one stream, served by `channel`; on the incoming thread.

    It is the `whimbrel.abc.RemoteMemory` that the channel sees: `written` and `came` are the loader's marks of each
    block. A page may come wherever the peer may write, so that is what is marked.
    """

    def __init__(
        self, channel: RemotelyWrittenChannel, written: Mapping[str, BoolArray], came: Mapping[str, BoolArray]
    ) -> None:
        self._channel, self._written, self._came = channel, written, came
        self._blocks: list[RamBlock] = []
        self._kind = SectionKind.START
        self._hooked = False  # in this body
        self._used = False  # in any

    def listed(self, blocks: Sequence[RamBlock]) -> None:
        """START has come, with these blocks in this order."""
        self._blocks = list(blocks)

    def body(self, kind: SectionKind) -> None:
        """A body begins."""
        self._kind, self._hooked = kind, False

    def hook(self) -> None:
        """A HOOK word has come. Raises as `RemotelyWrittenChannel.ram_load_hook`, and for a second one in a body."""
        if self._hooked:
            raise StreamError(f"two HOOK records came in one {self._kind.name} body")
        self._hooked = self._used = True
        self._channel.ram_load_hook(_CONTROLS[self._kind], self)

    def end_body(self) -> None:
        """The EOS of the body has come: behind the last of them nobody writes here any more."""
        if self._used and not self._hooked:
            raise StreamError(f"the {self._kind.name} body has no HOOK record, so pages may be on their way")
        if self._kind is SectionKind.END:
            self.revoke()

    def revoke(self) -> None:
        """Let the peer write no more."""
        self._channel.ram_revoke()

    @property
    def regions(self) -> Sequence[RamBlock]:
        """The blocks, in the source's order."""
        return self._blocks

    def expose(self, region: int, start: int, length: int) -> None:
        """Mark what the peer may write, and have memory for it. Raises StreamError and MigrationError."""
        block = self._writable(region)
        pages = slice(start // wire.PAGE_SIZE, -(-(start + length) // wire.PAGE_SIZE))
        there = self._written[block.name][pages].all()
        self._written[block.name][pages] = True
        self._came[block.name][pages] = True
        try:
            if not there:
                block.populate(start, length)
        except OSError as exc:
            # A write there would kill whichever process makes it, instead of raising.
            raise MigrationError(
                f"there is no memory for RAM block {block.name!r}: {exc}",
                hint="make room on this host, or give the machine less RAM at both ends",
            ) from exc

    def fill(self, region: int, start: int, length: int, value: int) -> None:
        """Fill a range, unless it is zero already and is to be. Raises StreamError."""
        block = self._writable(region)
        pages = slice(start // wire.PAGE_SIZE, -(-(start + length) // wire.PAGE_SIZE))
        written, self._came[block.name][pages] = self._written[block.name], True
        if value or written[pages].any():
            written[pages] = True
            block.view[start : start + length] = value

    def _writable(self, region: int) -> RamBlock:
        block = self._blocks[region]
        if block.shared:
            raise StreamError(f"the peer wants to write into RAM block {block.name!r}, which both ends share")
        return block
