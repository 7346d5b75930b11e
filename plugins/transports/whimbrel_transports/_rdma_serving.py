"""The destination's side of RAM over `rdma:`: what the peer asks for while the stream waits at a HOOK word.

Nothing that the peer says is used before it was held against the machine's own blocks (`wire.rdma.Layout`), and the
peer may write nothing but what is registered here.
"""

from __future__ import annotations

import threading

import numpy as np

from whimbrel.abc import BoolArray, RamControl, RemoteMemory
from whimbrel.errors import StreamError
from whimbrel.verbs import Access, MemoryRegion
from whimbrel.wire import rdma as wire
from whimbrel.wire.rdma import ControlType, Layout, Message, Range
from whimbrel_transports._rdma_link import ReceivingLink

_WRITABLE = Access.LOCAL_WRITE | Access.REMOTE_WRITE


class Serving:
    """Serves one source over `link`; `serve` on the incoming thread, `revoke` on any."""

    def __init__(self, link: ReceivingLink, *, pin_all: bool) -> None:
        self._link, self._pin_all = link, pin_all
        self._layout: Layout | None = None
        self._covered: list[BoolArray] = []  # chunks that are in a region
        self._regions: dict[tuple[int, int], tuple[MemoryRegion, int]] = {}  # by block and first chunk; how many
        self._registering = threading.Lock()
        self._revoked = False
        self.open = False  # RAM is being received: whoever ends it now has failed

    def serve(self, flags: RamControl, memory: RemoteMemory) -> None:
        """Do what the peer asks for until REGISTER_FINISHED, as `RemotelyWrittenChannel.ram_load_hook` says."""
        self.open = True
        while True:
            message = self._link.next_message()
            if message.kind is not ControlType.REGISTER_FINISHED:
                self._obey(message, flags, memory)
                self._link.handled()
                continue
            if self._layout is None:
                raise StreamError("the source says REGISTER_FINISHED and has not asked for the RAM blocks")
            self._link.handled()
            self.open = flags is not RamControl.FINISH
            return

    def revoke(self) -> None:
        """End every registration: when it returns no peer writes any more. Twice is fine."""
        with self._registering:
            self._revoked = True
            while self._regions:
                self._regions.popitem()[1][0].dereg()
            for covered in self._covered:
                covered[:] = False

    @property
    def regions(self) -> int:
        """How many regions the peer may write into."""
        return len(self._regions)

    def _obey(self, message: Message, flags: RamControl, memory: RemoteMemory) -> None:
        match message.kind:
            case ControlType.RAM_BLOCKS_REQUEST:
                self._tell_blocks(flags, memory)
            case ControlType.COMPRESS:
                for where, value in self._known().compressed(message.records()):
                    memory.fill(where.block, where.start, where.length, value)
            case ControlType.REGISTER_REQUEST:
                self._register(self._known().registered(message.records()), memory)
            case ControlType.UNREGISTER_REQUEST:
                self._unregister(self._known().unregistered(message.records()))
                self._link.answer(ControlType.UNREGISTER_FINISHED, repeat=message.repeat)
            case kind:
                raise StreamError(f"the source sent {kind.name}, which it may not where it says what it writes")

    def _known(self) -> Layout:
        if self._layout is None:
            raise StreamError("the source says what it writes and has not asked for the RAM blocks")
        return self._layout

    def _tell_blocks(self, flags: RamControl, memory: RemoteMemory) -> None:
        if self._layout is not None or flags is not RamControl.SETUP:
            raise StreamError("RAM_BLOCKS_REQUEST came twice, or behind START")
        layout = Layout([region.size for region in memory.regions])
        self._covered = [np.zeros(wire.chunks_of(size), np.bool_) for size in layout.sizes]
        rkeys = None
        if self._pin_all:
            rkeys = [self._expose(Range(at, 0, size), memory).rkey for at, size in enumerate(layout.sizes)]
        self._layout = layout
        records = layout.told([region.address for region in memory.regions], rkeys)
        self._link.answer(ControlType.RAM_BLOCKS_RESULT, records, repeat=1)

    def _register(self, ranges: list[Range], memory: RemoteMemory) -> None:
        if self._pin_all:
            raise StreamError("REGISTER_REQUEST came, and all memory is pinned already")
        results = np.zeros(len(ranges), wire.RESULT)
        for number, where in enumerate(ranges):
            region = self._expose(where, memory)
            results[number] = (region.rkey, 0, memory.regions[where.block].address)
        self._link.answer(ControlType.REGISTER_RESULT, results)

    def _expose(self, where: Range, memory: RemoteMemory) -> MemoryRegion:
        """Register a range; one that is in a region already is refused: there are no more regions than chunks."""
        first, count = where.start // wire.CHUNK, wire.chunks_of(where.length)
        if self._covered[where.block][first : first + count].any():
            raise StreamError(f"chunk {first} of RAM block {where.block}, or one behind it, is to be registered twice")
        memory.expose(where.block, where.start, where.length)
        block = memory.regions[where.block]
        with self._registering:
            if self._revoked:
                raise StreamError("the source wants to write, and all of its RAM has come")
            region = self._link.domain.reg_mr(
                block.address + where.start, where.length, _WRITABLE, fd=block.fd, fd_offset=where.start
            )
            self._regions[where.block, first] = region, count
        self._covered[where.block][first : first + count] = True
        return region

    def _unregister(self, ranges: list[Range]) -> None:
        """End regions, which must be named as they were registered."""
        for where in ranges:
            first, count = where.start // wire.CHUNK, wire.chunks_of(where.length)
            region, registered = self._regions.get((where.block, first), (None, 0))
            if region is None or registered != count:
                raise StreamError(
                    f"{count} chunks from {first} on of RAM block {where.block} are to be unregistered, "
                    "and there is no such region"
                )
            region.dereg()
            del self._regions[where.block, first]
            self._covered[where.block][first : first + count] = False
