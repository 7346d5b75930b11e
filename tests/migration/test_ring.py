"""A machine goes round a ring of processes, again and again, and none of them holds more for it than before."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean

import pytest

from . import ring_host
from .ring_host import LONG

HOSTS = 3
ROOM = {"mappings": 16}  # lines: what allocators keep for themselves comes and goes
WARM = 300  # hops
APART = 150  # hops between two samples
# KiB between the means of two quarters. One sample scatters by 3 MiB (its standard deviation), the mean of a quarter's
# 16 by 0.9 MiB, two such by 1.2 MiB: five times that is no chance. It is 2.5 KiB a hop, and 7.6 each time a process had
# the machine.
CREPT = 6 * 1024

Held = list[dict[str, int]]  # of each process


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

    def go(self, hops: int) -> Held:
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


def grown(early: Held, late: Held) -> list[str]:
    """What is more than it was, but for memory: one sample says nothing of that."""
    return [
        f"process {number}: {name} {before[name]} → {after[name]}"
        for number, (before, after) in enumerate(zip(early, late, strict=True))
        for name in before
        if name != "resident" and after[name] - before[name] > ROOM.get(name, 0)
    ]


def crept(samples: Sequence[Held]) -> list[str]:
    """Whose memory was more in the last quarter of the samples than in the third, in the mean."""
    quarter = len(samples) // 4
    found = []
    for number in range(len(samples[0])):
        resident = [sample[number]["resident"] for sample in samples]
        third, fourth = fmean(resident[-2 * quarter : -quarter]), fmean(resident[-quarter:])
        if fourth - third > CREPT:
            found.append(f"process {number}: resident {third:.0f} → {fourth:.0f} KiB, in the mean of {quarter} samples")
    return found


@pytest.mark.slow
def test_thirty_hops_leave_nothing_behind():
    with ring() as one:
        early = one.go(12)
        late = one.go(18)
        assert one.epoch - one.first == one.hops == 30
    assert not grown(early, late)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_thousand_hops_leave_nothing_behind():
    """Behind 300 all is warm; every 1,200 or so the figures are told."""
    with ring() as one:
        one.go(WARM)
        began, samples = time.perf_counter(), [one.go(APART)]
        while one.hops < 10_000:
            samples.append(one.go(min(APART, 10_002 - one.hops)))
            if not len(samples) % 8:
                pace = (one.hops - WARM) / (time.perf_counter() - began)
                print(f"{one.hops} hops, {pace:.1f} a second: {samples[-1]}", flush=True)
        assert one.epoch - one.first == one.hops == 10_002
    assert not grown(samples[0], samples[-1]), samples
    assert not crept(samples), samples


# What process 0 of a ring that lost nothing held behind every 75th hop, in KiB.
SCATTERED = [
    *(57952, 52856, 55980, 55852, 53760, 60068, 59000, 56988, 60168, 58172, 59224, 61204, 62176, 63388, 60172, 63344),
    *(63420, 66664, 63664, 65796, 62668, 62692, 61836, 60820, 62824, 60736, 58660, 60756, 61760, 61824, 63972, 58812),
    *(60852, 57656, 60872, 63876, 64828),
]


def sampled(hops: int, lost: int) -> list[Held]:
    """What the two quiet processes and one that loses so many bytes a hop would hold, sample by sample."""
    quiet = [SCATTERED[7 * number % len(SCATTERED)] for number in range(hops // APART)]
    loses = [kib + number * APART * lost // 1024 for number, kib in enumerate(quiet)]
    return [[{"resident": kib} for kib in each] for each in zip(quiet, loses, reversed(quiet), strict=True)]


@pytest.mark.parametrize("lost", [0, 1024, 4096])
def test_what_a_hop_loses_is_found_and_scattering_is_not(lost):
    found = crept(sampled(9_702, lost))
    assert [each.partition(":")[0] for each in found] == (["process 1"] if lost == 4096 else [])


def test_one_sample_out_of_all_is_no_creeping():
    samples = sampled(9_702, 0)
    for process in samples[-1]:
        process["resident"] += 32 * 1024
    assert not crept(samples)
