"""Host memory that is there already: `python -m benchmarks.warming MIB` touches so much of it and gives it back.

On a virtual machine whose hypervisor takes free memory back, the first touch of a page would otherwise measure the
hypervisor (some 4 s for each GiB), in whichever of the runs comes first. Where just that is to be measured, the
hypervisor is given the time to take what is free.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from benchmarks.processes import ROOT
from benchmarks.work import MIB, RunFailed, Work

PATIENCE: Final = 300.0  # seconds
TAKING: Final = 6.0  # seconds: free memory is reported to a hypervisor every 2 s (free page reporting)


def prepare(work: Work) -> None:
    """Have the host provide as much memory as the destination of `work` will touch, and a quarter more; or none."""
    if work.host == "cold":
        time.sleep(TAKING)
        return
    provide(work.mib + work.mib // 4)


def provide(mib: int) -> None:
    """Have the host provide so much memory."""
    command = [sys.executable, "-m", "benchmarks.warming", str(mib)]
    subprocess.run(command, check=True, timeout=PATIENCE, cwd=ROOT)


def check_room(work: Work) -> None:
    """Raise RunFailed if there is no room for both sides of `work`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) // 1024
    needed = 2 * work.mib + work.mib // 4 + 256
    if free < needed:
        raise RunFailed(
            f"{free} MiB of memory are free, and {needed} MiB are needed for two machines of {work.mib} MiB"
        )


def _touch(size: int) -> None:
    from whimbrel.machine.memory import MemoryArea

    MemoryArea(size).populate()


if __name__ == "__main__":
    _touch(int(sys.argv[1]) * MIB)
