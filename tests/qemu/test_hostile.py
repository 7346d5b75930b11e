"""A real stream that was cut or changed ends in a machine or in one named error, within a bound of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("hostile.py")
GROWTH = 64 << 20  # bytes that thousands of streams may take beyond the first
TIME = 1800  # seconds that only a hang takes


@pytest.fixture
def over_all(tiny_stream, tmp_path):
    """`over_all(how, first, last, step)`: the outcomes of all cases, on as many processes as there are processors."""
    file = tmp_path / "tiny.stream"
    file.write_bytes(tiny_stream)

    def run(how: str, first: int, last: int, step: int) -> Counter[str]:
        count = os.cpu_count() or 1
        running = []
        try:
            for turn in range(count):
                span = [str(number) for number in (first + turn * step, last, count * step)]
                command = [sys.executable, str(PROGRAM), how, str(file), *span]
                running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
            total: Counter[str] = Counter()
            for process in running:
                out, err = process.communicate(timeout=TIME)
                assert process.returncode == 0, err[-3000:]
                said = json.loads(out)
                assert said["growth"] <= GROWTH
                total += Counter(said["outcomes"])
        finally:
            for process in running:
                process.kill()
                process.communicate()
        assert total.total() == len(range(first, last, step))
        return total

    return run


@pytest.mark.slow
@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.long)])
def test_every_prefix_is_told_from_the_whole(over_all, tiny_stream, step):
    end = tiny_stream.rindex(b"\x00\x06\x00") + 1  # behind the EOF: who hangs up there has sent a whole machine
    assert set(over_all("cut", 0, end, step)) == {"lost"}
    outcomes = over_all("cut", end, len(tiny_stream), step)
    assert set(outcomes) <= {"loaded", "lost"}, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.long)])
def test_mutations_end_in_one_named_error(over_all, count):
    outcomes = over_all("changed", 0, count, 1)
    assert outcomes["loaded"], "changes of memory and of devices' bytes are still machines"
    assert outcomes["stream"] > count / 20, outcomes
    assert set(outcomes) <= {"loaded", "stream", "lost", "incompatible"}, outcomes
