"""The `block` plugin: a machine's drives as QEMU's block section, saved in rounds (wire format, section 4).

The handler is a front for two rooms that share nothing: `_block_saver` at the source, `_block_loader` at the
destination. A machine that leaves has one only if its drives go along; one that waits has one for any writable drive,
and takes a stream without the section too: both sides have the same images then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from whimbrel.abc import IterableHandler, Progress, SaveVMSpec, SectionKind, Slice, StreamReader, StreamWriter
from whimbrel.hookspecs import hookimpl
from whimbrel.machine import BareMachine, RunState
from whimbrel.machine.drives import Leaving
from whimbrel.wire import block as wire
from whimbrel_savevm._block_loader import BlockLoader
from whimbrel_savevm._block_saver import BlockSaver

PAGE_SIZE = 4096  # what statistics count in


class BlockHandler(IterableHandler):
    """Saves and loads all drives of one machine that are writable and not empty."""

    idstr = "block"
    version_id = wire.VERSION_ID
    priority = 110  # its END comes before that of RAM
    statistics_key = "disk"
    optional = True

    def __init__(self, machine: BareMachine) -> None:
        self._drives = machine.drives.writable
        self.progress = Progress(page_size=PAGE_SIZE, total=sum(drive.size for drive in self._drives))
        self._saver = BlockSaver(
            self._drives,
            self.progress,
            zero_blocks=machine.settings.capabilities.zero_blocks,
            allocated_only=machine.drives.leaving is Leaving.ALLOCATED,
        )
        self._loader: BlockLoader | None = None

    # ------------------------------------------------------------------------------------------- source

    def save_start(self, out: StreamWriter) -> None:
        """Begin to track."""
        self._saver.start(out)

    def sync(self) -> None:
        """Read the marks of what was written."""
        self._saver.sync()

    def pending(self) -> int:
        """Bytes that are marked, or being read."""
        return self._saver.pending()

    def ready(self) -> bool:
        """Whether a chunk was read and can be sent."""
        return self._saver.ready()

    def save_part(self, out: StreamWriter, slice_: Slice) -> None:
        """Send chunks while the slice lasts."""
        self._saver.part(out, slice_)

    def save_end(self, out: StreamWriter) -> None:
        """Send all that is left."""
        self._saver.end(out)

    # -------------------------------------------------------------------------------------- destination

    def load(self, reader: StreamReader, kind: SectionKind, version_id: int) -> None:  # noqa: ARG002 - there is one
        """Load one body into the machine's own drives."""
        if self._loader is None:
            self._loader = BlockLoader(self._drives)
        self._loader.load(reader, kind)

    def tally(self) -> Mapping[str, int]:
        """How many chunks of each drive have gone, or have come."""
        return self._saver.sent() if self._loader is None else self._loader.came()

    def chunks_come(self, name: str) -> int:
        """How many chunks of drive `name` came so far, each counted once."""
        return 0 if self._loader is None else self._loader.chunks_come(name)

    def commit(self) -> None:
        """Have all that was written on the disk."""
        if self._loader is not None:
            self._loader.commit()

    def rollback(self) -> None:
        """Let go of the images. What was written into them stays, and the mark that they are not whole."""
        if self._loader is not None:
            self._loader.rollback()

    # --------------------------------------------------------------------------------------------- both

    def finish(self) -> None:
        """End reading, tracking and flushing."""
        self._saver.finish()
        if self._loader is not None:
            self._loader.finish()


@hookimpl
def whimbrel_savevm_handlers(machine: BareMachine) -> Sequence[SaveVMSpec]:
    """Offer the handler of `machine`'s drives; where none go along or may come, there is none."""

    def create() -> list[BlockHandler]:
        arriving = machine.run_state is RunState.INMIGRATE
        takes_part = machine.drives.writable and (arriving or machine.drives.leaving is not Leaving.NOTHING)
        return [BlockHandler(machine)] if takes_part else []

    return [SaveVMSpec(name="block", summary="drives, in rounds", create=create)]
