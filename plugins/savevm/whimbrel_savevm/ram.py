"""The `ram` plugin: a machine's RAM blocks as QEMU's RAM section, saved in rounds (wire format, section 2).

The handler is a front for two rooms that share nothing: `_ram_saver` at the source, `_ram_loader` at the destination.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from whimbrel.abc import (
    ArrivingLanes,
    DeltaCodec,
    DepartingLanes,
    IterableHandler,
    Progress,
    RemotelyWrittenChannel,
    RemoteWritingChannel,
    SaveVMSpec,
    SectionKind,
    Slice,
    StreamReader,
    StreamWriter,
)
from whimbrel.errors import IncompatibleError, WhimbrelError
from whimbrel.hookspecs import hookimpl
from whimbrel.machine import BareMachine
from whimbrel.wire import ram as wire
from whimbrel_savevm._ram_delta import DeltaSender
from whimbrel_savevm._ram_hooked import HookedSender
from whimbrel_savevm._ram_lanes import LaneSender
from whimbrel_savevm._ram_loader import XBZRLE, RamLoader
from whimbrel_savevm._ram_saver import BATCH, RamSaver
from whimbrel_savevm._ram_sending import PageSender, PlainSender


class RamHandler(IterableHandler):
    """Saves and loads all RAM blocks of one machine."""

    idstr = "ram"
    version_id = wire.VERSION_ID
    priority = 100  # the first of all: everything else is small
    statistics_key = "ram"

    def __init__(self, machine: BareMachine) -> None:
        self._machine = machine
        sent = sum(block.size for block in machine.ram if not block.shared)
        self.progress = Progress(page_size=wire.PAGE_SIZE, total=sent)
        self._saver: RamSaver | None = None
        self._loader: RamLoader | None = None
        self._lanes: ArrivingLanes | None = None
        self._written: RemotelyWrittenChannel | None = None

    # ------------------------------------------------------------------------------------------- source

    def problems(self) -> Sequence[str]:
        """Without a dirty tracker that works nothing can be saved, nor without a codec that is asked for."""
        try:
            sender = self._sender()
            name, tracker = self._machine.new_dirty_tracker()
        except WhimbrelError as exc:
            return (str(exc),)
        self.progress.tracker = name
        self._saver = RamSaver(list(self._machine.ram), tracker, self.progress, sender)
        return ()

    def _sender(self) -> PageSender:
        settings = self._machine.settings
        # Over lanes pages go whole.
        if not settings.capabilities.xbzrle or settings.capabilities.multifd:
            return PlainSender(self.progress, zeros=BATCH)
        codec = self._machine.new_codec(XBZRLE)
        if not isinstance(codec, DeltaCodec):
            raise IncompatibleError(f"the codec {XBZRLE!r} is a {type(codec).__name__}, expected a DeltaCodec")
        return DeltaSender(self.progress, codec, list(self._machine.ram), settings.parameters, zeros=BATCH)

    def statistics(self) -> Mapping[str, Mapping[str, object]]:
        """The counters of the cache, with the capability xbzrle."""
        return {} if self._saver is None else self._saver.statistics()

    def use_lanes(self, lanes: DepartingLanes) -> None:
        """Send pages over lanes."""
        self._its_saver.use(LaneSender(lanes, self.progress, zeros=BATCH, pending=self._its_saver.pending))

    def use_remote_writing(self, channel: RemoteWritingChannel, flush: Callable[[], None]) -> None:
        """Have the channel write pages at the peer."""
        self._its_saver.use(HookedSender(channel, list(self._machine.ram), self.progress, flush))

    def save_start(self, out: StreamWriter) -> None:
        """Begin to track, and list the blocks."""
        self._its_saver.start(out)

    def sync(self) -> None:
        """Read the dirty marks."""
        self._its_saver.sync()

    def pending(self) -> int:
        """Bytes marked dirty."""
        return self._its_saver.pending()

    def save_part(self, out: StreamWriter, slice_: Slice) -> None:
        """Send dirty pages while the slice lasts."""
        self._its_saver.part(out, slice_)

    def save_end(self, out: StreamWriter) -> None:
        """Send all dirty pages."""
        self._its_saver.end(out)

    @property
    def _its_saver(self) -> RamSaver:
        assert self._saver is not None, "saved without having been asked for problems"
        return self._saver

    # -------------------------------------------------------------------------------------- destination

    def await_lanes(self, lanes: ArrivingLanes) -> None:
        """Expect pages from lanes too."""
        self._lanes = lanes

    def await_remote_writing(self, channel: RemotelyWrittenChannel) -> None:
        """Let the peer write pages."""
        self._written = channel

    def load(self, reader: StreamReader, kind: SectionKind, version_id: int) -> None:
        """Load one body into the machine's own blocks."""
        if version_id != wire.VERSION_ID:
            raise IncompatibleError(f"the RAM section has version {version_id}, expected {wire.VERSION_ID}")
        if self._loader is None:
            self._loader = RamLoader(self._machine, self._lanes, self._written)
        self._loader.load(reader, kind)

    def tally(self) -> Mapping[str, int]:
        """How many pages of each block have gone at least once, which is all of them, or have come."""
        blocks = [block for block in self._machine.ram if not block.shared]
        return {block.name: block.pages if self._loader is None else self.pages_come(block.name) for block in blocks}

    def pages_come(self, name: str) -> int:
        """How many pages of block `name` records were about so far. Raises UnknownNameError."""
        block = self._machine.ram[name]
        return 0 if self._loader is None else int(np.count_nonzero(self._loader.came(block.name)))

    def rollback(self) -> None:
        """Make every block that was written into zero again: a machine that arrives is never started on its own."""
        if self._loader is not None:
            self._loader.rollback()

    # --------------------------------------------------------------------------------------------- both

    def finish(self) -> None:
        """End the tracking and the populating."""
        if self._saver is not None:
            self._saver.finish()
        if self._loader is not None:
            self._loader.finish()


@hookimpl
def whimbrel_savevm_handlers(machine: BareMachine) -> Sequence[SaveVMSpec]:
    """Offer the handler of `machine`'s RAM."""
    return [SaveVMSpec(name="ram", summary="RAM blocks, in rounds", create=lambda: [RamHandler(machine)])]
