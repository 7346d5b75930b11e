"""whimbrel measured beside a real QEMU on the same work, in turns, in one run; medians, ratios, kept results.

    make bench                                  everything but the large sizes: some 15 minutes
    make bench ARGS="bulk live --runs 3"        some parts, fewer runs
    make bench ARGS="--quick"                   does it work? Small sizes, one run, nothing is kept
    make bench ARGS="large"                     4 and 8 GiB: needs 20 GiB of memory
    make plots                                  the plots and tables of docs/performance.md from what is kept

Absolute figures vary between machines and from run to run; what counts is the ratio to what is beside it. What is kept
is `benchmarks/results/latest.json` (or `--json FILE`), part by part.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks import keeping
from benchmarks.facts import facts, now
from benchmarks.measuring import Bench, errors
from benchmarks.parts import PARTS
from benchmarks.tables import cells


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--runs", type=click.IntRange(1), help="Runs of each, whose median is told: 5, or 1 if quick.")
@click.option("--quick", is_flag=True, help="Small sizes, to see that it works; kept only with --json.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Keep the results in this file.")
@click.option("--strict", is_flag=True, help="Exit with 1 if a target is missed, too.")
def main(parts: tuple[str, ...], runs: int | None, quick: bool, file: Path | None, strict: bool) -> None:
    """Measure, print, keep."""
    bench = Bench(runs or (1 if quick else 5), quick, lambda text: click.echo(text, err=True))
    measured: dict[str, keeping.Measured] = {}
    for name in parts or [name for name, part in PARTS.items() if part.default]:
        measured[name] = measure(name, bench)
        if file is not None or not quick:
            keeping.write({name: measured[name]}, file or keeping.KEPT)
    show(measured)
    figures = [figure for part in measured.values() for figure in part.figures]
    failed = errors(figures)
    for text in failed:
        click.echo(f"not measured: {text}", err=True)
    sys.exit(bool(failed) or (strict and any(figure.met is False for figure in figures)))


def measure(name: str, bench: Bench) -> keeping.Measured:
    """Measure one part."""
    part = PARTS[name]
    bench.tell(f"{name}: {part.about}")
    date, began = now(), time.monotonic()
    figures = part.measure(bench)
    seconds = round(time.monotonic() - began)
    command = f'make bench ARGS="{name} --runs {bench.runs}{" --quick" * bench.quick}"'
    return keeping.Measured(
        about=part.about,
        command=command,
        date=date,
        runs=bench.runs,
        seconds=seconds,
        machine=facts(),
        figures=figures,
    )


def show(measured: Mapping[str, keeping.Measured]) -> None:
    """Print a table."""
    table = Table("what", "whimbrel", "beside it", "ratio", "promised", "")
    for part in measured.values():
        table.add_section()
        for figure in part.figures:
            table.add_row(*cells(figure))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
