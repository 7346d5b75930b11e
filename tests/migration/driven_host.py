"""A host of test_drives_processes.py, a process of its own (`python driven_host.py NAME FOLDER`); what its guests do.

It is told in lines of JSON, and answers each: `{"do": "run"}` makes a machine and starts it; `{"do": "receive"}` makes
one that waits, and says where; `{"do": "arrived"}` waits until it runs; `{"do": "leave", "uri": …}` moves it away;
`{"do": "wait", "steps": …}` until its guest has done so many more; `{"do": "stop"}` has it stand still, `{"do": "go"}`
go on. What its guests have appended is noted here, outside of everything that moves: `appended` in each answer are the
numbers since the last one. All images and, when it stands still, the RAM are files in FOLDER.

What step n writes follows from n alone (`writes`), so that the perfect copy can be made from nothing but the count.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from whimbrel import LoopGuest, Machine, Settings

MIB = 1 << 20
PAGE = 4096
DISKS = {"disk0": 3 * MIB + 512, "sparse": 12 * MIB}
LOG = 4 * MIB
RAM = 256 * PAGE
LINE = 16  # bytes of the log
LONG = 60.0
REST = 0.0005  # seconds between two steps


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


class Host:
    """The machine that is here now, if any, and what its guest has appended."""

    def __init__(self, name: str, folder: Path, fault: str) -> None:
        self.name, self.folder, self.fault = name, folder, fault
        self.changed = threading.Condition()
        self.appended: list[int] = []

    def make(self) -> None:
        settings = Settings()
        settings.parameters.max_bandwidth = 64 * MIB  # so that much is written while it moves
        settings.parameters.announce_rounds = 1
        settings.capabilities.block = True
        settings.capabilities.zero_blocks = True
        self.machine = machine = Machine("driven", settings=settings)
        ram = machine.ram.add("ram", RAM).view
        count = machine.ram.array("count", (1,), "uint64")
        drives = {name: machine.drives.add(name, self.folder / f"{name}.img") for name in (*DISKS, "log")}
        if self.fault == "forgets":
            drives["disk0"].mark_dirty = lambda offset, size: None

        def step() -> None:
            number = int(count[0])
            for name, at, data in writes(number):
                if name == "ram":
                    ram[at : at + len(data)] = np.frombuffer(data, np.uint8)
                else:
                    drives[name].write(at, data)
            drives["log"].write(number * LINE, line(self.name, number))
            count[0] = number + 1
            with self.changed:
                self.appended.append(number)
                self.changed.notify_all()
            time.sleep(REST)

        machine.guest = LoopGuest(step, power_on=lambda: drives["disk0"].write(0, first_contents()))

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
                return {"disk": info.transfers["disk"].transferred, "downtime": info.downtime}
            case {"do": "wait", "steps": steps}:
                with self.changed:
                    goal = len(self.appended) + steps
                    assert self.changed.wait_for(lambda: len(self.appended) >= goal, LONG), "the guest stands still"
            case {"do": "stop"}:
                self.machine.stop()
                (self.folder / "ram").write_bytes(self.machine.ram["ram"].view)
            case {"do": "go"}:
                self.machine.start()
        return {}

    def told(self) -> list[int]:
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
