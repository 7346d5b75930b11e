"""The end of each device section by its footer, in a tail that grows (wire format, section 1.3).

A section ends at the first footer of its own that has something behind it that may stand there. Bytes of a device
may look like a footer, hardly ever like one with a header or a command behind it; and what can be told only by bytes
that have not come stays open.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import attrs

from whimbrel.errors import Place, StreamError
from whimbrel.wire.skeleton import TOP_LEVEL, Element, SectionHeader, section_footer
from whimbrel.wire.standing import Standing, Verdict, standing

BODY_MAX: Final = 16 << 20
SECTIONS_MAX: Final = 4096

FOOTER_SIZE: Final = 5

_FIRST_BYTES: Final = frozenset({*TOP_LEVEL})  # of what may stand behind a footer
_LAST_WORDS: Final = frozenset({Element.EOF, Element.COMMAND})  # behind which a source may wait for an answer


@attrs.frozen
class SectionSpan:
    """Where a device section lies in its tail: its header's type byte, its body's first byte, the one behind it."""

    header: SectionHeader
    offset: int
    body: int
    end: int


class FooterWalk:
    """Follows the device sections of a tail with footers, as it comes, from the first FULL's type byte at `at`.

    `seen` are the section ids that were taken before, `started` those that may still have a PART or an END;
    `body_limit` is how many bytes one section may have. After each `feed`, `spans` are the whole sections, and `end` is
    the offset behind the last of them. It stops at anything but a FULL, and goes on behind that when told to
    (`pass_over`). Keeps no view of the tail, and looks at a byte about once. Raises StreamError for what can be no
    section, and the same ever after.
    """

    def __init__(
        self, at: int = 0, *, seen: Iterable[int] = (), started: Iterable[int] = (), body_limit: int = BODY_MAX
    ) -> None:
        self.at = at
        self._body_limit = body_limit
        self._started = frozenset(started)
        self._seen = {*seen, *self._started}
        self._whole: list[SectionSpan] = []
        self._likely: SectionSpan | None = None
        self._open: Standing | None = None
        self._scan = at  # the open section's footer does not begin before here
        self._failure: StreamError | None = None

    @property
    def spans(self) -> tuple[SectionSpan, ...]:
        """The whole sections so far, in order."""
        return (*self._whole, self._likely) if self._likely else tuple(self._whole)

    @property
    def end(self) -> int:
        """The offset behind the last whole section and its footer."""
        return self._likely.end + FOOTER_SIZE if self._likely else self.at

    @property
    def certain(self) -> bool:
        """Whether more bytes cannot change that the last section ends there; before its follower has come, they can."""
        return self._likely is None

    @property
    def inside(self) -> SectionHeader | None:
        """The section whose end has not been seen; None between sections."""
        return self._open.header if self._open and not self._likely else None

    def feed(self, tail: bytes | bytearray) -> Standing | None:
        """The element behind the last whole section, as far as `tail` goes; None if it has not come.

        `tail` is that of the last call, with more bytes behind it. A command comes with its whole payload.
        """
        if self._failure:
            raise self._failure
        self._likely = None
        try:
            while self._open is None or self._leave(tail, self._open):
                found = self._between(tail)
                if found is None or found.element is not Element.SECTION_FULL:
                    return found
                self._enter(found)
            return self._likely_end(tail, self._open)
        except StreamError as exc:
            self._failure = exc
            raise

    def pass_over(self, end: int) -> None:
        """Go on at `end`, behind the element that `feed` has shown; if that was likely, it is certain now."""
        if self._likely:
            self._whole.append(self._likely)
        self._likely = self._open = None
        self.at = end

    def _between(self, tail: bytes | bytearray) -> Standing | None:
        """What stands at `at`, where no section is open."""
        verdict, found = standing(tail, self.at, seen=self._seen, started=self._started)
        if verdict is Verdict.NO:
            raise StreamError(
                f"byte {self.at} of the tail is {tail[self.at]:#04x}, and neither a new section nor a command nor the "
                "end of the stream stands there"
            )
        return found

    def _enter(self, found: Standing) -> None:
        if len(self._whole) >= SECTIONS_MAX:
            raise StreamError(f"more than {SECTIONS_MAX} device sections")
        assert found.section_id is not None
        self._seen.add(found.section_id)
        self._open, self._scan = found, found.end

    def _leave(self, tail: bytes | bytearray, section: Standing) -> bool:
        """Whether the open section's footer is there for certain; the section is closed then."""
        mark = _mark(section)
        while (footer := next_footer(tail, mark, self._scan)) >= 0:
            self._check_length(section, footer)
            verdict, _ = standing(tail, footer + FOOTER_SIZE, seen=self._seen, started=self._started)
            if verdict is Verdict.YES:
                self._whole.append(_span(section, footer))
                self._open, self.at = None, footer + FOOTER_SIZE
                return True
            self._scan = footer
            if verdict is not Verdict.NO:
                return False
            self._scan += 1
        self._scan = max(self._scan, len(tail) - (FOOTER_SIZE - 1))
        self._check_length(section, self._scan)
        return False

    def _likely_end(self, tail: bytes | bytearray, section: Standing) -> Standing | None:
        """The end at a footer that is the tail's last but for an EOF or a command: a source may wait for us there."""
        mark = _mark(section)
        footer = next_footer(tail, mark, self._scan)
        while footer >= 0:
            behind = footer + FOOTER_SIZE
            _, found = standing(tail, behind, seen=self._seen, started=self._started)
            if behind == len(tail) or (found and found.element in _LAST_WORDS and found.end == len(tail)):
                self._likely = _span(section, footer)
                return found
            footer = next_footer(tail, mark, footer + 1)
        return None

    def _check_length(self, section: Standing, footer: int) -> None:
        if footer - section.end > self._body_limit:
            assert section.header is not None
            raise StreamError(
                f"no footer within {self._body_limit} bytes, which is more than any device has",
                hint="[limits] device-section says how many it may have",
                place=Place(section=repr(section.header.idstr)),
            )


def next_footer(tail: bytes | bytearray, mark: bytes, begin: int, end: int | None = None) -> int:
    """Where the next `mark` stands with nothing behind it yet, or a byte that may stand there; -1 if nowhere.

    A tail may be all marks, of which hardly any is worth more than a look at one byte.
    """
    size, first_bytes = len(tail), _FIRST_BYTES
    footer = tail.find(mark, begin, end)
    while footer >= 0:
        behind = footer + FOOTER_SIZE
        if behind >= size or tail[behind] in first_bytes:
            return footer
        footer = tail.find(mark, footer + 1, end)
    return -1


def _mark(section: Standing) -> bytes:
    assert section.section_id is not None
    return section_footer(section.section_id)


def _span(section: Standing, footer: int) -> SectionSpan:
    assert section.header is not None
    return SectionSpan(section.header, section.offset, section.end, footer)
