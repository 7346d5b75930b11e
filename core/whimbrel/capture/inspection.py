"""What is in a stream: its form, its RAM blocks and how their pages came, its devices and what they say of themselves.

Nothing of a machine is made: pages are counted as they pass, and no page is kept. A stream that is cut or damaged is
looked into as far as it makes sense.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from os import PathLike
from typing import Any, Final
from uuid import UUID

import attrs
import numpy as np

from whimbrel.abc import BoolArray, Channel, Patience, SectionKind
from whimbrel.capture.tail import Tail
from whimbrel.capture.taking import IGNORE_SHARED, LISTED_MAX, file_uri
from whimbrel.capture.walk import Body, Walk
from whimbrel.errors import IncompatibleError, MigrationError, Place, StreamError
from whimbrel.migration.machine import manager_for
from whimbrel.migration.uri import resolve
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.wire import fields
from whimbrel.wire import ram as wire
from whimbrel.wire.fields import DecodedDevice
from whimbrel.wire.ram import ListedBlock
from whimbrel.wire.tail import DeviceSection

__all__ = ["BlockReport", "DeviceReport", "Inspection", "inspect"]

TRACKED_MAX: Final = 1 << 40  # bytes of RAM of which each page is marked, at a byte a page

_COUNTERS: Final = {
    wire.Flag.PAGE: "normal",
    wire.Flag.ZERO: "zero",
    wire.Flag.XBZRLE: "xbzrle",
    wire.Flag.COMPRESS_PAGE: "compressed",
}


@attrs.define
class BlockReport:
    """A RAM block: its size in bytes, and how many records of each kind were about its pages.

    `distinct` is how many of its `pages` came at least once; None if there are too many to be told apart.
    `guest_address` is there where blocks may be shared with the destination, and then none of their pages comes.
    """

    name: str
    size: int
    guest_address: int | None = None
    normal: int = 0
    zero: int = 0
    xbzrle: int = 0
    compressed: int = 0
    encoded_bytes: int = 0
    distinct: int | None = None

    @property
    def pages(self) -> int:
        """How many pages it has."""
        return self.size // wire.PAGE_SIZE

    @property
    def records(self) -> int:
        """Records of all kinds; those beyond `distinct` are of pages that came again."""
        return self.normal + self.zero + self.xbzrle + self.compressed

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**attrs.asdict(self), "pages": self.pages, "records": self.records}


@attrs.frozen
class DeviceReport:
    """A device section: `size` is its body's in bytes; `decoded` its fields, or None, and then `problem` says why."""

    name: str
    instance_id: int
    version_id: int
    section_id: int
    size: int
    decoded: DecodedDevice | None = attrs.field(default=None, repr=False)
    problem: str = ""

    @classmethod
    def of(cls, section: DeviceSection) -> DeviceReport:
        """Look into a section."""
        header = section.header
        decoded, problem = None, ""
        if section.described is None:
            problem = "the stream has no description of it"
        else:
            try:
                decoded = fields.decode(section.described, section.body)
            except StreamError as exc:
                problem = exc.message
        return cls(
            header.idstr,
            header.instance_id,
            header.version_id,
            header.section_id,
            len(section.body),
            decoded,
            problem,
        )

    def as_dict(self, *, values: bool = True) -> dict[str, Any]:
        """For JSON; its fields too, with `values`."""
        shown = attrs.asdict(self, filter=lambda attribute, _: attribute.name not in ("decoded", "problem"))
        if self.problem:
            shown["problem"] = self.problem
        if values and self.decoded is not None:
            inside = self.decoded.as_dict()
            shown["fields"] = inside["fields"]
            shown["subsections"] = inside.get("subsections", [])
        return shown


