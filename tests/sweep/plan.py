"""Which cuts are made, and what is kept of what came out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import attrs

from whimbrel.testing.cutwire import ACTIONS, Action, Cut, Way

from .world import GOOD, Measured, Outcome

SPARSELY: Final = 16
"""A link that dribbles from a byte on costs the more the earlier that is: away from pieces only every so many."""


def everywhere(measured: Measured, *, all_of_it: bool) -> list[Cut]:
    """Every byte from where the guest stands still to the end, on every connection, both ways; and each piece ±1.

    With `all_of_it`, every byte of the rounds as well.
    """
    cuts = []
    for (connection, way), size in measured.sizes.items():
        window = measured.window.get(connection, 0) if way is Way.FORTH else 0
        near = {at + by for at in measured.marks[connection, way] for by in (-1, 0, 1) if 0 <= at + by <= size}
        inside = range(0 if all_of_it else window, size + 1)
        for action in ACTIONS:
            sparse = action is Action.DRIBBLE
            chosen = near.union(at for at in inside if not sparse or (at >= window and at % SPARSELY == 0))
            cuts += [Cut(way, at, action, connection) for at in sorted(chosen)]
    return cuts


def thinned(cuts: Sequence[Cut], measured: Measured, count: int) -> list[Cut]:
    """About `count` of them: all of the way back, and of others by turns; the same ones each time."""
    must = [cut for cut in cuts if cut.way is Way.BACK]
    marks = {key: set(marks) for key, marks in measured.marks.items()}
    must += [
        cut for cut in cuts
        if cut.way is Way.FORTH and cut.at in marks[cut.connection, cut.way]
        and cut.at >= measured.window.get(cut.connection, 0)
    ]  # fmt: skip
    rest = sorted(set(cuts).difference(must), key=lambda cut: (cut.connection, cut.action, cut.at))
    step = max(1.0, len(rest) / max(1, count - len(must)))
    return must + [rest[int(number * step)] for number in range(int(len(rest) / step))]


@attrs.frozen
class Row:
    """Cuts in a row with one and the same outcome; `count` may be less than there are bytes."""

    connection: int
    way: str
    action: str
    first: int
    last: int
    outcome: str
    told: int
    count: int


def name_of(outcome: Outcome) -> str:
    """In a few words, what became of it; begins with the verdict."""
    if outcome.verdict not in GOOD:
        return f"{outcome.verdict.upper()}: {'; '.join(outcome.why)}"
    return f"{outcome.verdict} ({outcome.mine}, {outcome.theirs})"


def rows(found: Iterable[tuple[Cut, str, bool]]) -> Iterator[Row]:
    """The rows of what was found: each cut, its outcome and whether somebody had to be told to stop waiting."""
    row: Row | None = None
    for cut, outcome, told in found:
        here = (cut.connection, str(cut.way), str(cut.action), outcome)
        if row is not None and here == (row.connection, row.way, row.action, row.outcome) and cut.at > row.last:
            row = attrs.evolve(row, last=cut.at, told=row.told + told, count=row.count + 1)
            continue
        if row is not None:
            yield row
        row = Row(*here[:3], cut.at, cut.at, outcome, int(told), 1)
    if row is not None:
        yield row


def joined(pieces: Iterable[Row], main_one: int = 0) -> list[Row]:
    """The same, with rows of different chunks that go on from one another as one.

    Which lane takes what is up to the lanes, so of those beside `main_one` there is a row for each outcome, from its first to its last.
    """
    done: list[Row] = []
    lanes: dict[tuple[int, str, str, str], Row] = {}
    main = []
    for row in pieces:
        if row.connection == main_one:
            main.append(row)
            continue
        key = row.connection, row.way, row.action, row.outcome
        old = lanes.get(key, attrs.evolve(row, told=0, count=0))
        first, last = min(old.first, row.first), max(old.last, row.last)
        lanes[key] = attrs.evolve(row, first=first, last=last, told=old.told + row.told, count=old.count + row.count)
    for row in sorted(main, key=lambda row: (row.connection, row.way, ACTIONS.index(Action(row.action)), row.first)):
        if done and _goes_on(done[-1], row):
            done[-1] = attrs.evolve(
                done[-1], last=row.last, told=done[-1].told + row.told, count=done[-1].count + row.count
            )
        else:
            done.append(row)
    return [*done, *(lanes[key] for key in sorted(lanes))]


def _goes_on(one: Row, other: Row) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("connection", "way", "action", "outcome"))
