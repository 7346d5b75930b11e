"""The destination's side of RAM: runs of records → checks → one scatter into a block.

Only the machine's own blocks are ever written, inside their bounds. A zero page is not written into memory that is
zero already, and memory is populated ahead of the data on another thread, since first touches are what loading costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from whimbrel.abc import BoolArray, IndexArray, SectionKind, StreamReader
from whimbrel.errors import IncompatibleError, MigrationError, Place, StreamError
from whimbrel.machine import BareMachine, RamBlock
from whimbrel.wire import ram as wire
from whimbrel_savevm._populate import Populator

MINIMUM: Final = wire.WORD
_DIFFERENCES: Final = 8  # in one message
LISTED_MAX: Final = 1 << 56  # bytes; nothing is allocated for them, so a list may run on and be told apart by name


class RamLoader:
    """Loads the blocks of one machine; one use, on the incoming thread."""

    def __init__(self, machine: BareMachine) -> None:
        self._blocks = {block.name: block for block in machine.ram}
        self._limits = machine.settings.limits
        # Which pages may hold something: those that did before, and those that were written since.
        self._written: dict[str, BoolArray] = {name: block.present_pages() for name, block in self._blocks.items()}
        self._pages = sum(block.pages for block in self._blocks.values())
        self._populator = Populator()
        self._block: RamBlock | None = None  # the one that CONTINUE means; persists from body to body

    def load(self, reader: StreamReader, kind: SectionKind) -> None:
        """Load one body up to and including its EOS. Raises StreamError or IncompatibleError."""
        if kind is SectionKind.FULL:
            raise StreamError("the RAM section came as FULL, expected START, PART and END")
        try:
            if kind is SectionKind.START:
                self._load_block_list(reader)
            self._load_records(reader, 0 if kind is SectionKind.START else self._pages)
        except MigrationError as exc:
            name = None if self._block is None else self._block.name
            raise exc.at(Place(block=name)) from exc.__cause__

    def rollback(self) -> None:
        """Make everything zero again."""
        self._populator.close()
        for name, block in self._blocks.items():
            if self._written[name].any():
                block.discard()

    def finish(self) -> None:
        """End the populating."""
        self._populator.close()

    # --------------------------------------------------------------------------------------- block list

    def _load_block_list(self, reader: StreamReader) -> None:
        theirs = reader.parse(wire.parse_block_list(total_limit=LISTED_MAX, blocks_limit=self._limits.blocks))
        ours = {name: block.size for name, block in self._blocks.items()}
        if theirs != ours:
            raise IncompatibleError(f"the source's RAM blocks are not this machine's: {_difference(theirs, ours)}")

    # ------------------------------------------------------------------------------------------ records

    def _load_records(self, reader: StreamReader, limit: int) -> None:
        need, left = MINIMUM, limit
        while True:
            run = wire.read_run(reader.window(need))
            if isinstance(run, int):
                need = run
                continue
            need = MINIMUM
            if run.flag is wire.Flag.EOS:
                reader.advance(run.size)
                return
            left -= len(run.indices)
            if left < 0:
                raise StreamError(f"the body has more page records than the {limit} that may come in it")
            self._apply(run)
            reader.advance(run.size)

    def _apply(self, run: wire.Run) -> None:
        block = self._block_of(run)
        last = int(run.indices.max())
        if last >= block.pages:
            raise StreamError(
                f"a page at {last * wire.PAGE_SIZE:#x} is outside of block {block.name!r} of {block.size:#x} bytes"
            )
        written = self._written[block.name]
        if run.flag is wire.Flag.PAGE:
            self._store_pages(block, run, written)
        else:
            _store_fill(block, run, written)

    def _block_of(self, run: wire.Run) -> RamBlock:
        if run.block is not None:
            self._block = self._blocks.get(run.block)
            if self._block is None:
                raise StreamError(f"a record names RAM block {run.block!r}, which this machine has not")
        if self._block is None:
            raise StreamError("the first record continues a block, but none was named yet")
        return self._block

    def _store_pages(self, block: RamBlock, run: wire.Run, written: BoolArray) -> None:
        where = _consecutive(run.indices)
        if where is not None and not written[where.stop - 1]:
            self._populator.arrived(block, where.start, where.stop)
        pages = block.view.reshape(-1, wire.PAGE_SIZE)
        pages[run.indices if where is None else where] = run.payload
        written[run.indices if where is None else where] = True


def _store_fill(block: RamBlock, run: wire.Run, written: BoolArray) -> None:
    pages = block.view.reshape(-1, wire.PAGE_SIZE)
    if run.payload.any():
        # QEMU sends none but zeros and takes any.
        pages[run.indices] = run.payload[:, np.newaxis]
        written[run.indices] = True
        return
    stale = run.indices[written[run.indices]]
    if len(stale):
        pages[stale] = 0


def _consecutive(indices: IndexArray) -> slice | None:
    """`indices` as a slice if each is the one before plus one; a peer may send them in any order."""
    run = wire.as_slice(indices)
    return run if run is not None and bool((indices[1:] - indices[:-1] == 1).all()) else None


def _difference(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str:
    parts = [
        f"it has {name!r} of {size} bytes, this machine has none" for name, size in theirs.items() if name not in ours
    ]
    parts += [f"it lacks {name!r} of {size} bytes" for name, size in ours.items() if name not in theirs]
    parts += [
        f"its {name!r} is {theirs[name]} bytes long, this one's {ours[name]}"
        for name in theirs.keys() & ours.keys()
        if theirs[name] != ours[name]
    ]
    more = f"; and {len(parts) - _DIFFERENCES} more" if len(parts) > _DIFFERENCES else ""
    return "; ".join(sorted(parts)[:_DIFFERENCES]) + more
