"""The destination's side of RAM: runs of records → checks → one scatter into a block.

Only the machine's own blocks are ever written, inside their bounds. A zero page is not written into memory that is
zero already, and memory is populated ahead of the data on another thread, since first touches are what loading costs.
Encoded pages go through codecs that the machine finds by name, when the first of a kind comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from whimbrel.abc import (
    ArrivingLanes,
    BoolArray,
    Codec,
    DeltaCodec,
    IndexArray,
    RemotelyWrittenChannel,
    SectionKind,
    StreamReader,
)
from whimbrel.errors import IncompatibleError, MigrationError, Place, StreamError, WhimbrelError
from whimbrel.machine import BareMachine, RamBlock
from whimbrel.wire import ram as wire
from whimbrel_savevm._populate import Populator
from whimbrel_savevm._ram_changes import Changes
from whimbrel_savevm._ram_hooked import HookedLoader
from whimbrel_savevm._ram_lanes import LaneSink, LaneSyncs

_DIFFERENCES: Final = 8  # in one message
LISTED_MAX: Final = 1 << 56  # bytes; nothing is allocated for them, so a list may run on and be told apart by name

XBZRLE: Final = "xbzrle"
ZLIB: Final = "zlib"


class RamLoader:
    """Loads the blocks of one machine; one use, on the incoming thread.

    With `lanes` pages come over those too; with `written` the peer writes them by itself.
    """

    def __init__(
        self, machine: BareMachine, lanes: ArrivingLanes | None = None, written: RemotelyWrittenChannel | None = None
    ) -> None:
        self._machine = machine
        self._blocks = {block.name: block for block in machine.ram}
        # Which pages may hold something: those that did before, and those that were written since.
        self._written: dict[str, BoolArray] = {name: block.present_pages() for name, block in self._blocks.items()}
        self._came = {name: np.zeros(block.pages, np.bool_) for name, block in self._blocks.items()}
        self._pages = sum(block.pages for block in self._blocks.values() if not block.shared)
        self._lanes = None if lanes is None else LaneSyncs(lanes)
        self._hooked = None if written is None else HookedLoader(written, self._written, self._came)
        self._records = wire.RecordReader(
            {name: block.size for name, block in self._blocks.items()},
            flush=None if self._lanes is None else self._flush,
            hook=None if self._hooked is None else self._hooked.hook,
        )
        self._populator = Populator()
        self._changes: Changes | None = None
        self._inflater: Codec | None = None

    def load(self, reader: StreamReader, kind: SectionKind) -> None:
        """Load one body up to and including its EOS. Raises StreamError or IncompatibleError."""
        if kind is SectionKind.FULL:
            raise StreamError("the RAM section came as FULL, expected START, PART and END")
        try:
            if kind is SectionKind.START:
                self._load_block_list(reader)
            if self._hooked is not None:
                self._hooked.body(kind)
            if self._lanes is not None:
                self._lanes.body(kind, LaneSink(self._blocks, self._written, self._came))
            for name, run in self._records.body(reader, 0 if kind is SectionKind.START else self._pages):
                self._apply(self._blocks[name], run)
            if self._changes is not None:
                self._changes.apply()
            if self._lanes is not None:
                self._lanes.end_body()
            if self._hooked is not None:
                self._hooked.end_body()
        except MigrationError as exc:
            raise exc.at(Place(block=self._records.block)) from exc.__cause__

    def _flush(self) -> None:
        """What comes over lanes from here on is newer than changes that wait."""
        assert self._lanes is not None
        if self._changes is not None:
            self._changes.apply()
        self._lanes.flush()

    def came(self, name: str) -> BoolArray:
        """Which pages of block `name` a record of this stream was about, shape (pages,), read-only."""
        came = self._came[name].view()
        came.flags.writeable = False
        return came

    def rollback(self) -> None:
        """Make everything zero again that is not shared with the source."""
        if self._hooked is not None:
            self._hooked.revoke()
        self._populator.close()
        for name, block in self._blocks.items():
            if self._written[name].any() and not block.shared:
                block.discard()

    def finish(self) -> None:
        """End the populating, and let nobody write here any more."""
        if self._hooked is not None:
            self._hooked.revoke()
        self._populator.close()

    # --------------------------------------------------------------------------------------- block list

    def _load_block_list(self, reader: StreamReader) -> None:
        listed = reader.parse(
            wire.parse_block_list(
                total_limit=LISTED_MAX,
                blocks_limit=self._machine.settings.limits.blocks,
                guest_addresses=any(block.guest_address is not None for block in self._blocks.values()),
            )
        )
        theirs = {block.name: block.size for block in listed}
        ours = {name: block.size for name, block in self._blocks.items()}
        if theirs != ours:
            raise IncompatibleError(f"the source's RAM blocks are not this machine's: {_difference(theirs, ours)}")
        if self._hooked is not None:
            self._hooked.listed([self._blocks[block.name] for block in listed])
        for block in listed:
            here = self._blocks[block.name]
            if here.shared and block.guest_address != here.guest_address:
                raise IncompatibleError(
                    f"the shared RAM block {block.name!r} is at {_address(block.guest_address)} in the source's guest, "
                    f"and at {_address(here.guest_address)} in this one"
                )

    # ------------------------------------------------------------------------------------------ records

    def _apply(self, block: RamBlock, run: wire.Run) -> None:
        if block.shared:
            raise StreamError(f"a record came for block {block.name!r}, which both ends share")
        where = wire.consecutive(run.indices)
        at = run.indices if where is None else where
        if self._changes is not None and run.flag is not wire.Flag.XBZRLE and self._changes.concern(block, at):
            self._changes.apply()  # `add` sees to the order of changes themselves
        written, came = self._written[block.name], self._came[block.name]
        # What may hold something is marked before it does: a record that fails half-way is rolled back too.
        match run.flag:
            case wire.Flag.ZERO:
                _store_fill(block, run, at, written)
            case wire.Flag.PAGE:
                if where is not None and not written[where.stop - 1]:
                    self._populator.arrived(block, where.start, where.stop)
                written[at] = True
                block.view.reshape(-1, wire.PAGE_SIZE)[at] = run.payload
            case wire.Flag.XBZRLE:
                _check_all_came(block, run.indices, came[at])
                written[at] = True
                self._change(block, run)
            case _:
                written[at] = True
                self._inflate(block, run)
        came[at] = True

    def _change(self, block: RamBlock, run: wire.Run) -> None:
        if self._changes is None:
            codec = self._new_codec(XBZRLE, run.flag)
            if not isinstance(codec, DeltaCodec):
                raise IncompatibleError(f"the codec {XBZRLE!r} is a {type(codec).__name__}, expected a DeltaCodec")
            self._changes = Changes(codec)
        self._changes.add(block, run)

    def _inflate(self, block: RamBlock, run: wire.Run) -> None:
        if self._inflater is None:
            codec = self._new_codec(ZLIB, run.flag)
            if not isinstance(codec, Codec):
                raise IncompatibleError(f"the codec {ZLIB!r} is a {type(codec).__name__}, expected a Codec")
            self._inflater = codec
        decode, data, pages = self._inflater.decode, run.data.data, block.view.reshape(-1, wire.PAGE_SIZE)
        for number, start, end in zip(run.indices.tolist(), run.starts.tolist(), run.ends.tolist(), strict=True):
            decode(data[start:end], pages[number])

    def _new_codec(self, name: str, flag: wire.Flag) -> Codec | DeltaCodec:
        try:
            return self._machine.new_codec(name)
        except WhimbrelError as exc:
            raise IncompatibleError(
                f"a {flag.name} record came, and there is no codec {name!r} to read it: {exc}"
            ) from exc


def _store_fill(block: RamBlock, run: wire.Run, at: IndexArray | slice, written: BoolArray) -> None:
    pages = block.view.reshape(-1, wire.PAGE_SIZE)
    if run.payload.any():
        # QEMU sends none but zeros and takes any.
        written[at] = True
        pages[run.indices] = run.payload[:, np.newaxis]
        return
    stale = run.indices[written[at]]
    if len(stale):
        pages[stale] = 0


def _check_all_came(block: RamBlock, indices: IndexArray, came: BoolArray) -> None:
    """QEMU takes a change to a page that it never got; whatever that page holds then, it is not the source's."""
    if not came.all():
        first = int(indices[came.argmin()])
        raise StreamError(
            f"an XBZRLE record changes the page at {first * wire.PAGE_SIZE:#x} of block {block.name!r}, "
            "which has not come in this stream"
        )


def _address(address: int | None) -> str:
    return "no address" if address is None else f"{address:#x}"


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
