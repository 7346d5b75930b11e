"""A stream's tail, from the first device section on, split into its sections (wire format, sections 1.3, 7.2 and 7.3).

No length stands before a device's bytes. Three things tell where they end, from the best to the worst: a description
says how long each field is; a footer stands behind each section; the next section's header can be told by its looks.
A tail that is cut or damaged is split as far as it is whole.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Final

import attrs

from whimbrel.errors import Place, StreamError
from whimbrel.wire.described import (
    NESTING_MAX,
    Described,
    fields_of,
    instance_of,
    length_of,
    name_of,
    size_of,
    subsection_head,
    subsections_of,
    version_of,
    vmsd_name_of,
)
from whimbrel.wire.description import Description, find
from whimbrel.wire.footers import BODY_MAX, FOOTER_SIZE, SECTIONS_MAX, FooterWalk, SectionSpan, next_footer
from whimbrel.wire.primitives import U32, str8
from whimbrel.wire.skeleton import Element, SectionHeader, section_footer
from whimbrel.wire.standing import Standing, Verdict, standing

__all__ = [
    "BODY_MAX",
    "SECTIONS_MAX",
    "DeviceSection",
    "FooterWalk",
    "SectionSpan",
    "Split",
    "Standing",
    "section_at",
    "split_by_description",
    "split_by_footers",
    "split_by_headers",
]


@attrs.frozen
class DeviceSection:
    """One device section: `body` without header and footer, `offset` that of its type byte in the tail.

    `described` is its entry in the description, None where the section was found without one.
    """

    header: SectionHeader
    body: bytes = attrs.field(repr=False)
    offset: int
    described: Described | None = attrs.field(default=None, repr=False)


@attrs.frozen
class Split:
    """The whole sections of a tail, and what became of the rest.

    `end` is the offset behind the last whole section: of the EOF, a command or another element there, of what `error`
    says is no such thing, or where the tail ends. `guessed` says that a section's bytes may have passed for a header.
    """

    sections: tuple[DeviceSection, ...]
    end: int
    error: StreamError | None = None
    guessed: bool = False


def section_at(tail: bytes | bytearray | memoryview, span: SectionSpan) -> DeviceSection:
    """The section that a :class:`FooterWalk` has found; its body is a copy."""
    return DeviceSection(span.header, bytes(tail[span.body : span.end]), span.offset)


def _flat(tail: bytes | bytearray | memoryview) -> bytes | bytearray:
    return tail if isinstance(tail, (bytes, bytearray)) else bytes(tail)


def _place(header: SectionHeader) -> Place:
    return Place(section=f"{header.idstr!r} (id {header.section_id})")


# ------------------------------------------------------------------------------------------------ by description


def split_by_description(
    tail: bytes | bytearray | memoryview,
    description: Description,
    *,
    footers: bool,
    start: int = 0,
    first: int = 0,
    seen: Iterable[int] = (),
    started: Iterable[int] = (),
    body_limit: int = BODY_MAX,
) -> Split:
    """Split the sections that begin at `start`, the first of which is device `first` of `description`.

    Sections and devices are matched by their order, and checked by name, instance and version; the pair of name and
    instance may come twice. Where the sizes do not add up, as those of arrays of null pointers do not, the section
    ends where the next device's header (behind the footer, if there are `footers`) stands. An element that is no
    FULL ends the split without error, but for an EOF before the last device, as does the end of the tail behind the
    last device. `seen` are section ids that were taken before, `started` those that may have a PART or an END;
    `body_limit` is how many bytes one section may have. Never raises for what the peer sent.
    """
    splitter = _Splitter(_flat(tail), footers, set(seen) | set(started), frozenset(started), body_limit, start)
    error = None
    try:
        splitter.split(description.devices[first:])
    except StreamError as exc:
        error = exc
    return Split(tuple(splitter.sections), splitter.at, error)


@attrs.define
class _Splitter:
    tail: bytes | bytearray
    footers: bool
    seen: set[int]
    started: frozenset[int]
    body_limit: int
    at: int
    sections: list[DeviceSection] = attrs.field(factory=list)

    def split(self, devices: tuple[Described, ...]) -> None:
        for described, following in zip(devices, (*devices[1:], None), strict=False):
            found = self._section(described)
            if found is None:
                return
            assert found.header is not None
            self.seen.add(found.header.section_id)
            try:
                end = self._body_end(found, found.header, described, following)
            except StreamError as exc:
                raise exc.at(_place(found.header)) from None
            self.sections.append(
                DeviceSection(found.header, bytes(self.tail[found.end : end]), found.offset, described)
            )
            self.at = end + (FOOTER_SIZE if self.footers else 0)
        self._check_end()

    def _section(self, described: Described) -> Standing | None:
        """The section at `at`, which must be the device's; None if another element stands there."""
        name = name_of(described, "a device")
        wanted = f"the section of {name!r}"
        verdict, found = self._standing(self.at)
        if verdict is Verdict.MAYBE and self.tail[self.at : self.at + 1] != b"\0":
            raise StreamError(f"the tail ends at byte {len(self.tail)}, and {wanted} was to begin at byte {self.at}")
        if found is None or found.element is Element.EOF:
            raise StreamError(f"{wanted} was to begin at byte {self.at} of the tail, not {self._byte(self.at)}")
        if found.element is not Element.SECTION_FULL:
            return None
        if not _is(found, described):
            raise StreamError(
                f"byte {self.at} of the tail begins section {found.header}, and the description says {name!r}, "
                f"instance {instance_of(described, name)}, version {version_of(described, name)}"
            )
        return found

    def _body_end(
        self, found: Standing, header: SectionHeader, described: Described, following: Described | None
    ) -> int:
        failure = None
        end = len(self.tail)
        try:
            end = self._measured(found.end, described, header.idstr)
            if end - found.end <= self.body_limit and self._may_end(end, header, following):
                return end
        except StreamError as exc:
            failure = exc
        cut = failure is None and end + (FOOTER_SIZE if self.footers else 0) > len(self.tail)
        by_looks = self._footer if self.footers else self._next_header
        searched = by_looks(found.end, header, following, cut)
        if searched is not None:
            return searched
        if failure:
            raise failure
        if cut:
            raise StreamError(
                f"the tail ends at byte {len(self.tail)}, {len(self.tail) - found.end} bytes into this section, of "
                f"which {end - found.end} bytes{' and a footer' if self.footers else ''} were expected"
            )
        raise StreamError(
            f"this section is described as {end - found.end} bytes long, up to byte {end} of the tail, but what must "
            f"stand there does not, and nowhere behind: {self._byte(end)} does"
        )

    def _measured(self, at: int, described: Described, path: str, depth: int = 0) -> int:
        """Where the fields and subsections at `at` end by their sizes; that may be behind the tail."""
        if depth > NESTING_MAX:
            raise StreamError(f"{path} is nested more than {NESTING_MAX} deep")
        for field in fields_of(described, path):
            length = length_of(field, path)
            at += size_of(field, path) * (1 if length is None else length)
        for part in subsections_of(described, path):
            head = subsection_head(part, path)
            came = self.tail[at : at + len(head)]
            if not head.startswith(came):
                raise StreamError(f"subsection {vmsd_name_of(part, path)!r} was to begin at byte {at} of the tail")
            at = self._measured(at + len(head), part, f"{vmsd_name_of(part, path)}", depth + 1)
        return at

    def _may_end(self, end: int, header: SectionHeader, following: Described | None) -> bool:
        """Whether the section can end at `end`: at its footer, or without footers at what comes next."""
        if self.footers:
            return self.tail[end : end + FOOTER_SIZE] == section_footer(header.section_id)
        if end > len(self.tail):
            return False
        verdict, found = self._standing(end)
        if found and following is not None:
            return found.element is not Element.EOF and (found.header is None or _is(found, following))
        return verdict is not Verdict.NO

    def _footer(self, begin: int, header: SectionHeader, following: Described | None, cut: bool) -> int | None:
        """Where the section's footer stands, with the next device's section or the end of all behind it."""
        mark = section_footer(header.section_id)
        most = begin + self.body_limit + FOOTER_SIZE
        footer = next_footer(self.tail, mark, begin, most)
        while footer >= 0:
            verdict, found = self._standing(footer + FOOTER_SIZE)
            if found and (verdict is Verdict.YES or not cut) and self._follows(found, following):
                return footer
            footer = next_footer(self.tail, mark, footer + 1, most)
        return None

    def _next_header(self, begin: int, _: SectionHeader, following: Described | None, cut: bool) -> int | None:
        """Where the next device's header stands, or the end of all with the description behind it."""
        if following is None:
            ending = None if cut else find(self.tail, begin)
            return ending.eof_offset if ending and ending.eof_offset - begin <= self.body_limit else None
        words = str8(name_of(following, "a device")) + U32.pack(instance_of(following, "a device"))
        most = begin + self.body_limit + 5 + len(words)
        name = self.tail.find(words, begin + 5, most)
        while name >= 0:
            verdict, found = self._standing(name - 5)
            if verdict is Verdict.YES and found and self._follows(found, following):
                return name - 5
            name = self.tail.find(words, name + 1, most)
        return None

    @staticmethod
    def _follows(found: Standing, following: Described | None) -> bool:
        if following is None:
            return found.element is not Element.SECTION_FULL
        return found.element is Element.SECTION_FULL and _is(found, following)

    def _check_end(self) -> None:
        """Behind the last device anything may stand but another one."""
        verdict, found = self._standing(self.at)
        if found and found.element is Element.SECTION_FULL:
            raise StreamError(f"section {found.header} at byte {self.at} of the tail is not in the description")
        if verdict is Verdict.NO:
            raise StreamError(
                f"behind the last device, at byte {self.at} of the tail, the end of the stream (0x00) was expected, "
                f"not {self._byte(self.at)}"
            )

    def _standing(self, at: int) -> tuple[Verdict, Standing | None]:
        return standing(self.tail, at, seen=self.seen, started=self.started)

    def _byte(self, at: int) -> str:
        return f"{self.tail[at]:#04x}" if at < len(self.tail) else "its end"


