"""Looks into a stream: its form, its RAM blocks and how their pages came, its devices and what they say of themselves.

Nothing of a machine is made: pages are counted as they pass, and no page is kept. A stream that is cut or damaged is
looked into as far as it makes sense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from os import PathLike
from typing import TYPE_CHECKING, Final
from uuid import UUID

import numpy as np

from whimbrel.abc import Channel, SectionKind
from whimbrel.capture.files import open_stream
from whimbrel.capture.findings import (
    BlockReport,
    Breakdown,
    Cut,
    DeviceReport,
    DriveReport,
    Inspection,
    SectionReport,
)
from whimbrel.capture.pages import Kinds, PageSums, PageTable, kinds_of
from whimbrel.capture.tail import Tail
from whimbrel.capture.taking import IGNORE_SHARED, LISTED_MAX
from whimbrel.capture.walk import BLOCK, DEVICES, Body, Walk
from whimbrel.errors import ChannelLost, IncompatibleError, MigrationError, Place, StreamError
from whimbrel.migration.machine import manager_for
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.stream import ForwardingChannel
from whimbrel.wire import block, skeleton
from whimbrel.wire import ram as wire
from whimbrel.wire.ram import ListedBlock
from whimbrel.wire.ram_batches import Batch, BatchReader
from whimbrel.wire.skeleton import SectionHeader
from whimbrel.wire.tail import DeviceSection

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BlockReport",
    "Breakdown",
    "Cut",
    "DeviceReport",
    "DriveReport",
    "Inspection",
    "Kinds",
    "SectionReport",
    "inspect",
]

TRACKED_MAX: Final = 1 << 38
"""Bytes of RAM of which each page is tracked, at 11 bytes a page that comes, and 10 more while contents are compared:
less than 1.5 GiB for the largest machine."""

TOLD_EVERY: Final = 4 << 20  # bytes between two words of progress
_FOOTER: Final = len(skeleton.section_footer(0))
_DESCRIPTION_HEAD: Final = 5

_MISSING: Final = {"head": "the head of the next section or the end of the stream", "command": "the rest of a command"}


def inspect(
    source: str | PathLike[str] | Channel,
    *,
    progress: Callable[[int], object] = lambda _: None,
    settings: Settings | None = None,
    plugins: PluginManager | None = None,
) -> Inspection:
    """Look into the stream in a file, or out of a channel that only gives; the channel is closed at the end.

    `progress` is called now and then with the bytes read so far. What is wrong in the stream is in the result
    (`error`), with all that came before. Raises ConfigError and ConnectError for a file that cannot be read, and
    ChannelLost or a ProtocolError for one that does not even begin like a migration stream.
    """
    settings = settings if settings is not None else Settings()
    if not isinstance(source, Channel):
        source = open_stream(source, settings, plugins if plugins is not None else manager_for(settings))
    with closing(source) as channel:
        return _Inspector(channel, settings, progress).run()


class _Counted(ForwardingChannel):
    """`channel`, with what came out of it counted."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self.duplex = False
        self.count = 0
        self.ended = False

    def recv_into(self, buffer: Buffer) -> int:
        count = super().recv_into(buffer)
        self.count += count
        self.ended = count == 0
        return count


