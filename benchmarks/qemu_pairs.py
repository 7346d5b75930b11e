"""QEMU's side of a comparison: a machine moves from one QEMU (TCG) to another over loopback TCP.

The source's memory is a memfd that both it and we have mapped: it is filled from outside while the guest stands still,
the guest is told through it what to do, and its progress is read from it. All of it is mapped by the QEMU beforehand,
as that of a guest that has run for a while is. The destination's memory is its own.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from tests.qemu import peer
from tests.qemu.peer import Qemu
from tests.qemu.qmp import Qmp, QmpError

from benchmarks.contents import fill
from benchmarks.guests import Steering, writer
from benchmarks.warming import check_room, prepare
from benchmarks.watching import Meter
from benchmarks.work import Run, RunFailed, Work

WITHOUT_LIMIT: Final = 1 << 40  # bytes per second
FAILURES: Final = (OSError, EOFError, QmpError, AssertionError)


def missing() -> str:
    """Why this side cannot be measured here; empty if it can."""
    return peer.missing()


def migrate(work: Work) -> Run:
    """Move a guest as `work` says. Raises RunFailed."""
    check_room(work)
    try:
        with ExitStack() as stack:
            destination = stack.enter_context(_destination(work))
            source = stack.enter_context(Source(work))
            return _measure(work, source, destination)
    except FAILURES as exc:
        raise RunFailed(f"QEMU: {type(exc).__name__}: {exc}") from exc


def _measure(work: Work, source: Source, destination: Qemu) -> Run:
    set_up(destination, work)
    destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    port = destination.execute("query-migrate")["socket-address"][0]["port"]
    set_up(source.qemu, work)
    prepare(work)
    before = source.pages_per_second()
    meter = Meter(source.qemu.process.pid, destination.process.pid)
    pages, began = source.pages(), time.perf_counter()
    source.qemu.migrate(f"tcp:127.0.0.1:{port}")
    with _cancelling(source.qemu, work.bound):
        status = source.qemu.wait_status("completed", "failed", "cancelled")
    ended = time.perf_counter()
    if status == "failed":
        raise RunFailed(f"QEMU: the migration has failed: {destination.log().strip()}")
    written = source.pages() - pages
    if status == "completed":
        destination.wait_status("completed")
        outside = time.perf_counter() - began
        source.qemu.wait_run_state("postmigrate")  # the event comes before the total is known
    else:
        outside = ended - began
    told = source.qemu.execute("query-migrate")
    ram = told.get("ram", {})
    return Run(
        converged=status == "completed",
        seconds=told.get("total-time", 0) / 1000,
        outside=outside,
        downtime=float(told.get("downtime", 0)),
        rounds=ram.get("dirty-sync-count", 0),
        sent=ram.get("transferred", 0),
        cpu=meter.cpu(),
        overhead=meter.overhead(),
        pages_before=before,
        pages_during=written / (ended - began),
    )


class Source:
    """A QEMU with its memory filled, whose guest does what it is to do. A context manager."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._steering: Steering | None = None

    def pages(self) -> int:
        """Pages that the guest has written so far."""
        return self._steering.pages() if self._steering is not None else 0

    def pages_per_second(self) -> float:
        """How many pages it writes while it is left alone."""
        pattern = self._work.pattern
        if pattern is None or not pattern.working_set:
            return 0.0
        first, began = self.pages(), time.perf_counter()
        time.sleep(self._work.before)
        return (self.pages() - first) / (time.perf_counter() - began)

    def __enter__(self) -> Self:
        work = self._work
        anonymous = work.content in {"none", "touched"}  # a hole in a memfd would be filled by whoever reads it
        kind = "memory-backend-ram" if anonymous else "memory-backend-memfd"
        backend = f"{kind},id=m,size={work.mib}M,prealloc={'off' if work.content == 'none' else 'on'}"
        if not anonymous:
            backend += ",share=on"
        guest = writer() if work.pattern is not None else None
        extra = ("-object", backend)
        self.qemu = Qemu(work.mib, machine="pc,memory-backend=m", guest=guest, stopped=True, extra=extra)
        try:
            if not anonymous:
                self._fill()
        except BaseException:
            self.qemu.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.qemu.close()

    def _fill(self) -> None:
        with _memory_of(self.qemu).open("r+b") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), self._work.size), np.uint8)
        fill(memory, self._work.content)
        pattern = self._work.pattern
        if pattern is None:
            return
        self.qemu.execute("cont")
        self.qemu.wait_started()
        self._steering = Steering(memory)
        if pattern.working_set:
            self._steering.begin(pattern)


def _destination(work: Work) -> Qemu:
    prealloc = "on" if work.destination == "preallocated" else "off"
    extra = ("-object", f"memory-backend-ram,id=m,size={work.mib}M,prealloc={prealloc}")
    guest = writer() if work.pattern is not None else None
    return Qemu(
        work.mib,
        machine="pc,memory-backend=m",
        guest=guest,
        incoming="defer",
        stopped=work.pattern is None,
        extra=extra,
    )


def set_up(qemu: Qemu, work: Work) -> None:
    """Make settings that both ends need, or that the one they do not concern ignores."""
    capabilities = [name for name, wanted in (("multifd", work.lanes), ("xbzrle", work.xbzrle)) if wanted]
    if capabilities:
        qemu.switch_on(*capabilities)
    parameters: dict[str, Any] = {
        "max_bandwidth": work.bandwidth or WITHOUT_LIMIT,
        "downtime_limit": work.downtime_limit,
    }
    if work.lanes:
        parameters |= {"multifd_channels": work.lanes, "multifd_compression": work.compression}
    qemu.execute("migrate-set-parameters", **parameters)


@contextmanager
def _cancelling(qemu: Qemu, seconds: float) -> Iterator[None]:
    """Cancel the migration of `qemu` after so many seconds, from a monitor of its own."""
    second = qemu.connect()
    timer = threading.Timer(seconds, _cancel, [second])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _cancel(monitor: Qmp) -> None:
    monitor.execute("migrate_cancel")


def _memory_of(qemu: Qemu) -> Path:
    """The memfd that is the memory of `qemu`."""
    folder = Path(f"/proc/{qemu.process.pid}/fd")
    for link in folder.iterdir():
        if "memory-backend-memfd" in str(link.readlink()):
            return link
    raise RunFailed("QEMU: its memory is no memfd")
