"""Which section may come when: the order of a stream as a table (wire format, section 1.7).

A handler's section lives through START, PARTs and END; a FULL stands alone. Ids are the sender's, learned from START
and FULL and never assumed. Order and duplicates are this table's business and nobody else's.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import attrs

from whimbrel.abc import SectionKind
from whimbrel.errors import StreamError
from whimbrel.wire.skeleton import SectionHeader


class SectionState(Enum):
    """How far the section of one id has come."""

    UNKNOWN = "unknown"
    STARTED = "started"
    ENDED = "ended"
    FULL = "full"


MOVES: Final = {
    (SectionState.UNKNOWN, SectionKind.START): SectionState.STARTED,
    (SectionState.UNKNOWN, SectionKind.FULL): SectionState.FULL,
    (SectionState.STARTED, SectionKind.PART): SectionState.STARTED,
    (SectionState.STARTED, SectionKind.END): SectionState.ENDED,
}


@attrs.define
class SectionOrder:
    """Follows the sections of one stream and refuses what is out of order. `limit` bounds the ids it learns."""

    limit: int
    _headers: dict[int, SectionHeader] = attrs.field(factory=dict, init=False)
    _states: dict[int, SectionState] = attrs.field(factory=dict, init=False)

    def accept(self, kind: SectionKind, header: SectionHeader | int) -> SectionHeader:
        """Note a section head and return the full one. Raises StreamError if it may not come now."""
        section_id = header if isinstance(header, int) else header.section_id
        state = self._states.get(section_id, SectionState.UNKNOWN)
        following = MOVES.get((state, kind))
        if following is None:
            known = self._headers.get(section_id)
            name = f"{known.idstr!r} (id {section_id})" if known else f"id {section_id}"
            raise StreamError(f"{kind.name} of section {name} may not come now: that section is {state.value}")
        if isinstance(header, SectionHeader):
            if len(self._headers) >= self.limit:
                raise StreamError(f"more than {self.limit} sections", hint="[limits] sections says how many may come")
            self._headers[section_id] = header
        self._states[section_id] = following
        return self._headers[section_id]

    def ids(self) -> list[int]:
        """Ids of all sections so far."""
        return list(self._states)

    def started(self) -> list[int]:
        """Ids of the sections that have a START and no END yet."""
        return [section_id for section_id, state in self._states.items() if state is SectionState.STARTED]

    def open_sections(self) -> list[str]:
        """Names of the sections that have a START and no END yet."""
        return [self._headers[i].idstr for i, state in self._states.items() if state is SectionState.STARTED]