class _Inspector:
    """Follows one stream; one use."""

    def __init__(self, channel: Channel, settings: Settings, progress: Callable[[int], object]) -> None:
        self._channel = _Counted(channel)
        self._walk = Walk(self._channel, settings.limits, drives=True)
        self._settings, self._progress = settings, progress
        self._told = 0
        self._found = Inspection(source=channel.peer)
        self._blocks: dict[str, BlockReport] = {}
        self._tables: dict[str, PageTable] = {}
        self._records = BatchReader({})
        self._drives: dict[str, _CountedDrive] = {}
        self._expected = "a stream's header and its configuration"

    def run(self) -> Inspection:
        found, walk = self._found, self._walk
        try:
            configuration = walk.begin()
        except MigrationError as exc:
            raise self._judged(exc) from exc.__cause__
        found.breakdown.header = walk.reader.offset
        if configuration is not None:
            found.machine, found.configuration = configuration.machine, True
            found.capabilities = configuration.capabilities
            found.uuid = None if configuration.uuid is None else UUID(bytes=configuration.uuid)
        try:
            while (body := self._next_body()) is not None:
                self._count_body(body)
        except MigrationError as exc:
            found.error = self._judged(exc.at(Place(offset=walk.reader.offset)))
        found.size = self._channel.count if self._channel.ended else walk.reader.offset
        found.footers, found.return_path = walk.footers, walk.return_path_open
        found.blocks = list(self._blocks.values())
        found.drives = [drive.summed_up() for drive in self._drives.values()]
        self._sum_up_pages()
        if walk.end is None:
            found.devices = tuple(DeviceReport.of(section) for section in walk.early)
        else:
            self._add_tail(walk.end)
        if found.error is not None:
            found.breakdown.unread = found.size - found.breakdown.total
        return found

    def _judged(self, exc: MigrationError) -> MigrationError:
        """What to say of an error: that the stream is cut, if that is what it comes from."""
        if not isinstance(exc, ChannelLost) or not self._channel.ended:
            return exc
        return self._cut(exc.place, self._expected)

    def _cut(self, place: Place, expected: str, says: str = "") -> ChannelLost:
        cut = self._found.cut = Cut(self._channel.count, place.section, place.block, expected)
        return ChannelLost(
            says or f"the stream is cut: it ends here, expected {expected}",
            place=Place(cut.section, cut.block, cut.offset, self._channel.peer),
        )

    # --------------------------------------------------------------------------------------- between the bodies

    def _next_body(self) -> Body | None:
        """The next body of RAM, with what stands before it counted; None at the end."""
        walk, spent = self._walk, self._found.breakdown
        began, known = walk.reader.offset, len(walk.early)
        behind_a_body = bool(self._found.sections)
        try:
            body = walk.next_body()
        except MigrationError as exc:
            self._expected = _MISSING.get(exc.place.section or "", "the footer of this section")
            self._add_devices(walk.early[known:])
            raise
        heads, bodies = self._add_devices(walk.early[known:])
        footer = _FOOTER if behind_a_body and walk.footers else 0
        head = 0 if body is None else _head_size(body.header, body.kind)
        spent.section_heads += footer + head
        end = walk.reader.offset if body is not None else walk.base
        spent.commands += end - began - footer - heads - bodies - head
        return body

    def _add_devices(self, sections: Sequence[DeviceSection]) -> tuple[int, int]:
        """Count sections that the walk has just found; returns the bytes of their heads and footers, and of bodies."""
        heads = bodies = 0
        for section in sections:
            header = section.header
            numbers = header.instance_id, header.version_id, header.section_id
            offset = self._walk.base + section.offset
            self._found.sections.append(
                SectionReport(SectionKind.FULL, header.idstr, *numbers, offset, len(section.body))
            )
            heads += _head_size(header, SectionKind.FULL) + (_FOOTER if self._walk.footers else 0)
            bodies += len(section.body)
        self._found.breakdown.section_heads += heads
        self._found.breakdown.devices += bodies
        return heads, bodies

    def _add_tail(self, tail: Tail) -> None:
        found, spent, walk = self._found, self._found.breakdown, self._walk
        found.devices = tuple(DeviceReport.of(section) for section in tail.sections)
        found.guessed, found.behind, found.error = tail.guessed, tail.behind, tail.error
        last = tail.sections[len(walk.early) :]
        heads, bodies = self._add_devices(last)
        if tail.cut is not None:
            came, length = tail.cut
            says = f"the description is cut: {came} of {length} bytes came"
            found.error = self._cut(Place(section="description"), f"{length - came} more bytes of it", says)
            spent.description = _DESCRIPTION_HEAD + came
            found.behind = 0
        elif tail.description is not None:
            found.description = len(tail.description.text)
            spent.description = _DESCRIPTION_HEAD + found.description
        elif tail.error is not None:
            inside = tail.error.place.section not in (None, DEVICES)
            self._expected = "the rest of this section" if inside else "a device section or the end of the stream"
            found.error = self._judged(tail.error)
        length_here = found.size - walk.base
        if found.error is None or tail.cut is not None:
            spent.section_heads += 1  # the end mark
            spent.behind = found.behind
            spent.commands += length_here - heads - bodies - spent.description - spent.behind - 1
        elif last:
            end = last[-1].offset + len(last[-1].body) + _head_size(last[-1].header, SectionKind.FULL)
            spent.commands += end + (_FOOTER if walk.footers else 0) - heads - bodies

    # ------------------------------------------------------------------------------------------------------- RAM

    def _count_body(self, body: Body) -> None:
        reader, spent = self._walk.reader, self._found.breakdown
        began = reader.offset
        section = self._section(body, began - _head_size(body.header, body.kind))
        try:
            limit, self._expected = 0, ""
            if body.header.idstr == BLOCK:
                self._count_chunks(body)
                return
            if body.kind is SectionKind.START:
                self._expected = "the rest of the list of RAM blocks"
                self._begin(body)
                spent.block_list += reader.offset - began
                self._expected = ""
            else:
                limit = sum(block.pages for block in self._blocks.values())
            for name, batch in self._records.body(reader, limit):
                self._count(name, batch)
                if reader.offset - self._told >= TOLD_EVERY:
                    self._told = reader.offset
                    self._progress(reader.offset)
            spent.record_heads += len(wire.EOS_RECORD)
        except MigrationError as exc:
            self._expected = self._expected or self._rest_of_record()
            place = Place(section=f"{body.header.idstr!r} (id {body.header.section_id})", offset=reader.offset)
            raise exc.at(place) from exc.__cause__
        finally:
            section.size += reader.offset - began

    def _count_chunks(self, body: Body) -> None:
        """Count a body of drives."""
        if body.header.version_id != block.VERSION_ID:
            raise IncompatibleError(
                f"the block section has version {body.header.version_id}, expected {block.VERSION_ID}"
            )
        reader, spent = self._walk.reader, self._found.breakdown
        while True:
            began = reader.offset
            self._expected = "another record or the end of this body"
            record = reader.parse(block.parse_record())
            head = reader.offset - began
            if isinstance(record, block.Chunk):
                if not record.zero:
                    self._expected = "the rest of a chunk of a drive"
                    self._pass_over(block.CHUNK)
                    spent.chunks += block.CHUNK
                self._drive(record.device).take(record, reader.offset - began)
            spent.record_heads += head
            if isinstance(record, block.End):
                return

    def _drive(self, name: str) -> _CountedDrive:
        if name not in self._drives and len(self._drives) >= self._settings.limits.sections:
            raise StreamError(
                f"more than {self._settings.limits.sections} drives", hint="[limits] sections says how many may come"
            )
        return self._drives.setdefault(name, _CountedDrive(name))

    def _pass_over(self, size: int) -> None:
        reader = self._walk.reader
        end = reader.offset + size
        while reader.offset < end:
            reader.advance(min(len(reader.window(1)), end - reader.offset))
        if reader.offset - self._told >= TOLD_EVERY:
            self._told = reader.offset
            self._progress(reader.offset)

    def _section(self, body: Body, offset: int) -> SectionReport:
        """Where a body is counted: with the one before, if that is of the same kind."""
        header, sections = body.header, self._found.sections
        if sections and (sections[-1].kind, sections[-1].section_id) == (body.kind, header.section_id):
            sections[-1].count += 1
        else:
            numbers = header.instance_id, header.version_id, header.section_id
            sections.append(SectionReport(body.kind, header.idstr, *numbers, offset))
        return sections[-1]

    def _rest_of_record(self) -> str:
        have = self._channel.count - self._walk.reader.offset
        if not have:
            return "another record or the end of this body"
        return f"at least {self._records.need - have} more bytes of a record"

    def _begin(self, body: Body) -> None:
        if body.header.version_id != wire.VERSION_ID:
            raise IncompatibleError(f"the RAM section has version {body.header.version_id}, expected {wire.VERSION_ID}")
        listed: tuple[ListedBlock, ...] = self._walk.reader.parse(
            wire.parse_block_list(
                total_limit=LISTED_MAX,
                blocks_limit=self._settings.limits.blocks,
                guest_addresses=IGNORE_SHARED in self._found.capabilities,
            )
        )
        self._blocks = {block.name: BlockReport(block.name, block.size, block.guest_address) for block in listed}
        sizes = {block.name: block.size for block in listed}
        self._records = BatchReader(sizes)
        self._found.tracked = sum(sizes.values()) <= TRACKED_MAX
        if self._found.tracked:
            sums = PageSums()
            self._tables = {name: PageTable(size // wire.PAGE_SIZE, sums) for name, size in sizes.items()}

    def _count(self, name: str, batch: Batch) -> None:
        block, spent = self._blocks[name], self._found.breakdown
        kinds = kinds_of(batch)
        counts = np.bincount(kinds, minlength=4)
        payloads = np.bincount(kinds, batch.ends - batch.starts, minlength=4)
        block.records.add(counts)
        block.bytes += batch.size
        pages, _, xbzrle, compressed = (int(size) for size in payloads.tolist())
        named = int(batch.starts[0]) - wire.WORD if batch.flags[0] == wire.Flag.ZERO else 0
        zero = int(counts[1]) * wire.ZERO_STRIDE + named
        spent.pages += pages
        spent.zero += zero
        spent.xbzrle += xbzrle
        spent.compressed += compressed
        spent.record_heads += batch.size - pages - zero - xbzrle - compressed
        if self._tables:
            self._tables[name].take(batch)

    def _sum_up_pages(self) -> None:
        times = np.zeros(1, np.int64)
        for name, table in self._tables.items():
            block, more = self._blocks[name], table.times()
            block.last, block.distinct, block.passes = table.last(), table.distinct(), len(more) - 1
            total = np.zeros(max(len(times), len(more)), np.int64)
            total[: len(times)] = times
            total[: len(more)] += more
            times = total
        (seen,) = times.nonzero()
        self._found.times = tuple(zip(seen.tolist(), times[seen].tolist(), strict=True))


class _CountedDrive:
    """A drive, and how often each of its chunks came, a hundred bytes or so a chunk that came."""

    def __init__(self, name: str) -> None:
        self._report = DriveReport(name)
        self._times: Counter[int] = Counter()

    def take(self, chunk: block.Chunk, size: int) -> None:
        """Count a record of so many bytes."""
        report = self._report
        report.zero += chunk.zero
        report.chunks += not chunk.zero
        report.size = max(report.size, (chunk.number + 1) * block.CHUNK)
        report.bytes += size
        self._times[chunk.number] += 1

    def summed_up(self) -> DriveReport:
        """What was counted."""
        self._report.distinct = len(self._times)
        self._report.passes = max(self._times.values(), default=0)
        return self._report


def _head_size(header: SectionHeader, kind: SectionKind) -> int:
    return len(skeleton.section_header(kind, header))
