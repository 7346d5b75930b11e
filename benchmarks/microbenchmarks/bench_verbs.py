"""One-sided writes of the emulated verbs, beside a plain copy of the same bytes in the same run.

Both ends are in this process. A round writes all of the memory, or every second page, and waits until it is there (a
message behind the writes has arrived). The destination was written before, so no page is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Final

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from whimbrel.abc import IndexArray, Patience
from whimbrel.machine.memory import MemoryArea
from whimbrel.testing.verbs import VerbsBench
from whimbrel.verbs import Access, WcStatus
from whimbrel_transports._verbs_rendezvous import Emulation, Ways

SIZE: Final = 128 << 20
PAGE: Final = 4096
BATCH: Final = 256  # pages, a chunk of QEMU's protocol

PATTERNS: Final[dict[str, Callable[[], IndexArray]]] = {
    "runs of 1 MiB": lambda: np.arange(0, SIZE // PAGE, dtype=np.intp),
    "every second page": lambda: np.arange(0, SIZE // PAGE, 2, dtype=np.intp),
}


@pytest.fixture
def memories() -> Iterator[tuple[MemoryArea, MemoryArea]]:
    """Random bytes, and where they go."""
    source, target = MemoryArea(SIZE, "memfd"), MemoryArea(SIZE, "memfd")
    source.view[:] = np.random.default_rng(5).integers(0, 256, SIZE, np.uint8)
    target.view[:] = 1
    yield source, target
    source.close()
    target.close()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_copy(benchmark: BenchmarkFixture, memories: tuple[MemoryArea, MemoryArea], pattern: str) -> None:
    source, target = memories
    step = 1 + (pattern != "runs of 1 MiB")
    into, out = (memory.view.reshape(-1, PAGE)[::step] for memory in (target, source))
    benchmark.extra_info.update(what="copy", pattern=pattern, bytes=into.size)
    benchmark(np.copyto, into, out)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("way", ["SHARED", "SOCKET"])
def test_write(
    benchmark: BenchmarkFixture, memories: tuple[MemoryArea, MemoryArea], way: str, pattern: str
) -> None:  # fmt: skip
    source, target = memories
    offsets = PATTERNS[pattern]().astype(np.uint64) * np.uint64(PAGE)
    batches = [offsets[at : at + BATCH] for at in range(0, len(offsets), BATCH)]
    with ExitStack() as stack:
        bench = VerbsBench(Emulation(Ways[way]), "memfd", 60.0, stack)
        near, far = bench.pair()
        ours = near.register(source, Access.LOCAL_WRITE)
        theirs = far.register(target, Access.LOCAL_WRITE | Access.REMOTE_WRITE)

        def write() -> None:
            for batch in batches:
                sizes = np.full(len(batch), PAGE, np.uint64)
                near.pair.post_write(
                    batch + np.uint64(source.address), ours.lkey, batch + np.uint64(target.address), theirs.rkey,
                    sizes, 1,
                )  # fmt: skip
                near.queue.wait(Patience(60.0))
                assert all(done.status is WcStatus.SUCCESS for done in near.queue.poll(8))

        bench.settle(near, far)  # the region was told of
        benchmark.extra_info.update(what=way.lower(), pattern=pattern, bytes=len(offsets) * PAGE)
        benchmark(write)
        assert (target.view.reshape(-1, PAGE)[offsets // PAGE] == source.view.reshape(-1, PAGE)[offsets // PAGE]).all()
