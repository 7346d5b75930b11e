"""Two drives and RAM under constant writes move between two processes, and are what a perfect copy of them is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from . import driven_host
from .driven_host import DISKS, LINE, LOG, LONG, MIB, RAM, first_contents, line, writes

STEPS = 20  # of the guest, at least, on each host


class Process:
    """A host, and its folder of images."""

    def __init__(self, name: str, folder: Path, fault: str) -> None:
        self.name, self.folder = name, folder
        folder.mkdir()
        for image, size in {**DISKS, "log": LOG}.items():
            (folder / f"{image}.img").touch()
            os.truncate(folder / f"{image}.img", size)
        command = [sys.executable, driven_host.__file__, name, str(folder), fault]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.appended: list[tuple[str, int]] = []

    def tell(self, **order: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, object]:
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        self.appended += [(self.name, number) for number in answer.pop("appended")]
        assert "error" not in answer, answer["error"]
        return answer

    def ask(self, **order: object) -> dict[str, object]:
        self.tell(**order)
        return self.hear()

    def take_appended(self) -> list[tuple[str, int]]:
        appended, self.appended = self.appended, []
        return appended

    def close(self) -> None:
        self.process.communicate(timeout=LONG)


class Copy:
    """What the machine must be, made from what its guests said that they appended."""

    def __init__(self) -> None:
        self.parts = {name: np.zeros(size, np.uint8) for name, size in {**DISKS, "log": LOG, "ram": RAM}.items()}
        self.put("disk0", 0, first_contents())
        self.count = 0

    def put(self, name: str, at: int, data: bytes) -> None:
        self.parts[name][at : at + len(data)] = np.frombuffer(data, np.uint8)

    def follow(self, appended: list[tuple[str, int]]) -> None:
        """Do the steps that were appended, in the order in which they were."""
        for host, number in appended:
            assert number == self.count, (
                f"{host} has appended {number} after {self.count - 1}: a gap, a fork or a repeat"
            )
            for name, at, data in writes(number):
                self.put(name, at, data)
            self.put("log", number * LINE, line(host, number))
            self.count += 1

    def check(self, folder: Path) -> None:
        """What is in `folder` is the same, byte for byte."""
        for name, expected in self.parts.items():
            found = np.fromfile(folder / (name if name == "ram" else f"{name}.img"), np.uint8)
            assert len(found) == len(expected), name
            different = np.flatnonzero(found != expected)
            assert not len(different), f"{len(different)} bytes of {name} differ, the first at {different[0]}"


@contextmanager
def two_hosts(folder: Path, fault: str = "") -> Iterator[tuple[Process, Process]]:
    with ExitStack() as stack:
        hosts = []
        for name in ("a", "b"):
            hosts.append(Process(name, folder / name, fault))
            stack.callback(hosts[-1].close)
        yield hosts[0], hosts[1]


def hop(source: Process, destination: Process) -> dict[str, object]:
    """The machine moves, runs there for a while, and stands still."""
    source.ask(do="wait", steps=STEPS)
    uri = destination.ask(do="receive")["uri"]
    destination.tell(do="arrived")
    told = source.ask(do="leave", uri=uri)
    destination.hear()
    destination.ask(do="wait", steps=STEPS)
    destination.ask(do="stop")
    return told


def move(folder: Path, hops: int, fault: str = "") -> None:
    """Move so many times, back and forth, and compare each time."""
    copy = Copy()
    with two_hosts(folder, fault) as (source, destination):
        source.ask(do="run")
        for _ in range(hops):
            told = hop(source, destination)
            left = source.take_appended()
            copy.follow(left)
            copy.follow(destination.take_appended())
            copy.check(destination.folder)
            assert told["disk"] > DISKS["disk0"]
            assert told["again"] or "forgets" in fault, "no chunk of disk0 was written while it moved"
            destination.ask(do="go")
            source, destination = destination, source


@pytest.mark.slow
def test_two_drives_move_between_two_processes_there_and_back(tmp_path):
    move(tmp_path, 2)


@pytest.mark.long
def test_two_drives_move_between_two_processes_twenty_times(tmp_path):
    move(tmp_path, 20)


@pytest.mark.slow
def test_a_guest_in_a_process_of_its_own_writes_drives_that_move(tmp_path):
    move(tmp_path, 2, "apart")


@pytest.mark.long
def test_a_guest_in_a_process_of_its_own_writes_drives_that_move_twenty_times(tmp_path):
    move(tmp_path, 20, "apart")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["forgets", "apart forgets"])
def test_a_drive_that_forgets_what_is_written_is_found_out(tmp_path, fault):
    """What the guest writes behind the first reading is lost then, and the comparison says so."""
    with pytest.raises(AssertionError, match="bytes of disk0 differ"):
        move(tmp_path, 2, fault)


def test_the_log_of_a_guest_that_runs_twice_is_found_out():
    copy = Copy()
    copy.follow([("a", 0), ("a", 1)])
    with pytest.raises(AssertionError, match="b has appended 1 after 1: a gap, a fork or a repeat"):
        copy.follow([("b", 1)])


def test_one_byte_in_a_drive_is_found_out(tmp_path):
    copy = Copy()
    copy.follow([("a", 0)])
    for name, contents in copy.parts.items():
        contents.tofile(tmp_path / (name if name == "ram" else f"{name}.img"))
    copy.check(tmp_path)
    with (tmp_path / "sparse.img").open("r+b") as image:
        image.seek(11 * MIB)
        image.write(b"\x01")
    with pytest.raises(AssertionError, match=f"1 bytes of sparse differ, the first at {11 * MIB}"):
        copy.check(tmp_path)
