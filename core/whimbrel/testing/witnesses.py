"""The conformance suite for witnesses.

::

    class TestMine(WitnessConformance):
        factory = "my_witness:MyWitness"            # what makes one at an address, in other processes too
        modules = ("socket",)                       # whose functions reach the storage

        def address(self, folder): ...              # a fresh place
        def unreachable(self, folder): ...          # one where nothing is
        def read_only(self, folder): ...            # one that can be read and not written
        def spoil(self, address, mid, data): ...    # put something else into a cell

Those that race are processes, let go at one moment. Those that are interrupted are processes too: they are killed, or
handed an error, before and after every single call that a claim makes into `modules`, as a crash or a lost answer would
do it. Whatever becomes of them, their cell is then free or whole, and whoever was told an owner was told the truth.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import stat
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Final

from whimbrel.abc import Patience
from whimbrel.errors import MigrationCancelled, WitnessError
from whimbrel.testing._bench import nothing_left, raises
from whimbrel.witness import CELL_MAX, MID_SIZE, Witness, cell, meeting

__all__ = ["WitnessConformance"]

_WRITERS: Final = 6
_CELLS: Final = 8
_LONG: Final = 60.0  # seconds; only what hangs waits so long


class WitnessConformance(ABC):
    """What every witness must do; inherit it."""

    factory: ClassVar[str]
    """Where the callable is that makes a witness at an address: "module:name"."""
    modules: ClassVar[tuple[str, ...]] = ("posix",)
    """The modules of the functions in C that reach the storage."""

    @abstractmethod
    def address(self, folder: Path) -> str:
        """A place that is fresh and works; `folder` is empty."""

    @abstractmethod
    def unreachable(self, folder: Path) -> str:
        """A place that cannot be reached."""

    @abstractmethod
    def read_only(self, folder: Path) -> str:
        """A place that can be reached and not written, not by root either."""

    @abstractmethod
    def spoil(self, address: str, mid: bytes, data: bytes) -> None:
        """Make the cell of `mid` hold `data`."""

    def files(self, folder: Path) -> list[Path]:
        """The files in which cells are kept, after a few claims at `address(folder)`; none if they are elsewhere."""
        return [path for path in folder.rglob("*") if path.is_file()]

    def make(self, address: str) -> Witness:
        """A witness there."""
        return _factory(self.factory)(address)

    @contextmanager
    def made(self, address: str) -> Iterator[Witness]:
        """A witness there, which leaves nothing behind."""
        with nothing_left(_LONG):
            witness = self.make(address)
            try:
                yield witness
            finally:
                witness.close()
                witness.close()

    # ------------------------------------------------------------------------------------------ what a cell is

    def test_the_first_writer_owns_a_cell_and_stays_its_owner(self, tmp_path: Path) -> None:
        """A second claim learns whose it is, and so does everybody who reads."""
        mid = _mid()
        with self.made(self.address(tmp_path)) as witness:
            assert witness.read(mid, _patience()) is None
            assert witness.claim(mid, "source", _patience()) == "source"
            assert witness.claim(mid, "destination", _patience()) == "source"
            assert witness.read(mid, _patience()) == "source"

    def test_a_claim_by_the_same_writer_is_the_same_claim(self, tmp_path: Path) -> None:
        """From the same object, and from one made anew."""
        mid, address = _mid(), self.address(tmp_path)
        for _ in range(2):
            with self.made(address) as witness:
                assert [witness.claim(mid, "source", _patience()) for _ in range(3)] == ["source"] * 3

    def test_attempts_are_apart(self, tmp_path: Path) -> None:
        """Neighbours in every byte, and the cell in which both sides meet."""
        mids = [bytes(at == i for at in range(MID_SIZE)) for i in range(MID_SIZE)]
        mids += [meeting(mids[0]), b"\xff" * MID_SIZE]
        with self.made(self.address(tmp_path)) as witness:
            for number, mid in enumerate(mids):
                assert witness.read(mid, _patience()) is None
                assert witness.claim(mid, f"w{number}", _patience()) == f"w{number}"
            assert [witness.read(mid, _patience()) for mid in mids] == [f"w{number}" for number in range(len(mids))]

    def test_what_no_cell_can_have_is_refused(self, tmp_path: Path) -> None:
        """An id of another length, a writer that is no name; the longest name works."""
        mid = _mid()
        with self.made(self.address(tmp_path)) as witness:
            for wrong in (b"", mid[:-1], mid + b"0"):
                with raises(ValueError):
                    witness.claim(wrong, "source", _patience())
                with raises(ValueError):
                    witness.read(wrong, _patience())
            for who in ("", "a" * 65, "two words", "../up", "A", "a\n", "é", ".hidden", "-"):
                with raises(ValueError):
                    witness.claim(mid, who, _patience())
            assert witness.read(mid, _patience()) is None
            assert witness.claim(mid, "a" * 64, _patience()) == "a" * 64

    def test_garbage_in_a_cell_is_an_error_and_no_free_cell(self, tmp_path: Path) -> None:
        """For whoever reads and whoever claims, and it stays as it is."""
        address = self.address(tmp_path)
        with self.made(address) as witness:
            witness.claim(_mid(), "source", _patience())  # whatever is made at first is there
            for garbage in _garbage(_mid()):
                mid = _mid()
                self.spoil(address, mid, garbage)
                with raises(WitnessError):
                    witness.read(mid, _patience())
                for _ in range(2):
                    with raises(WitnessError):
                        witness.claim(mid, "destination", _patience())

    def test_only_its_user_may_read_and_write(self, tmp_path: Path) -> None:
        """Files are 0600, whatever the umask."""
        before = os.umask(0)
        try:
            with self.made(self.address(tmp_path)) as witness:
                witness.probe(_patience())
                witness.claim(_mid(), "source", _patience())
        finally:
            os.umask(before)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in self.files(tmp_path)}
        assert set(modes.values()) <= {0o600}, modes

    # ------------------------------------------------------------------------------------- out of reach

    def test_a_probe_leaves_nothing(self, tmp_path: Path) -> None:
        """And may be made as often as one likes."""
        with self.made(self.address(tmp_path)) as witness:
            witness.probe(_patience())
            files = sorted(self.files(tmp_path))
            for _ in range(3):
                witness.probe(_patience())
            assert sorted(self.files(tmp_path)) == files

    def test_what_cannot_be_reached_raises(self, tmp_path: Path) -> None:
        """Every call, each time; making it does not."""
        with self.made(self.unreachable(tmp_path)) as witness:
            self._all_raise(witness)
            with raises(WitnessError):
                witness.read(_mid(), _patience())

    def test_what_cannot_be_written_raises(self, tmp_path: Path) -> None:
        """The probe tells before anything is at stake."""
        with self.made(self.read_only(tmp_path)) as witness:
            self._all_raise(witness)

    def _all_raise(self, witness: Witness) -> None:
        for _ in range(2):
            with raises(WitnessError):
                witness.probe(_patience())
            with raises(WitnessError):
                witness.claim(_mid(), "source", _patience())

    def test_it_heeds_patience(self, tmp_path: Path) -> None:
        """One that is told to stop, and one whose time is up; neither keeps a later call from working."""
        mid = _mid()
        with self.made(self.address(tmp_path)) as witness:
            told = _patience()
            told.cancelled.set()
            with raises(MigrationCancelled):
                witness.claim(mid, "destination", told)
            with raises(WitnessError):
                witness.claim(mid, "destination", Patience(0))
            assert witness.read(mid, _patience()) is None
            assert witness.claim(mid, "source", _patience()) == "source"

    # ------------------------------------------------------------------------------------------ many, and crashes

    def test_one_of_many_processes_wins_and_all_agree(self, tmp_path: Path) -> None:
        """At each of several cells, the first time anybody uses the place."""
        address, mids = self.address(tmp_path), [_mid() for _ in range(_CELLS)]
        answers = self._elsewhere("race", address, [mid.hex() for mid in mids])
        assert len(answers) == _WRITERS
        with self.made(address) as witness:
            for number, mid in enumerate(mids):
                told = {answer[number] for answer in answers}
                assert told == {witness.read(mid, _patience())}
                assert told < {f"w{writer}" for writer in range(_WRITERS)}

    def test_a_claim_that_is_killed_leaves_its_cell_free_or_whole(self, tmp_path: Path) -> None:
        """Before and after every call into the storage; at the end it was free to begin with and owned at last."""
        address = self.address(tmp_path)
        found = self._interrupted(address, "kill")
        assert found["killed"] == found["points"]
        assert found["free"] > 0
        assert found["owned"] > 0

    def test_a_claim_whose_call_fails_raises_or_tells_the_truth(self, tmp_path: Path) -> None:
        """An error before a call, and one in the place of its answer."""
        found = self._interrupted(self.address(tmp_path), "fail")
        assert found["raised"] + found["told"] == found["points"]
        assert found["raised"] > 0

    def _interrupted(self, address: str, how: str) -> Counter[str]:
        with self.made(address) as witness:
            witness.probe(_patience())
            outcomes: list[dict[str, Any]] = self._elsewhere(how, address, list(self.modules))
            counts = Counter(points=len(outcomes))
            for outcome in outcomes:
                mid, told = bytes.fromhex(outcome["mid"]), outcome["told"]
                assert outcome["left"] == [], outcome
                owner = witness.read(mid, _patience())
                assert owner in {None, "source"}, outcome
                # Who was told an owner may rely on it; who was not may not have won all the same.
                assert told in {"killed", "raised", owner}, outcome
                counts["free" if owner is None else "owned"] += 1
                counts[told if told in {"killed", "raised"} else "told"] += 1
                assert witness.claim(mid, "destination", _patience()) == (owner or "destination"), outcome
        assert counts["points"] > 10, counts
        return counts

    def _elsewhere(self, what: str, address: str, arguments: Sequence[str]) -> Any:
        """Do something in processes that have no threads, and return what they tell."""
        done = subprocess.run(
            [sys.executable, "-m", "whimbrel.testing._witness_processes", what, self.factory, address, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            timeout=2 * _LONG,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return json.loads(done.stdout)


def _factory(name: str) -> Callable[[str], Witness]:
    module, _, path = name.partition(":")
    found: Any = reduce(getattr, path.split("."), importlib.import_module(module))
    made: Callable[[str], Witness] = found
    return made


def _garbage(other: bytes) -> Iterator[bytes]:
    whole = cell(other, "source")
    yield from (b"", b"source", whole, whole[:-1], whole + whole, b"x" * CELL_MAX, b"x" * (CELL_MAX + 1))
    yield b"\xff\x00" * 8


def _mid() -> bytes:
    return secrets.token_bytes(MID_SIZE)


def _patience() -> Patience:
    return Patience(_LONG)
