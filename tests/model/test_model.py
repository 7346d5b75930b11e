"""The checked model of the handover: no error within its bounds, no move but the table's, each planted fault found."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Final

import pytest

from . import moves, spin
from .spin import Bounds, Deal, Fault, explore

QUICK: Final = (
    Bounds(Deal.PAIRWISE, crashes=2),
    Bounds(Deal.PAIRWISE, forgets=True),
    Bounds(Deal.PROOF),
    Bounds(Deal.ONE_WAY),
    Bounds(Deal.WITNESS_CELL),
)
LONG: Final = (
    Bounds(Deal.PAIRWISE, attempts=3, crashes=1),
    Bounds(Deal.PAIRWISE, attempts=2, crashes=3, cuts=3),
    Bounds(Deal.PAIRWISE, attempts=3, crashes=1, forgets=True),
    Bounds(Deal.PROOF, attempts=3, crashes=2),
    Bounds(Deal.ONE_WAY, attempts=3, crashes=2),
    Bounds(Deal.WITNESS_CELL, attempts=3, crashes=2),
)
ENOUGH: Final = 200_000  # states, which the quick searches must have seen

# Each fault, the deals in which it does harm, and what that violates.
TWICE: Final = r"!\(s_run\)|!\(d_run\[i\]\)"  # two run
BACK: Final = r"!\(ran\)|!\(past\[m\]\)|!\(taken_back\[m\]\)"  # time travel
PLANTED: Final = [
    (Bounds(Deal.PROOF, fault=Fault.RELEASE_NOT_WRITTEN), f"{TWICE}|{BACK}"),
    (Bounds(Deal.WITNESS_CELL, fault=Fault.RELEASE_NOT_WRITTEN), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PAIRWISE, fault=Fault.SOURCE_RESUMES_AFTER_RELEASE), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PAIRWISE, fault=Fault.STARTS_WITHOUT_ORDER), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PAIRWISE, fault=Fault.REFUSES_AFTER_RUNNING), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PAIRWISE, fault=Fault.FORGETS_ITS_REFUSAL), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PAIRWISE, fault=Fault.THAW_NOT_WRITTEN), BACK),
    (Bounds(Deal.PAIRWISE, fault=Fault.UNKNOWN_TAKEN_FOR_REFUSE, forgets=True), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PAIRWISE, fault=Fault.ATTEMPT_NOT_WRITTEN), "s_undecided"),
    (Bounds(Deal.WITNESS_CELL, fault=Fault.ONE_CELL_FOR_ALL_ATTEMPTS), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PAIRWISE, fault=Fault.OLD_COMMIT_OBEYED), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PAIRWISE, fault=Fault.OLD_ABORT_OBEYED), r"taken_back\[m\]"),
    (Bounds(Deal.PAIRWISE, fault=Fault.NO_FRESH_EPOCH), "s_epoch"),
    (Bounds(Deal.PAIRWISE, fault=Fault.SOURCE_WITHOUT_JOURNAL), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PROOF, fault=Fault.SOURCE_WITHOUT_JOURNAL), f"{TWICE}|{BACK}"),
    (Bounds(Deal.WITNESS_CELL, fault=Fault.STARTS_WITHOUT_THE_CELL), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PAIRWISE, fault=Fault.RELEASED_TAKEN_FOR_LOST), f"{TWICE}|{BACK}"),
    (Bounds(Deal.WITNESS_CELL, fault=Fault.SOURCE_RESUMES_WITHOUT_THE_CELL), f"{TWICE}|{BACK}"),
    (Bounds(Deal.PAIRWISE, fault=Fault.START_NOT_WRITTEN), f"{TWICE}|{BACK}"),
]


@pytest.fixture(scope="session")
def real_spin() -> None:
    """There is a spin and a gcc here, or nothing of this is tested."""
    if reason := spin.missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}. CI=true, so the model must not be skipped", pytrace=False)
        pytest.skip(reason)


def test_the_table_of_the_model_is_that_of_the_code() -> None:
    assert moves.FILE.read_text() == moves.text(), "python -m tests.model.moves writes it anew"


@pytest.mark.slow
def test_no_error_and_every_move_that_needs_no_operator_is_taken(
    real_spin: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states, taken = 0, set[moves.Move]()
    for number, bounds in enumerate(QUICK):
        found = explore(bounds, _folder(tmp_path, number))
        _report(bounds, found.states, capsys)
        assert not found.error, bounds
        states += found.states
        taken |= found.taken
    assert states >= ENOUGH
    assert taken == {move for move in moves.moves() if move.why != "OPERATOR"}


@pytest.mark.long
@pytest.mark.parametrize("bounds", LONG, ids=str)
def test_no_error_within_wider_bounds(
    real_spin: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], bounds: Bounds
) -> None:
    found = explore(bounds, tmp_path)
    _report(bounds, found.states, capsys)
    assert not found.error


@pytest.mark.parametrize("deal", Deal, ids=lambda deal: deal.name)
def test_every_run_ends(real_spin: None, tmp_path: Path, deal: Deal) -> None:
    assert not explore(Bounds(deal, attempts=1, crashes=2), tmp_path, cycles=True).error


@pytest.mark.long
@pytest.mark.parametrize("bounds", QUICK, ids=str)
def test_every_longer_run_ends(real_spin: None, tmp_path: Path, bounds: Bounds) -> None:
    assert not explore(bounds, tmp_path, cycles=True).error


@pytest.mark.parametrize(("bounds", "violated"), PLANTED, ids=[str(bounds) for bounds, _ in PLANTED])
def test_a_planted_fault_is_found(real_spin: None, tmp_path: Path, bounds: Bounds, violated: str) -> None:
    found = explore(bounds, tmp_path)
    assert re.search(violated, found.error), found.error or "nothing was found"


def test_every_fault_is_planted() -> None:
    assert {bounds.fault for bounds, _ in PLANTED} == set(Fault) - {Fault.NONE}


def test_a_move_that_the_table_does_not_have_is_an_error(real_spin: None, tmp_path: Path) -> None:
    model = tmp_path / spin.MODEL.name
    shutil.copy(spin.MODEL, model)
    without = moves.text().replace("(old) == S_FROZEN && (new) == S_OWNER && (why) == THAWED", "0")
    assert without != moves.text()
    (tmp_path / moves.FILE.name).write_text(without)
    found = explore(Bounds(Deal.PAIRWISE), _folder(tmp_path, 0), model=model)
    assert found.error.startswith("assertion violated")
    assert moves.Move("S", "S_FROZEN", "S_OWNER", "THAWED") not in found.taken


def _folder(under: Path, number: int) -> Path:
    folder = under / str(number)
    folder.mkdir()
    return folder


def _report(bounds: Bounds, states: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{bounds}: {states} states")