def _is(found: Standing, described: Described) -> bool:
    """Whether a section's header is that of a described device; old-style devices have no version there."""
    header = found.header
    if header is None:
        return False
    version = version_of(described, header.idstr)
    return (
        header.idstr == name_of(described, "a device")
        and header.instance_id == instance_of(described, header.idstr)
        and version in (None, header.version_id)
    )


# ---------------------------------------------------------------------------------------------------- by footers


def split_by_footers(
    tail: bytes | bytearray | memoryview,
    *,
    start: int = 0,
    seen: Iterable[int] = (),
    started: Iterable[int] = (),
    body_limit: int = BODY_MAX,
) -> Split:
    """Split the sections that begin at `start` by their footers alone; the parameters are those of `FooterWalk`.

    An element that is no FULL ends the split without error, as does the end of the tail behind a footer. Never raises
    for what the peer sent.
    """
    tail = _flat(tail)
    walk = FooterWalk(start, seen=seen, started=started, body_limit=body_limit)
    error = None
    try:
        behind = walk.feed(tail)
        if behind is None and walk.end < len(tail):
            inside = walk.inside
            expected = "before this section's footer and what may stand behind it" if inside else "within a header"
            place = _place(inside) if inside else None
            error = StreamError(f"the tail ends at byte {len(tail)}, {expected}", place=place)
    except StreamError as exc:
        error = exc
    return Split(tuple(section_at(tail, span) for span in walk.spans), walk.end, error)


