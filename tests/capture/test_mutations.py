"""Damaged streams, thousands in the long run: each ends in a machine or in one error of ours, within bounds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mutating.py")


def run(first, stop, seconds):
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(first), str(stop)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    came = json.loads(result.stdout.partition(": ")[2])
    assert sum(came.values()) == stop - first
    # So that it is known to be worth something: damage of every kind of consequence was done.
    assert min(came[what] for what in ("machine", "stream", "incompatible", "lost")) > (stop - first) / 100


@pytest.mark.slow
def test_some_hundred_damaged_streams():
    run(0, 250, 300)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_many_thousand_damaged_streams(part):
    run(10_000 + part * 5000, 10_000 + (part + 1) * 5000, 900)
