"""Codecs by themselves: the microbenchmarks, which pytest-benchmark runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.measuring import Bench, Figure, Target
from benchmarks.processes import ROOT

FOLDER: Final = ROOT / "benchmarks" / "microbenchmarks"
TARGETS: Final = {("encode", 8): 2.0, ("encode", 64): 0.5}  # GB/s by what and changed words a page
PATIENCE: Final = 300.0


def measure(bench: Bench) -> list[Figure]:
    """XBZRLE encoding and decoding, in GB of pages a second, by how many words of a page have changed."""
    samples: dict[tuple[str, int], list[float]] = {}

    def take() -> None:
        for found in _run(bench):
            info = found["extra_info"]
            speed = info["bytes"] / found["stats"]["median"] / 1e9
            samples.setdefault((info["what"], info["words"]), []).append(speed)

    bench.in_turns({"microbenchmarks": take})
    return [
        Figure(
            name=f"xbzrle, {what}, {words} changed word{'s' * (words > 1)} a page",
            unit="GB/s",
            ours=speeds,
            target=Target("ours", least=TARGETS[what, words]) if (what, words) in TARGETS else None,
            where={"what": what, "words": words},
        )
        for (what, words), speeds in samples.items()
    ]


def _run(bench: Bench) -> list[dict[str, Any]]:
    """One run of all of them, as pytest-benchmark tells it."""
    with tempfile.TemporaryDirectory(prefix="whimbrel-bench-") as folder:
        told = Path(folder) / "told.json"
        command = [sys.executable, "-m", "pytest", "-q", "-c", str(FOLDER / "pytest.ini")]
        command += [str(FOLDER / "bench_xbzrle.py")]
        command += ["-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider", f"--benchmark-json={told}"]
        command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1"] if bench.quick else []
        # Without what else is installed for pytest: some of it measures, too.
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        ran = subprocess.run(
            command, check=False, env=environment, cwd=ROOT, timeout=PATIENCE, capture_output=True, text=True
        )
        if ran.returncode:
            raise SystemExit(f"the microbenchmarks failed:\n{ran.stdout}{ran.stderr}")
        found: list[dict[str, Any]] = json.loads(told.read_text())["benchmarks"]
    return found
