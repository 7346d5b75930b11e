"""A machine goes round a ring of processes, again and again, and none of them holds more for it than before."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from . import ring_host
from .ring_host import LONG

HOSTS = 3
ROOM = {"resident": 8 * 1024, "mappings": 16}  # KiB, and lines: what allocators keep for themselves comes and goes


class Process:
    """A host, which is told over its pipes."""

    def __init__(self) -> None:
        command = [sys.executable, ring_host.__file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, **order: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, object]:
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def ask(self, **order: object) -> dict[str, object]:
        self.tell(**order)
        return self.hear()

    def close(self) -> None:
        self.process.communicate(timeout=LONG)


class Ring:
    """The processes, the one that has the machine first."""

    def __init__(self, hosts: list[Process]) -> None:
        self.hosts = hosts
        self.hops = 0
        self.first = self.epoch = hosts[0].ask(do="run")["epoch"]
        self.count = 0

    def hop(self) -> None:
        """The machine moves one on, with all that its guest had done and in a new epoch, and goes on there."""
        source, destination = self.hosts[:2]
        uri = destination.ask(do="receive")["uri"]
        destination.tell(do="arrived")
        left, arrived = source.ask(do="leave", uri=uri), destination.hear()
        assert left["ownership"] == "done"
        assert self.count <= left["count"] < arrived["count"], "steps were lost, or the guest did none"
        assert arrived["epoch"] > self.epoch
        self.count, self.epoch = arrived["count"], arrived["epoch"]
        self.hosts = [*self.hosts[1:], source]
        self.hops += 1

    def go(self, hops: int) -> list[dict[str, object]]:
        """So many hops; what each process holds behind them, in their own order."""
        for _ in range(hops):
            self.hop()
        assert not hops % HOSTS, "the machine is where it was: what is compared is like"
        return [host.ask(do="held") for host in self.hosts]


@contextmanager
def ring() -> Iterator[Ring]:
    with ExitStack() as stack:
        hosts = []
        for _ in range(HOSTS):
            hosts.append(Process())
            stack.callback(hosts[-1].close)
        yield Ring(hosts)


def grown(early: list[dict[str, object]], late: list[dict[str, object]]) -> list[str]:
    """What is more than it was."""
    return [
        f"process {number}: {name} {before[name]} → {after[name]}"
        for number, (before, after) in enumerate(zip(early, late, strict=True))
        for name in before
        if after[name] - before[name] > ROOM.get(name, 0)
    ]


@pytest.mark.slow
def test_thirty_hops_leave_nothing_behind():
    with ring() as one:
        early = one.go(12)
        late = one.go(18)
        assert one.epoch - one.first == one.hops == 30
    for each in (*early, *late):
        del each["resident"]  # is not warm yet
    assert not grown(early, late)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_thousand_hops_leave_nothing_behind():
    """Behind 300 all is warm; every 1,200 more the figures are told."""
    with ring() as one:
        early = one.go(300)
        began, samples = time.perf_counter(), [early]
        while one.hops < 10_000:
            samples.append(one.go(min(1_200, 10_002 - one.hops)))
            pace = (one.hops - 300) / (time.perf_counter() - began)
            print(f"{one.hops} hops, {pace:.1f} a second: {samples[-1]}", flush=True)
        assert one.epoch - one.first == one.hops == 10_002
    assert not grown(early, samples[-1]), samples
