"""Draws what was measured: `python -m benchmarks.plots [FOLDER]`, or `make plots`; SVGs for docs/performance.md.

Bars are medians, points the single runs. The same results make the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from benchmarks.keeping import KEPT, Measured, read
from benchmarks.measuring import Figure
from benchmarks.processes import ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES: Final = ROOT / "docs" / "images"
COLOURS: Final = {"whimbrel": "#1b6ca8", "QEMU": "#e07a1f"}
OTHER: Final = "#8a8a8a"
WIDTH: Final = 8.0  # inches
BAR: Final = 0.38

Kept = Mapping[str, Measured]
Draw = Callable[[Any, Sequence[Figure]], None]


@attrs.frozen
class Plot:
    """A drawing of figures of some parts, shown with the first of them; nothing of it is drawn without that one."""

    about: str
    parts: Sequence[str]
    draw: Draw


def main(arguments: Sequence[str], results: Path = KEPT) -> int:
    """Draw all plots of which there are results."""
    folder = Path(arguments[0]) if arguments else IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    kept = read(results)
    for name, plot in PLOTS.items():
        if plot.parts[0] in kept:
            figures = [figure for part in plot.parts if part in kept for figure in kept[part].figures]
            draw(folder / f"{name}.svg", plot, figures)
            print(folder / f"{name}.svg")
    return 0


def draw(file: Path, plot: Plot, figures: Sequence[Figure]) -> None:
    """Draw one plot into a file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Sheet

    # With text as text the files are small, and readable in a comparison.
    with mpl.rc_context({"svg.hashsalt": "whimbrel", "svg.fonttype": "none", "font.size": 9}):
        sheet = Sheet(layout="constrained")
        plot.draw(sheet, figures)
        sheet.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


# ------------------------------------------------------------------------------------------------------------ bars


def _bars(*quantities: str, log: bool = False) -> Draw:
    """A panel of horizontal bars for each of `quantities`; without any, one for all figures."""

    def drawn(sheet: Any, figures: Sequence[Figure]) -> None:
        groups = [_of(figures, quantity) for quantity in quantities] or [list(figures)]
        groups = [group for group in groups if group]
        heights = [1 + 0.5 * len(group) for group in groups]
        sheet.set_size_inches(WIDTH, sum(heights))
        panels = sheet.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, group in zip(panels, groups, strict=True):
            _draw_bars(panel, group, log=log)

    return drawn


def _draw_bars(panel: Axes, figures: Sequence[Figure], *, log: bool) -> None:
    if log:
        panel.set_xscale("log")
    named: set[str] = set()
    for row, figure in enumerate(figures):
        sides = [("whimbrel", figure.ours, figure.our_median, figure.ours_stuck, -BAR / 2)]
        if figure.theirs or figure.theirs_stuck:
            sides.append((figure.beside, figure.theirs, figure.their_median, figure.theirs_stuck, BAR / 2))
        for name, samples, median, stuck, shift in sides:
            colour = COLOURS.get(name, OTHER)
            label = "" if name in named else name
            named.add(name)
            panel.barh(row + shift, median or 0, BAR, color=colour, label=label)
            panel.plot(samples, [row + shift] * len(samples), "|", color="black", markersize=5, markeredgewidth=0.7)
            if stuck:
                panel.annotate(
                    f" did not converge in {stuck} of {stuck + len(samples)}",
                    (median or 0, row + shift),
                    va="center",
                    fontsize=7,
                    color=colour,
                )
    panel.set_yticks(range(len(figures)), [_wrapped(figure.name) for figure in figures])
    panel.invert_yaxis()
    better = {True: " (more is better)", False: " (less is better)", None: ""}[figures[0].more_is_better]
    panel.set_xlabel(figures[0].unit + better)
    panel.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    panel.grid(axis="x", alpha=0.3)


