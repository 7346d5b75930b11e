"""A host of test_drives_processes.py, a process of its own (`python driven_host.py NAME FOLDER HOW`), and its guests.

It is told in lines of JSON, and answers each: `{"do": "run"}` makes a machine and starts it; `{"do": "receive"}` makes
one that waits, and says where; `{"do": "arrived"}` waits until it runs; `{"do": "leave", "uri": …}` moves it away;
`{"do": "wait", "steps": …}` until its guest has done so many more; `{"do": "stop"}` has it stand still, `{"do": "go"}`
go on. What its guests have appended is noted here, outside of everything that moves: `appended` in each answer are the
numbers since the last one. All images and, when it stands still, the RAM are files in FOLDER. HOW begins with "apart"
for guests in processes of their own, and is or ends with what a test wants to be broken.

What step n writes follows from n alone (`writes`), so that the perfect copy can be made from nothing but the count.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from whimbrel import LoopGuest, Machine, ProcessGuest, Settings

MIB = 1 << 20
PAGE = 4096
DISKS = {"disk0": 3 * MIB + 512, "sparse": 12 * MIB}
LOG = 4 * MIB
RAM = 256 * PAGE
LINE = 16  # bytes of the log
LONG = 60.0
REST = 0.0005  # seconds between two steps
NOTE = struct.Struct("=Q")  # of a guest in a process of its own


def writes(number: int) -> Iterator[tuple[str, int, bytes]]:
    """What step `number` writes, beside its line: to which drive or to RAM, where, and what."""
    dice = random.Random(number)
    for name, size in (*DISKS.items(), ("ram", RAM)):
        data = dice.randbytes(dice.choice((1, 16, 512, 4096, 70000)))
        if dice.random() < 0.1:
            data = bytes(len(data))
        yield name, dice.randrange(size - len(data) + 1), data


def line(host: str, number: int) -> bytes:
    """What a guest appends to the log."""
    return b"%6s %8d\n" % (host.encode(), number)


def first_contents() -> bytes:
    """What disk0 has when the machine is switched on; the sparse one has nothing."""
    return random.Random("first").randbytes(DISKS["disk0"])


class Guest:
    """What the guest does: its step number is in RAM, and `told` is called with each that is done."""

    def __init__(self, host, ram, count, drives, told) -> None:
        self.host, self.ram, self.count, self.drives, self.told = host, ram, count, drives, told

    def power_on(self) -> None:
        self.drives["disk0"].write(0, first_contents())

    def step(self) -> None:
        number = int(self.count[0])
        for name, at, data in writes(number):
            if name == "ram":
                self.ram[at : at + len(data)] = np.frombuffer(data, np.uint8)
            else:
                self.drives[name].write(at, data)
        self.drives["log"].write(number * LINE, line(self.host, number))
        self.count[0] = number + 1
        self.told(number)
        time.sleep(REST)


def apart(memory, host, notes):
    """The guest in a process of its own; it appends to a file there, outside of everything that moves, what it did."""
    file = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    guest = Guest(
        host,
        memory.view("ram"),
        memory.array("count", (1,), "uint64"),
        memory.drives,
        lambda number: os.write(file, NOTE.pack(number)),
    )
    return LoopGuest(guest.step, power_on=guest.power_on)


class Host:
    """The machine that is here now, if any, and what its guest has appended."""

    def __init__(self, name: str, folder: Path, fault: str) -> None:
        self.name, self.folder = name, folder
        self.apart, self.fault = fault.startswith("apart"), fault.removeprefix("apart").lstrip()
        self.notes, self.noted = folder / "notes", 0
        self.changed = threading.Condition()
        self.appended: list[int] = []

    def make(self) -> None:
        settings = Settings()
        if self.apart:
            settings.backends.memory = "memfd"
        settings.parameters.max_bandwidth = 64 * MIB  # so that much is written while it moves
        settings.parameters.announce_rounds = 1
        settings.capabilities.block = True
        settings.capabilities.zero_blocks = True
        self.machine = machine = Machine("driven", settings=settings)
        ram = machine.ram.add("ram", RAM).view
        count = machine.ram.array("count", (1,), "uint64")
        drives = {name: machine.drives.add(name, self.folder / f"{name}.img") for name in (*DISKS, "log")}
        if self.fault == "forgets" and self.apart:
            drives["disk0"]._take_marks = lambda: np.zeros(drives["disk0"].chunks, np.bool_)
        elif self.fault == "forgets":
            drives["disk0"].mark_dirty = lambda offset, size: None

        self.again = 0
        self.count_again(drives["disk0"])
        if self.apart:
            machine.guest = ProcessGuest(f"{__file__}:apart", arguments={"host": self.name, "notes": str(self.notes)})
            return
        guest = Guest(self.name, ram, count, drives, self.note)
        machine.guest = LoopGuest(guest.step, power_on=guest.power_on)

    def count_again(self, drive) -> None:
        """Count the chunks that are found written while the machine leaves."""
        collect = drive.collect

        def counting():
            found = collect()
            self.again += int(np.count_nonzero(found))
            return found

        drive.collect = counting

    def note(self, number: int) -> None:
        with self.changed:
            self.appended.append(number)
            self.changed.notify_all()

    def obey(self, order: dict[str, object]) -> dict[str, object]:
        match order:
            case {"do": "run"}:
                self.make()
                self.machine.start()
            case {"do": "receive"}:
                self.make()
                self.arriving = self.machine.incoming("tcp:127.0.0.1:0")
                return {"uri": self.arriving.uri}
            case {"do": "arrived"}:
                self.arriving.wait(LONG)
            case {"do": "leave", "uri": uri}:
                info = self.machine.migrate(uri).wait(LONG)
                self.machine.close()
                return {"disk": info.transfers["disk"].transferred, "again": self.again, "downtime": info.downtime}
            case {"do": "wait", "steps": steps}:
                self.wait(steps)
            case {"do": "stop"}:
                self.machine.stop()
                (self.folder / "ram").write_bytes(self.machine.ram["ram"].view)
            case {"do": "go"}:
                self.machine.start()
        return {}

    def wait(self, steps: int) -> None:
        until = time.monotonic() + LONG
        self.follow_notes()
        with self.changed:
            goal = len(self.appended) + steps
            while len(self.appended) < goal:
                assert time.monotonic() < until, "the guest stands still"
                self.changed.wait(REST if self.apart else LONG)  # a file that another process writes wakes nobody
                self.follow_notes()

    def follow_notes(self) -> None:
        """Read what the guest has noted in its own process."""
        if self.apart and self.notes.exists():
            with self.notes.open("rb") as file:
                file.seek(self.noted)
                data = file.read()
            data = data[: len(data) // NOTE.size * NOTE.size]
            self.noted += len(data)
            self.appended += [number for (number,) in NOTE.iter_unpack(data)]

    def told(self) -> list[int]:
        self.follow_notes()
        with self.changed:
            appended, self.appended = self.appended, []
        return appended


def main(name: str, folder: str, fault: str = "") -> None:
    host = Host(name, Path(folder), fault)
    for text in sys.stdin:
        try:
            answer = host.obey(json.loads(text))
        except Exception as exc:  # the test tells of it
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps({**answer, "appended": host.told()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
