"""Crashes at each record of a journal: before it is written, behind it, and with a part of it written.

`python -m tests.sweep.crashes` does it, in real processes: it reads cases as lines of JSON and answers each. A case is
a handover in pairs, or with a witness, and with journals at both ends; one side's process ends at the record that the
case names, and is brought back as `whimbrel run --journal` would, with `--incoming` where the machine is not its own.
Then the other side is killed and brought back, too. Who runs holds a lock of the kernel's, and each start is a line in
a ledger, with its process and its epoch.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Final

import attrs

from whimbrel import Machine, PluginManager
from whimbrel.abc import Guest
from whimbrel.errors import WhimbrelError
from whimbrel.migration import journal as journals
from whimbrel.migration import keeper
from whimbrel.migration.journal import Journal
from whimbrel.migration.standing import Verdict

SOURCE, DESTINATION = "source", "destination"
RECORDS: Final = {SOURCE: ("frozen", "prepared", "released", "done"), DESTINATION: ("loading", "prepared", "owner")}
SOON: Final = 1.0  # seconds after which whoever still asks or waits is left at it
LONG: Final = 30.0
CRASHED: Final = 99


@attrs.frozen
class Case:
    """Where who crashes: `at` is "before", "behind", or "torn" with `size` bytes of the record written.

    `fault` is one that is planted: the source "forgets" and writes nothing before it is over, brought back it "does not
    ask" and starts, or the destination "runs first" and writes it down then.
    """

    side: str
    record: str
    at: str
    size: int = 0
    fault: str = ""
    witness: bool = False


@attrs.frozen
class Result:
    """Who runs behind the first crash and behind the second, what each process said, and what must not be."""

    first: str
    second: str
    said: list[str]
    wrong: list[str]


def cases(sizes: Callable[[int], list[int]], *, witness: bool = False) -> Iterator[Case]:
    """Every record of either side; `sizes` chooses how much of a torn one, of so many bytes, is written."""
    for side, records in RECORDS.items():
        for record in records:
            if witness and (side, record) == (SOURCE, "prepared"):
                continue  # nothing is proved before it lets go
            yield Case(side, record, "before", witness=witness)
            yield Case(side, record, "behind", witness=witness)
            for size in sizes(200):  # no record is shorter
                yield Case(side, record, "torn", size, witness=witness)


class _Guest(Guest):
    """Holds the lock as long as it runs."""

    def __init__(self, name: str, folder: Path, machine: Machine) -> None:
        self._name, self._folder, self._machine = name, folder, machine
        self._lock = -1
        self.late: Callable[[], object] = lambda: None  # what a planted fault puts off until it runs

    def power_on(self) -> None:
        """Nothing is needed."""

    def start(self) -> None:
        """Take the lock, and write down the epoch."""
        self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            wrong = ""
        except BlockingIOError:
            wrong = "both"
        with (self._folder / "ledger").open("a") as file:
            file.write(f"{self._name} {os.getpid()} {self._machine.epoch} {wrong}\n")
        self.late()

    def stop(self) -> None:
        """Let go of it."""
        os.close(self._lock)


class _Side:
    """A process that was forked; it says lines, and ends with its input or when it is killed."""

    def __init__(self, name: str, do: Callable[[Callable[[str], object]], object]) -> None:
        self.name, self.said, self._rest = name, list[str](), b""
        self._hears, says = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                do(lambda text: os.write(says, f"{text}\n".encode()))
                threading.Event().wait()
            finally:
                os._exit(1)
        os.close(says)

    def hear(self, seconds: float) -> str:
        """The next line; empty if none comes in time, "gone" if none ever will."""
        until = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not select.select([self._hears], [], [], max(0.0, until - time.monotonic()))[0]:
                return ""
            if not (data := os.read(self._hears, 4096)):
                return "gone"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        self.said.append(f"{self.name}: {line.decode()}")
        return line.decode()

    def end(self) -> None:
        """Kill it; twice is fine."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._hears)
            self.pid = 0


