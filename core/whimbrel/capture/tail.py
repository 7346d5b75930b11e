"""The end of a stream as it comes: device sections, a description, and what else may stand there.

No length stands before a device's bytes, so all are kept until the description tells their sizes, or footers do, or
the stream has ended (`whimbrel.wire.tail`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from whimbrel.errors import ChannelLost, MigrationError, Place, StreamError
from whimbrel.settings import Limits
from whimbrel.wire import commands
from whimbrel.wire.commands import Ping
from whimbrel.wire.described import Described
from whimbrel.wire.description import Description, DescriptionFinder, Found
from whimbrel.wire.skeleton import Element, SectionHeader
from whimbrel.wire.tail import (
    DeviceSection,
    FooterWalk,
    Split,
    Standing,
    section_at,
    split_by_description,
    split_by_footers,
    split_by_headers,
)

MISFITS_MAX: Final = 8  # descriptions that do not fit the sections before them
FITS_MAX: Final = 64  # descriptions that do, all but the last of which are a device's bytes
_PING: Final = 9  # bytes
_TEXT_AT: Final = 5  # bytes from a description's mark to its text
_AROUND: Final = 1 << 10  # bytes of an EOF, PINGs, and a description's head


@attrs.frozen(eq=False)
class Tail:
    """The end of a stream: its device sections, and its description if it has one.

    `guessed` says that the sections were told apart without description and footers. `behind` counts bytes that came
    after the end. `error` says where the stream was cut or makes no sense; `sections` are those before it then. `end`
    is where the description ends, counted from the first device on. `cut` is there if it is not whole: how many bytes
    of its JSON have come, and how many it is to have.
    """

    sections: tuple[DeviceSection, ...]
    description: Description | None = None
    guessed: bool = False
    behind: int = 0
    error: MigrationError | None = None
    end: int = 0
    cut: tuple[int, int] | None = None


class TailCollector:
    """Keeps the bytes from a FULL on, whose type byte is at `base` of the stream.

    `first` sections came before, with `before` bytes; `seen` and `started` are the section ids that were taken, and
    may go on. Of `limits` those of the description and of device sections count. One thread.
    """

    def __init__(
        self,
        base: int,
        *,
        footers: bool,
        seen: Iterable[int],
        started: Iterable[int],
        first: int,
        before: int,
        limits: Limits,
    ) -> None:
        self.data = bytearray()
        self.base = base
        self._footers, self._first, self._before = footers, first, before
        self._limit, self._total = limits.description, limits.device_sections
        self._body_limit = limits.device_section
        self._seen, self._started = frozenset(seen), frozenset(started)
        self._finder = DescriptionFinder(limit=self._limit)
        self._walk = self._new_walk() if footers else None
        self._fit: Tail | None = None  # by the last description that fits
        self._misfit: Tail | None = None  # by the last one that does not
        self._fits = self._misfits = 0
        self._found_end = -1

    def _new_walk(self) -> FooterWalk:
        return FooterWalk(seen=self._seen, started=self._started, body_limit=self._body_limit)

    @property
    def has_footers(self) -> bool:
        """Whether footers tell where the devices end, and are believed."""
        return self._walk is not None

    @property
    def description_came(self) -> bool:
        """Whether something that may be the description has come, so that nothing more has to."""
        return self._fit is not None or self._found_end == len(self.data)

    def doubt_footers(self) -> None:
        """A device's bytes passed for an end; the description will tell."""
        self._walk = None

    def behind(self) -> Standing | None:
        """What stands behind the last whole section, as far as footers show it; None while nothing has come."""
        if self._walk is None:
            return None
        try:
            return self._walk.feed(self.data)
        except StreamError:
            self.doubt_footers()
            return None

    def ping(self, element: Standing) -> Ping | None:
        """The PING that `element` is, if it is one."""
        return _ping(self.data[element.offset : element.end])

    def pass_over(self, element: Standing) -> None:
        """Go on behind `element`, a command."""
        if self._walk is not None:
            self._walk.pass_over(element.end)

    def devices(self) -> tuple[DeviceSection, ...]:
        """The sections that footers have shown so far."""
        return tuple(section_at(self.data, span) for span in self._walk.spans) if self._walk is not None else ()

    def too_long(self) -> bool:
        """Whether more has come than all devices of a machine have, and a description."""
        return self._before + len(self.data) > self._total + self._limit + _AROUND

    def described(self, *, at_end: bool = False) -> Tail | None:
        """The tail, if a description of it ends what has come; with `at_end` no more bytes come.

        A device's bytes may look like one too. So one that does not fit the sections before it is passed over, and of
        those that fit the last one counts: if more has come behind one, the tail is not told before the end.
        """
        while (found := self._finder.feed(self.data, at_end=at_end)) is not None:
            tail = self._split(found)
            self._found_end = found.end
            if tail.error is None:
                self._fit = tail
                if found.end == len(self.data):
                    return tail
                self._fits += 1
                if self._fits > FITS_MAX:
                    return attrs.evolve(tail, error=self._too_many(found.end))
            else:
                self._misfit = tail
                self._misfits += 1
                if self._misfits > MISFITS_MAX:
                    return tail
            self._finder = DescriptionFinder(found.eof_offset + 1, limit=self._limit)
        if self._fit is None or not at_end:
            return None
        return attrs.evolve(self._fit, behind=len(self.data) - self._fit.end)

    def ended(self) -> Tail:
        """The tail of a stream that has ended here, or says no more."""
        waiting = self._finder.waiting
        if (tail := self.described(at_end=True)) is not None:
            return tail
        if self.too_long():
            return Tail((), error=self._too_long())
        if self._misfit is not None and not self._footers:
            return self._misfit
        if self._footers:
            split = split_by_footers(self.data, seen=self._seen, started=self._started, body_limit=self._body_limit)
        elif waiting is not None:
            return self._described_in_part(*waiting)
        else:
            split = split_by_headers(self.data, seen=self._seen, body_limit=self._body_limit)
        end = split.end
        while _ping(self.data[end : end + _PING]) is not None:
            end += _PING
        if split.error is None and self.data[end : end + 1] == bytes((Element.EOF,)):
            error = self._what_is_behind(end + 1)
            if error is None:
                return attrs.evolve(self._tail(split), behind=len(self.data) - end - 1, cut=_cut(self.data[end + 1 :]))
            split = attrs.evolve(split, error=error)
            return self._misfit if self._misfit is not None else self._tail(split)
        if self._misfit is not None:
            return self._misfit
        last = f"device section {split.sections[-1].header.idstr!r}" if split.sections else "its RAM"
        reason = split.error.message if split.error is not None else "the end mark (00) is missing"
        lost = ChannelLost(f"the stream ended early, behind {last}: {reason}", hint="its sender says why")
        place = split.error.place if split.error is not None else Place()
        return attrs.evolve(self._tail(split), error=lost.at(place).at(self._place(split.end)))

    def _described_in_part(self, came: int, length: int) -> Tail:
        """The tail without footers that ends `came` bytes into its description."""
        begin = len(self.data) - came - _TEXT_AT
        split = split_by_headers(self.data[:begin], seen=self._seen, body_limit=self._body_limit)
        lost = ChannelLost(
            f"the description is cut: {came} of {length} bytes came",
            hint="its sender says why",
            place=self._place(len(self.data)),
        )
        return attrs.evolve(self._tail(split), error=lost, cut=(came, length))

    def _what_is_behind(self, end: int) -> StreamError | None:
        """What is wrong with the bytes behind an EOF, up to `end`, if they are no description that was cut off."""
        rest = self.data[end:]
        if not rest:
            return None
        length = int.from_bytes(rest[1:_TEXT_AT], "big")
        if length > self._limit:
            return StreamError(
                f"the description is {length} bytes long, at most {self._limit}",
                hint="[limits] description says how long it may be",
            )
        if len(rest) > _TEXT_AT + length or not _is_text(rest[_TEXT_AT:]):
            return StreamError(
                f"{len(rest)} bytes came behind the end of the stream, and they are no description of it"
            )
        return None

    def _too_long(self) -> StreamError:
        return StreamError(
            f"the device sections are longer than {self._total} bytes, which is more than any machine has",
            hint="[limits] device-sections says how many they may have",
            place=Place(section="devices", offset=self.base),
        )

    def _too_many(self, end: int) -> StreamError:
        return StreamError(
            f"more than {FITS_MAX} descriptions came, each of which fits all before it",
            place=self._place(end),
        )

    def _split(self, found: Found) -> Tail:
        described = found.description.devices[self._first :]
        split = split_by_description(
            self.data,
            found.description,
            footers=self._footers,
            first=self._first,
            seen=self._seen,
            started=self._started,
            body_limit=self._body_limit,
        )
        if split.error is not None and self._walk is not None and self._walk.end == found.eof_offset:
            spans = self._walk.spans
            if _describe_all(described, [span.header for span in spans]):
                split = Split(tuple(section_at(self.data, span) for span in spans), found.eof_offset)
        if split.error is None and not _only_pings(self.data[split.end : found.eof_offset]):
            left = found.eof_offset - split.end
            error = StreamError(f"{left} bytes stand between the last device that is known and the end of the stream")
            split = attrs.evolve(split, error=error)
        return attrs.evolve(self._tail(split, found.description), end=found.end)

    def _tail(self, split: Split, description: Description | None = None) -> Tail:
        error = split.error
        if error is None and self._before + split.end > self._total:
            error = self._too_long()
        if error is not None:
            error = error.at(self._place(split.end))
        return Tail(split.sections, description, split.guessed, error=error)

    def _place(self, at: int) -> Place:
        return Place(section="devices", offset=self.base + at)


