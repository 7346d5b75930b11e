"""A real QEMU's guest, taken out of it by `whimbrel receive`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks import qemu_pairs
from benchmarks.measuring import Bench, Both, Figure, Target
from benchmarks.warming import check_room, prepare
from benchmarks.work import MIB, Run, RunFailed, Work

MIB_OF_RAM: Final = 1024
PATIENCE: Final = 120.0  # seconds that nothing here takes


def measure(bench: Bench) -> list[Figure]:
    """1 GiB of random pages out of a QEMU, into `whimbrel receive` and into a QEMU; then `whimbrel inspect`."""
    both = Both(Work(mib=bench.mib(MIB_OF_RAM)))
    both.ours.error = both.theirs.error = qemu_pairs.missing()
    stored, inspected = [], []
    with tempfile.TemporaryDirectory(prefix="whimbrel-bench-") as folder:
        file = Path(folder) / "machine.stream"

        def receive() -> Run:
            run, seconds = _receive(both.work, file)
            stored.append(seconds)
            inspected.append(_inspect(file))
            return run

        bench.in_turns({
            "to a QEMU": lambda: both.theirs.take(lambda: qemu_pairs.migrate(both.work)),
            "to whimbrel receive": lambda: both.ours.take(receive),
        })  # fmt: skip
    return [
        both.speed("receive from a QEMU", target=Target("ratio", least=1), where={"quantity": "speed"}),
        Figure(
            name="... until it is on the disk",
            unit="s",
            ours=stored,
            more_is_better=False,
            where={"quantity": "stored"},
        ),
        Figure(
            name="inspect",
            unit="MiB/s",
            ours=inspected,
            target=Target("ours", least=200),
            where={"quantity": "inspect"},
        ),
    ]


def _receive(work: Work, file: Path) -> tuple[Run, float]:
    """Take a QEMU's machine into `file`; the run, and the seconds from its first byte until it was stored."""
    check_room(work)
    command = [sys.executable, "-m", "whimbrel", "receive", "tcp:127.0.0.1:0", str(file), "--json", "--force"]
    try:
        with (
            qemu_pairs.Source(work) as source,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as receiving,
        ):
            try:
                return _taken(work, source, receiving)
            finally:
                receiving.kill()
    except qemu_pairs.FAILURES as exc:
        raise RunFailed(f"receive: {type(exc).__name__}: {exc}") from exc


def _taken(work: Work, source: qemu_pairs.Source, receiving: subprocess.Popen[str]) -> tuple[Run, float]:
    assert receiving.stderr is not None
    uri = receiving.stderr.readline().partition(" at ")[2].strip()
    qemu_pairs.set_up(source.qemu, work)
    prepare(work)
    began = time.perf_counter()
    source.qemu.migrate(uri)
    if source.qemu.wait_status("completed", "failed") != "completed":
        raise RunFailed(f"receive: the migration has failed: {source.qemu.log().strip()}")
    source.qemu.wait_run_state("postmigrate")
    told = source.qemu.execute("query-migrate")
    out, _ = receiving.communicate(timeout=PATIENCE)
    run = Run(
        converged=True,
        seconds=told["total-time"] / 1000,
        outside=time.perf_counter() - began,
        downtime=float(told["downtime"]),
        rounds=told["ram"]["dirty-sync-count"],
        sent=told["ram"]["transferred"],
        cpu=0.0,
        overhead=0,
    )
    return run, json.loads(out)["seconds"]


def _inspect(file: Path) -> float:
    """MiB/s of `whimbrel inspect` over a stored machine, its start included."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "whimbrel", "inspect", str(file), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)
    return file.stat().st_size / MIB / (time.perf_counter() - began)