class _Play:
    """One case, in a folder of its own."""

    def __init__(self, case: Case, folder: Path, plugins: PluginManager) -> None:
        self._case, self._folder, self._plugins = case, folder, plugins
        self._uri = f"unix:{folder}/here"

    def _machine(self, name: str) -> Machine:
        machine = Machine("tiny", plugins=self._plugins)
        machine.ram.add("ram", 4 * 4096)
        machine.settings.parameters.announce_rounds = 0
        machine.settings.limits.handover_timeout = 1.0
        if self._case.witness:
            machine.settings.backends.witness = f"folder:{self._folder}/witness"
        machine.guest = _Guest(name, self._folder, machine)
        return machine

    def source(self, say: Callable[[str], object]) -> None:
        """Run the machine, and hand it over."""
        self._plant(SOURCE)
        machine = self._machine(SOURCE)
        machine.keep_journal(self._folder / SOURCE)
        machine.start()
        try:
            machine.migrate(self._uri, handover="auto").wait()
            say("done")
        except WhimbrelError as exc:
            say(f"{machine.run_state} {type(exc).__name__}")

    def destination(self, say: Callable[[str], object]) -> None:
        """Wait for it."""
        self._plant(DESTINATION)
        machine = self._machine(DESTINATION)
        if self._case.fault == "runs first":
            keeper.Keeper.move = _hasty(keeper.Keeper.move, machine.guest)  # type: ignore[method-assign, arg-type]
        self._receive(machine, say)

    def back(self, side: str, say: Callable[[str], object]) -> None:
        """What `whimbrel run --journal` does."""
        machine = self._machine(side)
        standing = machine.keep_journal(self._folder / side)
        if standing.must_ask and self._case.fault == "does not ask":
            machine.start_afresh()
        else:
            stopped = threading.Event()
            threading.Timer(SOON / 2, stopped.set).start()
            standing = machine.settle_standing(stopped)
        waits = side == DESTINATION and standing.verdict in (Verdict.FRESH, Verdict.ELSEWHERE)
        say(standing.verdict.name)
        if waits:
            self._receive(machine, say)
        elif standing.may_start:
            machine.start()
            say("runs")

    def _receive(self, machine: Machine, say: Callable[[str], object]) -> None:
        if machine.journal.path is None:
            machine.keep_journal(self._folder / DESTINATION)
        arriving = machine.incoming(self._uri)
        say("listens")
        try:
            arriving.wait()
            say("runs")
        except WhimbrelError as exc:
            say(f"failed {type(exc).__name__}")

    def _plant(self, side: str) -> None:
        """End the process at the record of the case."""
        case, write = self._case, Journal._write
        if case.fault == "forgets" and side == SOURCE:
            keeper.Keeper.move = _forgetful(keeper.Keeper.move)  # type: ignore[method-assign]
        if side != case.side:
            return

        def crashing(self: Journal, record: journals.Record) -> None:
            if (record.role, record.ownership) != (case.side, case.record):
                write(self, record)
                return
            if case.at == "behind":
                write(self, record)
                self.sync()
            elif case.at == "torn":
                os.pwrite(self._fd, journals._format(record)[: case.size], self._good)
            os._exit(CRASHED)

        Journal._write = crashing  # type: ignore[method-assign]

    def play(self) -> Result:
        """All of it."""
        if self._case.witness:
            (self._folder / "witness").mkdir()
        crashes, lives = (SOURCE, DESTINATION) if self._case.side == SOURCE else (DESTINATION, SOURCE)
        sides = {DESTINATION: _Side(DESTINATION, self.destination)}
        everybody = [sides[DESTINATION]]
        assert sides[DESTINATION].hear(LONG) == "listens"
        sides[SOURCE] = _Side(SOURCE, self.source)
        everybody.append(sides[SOURCE])
        try:
            heard = ""
            while heard != "gone":
                heard = sides[crashes].hear(LONG)
                assert heard, "it has not crashed"
            self._bring_back(crashes, sides, everybody)
            sides[lives].hear(SOON)
            first = self._runs()
            second = self._bring_back(lives, sides, everybody)
            return Result(first, second, [line for side in everybody for line in side.said], self._wrong())
        finally:
            for side in everybody:
                side.end()

    def _bring_back(self, name: str, sides: dict[str, _Side], everybody: list[_Side]) -> str:
        sides[name].end()
        sides[name] = back = _Side(name, lambda say: self.back(name, say))
        everybody.append(back)
        verdict = back.hear(LONG)
        if verdict in ("FRESH", "LOST") or name == DESTINATION:
            back.hear(LONG if verdict in ("FRESH", "LOST") else SOON)
        return self._runs()

    def _runs(self) -> str:
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._starts()[-1][0]
        finally:
            os.close(lock)
        return "nobody"

    def _starts(self) -> list[list[str]]:
        return [line.split(" ") for line in (self._folder / "ledger").read_text().splitlines()]

    def _wrong(self) -> list[str]:
        starts = self._starts()
        wrong = [f"{name} was started while another ran" for name, _, _, both in starts if both]
        processes = [process for process, _ in groupby(starts, key=lambda start: start[1])]
        if len(processes) != len(set(processes)):
            wrong.append("a memory ran on that was older than a run elsewhere")
        epochs = [int(epoch) for _, _, epoch, _ in starts]
        if any(later < before for before, later in pairwise(epochs)):
            wrong.append(f"the epochs of the starts are {epochs}")
        return wrong


def _forgetful(move: Callable[..., None]) -> Callable[..., None]:
    """A keeper that writes nothing between the guest's stop and the destination's answer."""

    def forgetful(self: Any, old: Any, new: Any, why: Any) -> None:
        if str(new) == "done":
            move(self, old, new, why)

    return forgetful


def _hasty(move: Callable[..., None], guest: _Guest) -> Callable[..., None]:
    """A keeper that writes down that the machine is this side's once it runs."""

    def hasty(self: Any, old: Any, new: Any, why: Any) -> None:
        if str(new) == "owner":
            guest.late = partial(move, self, old, new, why)
        else:
            move(self, old, new, why)

    return hasty


def main() -> None:
    """Answer cases until there are no more."""
    logging.disable(logging.CRITICAL)
    plugins = PluginManager()
    for text in sys.stdin:
        with tempfile.TemporaryDirectory(prefix="whimbrel-crash-") as folder:
            result = _Play(Case(**json.loads(text)), Path(folder), plugins).play()
        print(json.dumps(attrs.asdict(result)), flush=True)


if __name__ == "__main__":
    main()
