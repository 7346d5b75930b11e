"""QEMU's side of a comparison: a machine moves from one QEMU (TCG) to another over loopback TCP.

Memory is what a QEMU takes by itself: anonymous, in huge pages where the system lets it. The source has touched all of
its own beforehand, as one whose guest has run for a while has. It is filled from outside while the guest stands still
(`Memory`), the guest is told through it what to do, and its progress is read from it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, Self

from tests.qemu import peer
from tests.qemu.peer import Qemu
from tests.qemu.qmp import Qmp, QmpError

from benchmarks.contents import pieces
from benchmarks.guests import Steering, writer
from benchmarks.warming import check_room, prepare
from benchmarks.watching import Meter
from benchmarks.work import Pattern, Run, RunFailed, Work
from benchmarks.writers import DRIVE

if TYPE_CHECKING:
    from typing_extensions import Buffer

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


class Memory:
    """The RAM of a QEMU, by the guest's addresses up to where a PC's has its hole, and by offsets all of it.

    It is read and written in the process that has it (proc(5), /proc/PID/mem), which the parent of a process may do.
    """

    def __init__(self, qemu: Qemu) -> None:
        said = qemu.execute("human-monitor-command", command_line="gpa2hva 0")
        self._start = int(said.strip().rpartition(" ")[2], 16)
        self._fd = os.open(f"/proc/{qemu.process.pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def read(self, address: int, size: int) -> bytes:
        """What is there."""
        return os.pread(self._fd, size, self._start + address)

    def write(self, address: int, data: Buffer) -> None:
        """Put something there."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], self._start + address + done)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


class Source:
    """A QEMU with its memory filled, whose guest does what it is to do. A context manager."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._memory: Memory | None = None
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
        prealloc = "off" if work.content == "none" else "on"
        backend = _backend(work, prealloc=prealloc)
        guest = writer() if work.pattern is not None else None
        extra = ("-object", backend, *_drive(work.source_image))
        self.qemu = Qemu(work.mib, machine="pc,memory-backend=m", guest=guest, stopped=True, extra=extra)
        try:
            self._memory = Memory(self.qemu)
            if work.content not in {"none", "touched"}:
                for offset, piece in pieces(work.size, work.content):
                    self._memory.write(offset, piece.data)
            if work.pattern is not None:
                self._start(work.pattern)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.qemu.close()
        if self._memory is not None:
            self._memory.close()

    def _start(self, pattern: Pattern) -> None:
        assert self._memory is not None
        self.qemu.execute("cont")
        self.qemu.wait_started()
        self._steering = Steering(self._memory)
        if pattern.working_set:
            self._steering.begin(pattern)


def _destination(work: Work) -> Qemu:
    prealloc = "on" if work.destination == "preallocated" else "off"
    extra = ("-object", _backend(work, prealloc=prealloc), *_drive(work.destination_image))
    guest = writer() if work.pattern is not None else None
    return Qemu(
        work.mib,
        machine="pc,memory-backend=m",
        guest=guest,
        incoming="defer",
        stopped=work.pattern is None,
        extra=extra,
    )


def _backend(work: Work, *, prealloc: str) -> str:
    kind = "memory-backend-memfd,share=on" if work.shared else "memory-backend-ram"
    return f"{kind},id=m,size={work.mib}M,prealloc={prealloc}"


def _drive(image: str) -> tuple[str, ...]:
    if not image:
        return ()
    return ("-drive", f"id={DRIVE},file={image},format=raw,if=none", "-device", f"ide-hd,drive={DRIVE}")


def set_up(qemu: Qemu, work: Work) -> None:
    """Make settings that both ends need, or that the one they do not concern ignores."""
    wanted = {
        "multifd": work.lanes,
        "xbzrle": work.xbzrle,
        "block": work.source_image,
        "zero-blocks": work.zero_blocks,
    }
    capabilities = [name for name, state in wanted.items() if state]
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
