"""Runs the model: `explore(Bounds(…))` has spin write the search, gcc compile it, and returns what it has found."""

from __future__ import annotations

import re
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path
from typing import Final

import attrs

from .moves import PREFIXES, Move, names

MODEL: Final = Path(__file__).parent / "handover.pml"
PATIENCE: Final = 1800.0  # seconds for one program
DEEPEST: Final = 10_000  # steps; a search that gets there has not seen everything, and fails


class Deal(IntEnum):
    """How ownership passes, as the model numbers it."""

    PAIRWISE = 1
    PROOF = 2
    ONE_WAY = 3
    WITNESS_CELL = 4


class Fault(IntEnum):
    """What is planted, as the model numbers it."""

    NONE = 0
    RELEASE_NOT_WRITTEN = 1
    SOURCE_RESUMES_AFTER_RELEASE = 2
    STARTS_WITHOUT_ORDER = 3
    REFUSES_AFTER_RUNNING = 4
    FORGETS_ITS_REFUSAL = 5
    THAW_NOT_WRITTEN = 6
    UNKNOWN_TAKEN_FOR_REFUSE = 7
    ATTEMPT_NOT_WRITTEN = 8
    ONE_CELL_FOR_ALL_ATTEMPTS = 9
    OLD_COMMIT_OBEYED = 10
    OLD_ABORT_OBEYED = 11
    NO_FRESH_EPOCH = 12
    SOURCE_WITHOUT_JOURNAL = 13
    STARTS_WITHOUT_THE_CELL = 14
    RELEASED_TAKEN_FOR_LOST = 15
    SOURCE_RESUMES_WITHOUT_THE_CELL = 16
    START_NOT_WRITTEN = 17


@attrs.frozen(str=False)
class Bounds:
    """What is searched: a deal, how much of what goes wrong, and what is planted."""

    deal: Deal
    attempts: int = 2
    crashes: int = 1
    cuts: int = 1
    forgets: bool = False  # destinations keep no journal
    fault: Fault = Fault.NONE

    def __str__(self) -> str:
        kept = ", destinations without a journal" if self.forgets else ""
        planted = f", {self.fault.name}" if self.fault else ""
        return f"{self.deal.name}, {self.attempts} attempts, {self.crashes} crashes, {self.cuts} cuts{kept}{planted}"

    @property
    def defines(self) -> list[str]:
        """The same for spin."""
        chosen = {"DEAL": self.deal, "ATTEMPTS": self.attempts, "CRASHES": self.crashes, "CUTS": self.cuts}
        return [
            *(f"-D{name}={int(value)}" for name, value in chosen.items()),
            f"-DFAULT={int(self.fault)}",
            *(["-DFORGETS"] if self.forgets else []),
        ]


@attrs.frozen
class Found:
    """What a search has found. `error` is spin's sentence on the first violation; empty if everything was seen."""

    states: int
    error: str
    taken: frozenset[Move]


def missing() -> str:
    """Why the model cannot be run here; empty if it can."""
    for program in ("spin", "gcc"):
        if shutil.which(program) is None:
            return f"there is no {program}; as root on Debian, tools/make-spin installs it"
    return ""


def explore(bounds: Bounds, folder: Path, *, cycles: bool = False, model: Path = MODEL) -> Found:
    """Search every state within `bounds` up to the first violation; `folder` is empty and for this alone.

    With `cycles` a run without an end is a violation as well: there must be none, so that what is asserted where
    nothing can happen any more holds for every run. That search counts nearly every state twice.
    """
    _run(folder, "spin", *bounds.defines, "-a", str(model))
    # To compile well takes longer than a small search.
    how = ["-O0" if bounds.attempts < 3 else "-O2", "-DNP" if cycles else "-DSAFETY"]
    _run(folder, "gcc", *how, "-w", "-DVECTORSZ=1024", "-o", "pan", "pan.c")
    return _searched(_run(folder, "./pan", f"-m{DEEPEST}", "-w22", *(["-l"] if cycles else [])))


def _searched(said: str) -> Found:
    states = re.search(r"^ *(\d+) states, stored", said, re.MULTILINE)
    errors = re.search(r"errors: (\d+)", said)
    assert states is not None, said
    assert errors is not None, said
    assert "max search depth too small" not in said, said
    error = re.search(r"^pan:\d+: (.*)$", said, re.MULTILINE)
    assert (error is None) == (errors[1] == "0"), said
    return Found(int(states[1]), "" if error is None else error[1], frozenset(_taken(said)))


def _taken(said: str) -> list[Move]:
    number = names()
    return [
        Move(
            PREFIXES[int(side)],
            number[PREFIXES[int(side)]][int(old) - 1],
            number[PREFIXES[int(side)]][int(new) - 1],
            number["why"][int(why) - 1],
        )
        for side, old, new, why in re.findall(r"^took (\d+) (\d+) (\d+) (\d+)$", said, re.MULTILINE)
    ]


def _run(folder: Path, *command: str) -> str:
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if ended.returncode:
        raise AssertionError(f"{' '.join(command)} has failed:\n{ended.stdout}{ended.stderr}")
    return ended.stdout
