"""The end of a stream as it comes: device sections, a description, and what else may stand there.

No length stands before a device's bytes, so all are kept until the description tells their sizes, or footers do, or
the stream has ended (`whimbrel.wire.tail`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import attrs

from whimbrel.errors import ChannelLost, MigrationError, Place, StreamError
from whimbrel.wire import commands
from whimbrel.wire.commands import Ping
from whimbrel.wire.description import Description, DescriptionFinder
from whimbrel.wire.skeleton import Element
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

TAIL_MAX: Final = 64 << 20  # bytes of device sections, beside the description's
_PING: Final = 9  # bytes


@attrs.frozen(eq=False)
class Tail:
    """The end of a stream: its device sections, and its description if it has one.

    `guessed` says that the sections were told apart without description and footers. `behind` counts bytes that came
    after the end. `error` says where the stream was cut or makes no sense; `sections` are those before it then.
    """

    sections: tuple[DeviceSection, ...]
    description: Description | None = None
    guessed: bool = False
    behind: int = 0
    error: MigrationError | None = None


class TailCollector:
    """Keeps the bytes from a FULL on, whose type byte is at `base` of the stream.

    `first` sections came before; `seen` and `started` are the section ids that were taken, and may go on. One thread.
    """

    def __init__(
        self, base: int, *, footers: bool, seen: Iterable[int], started: Iterable[int], first: int, limit: int
    ) -> None:
        self.data = bytearray()
        self.base = base
        self._footers, self._first, self._limit = footers, first, limit
        self._seen, self._started = frozenset(seen), frozenset(started)
        self._finder = DescriptionFinder(limit=limit)
        self._walk = FooterWalk(seen=self._seen, started=self._started) if footers else None

    def behind(self) -> Standing | None:
        """What stands behind the last whole section, as far as footers show it; None while nothing has come."""
        if self._walk is None:
            return None
        try:
            return self._walk.feed(self.data)
        except StreamError:
            self._walk = None  # a device's bytes passed for an end; the description will tell
            return None

    def ping(self, element: Standing) -> Ping | None:
        """The PING that `element` is, if it is the last that has come: its sender waits for an answer."""
        if element.end != len(self.data):
            return None
        return _ping(self.data[element.offset :])

    def pass_over(self, element: Standing) -> None:
        """Go on behind `element`, a command."""
        if self._walk is not None:
            self._walk.pass_over(element.end)

    def devices(self) -> tuple[DeviceSection, ...]:
        """The sections that footers have shown so far."""
        return tuple(section_at(self.data, span) for span in self._walk.spans) if self._walk is not None else ()

    def check_length(self) -> None:
        """Raise StreamError for more bytes than all devices of a machine have."""
        if len(self.data) > TAIL_MAX + self._limit:
            raise StreamError(
                f"the device sections are longer than {TAIL_MAX} bytes, and no end is in sight",
                place=Place(section="devices", offset=self.base),
            )

    def described(self, *, at_end: bool = False) -> Tail | None:
        """The tail, if its description is there; with `at_end` no more bytes come."""
        found = self._finder.feed(self.data, at_end=at_end)
        if found is None:
            return None
        split = split_by_description(
            self.data,
            found.description,
            footers=self._footers,
            first=self._first,
            seen=self._seen,
            started=self._started,
        )
        if split.error is not None and self._footers:
            footers = split_by_footers(self.data, seen=self._seen, started=self._started)
            split = footers if footers.error is None else split
        if split.error is None and not _only_pings(self.data[split.end : found.eof_offset]):
            left = found.eof_offset - split.end
            error = StreamError(f"{left} bytes stand between the last device that is known and the end of the stream")
            split = attrs.evolve(split, error=error)
        return attrs.evolve(self._tail(split, found.description), behind=len(self.data) - found.end)

    def ended(self) -> Tail:
        """The tail of a stream that has ended here, or says no more."""
        if (tail := self.described(at_end=True)) is not None:
            return tail
        if self._footers:
            split = split_by_footers(self.data, seen=self._seen, started=self._started)
        else:
            split = split_by_headers(self.data, seen=self._seen)
        end = split.end
        while _ping(self.data[end : end + _PING]) is not None:
            end += _PING
        behind = len(self.data) - end - 1
        if split.error is None and self.data[end : end + 1] == bytes((Element.EOF,)):
            return attrs.evolve(self._tail(split), behind=behind)
        last = f"device section {split.sections[-1].header.idstr!r}" if split.sections else "its RAM"
        reason = split.error.message if split.error is not None else "the end mark (00) is missing"
        lost = ChannelLost(f"the stream ended early, behind {last}: {reason}", hint="its sender says why")
        place = split.error.place if split.error is not None else Place()
        return attrs.evolve(self._tail(split), error=lost.at(place).at(self._place(split)))

    def _tail(self, split: Split, description: Description | None = None) -> Tail:
        error = split.error.at(self._place(split)) if split.error is not None else None
        return Tail(split.sections, description, split.guessed, error=error)

    def _place(self, split: Split) -> Place:
        return Place(section="devices", offset=self.base + split.end)


def _ping(data: bytearray) -> Ping | None:
    head = commands.encode(Ping(0))[:-4]
    return Ping(int.from_bytes(data[-4:], "big")) if len(data) == _PING and data.startswith(head) else None


def _only_pings(data: bytearray) -> bool:
    return all(_ping(data[at : at + _PING]) is not None for at in range(0, len(data), _PING))
