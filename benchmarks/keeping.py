"""The results that are kept: a file of JSON with the last measurement of each part, under version control.

A part is measured as a whole and replaced as a whole, with its date, command and machine; the others stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks.measuring import Figure
from benchmarks.processes import ROOT

KEPT: Final = ROOT / "benchmarks" / "results" / "latest.json"
FORMAT: Final = 1


@attrs.frozen(kw_only=True)
class Measured:
    """One part, measured."""

    about: str
    command: str
    date: str
    runs: int
    seconds: float
    machine: Mapping[str, Any]
    figures: Sequence[Figure]

    def figure(self, **where: Any) -> Figure | None:
        """The first figure that is where `where` says."""
        return next((f for f in self.figures if where.items() <= f.where.items()), None)


def read(file: Path = KEPT) -> dict[str, Measured]:
    """All parts that are kept, by name; none if there is no file."""
    if not file.exists():
        return {}
    told = json.loads(file.read_text(encoding="utf-8"))
    if told["format"] != FORMAT:
        raise SystemExit(f"{file} has format {told['format']}, and {FORMAT} is known: measure anew")
    return {
        name: Measured(**{**part, "figures": [Figure.from_dict(figure) for figure in part["figures"]]})
        for name, part in told["parts"].items()
    }


def write(parts: Mapping[str, Measured], file: Path = KEPT) -> None:
    """Keep `parts`, and those that were kept before and are not among them."""
    whole = {**read(file), **parts}
    told = {
        name: {**attrs.asdict(part, recurse=False), "figures": [figure.as_dict() for figure in part.figures]}
        for name, part in sorted(whole.items())
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps({"format": FORMAT, "parts": told}, indent=1) + "\n", encoding="utf-8")
    fresh.replace(file)
