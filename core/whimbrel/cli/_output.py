"""What commands print: results on standard output, everything else on standard error.

Tables are rich's and as wide as they need to be where standard output is no terminal. rich is imported late.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

_UNBOUNDED: Final = 100_000  # columns


def note(text: str) -> None:
    """Say something on the way, on standard error; that nobody listens is no reason to end a machine."""
    with suppress(OSError):
        click.echo(text, err=True)


def complain(text: str) -> None:
    """Say what is wrong: one line on standard error."""
    note(f"whimbrel: {' '.join(text.split())}")


def print_json(value: Any) -> None:
    """Print a result for programs: one JSON document."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # a path that is no text: JSON can write it all the same
        text = json.dumps(value, indent=2, default=str)
    click.echo(text)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print a table of names and values, leaving out what has no value."""
    print_table(None, [row for row in rows if row[1]])


def print_table(heads: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> None:
    """Print a table, with `heads` above the columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    table = Table(
        box=SIMPLE_HEAD if heads else None,
        show_header=heads is not None,
        show_edge=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for head in heads or [""] * max(map(len, rows), default=0):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: what looks like markup is somebody's name
    console(error=False).print(table)


def console(*, error: bool) -> Console:
    """Rich's console for standard error or standard output as they are now."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else _UNBOUNDED)
