"""RAM over lanes (`multifd`): the sender at the source, and where lanes put pages at the destination.

What ties lanes to the main channel are syncs. Where each body has one, its EOS tells; else a MULTIFD_FLUSH does, in
START, in END, and wherever pages may come again that have been sent: behind a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from whimbrel.abc import (
    ArrivingLanes,
    BoolArray,
    ByteArray,
    DepartingLanes,
    IndexArray,
    PageSink,
    Progress,
    SectionKind,
    StreamWriter,
)
from whimbrel.errors import MigrationError, StreamError
from whimbrel.machine import RamBlock
from whimbrel.wire import ram as wire
from whimbrel_savevm._ram_sending import PageSender, PlainSender

_NONE: IndexArray = np.empty(0, np.intp)


class LaneSender(PageSender):
    """Sends whole pages over lanes, and zero pages there or as records; room for `zeros` records at once.

    `pending` tells how many bytes are left to be sent before everything is synced anew.
    """

    def __init__(self, lanes: DepartingLanes, progress: Progress, *, zeros: int, pending: Callable[[], int]) -> None:
        self._lanes, self._progress, self._pending = lanes, progress, pending
        self._records = PlainSender(progress, zeros=zeros)
        self._unsynced = False  # pages have gone since the last sync
        self._stale = False  # and some of them may come again

    def begin_pass(self, number: int) -> None:  # noqa: ARG002
        """From here on pages may come that have been sent already."""
        self._stale = self._unsynced

    def zeros(self, out: StreamWriter, block: RamBlock, indices: IndexArray) -> None:
        """Send zero pages."""
        self._go_on(out)
        if not self._lanes.take_zeros:
            self._records.zeros(out, block, indices)
            return
        self._lanes.send(block.name, block.view, _NONE, indices)
        self._progress.duplicate += len(indices)

    def pages(self, out: StreamWriter, block: RamBlock, memory: ByteArray, indices: IndexArray) -> None:
        """Send pages."""
        self._go_on(out)
        self._lanes.send(block.name, memory, indices, _NONE)
        self._progress.normal += len(indices)

    def end_body(self, out: StreamWriter, kind: SectionKind) -> None:
        """Sync, if this body is to end with it, or ends a round."""
        if self._lanes.sync_each_body:
            self._lanes.sync()
            self._unsynced = self._stale = False
        elif kind is not SectionKind.PART or not self._pending():
            self._flush(out)

    def _go_on(self, out: StreamWriter) -> None:
        """A page goes: not past one of the round before."""
        if self._stale:
            self._flush(out)
        self._unsynced = True

    def _flush(self, out: StreamWriter) -> None:
        if not self._lanes.sync_each_body:
            out.write(wire.FLUSH_RECORD)
        self._lanes.sync()
        self._unsynced = self._stale = False


class LaneSyncs:
    """What the main channel says of the syncs of lanes at the destination; on the incoming thread.

    A source that says MULTIFD_FLUSH in START does so at each sync; one that does not has a sync in each body.
    """

    def __init__(self, lanes: ArrivingLanes) -> None:
        self._lanes = lanes
        self._kind = SectionKind.START
        self._told = False  # the source tells of its syncs
        self._flushed = False  # it has in this body

    def body(self, kind: SectionKind, sink: PageSink) -> None:
        """A body begins; with the first of them the pages begin to come, into `sink`."""
        self._kind, self._flushed = kind, False
        if kind is SectionKind.START:
            self._lanes.begin(sink)

    def flush(self) -> None:
        """A MULTIFD_FLUSH has come. Raises as `ArrivingLanes.sync`, and StreamError if there was none in START."""
        if self._kind is SectionKind.START:
            self._told = True
        if not self._told:
            raise StreamError("a MULTIFD_FLUSH record came, and there was none in START")
        self._flushed = True
        self._lanes.sync()

    def end_body(self) -> None:
        """The EOS of the body has come. Raises as `flush`, and StreamError for an END without a sync."""
        if not self._told:
            self._lanes.sync()
        elif self._kind is SectionKind.END and not self._flushed:
            raise StreamError("the last RAM body ends without a MULTIFD_FLUSH record, so pages may be on their way")
        if self._kind is SectionKind.END:
            self._lanes.complete()


class LaneSink:
    """`whimbrel.abc.PageSink` for the blocks of one machine; called on the lanes' threads.

    `written` and `came` are the loader's marks of each block: which pages may hold something, and which a record, or a
    packet, was about.
    """

    def __init__(
        self, blocks: Mapping[str, RamBlock], written: Mapping[str, BoolArray], came: Mapping[str, BoolArray]
    ) -> None:
        self._blocks, self._written, self._came = blocks, written, came

    def memory(self, block: str) -> ByteArray:
        """All bytes of a block. Raises StreamError for one that is not there, or that both ends share."""
        found = self._blocks.get(block)
        if found is None:
            raise StreamError(f"a packet names RAM block {block!r}, which is not there")
        if found.shared:
            raise StreamError(f"a packet came for block {block!r}, which both ends share")
        return found.view

    def arriving(self, block: str, indices: IndexArray) -> None:
        """Mark pages, before they hold anything, and have the kernel make room for them.

        Raises MigrationError if there is none.
        """
        written, run = self._written[block], wire.as_slice(indices)
        if run is not None and not written[run.stop - 1]:
            self._populate(self._blocks[block], run.start, run.stop)
        written[indices] = True
        self._came[block][indices] = True

    def zeros(self, block: str, indices: IndexArray) -> None:
        """Make pages zero that are not."""
        stale = indices[self._written[block][indices]]
        if len(stale):
            self._blocks[block].view.reshape(-1, wire.PAGE_SIZE)[stale] = 0
        self._came[block][indices] = True

    @staticmethod
    def _populate(block: RamBlock, first: int, stop: int) -> None:
        try:
            block.populate(first * wire.PAGE_SIZE, (stop - first) * wire.PAGE_SIZE)
        except OSError as exc:
            # To write there now would kill the process instead of raising.
            raise MigrationError(
                f"there is no memory for RAM block {block.name!r}: {exc}",
                hint="make room on this host, or give the machine less RAM at both ends",
            ) from exc
