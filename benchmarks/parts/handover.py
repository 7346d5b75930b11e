"""What ways to hand over cost the standstill of a machine that does nothing, and what it is made of.

Two processes on one host, a machine of 1 MiB, journals on the disk of the temporary folder (TMPDIR; a tmpfs would show
nothing). Beside them, in the same run: a round trip of a word over a bare socket between two processes, and a record
made durable in a file on that disk. As a process of its own this module is one side of it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.measuring import Bench, Figure, Take
from benchmarks.processes import Role
from whimbrel import LoopGuest, Machine

WAYS: Final = {
    "qemu": ("qemu", False),
    "proof": ("proof", False),
    "in pairs": ("auto", False),
    "in pairs, with journals": ("auto", True),
}
LONG: Final = 60.0
WORD: Final = 32  # bytes
RECORD: Final = 250  # bytes
TIMES: Final = 20


def measure(bench: Bench) -> list[Figure]:
    """The downtime of a guest of 1 MiB that does nothing, by how it is handed over, beside QEMU's own timing."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    trips: list[float] = []
    records: list[float] = []
    takes: dict[str, Take] = {name: _moving(name, found[name]) for name in WAYS}
    takes["a round trip"] = lambda: trips.append(_round_trip())
    takes["a durable record"] = lambda: records.append(_durable_record())
    bench.in_turns(takes)
    beside = {"theirs": found["qemu"], "beside": "handover=qemu"}
    figures = [
        Figure(name=f"downtime, {name}", unit="ms", ours=samples, more_is_better=False, where={"way": name}, **beside)
        for name, samples in found.items()
    ]
    return [
        *figures,
        Figure(name="a round trip of 32 bytes between two processes", unit="ms", ours=trips, more_is_better=False),
        Figure(name="a record made durable (fdatasync)", unit="ms", ours=records, more_is_better=False),
    ]


def _moving(name: str, samples: list[float]) -> Take:
    timing, journal = WAYS[name]

    def take() -> None:
        with TemporaryDirectory(prefix="whimbrel-bench-") as folder:
            here, there = (f"{folder}/{side}" if journal else "" for side in ("here", "there"))
            with Role("parts.handover", "wait", there) as destination, Role("parts.handover", "run", here) as source:
                uri = destination.hear(LONG)["uri"]
                source.hear(LONG)
                samples.append(source.ask(LONG, uri=uri, handover=timing)["downtime"])

    return take


def _round_trip() -> float:
    """Milliseconds, of many the median."""
    ours, theirs = socket.socketpair()
    if (child := os.fork()) == 0:
        ours.close()
        while word := theirs.recv(WORD):
            theirs.sendall(word)
        os._exit(0)
    theirs.close()
    took = []
    with ours:
        for _ in range(10 * TIMES):
            began = time.perf_counter()
            ours.sendall(bytes(WORD))
            ours.recv(WORD)
            took.append(time.perf_counter() - began)
    os.waitpid(child, 0)
    return 1000 * sorted(took)[len(took) // 2]


def _durable_record() -> float:
    """Milliseconds, of some the median."""
    took = []
    with TemporaryDirectory(prefix="whimbrel-bench-") as folder, Path(folder, "records").open("ab", 0) as file:
        for _ in range(TIMES):
            began = time.perf_counter()
            file.write(bytes(RECORD))
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return 1000 * sorted(took)[len(took) // 2]


def main(role: str, journal: str) -> None:
    """Be a side until standard input ends."""
    with Machine("tiny") as machine:
        machine.ram.add("ram", 1 << 20)
        machine.guest = LoopGuest(lambda: time.sleep(0.001))
        machine.settings.parameters.announce_rounds = 0
        if journal:
            machine.keep_journal(Path(journal))
        for told in _wait(machine) if role == "wait" else _run(machine):
            print(json.dumps(told), flush=True)


def _wait(machine: Machine) -> Iterator[dict[str, object]]:
    arriving = machine.incoming("tcp:127.0.0.1:0")
    yield {"uri": arriving.uri}
    arriving.wait(LONG)
    sys.stdin.read()


def _run(machine: Machine) -> Iterator[dict[str, object]]:
    machine.start()
    yield {"ready": True}
    order = json.loads(sys.stdin.readline())
    info = machine.migrate(order["uri"], handover=order["handover"]).wait(LONG)
    yield {"downtime": info.downtime_exact, "split": dict(info.downtime_split)}


if __name__ == "__main__":
    main(*sys.argv[1:])