# ---------------------------------------------------------------------------------------------------- by headers

# The type byte, an id that a counter of sections can reach, a length, and the first two characters of a name.
_LIKE_A_HEADER: Final = re.compile(rb"\x04\x00\x00[\x00-\x0f].[\x02-\xff][\x21-\x7e]{2}", re.DOTALL)
_INSTANCE_MAX: Final = 0xFFFF


def split_by_headers(
    tail: bytes | bytearray | memoryview, *, start: int = 0, seen: Iterable[int] = (), body_limit: int = BODY_MAX
) -> Split:
    """Guess where the sections of a tail without footers and description end (machine types up to 2.2).

    A section is taken to end where something stands that looks like the next one's header: an id that is new and
    below 4096, a name, and an instance below 65536. (Ids mostly rise, but devices that are saved before their turn
    have higher ones.) No section has more than `body_limit` bytes. The tail must be whole: its last byte is the EOF.
    """
    tail = _flat(tail)
    taken = set(seen)
    sections: list[DeviceSection] = []
    _, found = standing(tail, start, seen=taken)
    if found is None or found.header is None or found.element is not Element.SECTION_FULL:
        error = None if found else StreamError(f"no section begins at byte {start} of the tail")
        return Split((), start, error, guessed=True)
    while True:
        assert found.header is not None
        taken.add(found.header.section_id)
        following = _like_a_header(tail, found.end, taken)
        end = following.offset if following else len(tail) - 1
        error = None
        if following is None and (end < found.end or tail[end] != Element.EOF):
            error = StreamError(f"the tail ends at byte {len(tail)}, and not with the end of a stream (0x00)")
        elif end - found.end > body_limit:
            error = StreamError(f"no other section begins within {body_limit} bytes")
        if error:
            return Split(tuple(sections), found.offset, error.at(_place(found.header)), guessed=True)
        sections.append(DeviceSection(found.header, bytes(tail[found.end : end]), found.offset))
        if following is None:
            return Split(tuple(sections), end, guessed=True)
        found = following


def _like_a_header(tail: bytes | bytearray, begin: int, taken: Container[int]) -> Standing | None:
    while like := _LIKE_A_HEADER.search(tail, begin):
        _, found = standing(tail, like.start(), seen=taken)
        header = found.header if found else None
        if header and header.instance_id <= _INSTANCE_MAX:
            return found
        begin = like.start() + 1
    return None