def _ping(data: bytearray) -> Ping | None:
    head = commands.encode(Ping(0))[:-4]
    return Ping(int.from_bytes(data[-4:], "big")) if len(data) == _PING and data.startswith(head) else None


def _only_pings(data: bytearray) -> bool:
    return all(_ping(data[at : at + _PING]) is not None for at in range(0, len(data), _PING))


def _cut(rest: bytearray) -> tuple[int, int] | None:
    """How much came of a description whose head begins `rest`, and how much is to come; None if it is whole."""
    if len(rest) < _TEXT_AT or rest[0] != Element.VMDESCRIPTION:
        return None
    came, length = len(rest) - _TEXT_AT, int.from_bytes(rest[1:_TEXT_AT], "big")
    return (came, length) if came < length else None


def _is_text(data: bytearray) -> bool:
    return data.isascii() and data.decode("ascii").isprintable()


def describes(described: Described, header: SectionHeader) -> bool:
    """Whether an entry of a description is that of the section with this header."""
    return (
        described.get("name") == header.idstr
        and described.get("instance_id") == header.instance_id
        and described.get("version") in (None, header.version_id)
    )


def _describe_all(described: Sequence[Described], headers: Sequence[SectionHeader]) -> bool:
    return len(described) == len(headers) and all(map(describes, described, headers))
