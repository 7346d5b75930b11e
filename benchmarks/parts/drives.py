"""A drive that goes along, beside the block migration of a QEMU; and one that is mostly a hole.

Every run has an image of its own to load into, and it is compared when the run is over: a QEMU ends without a word
where more than it is just reading fits into its downtime limit, so that is 1 ms; whimbrel's is 10 ms. The images are in
memory (tmpfs), so that nobody waits for a disk: whimbrel has everything durable before the machine runs, which costs
nothing there, and a QEMU (cache=writeback, as it is by itself) does not ask for it. What no migration by copying can
be much faster than is measured in the same run: the same bytes read, sent over a bare TCP connection, received and
written, a MiB at a time, with nothing around them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import attrs
import numpy as np

from benchmarks import qemu_pairs, sockets, whimbrel_pairs
from benchmarks.measuring import Bench, Both, Figure, Samples, Take, Target
from benchmarks.warming import provide
from benchmarks.work import MIB, Run, RunFailed, Work

MEMORY: Final = Path("/dev/shm")
MIB_OF_DISK: Final = 512
GIB_OF_HOLES: Final = 10
MIB_OF_DATA: Final = 10
MIB_OF_RAM: Final = 16
FASTER: Final = 2.0
DOWNTIME: Final = 10  # milliseconds
SECONDS: Final = 2.0


def measure(bench: Bench) -> list[Figure]:
    """A raw disk of 512 MiB, full of random bytes, and one of 10 GiB with 10 MiB in it, zeros sent as marks."""
    mib, holes = bench.mib(MIB_OF_DISK), bench.mib(GIB_OF_HOLES << 10)
    with TemporaryDirectory(prefix="whimbrel-bench-", dir=MEMORY) as folder:
        full = _Disk(Path(folder, "full"), mib, range(mib))
        sparse = _Disk(Path(folder, "sparse"), holes, range(0, holes, -(-holes // MIB_OF_DATA)))
        both = Both(full.work(zero_blocks=False))
        beside = Both(sparse.work(zero_blocks=True))
        bare = Both(both.work, ours=both.ours)
        takes: dict[str, Take] = {}
        for name, disk, measured in (("full", full, both), ("sparse", sparse, beside)):
            measured.theirs.error = qemu_pairs.missing()
            takes[f"{name}: QEMU"] = _taking(disk, measured.theirs, qemu_pairs.migrate, measured.work)
            ours = attrs.evolve(measured.work, downtime_limit=DOWNTIME)
            takes[f"{name}: whimbrel"] = _taking(disk, measured.ours, whimbrel_pairs.migrate, ours)
        takes["full: a bare copy"] = _taking(full, bare.theirs, sockets.send, bare.work)
        bench.in_turns(takes)
    speed = both.figure(
        f"a drive of {mib} MiB",
        "MiB/s",
        lambda run: mib / run.seconds,
        target=Target("ratio", least=FASTER),
        where={"quantity": "speed"},
    )
    limit = bare.figure(
        f"a drive of {mib} MiB, beside a bare copy over TCP",
        "MiB/s",
        lambda run: mib / run.seconds,
        beside="bare copy",
        where={"quantity": "limit"},
    )
    seconds = beside.seconds(
        f"a drive of {holes >> 10} GiB with {len(sparse.filled)} MiB in it",
        target=Target("ours", most=SECONDS),
        where={"quantity": "sparse"},
    )
    return [speed, limit, seconds]


@attrs.frozen
class _Disk:
    """An image at `path` of `mib` MiB, of which those numbered in `filled` have random bytes and the rest are holes."""

    path: Path
    mib: int
    filled: Sequence[int]

    def __attrs_post_init__(self) -> None:
        dice = np.random.default_rng(7)
        with self.path.open("wb") as image:
            for number in self.filled:
                image.seek(number * MIB)
                image.write(dice.bytes(MIB))
            image.truncate(self.mib * MIB)

    @property
    def copy(self) -> Path:
        """Where it goes."""
        return self.path.with_suffix(".copy")

    def work(self, *, zero_blocks: bool) -> Work:
        """Its migration."""
        return Work(
            mib=MIB_OF_RAM,
            content="none",
            downtime_limit=1,
            source_image=str(self.path),
            destination_image=str(self.copy),
            zero_blocks=zero_blocks,
        )

    def make_room(self) -> None:
        """An empty image of the same size."""
        self.copy.unlink(missing_ok=True)
        self.copy.touch()
        os.truncate(self.copy, self.mib * MIB)
        provide(len(self.filled) * 5 // 4)

    def check(self) -> None:
        """Raise RunFailed where the copy is another."""
        with self.path.open("rb") as ours, self.copy.open("rb") as theirs:
            for number in self.filled:
                ours.seek(number * MIB)
                theirs.seek(number * MIB)
                if ours.read(MIB) != theirs.read(MIB):
                    raise RunFailed(f"MiB {number} of the drive is not what it was")


def _taking(disk: _Disk, samples: Samples, migrate: Callable[[Work], Run], work: Work) -> Take:
    def run() -> Run:
        disk.make_room()
        ended = migrate(work)
        disk.check()
        return ended

    return lambda: samples.take(run)
