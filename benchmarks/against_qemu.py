"""Beside a real QEMU: how fast its stream is taken, by `whimbrel receive` and by a QEMU destination, in turns.

The source is a QEMU with 1 GiB of random RAM (a shared file in memory) whose guest does not run, over loopback TCP.
Throughput is RAM by the source's own `total-time`, so both destinations are judged by the same clock: until the source
has got rid of its last byte. What `receive` takes to have it all on the disk is told beside it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.qemu.peer import Qemu, missing  # noqa: E402

MIB = 1024
UNLIMITED = 1 << 40
WAIT = 120.0  # seconds that nothing here takes


def available() -> str:
    """Why this cannot be measured here; empty if it can."""
    return missing()


class Bench:
    """The random memory, and what is measured with it. A context manager."""

    def __init__(self) -> None:
        self._memory = tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="whimbrel-bench-")  # noqa: SIM115
        self._folder = tempfile.TemporaryDirectory(prefix="whimbrel-bench-")
        for _ in range(MIB):
            self._memory.write(_random(1 << 20))
        self._memory.flush()
        self.stored = Path(self._folder.name) / "machine.stream"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.close()
        self._folder.cleanup()

    def source(self) -> Qemu:
        """A QEMU with the random memory, stopped."""
        backend = f"memory-backend-file,id=m,size={MIB}M,mem-path={self._memory.name},share=on"
        return Qemu(MIB, machine="pc,memory-backend=m", stopped=True, extra=("-object", backend))

    def to_qemu(self, *, prealloc: bool) -> float:
        """MiB/s into a QEMU destination."""
        backend = f"memory-backend-ram,id=m,size={MIB}M,prealloc={'on' if prealloc else 'off'}"
        extra = ("-object", backend)
        with Qemu(MIB, machine="pc,memory-backend=m", incoming="defer", stopped=True, extra=extra) as destination:
            destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
            address = destination.execute("query-migrate")["socket-address"][0]
            return self._migrate(f"tcp:127.0.0.1:{address['port']}")

    def to_whimbrel(self) -> tuple[float, float]:
        """MiB/s into `whimbrel receive`, and seconds from the first byte until it is stored."""
        arguments = ["receive", "tcp:127.0.0.1:0", str(self.stored), "--json", "--force"]
        command = [sys.executable, "-m", "whimbrel", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as receiving:
            assert receiving.stderr is not None
            uri = receiving.stderr.readline().split(" at ")[1].strip()
            speed = self._migrate(uri)
            out, _ = receiving.communicate(timeout=WAIT)
        return speed, json.loads(out)["seconds"]

    def _migrate(self, uri: str) -> float:
        with self.source() as source:
            source.execute("migrate-set-parameters", max_bandwidth=UNLIMITED)
            warm()
            source.migrate(uri)
            if source.wait_status("completed", "failed") != "completed":
                raise SystemExit(f"a migration of the benchmark failed: {source.report()}")
            source.wait_run_state("postmigrate")  # the event comes before the total is known
            total: int = source.execute("query-migrate")["total-time"]
        return MIB / (total / 1000)

    def inspect(self) -> float:
        """MiB/s of `whimbrel inspect` over the stored machine, its start included."""
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "whimbrel", "inspect", str(self.stored), "--json"],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=WAIT,
        )
        return self.stored.stat().st_size / (1 << 20) / (time.perf_counter() - began)


def _random(size: int) -> bytes:
    with Path("/dev/urandom").open("rb") as source:
        return source.read(size)


def warm() -> None:
    """Have the host provide memory, so that neither destination pays its hypervisor for the first touch."""
    command = [sys.executable, str(Path(__file__).parent / "roles.py"), "warm", str(2 * MIB)]
    subprocess.run(command, check=True, timeout=WAIT, stdout=subprocess.DEVNULL)


def median(values: list[float]) -> float:
    return statistics.median(values)