def _wrapped(name: str) -> str:
    """A name on two lines if it is long, cut behind a comma or a colon."""
    if len(name) < 32:
        return name
    cuts = [at + 1 for at, character in enumerate(name) if character in ",:"]
    at = min(cuts, key=lambda cut: abs(cut - len(name) // 2), default=len(name))
    return f"{name[:at]}\n{name[at:].strip()}".strip()


# ----------------------------------------------------------------------------------------------------------- lines


def _growth(sheet: Any, figures: Sequence[Figure]) -> None:
    """Seconds, and processor seconds a GiB, by the size of RAM."""
    sheet.set_size_inches(WIDTH, 3.2)
    left, right = sheet.subplots(1, 2)
    for panel, quantity, unit in ((left, "seconds", "total time (s)"), (right, "cpu", "processor (s/GiB)")):
        found = sorted(_of(figures, quantity), key=lambda figure: int(figure.where["mib"]))
        sizes = [figure.where["mib"] / 1024 for figure in found]
        _line(panel, sizes, [figure.our_median for figure in found], "whimbrel")
        _line(panel, sizes, [figure.their_median for figure in found], "QEMU")
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel("RAM (GiB)")
        panel.set_ylabel(unit)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)


def _densities(sheet: Any, figures: Sequence[Figure]) -> None:
    """GB/s by how many words of a page have changed."""
    sheet.set_size_inches(WIDTH, 3.2)
    panel = sheet.subplots()
    for what, colour in (("encode", COLOURS["whimbrel"]), ("decode", OTHER)):
        found = sorted((f for f in figures if f.where.get("what") == what), key=lambda f: int(f.where["words"]))
        panel.plot(
            [f.where["words"] for f in found], [f.our_median for f in found], "o-", label=f"{what}d", color=colour
        )
    bounds = [(f.where["words"], f.target.least) for f in figures if f.target is not None]
    panel.plot(*zip(*bounds, strict=True), "x", color="black", label="promised") if bounds else None
    panel.set_xscale("log", base=2)
    shown = sorted({int(f.where["words"]) for f in figures})
    panel.set_xticks(shown, [str(words) for words in shown])
    panel.set_yscale("log")
    panel.set_xlabel("changed words a page, of 512")
    panel.set_ylabel("GB/s of pages")
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3, which="both")


def _line(panel: Axes, where: Sequence[float], medians: Sequence[float | None], name: str) -> None:
    points = [(x, y) for x, y in zip(where, medians, strict=True) if y is not None]
    if points:
        panel.plot(*zip(*points, strict=True), "o-", label=name, color=COLOURS[name])


def _of(figures: Sequence[Figure], quantity: str) -> list[Figure]:
    return [figure for figure in figures if figure.where.get("quantity") == quantity]


PLOTS: Final[Mapping[str, Plot]] = {
    "bulk": Plot("Bulk: MiB/s of random pages, and processor seconds a GiB", ["bulk"], _bars("speed", "bare", "cpu")),
    "zero": Plot("Zero pages: MiB/s", ["zero"], _bars()),
    "compressible": Plot("Lanes that compress: MiB/s", ["compressible"], _bars("speed", "cpu")),
    "idle": Plot("Downtime of an idle guest", ["idle"], _bars("downtime")),
    "rewriting": Plot("Downtime and total time of a guest that rewrites 63 MiB", ["rewriting"],
                      _bars("downtime", "seconds")),
    "live": Plot("Downtime and total time by working set, rate and bandwidth", ["live"], _bars("downtime", "seconds")),
    "xbzrle": Plot("Total time and bytes with XBZRLE and without", ["xbzrle"], _bars("seconds", "sent")),
    "slowdown": Plot("What a guest gets done while it is moved", ["slowdown"], _bars("share")),
    "codecs": Plot("XBZRLE by the density of changes", ["codecs"], _densities),
    "scaling": Plot("Cost by the size of memory", ["scaling", "large"], _growth),
    "receiving": Plot("A QEMU's stream, received", ["receiving"], _bars("speed")),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
