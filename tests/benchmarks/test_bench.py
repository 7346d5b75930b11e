"""The benchmark measures: small works go through both sides, and what they tell makes sense."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import guests, qemu_pairs, sockets, whimbrel_pairs
from benchmarks.contents import fill
from benchmarks.measuring import Bench
from benchmarks.processes import ROOT, Role
from benchmarks.work import LOW, MIB, PAGE, Pattern, RunFailed, Work
from benchmarks.writers import BATCH, Writer

with_qemu = pytest.mark.skipif(bool(qemu_pairs.missing()), reason=qemu_pairs.missing())
WRITING = Pattern(4 * MIB, 8 * MIB)


def is_whole(run, work):
    assert run.converged
    assert run.seconds > 0
    assert run.outside > 0
    assert run.cpu > 0
    assert run.rounds >= 1
    # The firmware and its tables are a few MiB beside RAM.
    assert work.size <= run.sent < 2 * work.size + 16 * MIB


@pytest.mark.slow
def test_a_machine_of_whimbrels_is_moved_and_measured():
    work = Work(mib=16)
    is_whole(whimbrel_pairs.migrate(work), work)


@pytest.mark.slow
@with_qemu
def test_a_qemu_is_moved_and_measured():
    work = Work(mib=16)
    is_whole(qemu_pairs.migrate(work), work)


@pytest.mark.slow
def test_a_bare_socket_carries_as_much():
    run = sockets.send(Work(mib=16, destination="preallocated"))
    assert run.sent == 16 * MIB
    assert run.seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("side", [whimbrel_pairs, pytest.param(qemu_pairs, marks=with_qemu)])
def test_a_guest_that_writes_goes_on_while_it_is_moved(side):
    run = side.migrate(Work(mib=32, pattern=WRITING, before=0.1))
    assert run.converged
    assert run.downtime > 0
    assert run.pages_before > 0
    assert run.pages_during > 0


@pytest.mark.slow
@pytest.mark.parametrize("side", [whimbrel_pairs, pytest.param(qemu_pairs, marks=with_qemu)])
def test_what_never_ends_is_cancelled_and_counted(side):
    """16 MiB rewritten all the time do not go through 8 MiB/s within a millisecond of downtime."""
    run = side.migrate(
        Work(mib=32, pattern=Pattern(16 * MIB), bandwidth=8 * MIB, downtime_limit=1, bound=0.5, before=0.1)
    )
    assert not run.converged


def test_a_side_that_fails_is_told_and_not_asked_again():
    """No host has so much memory."""
    bench = Bench(runs=2, tell=lambda text: None)
    both = bench.both({"odd": Work(mib=1 << 30)})["odd"]
    assert "MiB are needed" in both.ours.error
    assert not both.ours.runs
    assert both.ours.failed == 2
    figure = both.speed("odd")
    assert figure.our_median is None
    assert figure.ratio is None


def test_a_process_that_fails_says_why():
    with Role("roles", "destination", "{}") as role, pytest.raises(RunFailed, match="KeyError"):
        role.hear(30)


@pytest.mark.parametrize("content", ["random", "words"])
def test_contents_are_the_same_each_time_and_no_two_pages_are_alike(content):
    first, second = np.zeros(40 * MIB, np.uint8), np.zeros(40 * MIB, np.uint8)
    fill(first, content)
    fill(second, content)
    assert np.array_equal(first, second)
    heads = np.ascontiguousarray(first.reshape(-1, PAGE)[:, :64]).view("V64").reshape(-1)
    assert len({head.tobytes() for head in heads}) == len(heads)


def test_an_unknown_content_is_refused():
    with pytest.raises(RunFailed, match="no content 'odd'"):
        fill(np.zeros(PAGE, np.uint8), "odd")


def test_a_writer_changes_the_words_of_its_working_set_and_counts_pages():
    ram, count = np.zeros(4 * MIB // 8, np.uint64), np.zeros(1, np.uint64)
    pattern = Pattern(2 * MIB, words=8)
    writer = Writer(ram, count, pattern)
    batches = 2 * MIB // PAGE // BATCH
    for _ in range(2 * batches):
        writer.step()
    assert count[0] == 2 * 2 * MIB // PAGE
    pages = ram.reshape(-1, 512)
    written = pages[LOW // PAGE : (LOW + 2 * MIB) // PAGE]
    assert (written[:, ::64] == 2).all()
    assert int(ram.sum()) == 2 * 8 * len(written)


def test_the_guest_is_what_its_source_makes():
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("there is no assembler")
    command = ["tests/qemu/guests/assemble", "../../../benchmarks/guests/writer", "0x7c00"]
    made = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert bytes.fromhex(made.stdout) == guests.writer()


@pytest.mark.long
def test_every_part_works(tmp_path):
    """All parts but the large ones, small and once, as `make bench ARGS=--quick` does."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("pytest_benchmark")
    from benchmarks import plots
    from benchmarks.parts import PARTS

    file = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.bench", "--quick", "--json", str(file)]
    ran = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(file.read_text())["parts"]
    assert set(told) == {name for name, part in PARTS.items() if part.default}
    assert plots.main([str(tmp_path)], file) == 0
    assert len(list(tmp_path.glob("*.svg"))) == len(plots.PLOTS)