@attrs.define(kw_only=True)
class Inspection:
    """What was found in a stream, up to `error` if that is not None. Sizes are in bytes.

    `machine` is None where the stream does not name one. `bodies` counts those of RAM: START, PARTs, END; `ram_bytes`
    is what they are long together. `description` is that of the JSON. `behind` counts bytes after the stream's end.
    `guessed`: the devices were told apart without description and footers.
    """

    source: str
    size: int = 0
    machine: str | None = None
    configuration: bool = False
    capabilities: tuple[str, ...] = ()
    uuid: UUID | None = None
    return_path: bool = False
    footers: bool = False
    description: int | None = None
    bodies: int = 0
    ram_bytes: int = 0
    blocks: list[BlockReport] = attrs.field(factory=list)
    devices: tuple[DeviceReport, ...] = ()
    guessed: bool = False
    behind: int = 0
    error: MigrationError | None = None

    @property
    def ram(self) -> int:
        """Bytes of RAM that the machine has."""
        return sum(block.size for block in self.blocks)

    def as_dict(self, *, values: bool = True) -> dict[str, Any]:
        """For JSON; with `values` the fields of each device too."""
        shown = attrs.asdict(self, recurse=False)
        shown["uuid"] = None if self.uuid is None else str(self.uuid)
        shown["capabilities"] = list(self.capabilities)
        shown["ram"] = self.ram
        shown["blocks"] = [block.as_dict() for block in self.blocks]
        shown["devices"] = [device.as_dict(values=values) for device in self.devices]
        del shown["error"]
        if self.error is not None:
            shown["error-code"], shown["error-desc"] = self.error.code, str(self.error)
        return shown


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
    StreamError for one that is no migration stream at all.
    """
    settings = settings if settings is not None else Settings()
    if not isinstance(source, Channel):
        plugins = plugins if plugins is not None else manager_for(settings)
        file = resolve(file_uri(source), plugins)
        with closing(file.spec.create().listen(file.address)) as listener:
            source = listener.accept(Patience(settings.limits.connect_timeout))
    with closing(source) as channel:
        return _Inspector(channel, settings, progress).run()


class _Inspector:
    """Follows one stream; one use."""

    def __init__(self, channel: Channel, settings: Settings, progress: Callable[[int], object]) -> None:
        self._walk = Walk(channel, settings.limits)
        self._settings, self._progress = settings, progress
        self._found = Inspection(source=channel.peer)
        self._blocks: dict[str, BlockReport] = {}
        self._came: dict[str, BoolArray] | None = None
        self._records = wire.RecordReader({})

    def run(self) -> Inspection:
        found, walk = self._found, self._walk
        configuration = walk.begin()
        if configuration is not None:
            found.machine, found.configuration = configuration.machine, True
            found.capabilities = configuration.capabilities
            found.uuid = None if configuration.uuid is None else UUID(bytes=configuration.uuid)
        try:
            while (body := walk.next_body()) is not None:
                self._count_body(body)
        except MigrationError as exc:
            found.error = exc.at(Place(offset=walk.reader.offset))
        found.size = walk.reader.offset
        found.footers, found.return_path = walk.footers, walk.return_path_open
        found.blocks = list(self._blocks.values())
        for name, came in (self._came or {}).items():
            self._blocks[name].distinct = int(np.count_nonzero(came))
        if walk.end is not None:
            self._add_tail(walk.end)
        return found

    def _add_tail(self, tail: Tail) -> None:
        found = self._found
        found.devices = tuple(DeviceReport.of(section) for section in tail.sections)
        found.description = None if tail.description is None else len(tail.description.text)
        found.guessed, found.behind, found.error = tail.guessed, tail.behind, tail.error

    # ------------------------------------------------------------------------------------------------------- RAM

    def _count_body(self, body: Body) -> None:
        reader = self._walk.reader
        began = reader.offset
        try:
            if body.kind is SectionKind.START:
                self._begin(body)
                limit = 0
            else:
                limit = sum(block.pages for block in self._blocks.values())
            for name, run in self._records.body(reader, limit):
                self._count(self._blocks[name], run)
                self._progress(reader.offset)
        except MigrationError as exc:
            section = f"{body.header.idstr!r} (id {body.header.section_id})"
            raise exc.at(Place(section=section, offset=reader.offset)) from exc.__cause__
        finally:
            self._found.bodies += 1
            self._found.ram_bytes += reader.offset - began

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
        self._records = wire.RecordReader(sizes)
        if sum(sizes.values()) <= TRACKED_MAX:
            # Zeros that nobody has touched cost nothing: a list may be long, what counts is what comes.
            self._came = {name: np.zeros(size // wire.PAGE_SIZE, np.bool_) for name, size in sizes.items()}

    def _count(self, block: BlockReport, run: wire.Run) -> None:
        counter = _COUNTERS[run.flag]
        setattr(block, counter, getattr(block, counter) + len(run.indices))
        if len(run.starts):
            block.encoded_bytes += int((run.ends - run.starts).sum())
        if self._came is not None:
            self._came[block.name][run.indices] = True
