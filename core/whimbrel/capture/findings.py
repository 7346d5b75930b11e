"""What was found in a stream, as values for programs and for `whimbrel inspect`. All sizes are in bytes."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import attrs

from whimbrel.abc import SectionKind
from whimbrel.capture.pages import Kinds
from whimbrel.errors import MigrationError, StreamError
from whimbrel.wire import fields
from whimbrel.wire import ram as wire
from whimbrel.wire.fields import DecodedDevice
from whimbrel.wire.tail import DeviceSection

__all__ = ["BlockReport", "Breakdown", "Cut", "DeviceReport", "DriveReport", "Inspection", "SectionReport"]


@attrs.define
class BlockReport:
    """A RAM block. `records` counts those about its pages, `bytes` is what they take in the stream, heads included.

    `last` are its pages as they are at the end of the stream, by the last record about each: `normal` are those that
    came last as they are, `zero` those of a ZERO record, and of those in XBZRLE and `compressed` the content is not
    known here. `distinct` is how many different contents the normal ones have (`PageSums` says what is taken for
    equal). `passes` is the most often that any page came: it went through so many passes at least, for a page that has
    not changed is not sent again. All three are None where pages were not tracked.

    `guest_address` is there where blocks may be shared with the destination, and then none of their pages comes.
    """

    name: str
    size: int
    guest_address: int | None = None
    records: Kinds = attrs.field(factory=Kinds)
    bytes: int = 0
    last: Kinds | None = None
    distinct: int | None = None
    passes: int | None = None

    @property
    def pages(self) -> int:
        """How many pages it has."""
        return self.size // wire.PAGE_SIZE

    @property
    def came(self) -> int | None:
        """How many pages came at least once; None where pages were not tracked."""
        return None if self.last is None else self.last.total

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        last = dict.fromkeys(attrs.asdict(self.records)) if self.last is None else attrs.asdict(self.last)
        return {
            "name": self.name,
            "size": self.size,
            "guest_address": self.guest_address,
            "pages": self.pages,
            "came": self.came,
            **last,
            "distinct": self.distinct,
            "passes": self.passes,
            "records": attrs.asdict(self.records),
            "bytes": self.bytes,
        }


@attrs.define
class DriveReport:
    """A drive that came along. `chunks` counts records with 1 MiB each, `zero` those of a chunk of zeros.

    `distinct` is how many different chunks came at all, and `passes` the most often that any did. `size` is where the
    furthest of them ends: the drive has no more than that, unless only what is allocated was sent. `bytes` is what its
    records take in the stream, heads included.
    """

    name: str
    chunks: int = 0
    zero: int = 0
    distinct: int = 0
    passes: int = 0
    size: int = 0
    bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return attrs.asdict(self)


@attrs.frozen
class DeviceReport:
    """A device section: `decoded` are its fields, or None, and then `problem` says why and `body` is all there is."""

    name: str
    instance_id: int
    version_id: int
    section_id: int
    body: bytes = attrs.field(repr=False)
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
        numbers = header.instance_id, header.version_id, header.section_id
        return cls(header.idstr, *numbers, section.body, decoded, problem)

    @property
    def size(self) -> int:
        """Bytes of its body."""
        return len(self.body)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: with `fields` and `subsections`, nested, or `problem` and `body`; bytes as hexadecimal digits."""
        shown = {
            "name": self.name,
            "instance_id": self.instance_id,
            "version_id": self.version_id,
            "section_id": self.section_id,
            "size": self.size,
        }
        if self.decoded is None:
            return {**shown, "problem": self.problem, "body": self.body.hex()}
        inside = self.decoded.as_dict()
        return {**shown, "fields": inside["fields"], "subsections": inside.get("subsections", [])}


