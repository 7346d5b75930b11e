"""Prints how something ended that cannot be undone: it has ended so, whether or not anybody can be told.

Standard output that is closed or full changes nothing about a machine that has moved, nor about the exit status.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from whimbrel.cli._output import complain, note, print_json, print_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from whimbrel.errors import WhimbrelError


def print_result(rows: Iterable[tuple[str, str]], document: dict[str, Any], *, as_json: bool) -> None:
    """Print `document` as JSON, else `rows` as a table."""
    _print((lambda: print_json(document)) if as_json else (lambda: print_rows(rows)))


def print_failure(error: WhimbrelError, text: str, status: int, *, as_json: bool) -> int:
    """Say `text`, and print it as JSON with the code of `error` if that was asked for; returns `status`."""
    complain(text)
    if as_json:
        _print(lambda: print_json({"error-code": error.code, "error-desc": text}))
    return status


def _print(print_it: Callable[[], object]) -> None:
    if sys.stdout is None:  # closed by whoever started us
        return
    try:
        print_it()
        sys.stdout.flush()
    except (OSError, UnicodeError) as exc:
        note(f"how it ended could not be printed: {exc}")
        _silence()
    except SystemExit:  # rich's word for a pipe that nobody reads any more
        note("how it ended could not be printed: nobody reads it")


def _silence() -> None:
    """Send what is still in the buffer nowhere, or the interpreter would fail over it at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
