"""The result of the last long sweep, as the table of docs/never-two.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from whimbrel.testing.cutwire import ACTIONS

from .plan import Row

RESULTS: Final = Path(__file__).with_name("results.json")
PAGE: Final = Path(__file__).parents[2] / "docs" / "never-two.md"
BEGIN, END = "<!-- sweep -->", "<!-- sweep ends -->"

OUTCOMES: Final = {
    "source (owner, refused)": "source",
    "source (owner, prepared)": "source; the destination holds it",
    "nobody (released, prepared)": "nobody",
    "destination (released, owner)": "destination; the source does not know",
    "destination (done, owner)": "destination",
}
"""What may come out, and how the table calls it."""


def kept() -> dict[str, Any]:
    """The last result."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def write() -> None:
    """Put the tables of the last result into the page."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(kept())}\n{END}{after}")


def tables(result: Mapping[str, Any]) -> str:
    """All tables of the page."""
    parts = [table(result)]
    if "qemu" in result:
        parts.append(qemu_table(result["qemu"]))
    return "\n\n".join(parts)


def table(result: Mapping[str, Any]) -> str:
    """What came out how often, in each mode; and where."""
    modes = {name: [Row(*row) for row in mode["rows"]] for name, mode in result["modes"].items()}
    counts = {name: _counts(found) for name, found in modes.items()}
    names = [*OUTCOMES, *sorted({name for each in counts.values() for name in each}.difference(OUTCOMES))]
    head = ["who runs behind the cut", *(f"`{name}`" for name in modes)]
    body = [[OUTCOMES.get(name, name), *(f"{each[name]:,}" for each in counts.values())] for name in names]
    told = [sum(row.told for row in found) for found in modes.values()]
    total = sum(sum(each.values()) for each in counts.values())
    both = sum(count for each in counts.values() for name, count in each.items() if name not in OUTCOMES)
    seconds = sum(mode["processor_seconds"] for mode in result["modes"].values())
    return "\n".join(
        [
            f"**{total:,} cuts: {both} double runs, time travels, lost machines or leaks.**",
            f"{seconds / 60:.0f} minutes of one processor, {1000 * seconds / max(1, total):.1f} ms a cut.",
            "",
            *_lines(head, [*body, ["all", *(f"{sum(each.values()):,}" for each in counts.values())],
                           ["somebody had to be told to stop waiting", *(f"{each:,}" for each in told)]]),
            "",
            *(line for name in modes for line in _where(name, result["modes"][name], modes[name])),
        ]
    )  # fmt: skip


def _counts(found: Sequence[Row]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row in found:
        counts[row.outcome] += row.count
    return counts


def _where(name: str, mode: Mapping[str, Any], found: Sequence[Row]) -> Iterator[str]:
    """Where on the main channel the outcome changes, action by action."""
    main = mode["connections"][0]
    at = f" At commit {mode['commit']}." if "commit" in mode else ""
    yield f"`{name}`: {mode['summary']}.{at}"
    if main["number"] == 0:
        yield f"{main['forth']:,} bytes go forth on the main channel; the guest stands still from byte"
        yield f"{main['window']:,} on."
    else:
        yield f"{main['forth']:,} bytes go forth on the second connection."
    if "planned" in mode and mode["cuts"] < mode["planned"]:
        yield f"Made so far: {mode['cuts']:,} of {mode['planned']:,} cuts, spread evenly; rows pass over the others."
    yield ""
    rows = [row for row in found if row.connection == main["number"]]
    body = []
    for way in ("forth", "back"):
        for action in ACTIONS:
            mine = [row for row in rows if (row.way, row.action) == (way, str(action))]
            if mine:
                spans = [f"{_span(row)} {OUTCOMES.get(row.outcome, row.outcome)}" for row in mine]
                body.append([way, str(action), "<br>".join(spans), f"{sum(row.count for row in mine):,}"])
    yield from _lines(["way", "action", "bytes passed on, and who runs then", "cuts"], body)
    yield ""


def _span(row: Row) -> str:
    return f"{row.first:,}:" if row.first == row.last else f"{row.first:,} to {row.last:,}:"


def qemu_table(found: Mapping[str, Any]) -> str:
    """What real QEMUs do under such cuts."""
    head = ["link", "cuts", "the source runs it", "the destination", "nobody", "**both**"]
    body = [
        [one["pair"], str(sum(one["counts"].values())), *(str(one["counts"].get(each, 0)) for each in _FATES)]
        for one in found["pairs"]
    ]
    both = [
        f"* {one['pair']}, both: {', '.join(f'`{cut}`' for cut in one['where']['both'])}"
        for one in found["pairs"]
        if "both" in one["where"]
    ]
    return "\n".join([f"### Beside it, {found['version']}", "", *_lines(head, body), "", *both])


_FATES: Final = ("source", "destination", "nobody", "both")


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]
