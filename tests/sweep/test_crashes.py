"""A side that crashes at a record of its journal, wherever in it: never two, and nobody only where one asks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
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
        asking = "source: ASK" in result.said and not case.witness
        assert result.first != "nobody" or asking, (case, result)
        assert result.second != "nobody" or asking, (case, result)
        assert not any(said.endswith(" ASK_WITNESS") for said in result.said), (case, result)


EACH = [(witness, side, record) for witness in (False, True) for side in RECORDS for record in RECORDS[side]]
EACH.remove((True, SOURCE, "prepared"))  # nothing is proved before it lets go


def those(sizes: Callable[[int], list[int]], witness: bool, side: str, record: str) -> list[Case]:
    return [case for case in cases(sizes, witness=witness) if (case.side, case.record) == (side, record)]


@pytest.mark.slow
@pytest.mark.parametrize(("witness", "side", "record"), EACH)
def test_before_a_record_behind_it_and_with_half_of_it(witness, side, record):
    judge(those(lambda size: [size // 2], witness, side, record))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("witness", "side", "record"), EACH)
def test_with_any_part_of_a_record(witness, side, record):
    judge(those(lambda size: list(range(1, size)), witness, side, record))


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
    """The order is durable before it is given, and the taking over before it is: whoever has written it down has it.

    And whoever has it says so, in whatever process: a source that has not heard asks until it does.
    """
    released, taken, answered = played(
        [Case(SOURCE, "released", "behind"), Case(DESTINATION, "owner", "before"), Case(DESTINATION, "owner", "behind")]
    )
    assert [released.first, taken.first, answered.first] == [DESTINATION, SOURCE, DESTINATION]
    assert "source: done" in answered.said


@pytest.mark.slow
def test_with_a_witness_a_claim_outlives_whoever_made_it():
    """The destination's claim comes before its record; crashed in between, it finds at the witness that it had it."""
    claimed, waiting = played(
        [Case(DESTINATION, "owner", "before", witness=True), Case(SOURCE, "released", "behind", witness=True)]
    )
    assert claimed.first == DESTINATION
    assert {"source: done", "destination: LOST"} <= set(claimed.said)
    assert waiting.first == SOURCE
    assert "source: LOST" in waiting.said
