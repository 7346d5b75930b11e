"""The source's side of RAM over `rdma:`: batches of page numbers → registered chunks → merged writes.

The rules it lives by (wire format, sections 8.5 and 8.6):

* **A chunk is registered when it is first written**, with its neighbours of the same batch, unless all memory is
  pinned; and ahead of that, the more the longer one follows another, as a kernel reads a file ahead. What is zero in a
  chunk that is not registered goes as COMPRESS; in one that is, zeros are written like anything else.
* **Pages that adjoin are one write**, inside of their chunk; all writes of a batch are one request.
* **A chunk is written once at a time**: what was posted before must be there first.
* **A body has ended when every write has completed.**
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import BoolArray, ByteArray, IndexArray, MemoryRegion, RamControl
from whimbrel.errors import StreamError
from whimbrel.verbs import Access
from whimbrel.verbs import MemoryRegion as Registered
from whimbrel.wire import rdma as wire
from whimbrel.wire.rdma import ControlType, RecordArray, WorkKind
from whimbrel_transports._rdma_link import SendingLink

PAGE_SIZE: Final = 4096
CHUNK_PAGES: Final = wire.CHUNK // PAGE_SIZE
MOST_AHEAD: Final = 64  # chunks
MOST_POSTED: Final = 16  # batches that have not completed: an ERROR waits for them


class Writing:
    """Writes the RAM of one machine over `link`; one use, on the migration thread."""

    def __init__(self, link: SendingLink, *, pin_all: bool) -> None:
        self._link, self._pin_all = link, pin_all
        self._attributes = link.connection.context.attributes
        self._blocks: list[_Block] = []
        self._posted: deque[tuple[_Block, IndexArray]] = deque()  # the chunks of each batch
        self._rows: list[tuple[_Block, int, int]] = []  # chunks in a row that are one region at the destination
        self.written = 0  # bytes taken care of
        self.open = False  # RAM is being sent: whoever ends it now has failed
        link.on_written = self._completed

    def before(self, flags: RamControl, regions: Sequence[MemoryRegion]) -> None:
        """A body begins."""
        if flags is RamControl.SETUP:
            self.open = True
            self._blocks = [_Block(number, region) for number, region in enumerate(regions)]

    def after(self, flags: RamControl) -> None:
        """A body ends: wait for what is under way, and say so."""
        self._drain()
        if flags is RamControl.SETUP:
            self._learn_blocks()
        self._link.tell(ControlType.REGISTER_FINISHED)
        if flags is RamControl.FINISH:
            self.open = False

    def save(self, region: int, memory: ByteArray, indices: IndexArray, zero: BoolArray) -> int:
        """Write pages, as `RemoteWritingChannel.ram_save_pages` says."""
        block = self._blocks[region]
        count, as_zeros = len(indices), 0
        chunks = indices // CHUNK_PAGES
        block.come_from(memory, self)
        if len(self._rows) + int(chunks[-1] - chunks[0]) >= self._attributes.max_mr // 2 and self._rows:
            self._unregister()
        if not (known := block.known[chunks]).all():
            wanted: IndexArray = np.unique(chunks[~known & ~zero])
            compressed = ~known & ~np.isin(chunks, wanted)
            if compressed.any():
                self._compress(block, indices[compressed])
                indices, chunks = indices[~compressed], chunks[~compressed]
                as_zeros = count - len(indices)
            if len(wanted):
                self._register(block, wanted)
        if len(indices):
            self._write(block, indices, chunks)
        self.written += count * PAGE_SIZE
        return as_zeros

    # ------------------------------------------------------------------------------------------- registration

    def _learn_blocks(self) -> None:
        """Ask where the destination's blocks are, and register ours where all memory is pinned."""
        layout = wire.Layout([block.size for block in self._blocks])
        answer = self._link.ask(ControlType.RAM_BLOCKS_REQUEST, None, ControlType.RAM_BLOCKS_RESULT)
        records = answer.records()
        layout.check_told(records)
        for block, (address, offset, _, rkey, _) in zip(self._blocks, records.tolist(), strict=True):
            block.remote, block.offset = address, offset
            if self._pin_all:
                block.known[:], block.rkeys[:] = True, rkey

    def _register(self, block: _Block, wanted: IndexArray) -> None:
        """Have the destination register chunks, those in a row as one region."""
        firsts, counts = _rows(block.and_ahead(wanted))
        for some in range(0, len(firsts), wire.REPEAT_MAX):
            self._register_rows(block, firsts[some : some + wire.REPEAT_MAX], counts[some : some + wire.REPEAT_MAX])

    def _register_rows(self, block: _Block, firsts: IndexArray, counts: IndexArray) -> None:
        records = np.zeros(len(firsts), wire.REGISTERED)
        records["where"] = firsts * wire.CHUNK + block.offset
        records["block"], records["more"] = block.number, counts - 1
        answer = self._link.ask(ControlType.REGISTER_REQUEST, records, ControlType.REGISTER_RESULT)
        results = answer.records()
        if len(results) != len(records):
            raise StreamError(f"{len(results)} chunks are registered at the destination, expected {len(records)}")
        rows = zip(firsts.tolist(), counts.tolist(), results.tolist(), strict=True)
        for first, count, (rkey, _, address) in rows:
            if address != block.remote:
                raise StreamError(
                    f"RAM block {block.number} is at {address:#x} of the destination, expected {block.remote:#x}"
                )
            chunks = slice(first, first + count)
            block.lkeys[chunks] = self.register_ours(block, first * wire.CHUNK, count * wire.CHUNK)
            block.rkeys[chunks], block.known[chunks] = rkey, True
            self._rows.append((block, first, count))

    def register_ours(self, block: _Block, start: int, length: int) -> int:
        """Register a range of our own memory, as far as the block goes; returns its key."""
        length = min(length, block.size - start)
        region = self._link.domain.reg_mr(block.address + start, length, Access(0))
        block.regions.append(region)
        return region.lkey

    def _unregister(self) -> None:
        """Give all regions back: the adapter has no room for more."""
        self._drain()
        for some in range(0, len(self._rows), wire.REPEAT_MAX):
            rows = self._rows[some : some + wire.REPEAT_MAX]
            records = np.zeros(len(rows), wire.REGISTERED)
            records["where"] = [first for _, first, _ in rows]
            records["block"] = [block.number for block, _, _ in rows]
            records["more"] = [count - 1 for _, _, count in rows]
            self._link.ask(ControlType.UNREGISTER_REQUEST, records, ControlType.UNREGISTER_FINISHED)
        self._rows.clear()
        for block in self._blocks:
            block.known[:] = False
            self.forget_ours(block)

    def forget_ours(self, block: _Block) -> None:
        """End the registrations of our own memory, once nothing is under way."""
        self._drain()
        while block.regions:
            block.regions.pop().dereg()

    # ---------------------------------------------------------------------------------------------- the pages

    def _compress(self, block: _Block, indices: IndexArray) -> None:
        firsts, counts = _rows(indices)
        records: RecordArray = np.zeros(len(firsts), wire.COMPRESSED)
        records["block"] = block.number
        records["offset"], records["length"] = firsts * PAGE_SIZE + block.offset, counts * PAGE_SIZE
        for number in range(len(records)):
            self._link.tell(ControlType.COMPRESS, records[number : number + 1].tobytes())

    def _write(self, block: _Block, indices: IndexArray, chunks: IndexArray) -> None:
        """Post writes of whole runs, once nothing is under way to the same chunks."""
        apart = np.ones(len(indices) + 1, np.bool_)
        apart[1:-1] = (indices[1:] - indices[:-1] != 1) | (chunks[1:] != chunks[:-1])
        (edges,) = apart.nonzero()
        firsts, counts = indices[edges[:-1]], edges[1:] - edges[:-1]
        most = self._attributes.max_write_batch
        if len(indices) * PAGE_SIZE > self._attributes.max_write_size:
            most = min(most, max(1, self._attributes.max_write_size // wire.CHUNK))
        for some in range(0, len(firsts), most):
            self._post(block, firsts[some : some + most], counts[some : some + most])

    def _post(self, block: _Block, firsts: IndexArray, counts: IndexArray) -> None:
        chunks = firsts // CHUNK_PAGES
        touched: IndexArray = np.unique(chunks)
        while block.under_way[touched].any() or len(self._posted) >= MOST_POSTED:
            self._link.complete_one()
        block.under_way[touched] += 1
        self._posted.append((block, touched))
        offsets = (firsts * PAGE_SIZE).astype(np.uint64)
        self._link.write(
            offsets + np.uint64(block.address),
            block.lkeys[chunks],
            offsets + np.uint64(block.remote),
            block.rkeys[chunks],
            (counts * PAGE_SIZE).astype(np.uint64),
            wire.work_id(WorkKind.WRITE, block.number, int(touched[0])),
        )

    def _completed(self) -> None:
        block, chunks = self._posted.popleft()
        block.under_way[chunks] -= 1

    def _drain(self) -> None:
        while self._posted:
            self._link.complete_one()


@attrs.define(eq=False)
class _Block:
    """A block and what is known of its chunks."""

    number: int
    region: MemoryRegion
    size: int = 0
    address: int = 0  # of what is written from
    remote: int = 0  # where the destination has it
    offset: int = 0  # in the destination's RAM
    regions: list[Registered] = attrs.field(factory=list)  # of our own memory
    ahead: int = 0  # chunks that are registered beyond those that are written
    edge: int = 0  # behind the last that was registered
    known: BoolArray = attrs.field(init=False)  # the destination has registered it
    under_way: npt.NDArray[np.uint32] = attrs.field(init=False)  # batches
    lkeys: npt.NDArray[np.uint32] = attrs.field(init=False)
    rkeys: npt.NDArray[np.uint32] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.size = self.region.size
        chunks = wire.chunks_of(self.size)
        self.known = np.zeros(chunks, np.bool_)
        self.under_way, self.lkeys, self.rkeys = (np.zeros(chunks, np.uint32) for _ in range(3))

    def come_from(self, memory: ByteArray, writing: Writing) -> None:
        """Pages come from `memory` from now on: a tracker may have a copy of its own."""
        address = int(memory.ctypes.data)
        if address == self.address:
            return
        self.address = address
        if self.known.any():
            writing.forget_ours(self)
            self.lkeys[:] = writing.register_ours(self, 0, self.size)

    def and_ahead(self, wanted: IndexArray) -> IndexArray:
        """Chunks to register, and more behind them where they follow those before: a word each way costs more."""
        first, last = int(wanted[0]), int(wanted[-1])
        self.ahead = min(MOST_AHEAD, 2 * self.ahead + len(wanted)) if first == self.edge else 0
        unknown = np.concatenate((self.known[last + 1 : last + 1 + self.ahead], [True]))
        more = int(np.argmax(unknown))
        self.edge = last + 1 + more
        return np.concatenate((wanted, np.arange(last + 1, self.edge)))


def _rows(numbers: IndexArray) -> tuple[IndexArray, IndexArray]:
    """Ascending numbers as rows of consecutive ones: where each begins, and how many they are."""
    apart = np.ones(len(numbers) + 1, np.bool_)
    apart[1:-1] = numbers[1:] - numbers[:-1] != 1
    (edges,) = apart.nonzero()
    return numbers[edges[:-1]], edges[1:] - edges[:-1]