@attrs.define
class SectionReport:
    """A section, or `count` bodies of RAM or drives of one kind that came one behind the other.

    `offset` is that of the first one's type byte in the stream; `size` is that of all bodies, without their heads and
    footers.
    """

    kind: SectionKind
    name: str
    instance_id: int
    version_id: int
    section_id: int
    offset: int
    size: int = 0
    count: int = 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**attrs.asdict(self), "kind": self.kind.name}


@attrs.define
class Breakdown:
    """Where the bytes of a stream went; together they are all of them.

    `pages` are those that came as they are, `chunks` those of drives, `zero` whole ZERO records, `xbzrle` and
    `compressed` what encoded pages take. `record_heads` are the heads of all records but ZERO ones, and the marks that
    end bodies of RAM and drives. `section_heads` are the heads and footers of all sections, and the mark that ends the
    stream. `devices` are their bodies. `header` is with the configuration, `description` with its head. `unread` is
    what stood before the place where a stream is cut or makes no sense, and could not be told.
    """

    header: int = 0
    commands: int = 0
    section_heads: int = 0
    block_list: int = 0
    record_heads: int = 0
    pages: int = 0
    zero: int = 0
    xbzrle: int = 0
    compressed: int = 0
    chunks: int = 0
    devices: int = 0
    description: int = 0
    behind: int = 0
    unread: int = 0

    @property
    def total(self) -> int:
        """All of them: the stream's length."""
        counts: tuple[int, ...] = attrs.astuple(self)
        return sum(counts)


@attrs.frozen
class Cut:
    """Where a stream ends before its time: `offset` is its length, `section` and `block` as in a `Place`."""

    offset: int
    section: str | None
    block: str | None
    expected: str


@attrs.define(kw_only=True)
class Inspection:
    """What was found in a stream, up to `error` if that is not None.

    `size` is the stream's length, or up to where it makes no sense. `machine` is None where the stream does not name
    one. `return_path` says whether it was sent to somebody who listens. `description` is the length of the JSON,
    None without one. `sections` are in their order, `devices` too. `tracked` says whether pages were told apart, and
    `times` how many pages came never, once, twice and so on, as pairs that rise. `behind` counts bytes after the
    stream's end. `guessed`: the devices were told apart without description and footers. `cut` is there if the stream
    ends before its time, and then `error` says so too.
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
    sections: list[SectionReport] = attrs.field(factory=list)
    breakdown: Breakdown = attrs.field(factory=Breakdown)
    blocks: list[BlockReport] = attrs.field(factory=list)
    drives: list[DriveReport] = attrs.field(factory=list)
    tracked: bool = True
    times: tuple[tuple[int, int], ...] = ()
    devices: tuple[DeviceReport, ...] = ()
    guessed: bool = False
    behind: int = 0
    cut: Cut | None = None
    error: MigrationError | None = None

    @property
    def ram(self) -> int:
        """Bytes of RAM that the machine has."""
        return sum(block.size for block in self.blocks)

    @property
    def passes(self) -> int | None:
        """The most often that any page came; None where pages were not tracked."""
        return max((block.passes or 0 for block in self.blocks), default=0) if self.tracked else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON. The keys are part of the API: each is always there, but for those of the error."""
        shown = attrs.asdict(self, recurse=False, filter=lambda attribute, _: attribute.name != "error")
        shown["uuid"] = None if self.uuid is None else str(self.uuid)
        shown["capabilities"] = list(self.capabilities)
        shown["ram"], shown["passes"] = self.ram, self.passes
        shown["sections"] = [section.as_dict() for section in self.sections]
        shown["breakdown"] = attrs.asdict(self.breakdown)
        shown["blocks"] = [block.as_dict() for block in self.blocks]
        shown["drives"] = [drive.as_dict() for drive in self.drives]
        shown["times"] = [{"times": times, "pages": pages} for times, pages in self.times]
        shown["devices"] = [device.as_dict() for device in self.devices]
        shown["cut"] = None if self.cut is None else attrs.asdict(self.cut)
        if self.error is not None:
            shown["error-code"], shown["error-desc"] = self.error.code, str(self.error)
        return shown
