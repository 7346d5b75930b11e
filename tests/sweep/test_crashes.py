"""A side that crashes at a record of its journal, wherever in it: never two, and nobody only where one asks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from .crashes import DESTINATION, RECORDS, SOURCE, Case, Result, cases

ROOT = Path(__file__).parents[2]


def played(some: list[Case]) -> list[Result]:
    """What came of them, in a process that forks the sides."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sweep.crashes"],
        input="".join(json.dumps(attrs.asdict(case)) + "\n" for case in some),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return [Result(**json.loads(line)) for line in done.stdout.splitlines()]


def judge(some: list[Case]) -> None:
    results = played(some)
    assert len(results) == len(some)
    for case, result in zip(some, results, strict=True):
        assert not result.wrong, (case, result)
        asking = "source: ASK" in result.said
        assert result.first != "nobody" or asking, (case, result)
        assert result.second != "nobody" or asking, (case, result)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "record"), [(side, record) for side in RECORDS for record in RECORDS[side]])
def test_before_a_record_behind_it_and_with_half_of_it(side, record):
    judge([case for case in cases(lambda size: [size // 2]) if (case.side, case.record) == (side, record)])


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("side", "record"), [(side, record) for side in RECORDS for record in RECORDS[side]])
def test_with_any_part_of_a_record(side, record):
    judge([case for case in cases(lambda size: list(range(1, size))) if (case.side, case.record) == (side, record)])


PLANTED = {
    # Nothing of the handover is written at the source until it is over: brought back, it starts what has moved.
    Case(SOURCE, "done", "before", fault="forgets"): "source was started while another ran",
    # It is written down that the destination has to be asked, and the source starts all the same.
    Case(SOURCE, "done", "before", fault="does not ask"): "source was started while another ran",
    # The destination has run and does not know: it says that it never did, and the source goes on where it stood.
    Case(DESTINATION, "owner", "before", fault="runs first"): "a memory ran on that was older than a run elsewhere",
}


@pytest.mark.slow
def test_what_is_planted_is_found_out():
    results = played(list(PLANTED))
    assert [result.wrong for result in results] == [[wrong] for wrong in PLANTED.values()], results


@pytest.mark.slow
def test_who_has_it_behind_a_crash():
    """The order is durable before it is given, and the taking over before it is: whoever has written it down has it."""
    found = played([Case(SOURCE, "released", "behind"), Case(DESTINATION, "owner", "before")])
    assert [result.first for result in found] == [DESTINATION, SOURCE]
