"""The demo, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Final

from benchmarks.measuring import Bench, Figure, Target

PATIENCE: Final = 300.0  # seconds


def measure(bench: Bench) -> list[Figure]:
    """`whimbrel demo`: 512 MiB under 40,000 random updates a second, every byte compared at the end."""
    said: list[dict[str, Any]] = []
    bench.in_turns({"demo": lambda: said.append(_run(bench))})
    rates = [run["operations-per-second"] for run in said]
    return [
        Figure(
            name="demo: downtime",
            unit="ms",
            ours=[run["migration"]["downtime-exact"] for run in said],
            more_is_better=False,
            target=Target("ours", most=50),
            where={"quantity": "downtime"},
        ),
        Figure(
            name="demo: operations during",
            unit="of before",
            ours=[rate["during"] / rate["before"] for rate in rates],
            target=Target("ours", least=0.7),
            where={"quantity": "share"},
        ),
        Figure(
            name="demo: runs whose every byte was as expected",
            unit="of all",
            ours=[float(run["identical"]) for run in said],
            target=Target("ours", least=1),
            where={"quantity": "identical"},
        ),
    ]


def _run(bench: Bench) -> dict[str, Any]:
    size = ["--size", "64MiB"] if bench.quick else []
    command = [sys.executable, "-m", "whimbrel", "demo", "--json", *size]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
    found: dict[str, Any] = json.loads(said.stdout)
    return found
