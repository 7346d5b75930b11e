"""What processes cost, seen from outside: time of all their threads, and how far their memory grew."""

from __future__ import annotations

import time
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """Seconds of processor time that all threads of a process have used, those that have ended too.

    The clock of another process has a number of its own (clock_getcpuclockid(3)); it counts nanoseconds, where
    /proc/PID/stat counts hundredths of a second.
    """
    return time.clock_gettime((~pid << 3) | 2)


def forget_peak(pid: int) -> int:
    """Begin to measure `peak` anew (proc(5), clear_refs); returns the bytes that are resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _resident(pid, "VmRSS")


def peak(pid: int) -> int:
    """The most bytes that were resident since `forget_peak`."""
    return _resident(pid, "VmHWM")


def _resident(pid: int, what: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[what].split()[0]) * 1024


class Meter:
    """Processor time of some processes from now on, and how far the memory of the first of them grows."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._resident = forget_peak(pids[0])
        self._before = self._cpu()

    def cpu(self) -> float:
        """Seconds so far."""
        return self._cpu() - self._before

    def overhead(self) -> int:
        """Bytes that the first process had resident at most above what it had at the beginning."""
        return max(0, peak(self._pids[0]) - self._resident)

    def _cpu(self) -> float:
        return sum(map(cpu_seconds, self._pids))
