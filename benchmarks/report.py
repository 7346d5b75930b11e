"""Writes what was measured into docs/performance.md: `python -m benchmarks.report [--check]`, or `make plots`.

What stands between ``<!-- figures: NAME -->`` and ``<!-- end -->`` is made here from the kept results: NAME is a part,
or one of `machine`, `verdict` and `better`. All figures of the page are inside of such marks. With --check nothing is
written, and the status is 1 if the page is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.keeping import KEPT, Measured, read
from benchmarks.measuring import Figure
from benchmarks.parts import PARTS
from benchmarks.plots import IMAGES, PLOTS
from benchmarks.processes import ROOT
from benchmarks.tables import HEAD, cells, number

PAGE: Final = ROOT / "docs" / "performance.md"
BLOCK: Final = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOTHING: Final = "*Not measured yet.*"

Kept = Mapping[str, Measured]


def main(arguments: Sequence[str], page: Path = PAGE, results: Path = KEPT) -> int:
    """Write the page anew, or with --check compare it."""
    before = page.read_text(encoding="utf-8")
    after = rewritten(before, read(results))
    if "--check" in arguments:
        if after != before:
            print(f"{page.name} is stale: run `make plots`", file=sys.stderr)
        return int(after != before)
    page.write_text(after, encoding="utf-8")
    return 0


def rewritten(text: str, kept: Kept) -> str:
    """A page with its blocks made from what is kept. Raises SystemExit for a block of a name that nothing has."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name in BLOCKS:
            made = BLOCKS[name](kept)
        elif name in PARTS:
            made = part(name, kept)
        else:
            raise SystemExit(f"there is no part {name!r} to show; there are {', '.join([*BLOCKS, *PARTS])}")
        return f"{match[1]}{made}\n{match[3]}"

    return BLOCK.sub(block, text)


def part(name: str, kept: Kept) -> str:
    """The plot and the table of one part, and how they were made."""
    if name not in kept:
        return NOTHING
    measured = kept[name]
    lines = [f"{measured.about} {how(measured)}", ""]
    plot = next((plot for plot, drawn in PLOTS.items() if drawn.parts[0] == name), None)
    if plot is not None:
        lines += [f"![{PLOTS[plot].about}]({IMAGES.name}/{plot}.svg)", ""]
    return "\n".join([*lines, *table(measured.figures)])


def table(figures: Sequence[Figure]) -> list[str]:
    """Figures as the lines of a Markdown table."""
    rows = [HEAD, tuple("---" for _ in HEAD), *map(cells, figures)]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def how(measured: Measured) -> str:
    """When and by what command a part was measured."""
    return f"(`{measured.command}`, {measured.date[:10]})"


def machine(kept: Kept) -> str:
    """Where it was measured, each machine once."""
    if not kept:
        return NOTHING
    lines = []
    for facts in _each_once([dict(measured.machine) for measured in kept.values()]):
        parts = [name for name, measured in kept.items() if dict(measured.machine) == facts]
        virtual = ", a virtual machine" if facts["hypervisor"] else ""
        lines.append(
            f"* {', '.join(f'`{name}`' for name in parts)}: {facts['cores']} cores of {facts['cpu']}, "
            f"{facts['memory-gib']} GiB{virtual}; Linux {facts['kernel']}, huge pages: {facts['huge-pages']}; "
            f"Python {facts['python']}, numpy {facts['numpy']}; whimbrel {facts['whimbrel']} beside "
            f"{facts['qemu'] or 'no QEMU'}"
        )
    return "\n".join(lines)


def verdict(kept: Kept) -> str:
    """Every promise, and whether it was kept."""
    promised = [figure for figure in _all(kept) if figure.target is not None]
    if not promised:
        return NOTHING
    met = sum(figure.met is True for figure in promised)
    return "\n".join([f"{met} of {len(promised)} promises were kept in these runs.", "", *table(promised)])


def better(kept: Kept) -> str:
    """Where QEMU did better, from the worst ratio on."""
    if not kept:
        return NOTHING
    found = sorted(
        (how_much, figure.name, figure)
        for figure in _all(kept)
        if figure.beside == "QEMU" and figure.ratio and figure.more_is_better is not None
        for how_much in [figure.ratio if figure.more_is_better else 1 / figure.ratio]
        if how_much < 1
    )
    stuck = [
        f"* {figure.name}: whimbrel did not converge in {figure.ours_stuck} runs, QEMU in {figure.theirs_stuck}"
        for figure in _all(kept)
        if figure.beside == "QEMU" and figure.ours_stuck > figure.theirs_stuck
    ]
    lines = [
        f"* {name}: whimbrel {number(figure.our_median or 0)}, QEMU {number(figure.their_median or 0)} {figure.unit} "
        f"({number(figure.ratio or 0)} x)"
        for _, name, figure in found
    ]
    return "\n".join(lines + stuck) or "In none of the figures on this page."


def _all(kept: Kept) -> list[Figure]:
    return [figure for name in PARTS if name in kept for figure in kept[name].figures]


def _each_once(values: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    return [value for at, value in enumerate(values) if value not in values[:at]]


BLOCKS: Final[Mapping[str, Callable[[Kept], str]]] = {"machine": machine, "verdict": verdict, "better": better}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
