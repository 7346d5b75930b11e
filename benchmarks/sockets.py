"""A bare socket between two processes, the limit beside which whimbrel stands: `python -m benchmarks.sockets ROLE …`.

A `destination MIB MEMORY` receives into memory of its own, "fresh" or "preallocated"; a `source MIB` sends what it has,
as it is.
"""

from __future__ import annotations

import json
import mmap
import socket
import sys
import time
from typing import Any

import numpy as np

from benchmarks.contents import fill
from benchmarks.processes import Role
from benchmarks.warming import check_room, prepare
from benchmarks.watching import Meter
from benchmarks.work import MIB, Run, Work

PATIENCE = 300.0  # seconds


def send(work: Work) -> Run:
    """Send as much memory as `work` has from one process to another, and nothing else."""
    check_room(work)
    size = str(work.mib)
    with Role("sockets", "destination", size, work.destination) as there, Role("sockets", "source", size) as here:
        port = there.hear(PATIENCE)["port"]
        here.hear(PATIENCE)
        prepare(work)
        meter = Meter(here.pid, there.pid)
        began = time.perf_counter()
        seconds = here.ask(PATIENCE, port=port)["seconds"]
        return Run(
            converged=True,
            seconds=seconds,
            outside=time.perf_counter() - began,
            downtime=0.0,
            rounds=1,
            sent=work.size,
            cpu=meter.cpu(),
            overhead=meter.overhead(),
        )


def source(size: int) -> None:
    """Send memory until all of it is there."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fill(np.frombuffer(area, np.uint8), "random")
    view = memoryview(area)
    _say(ready=True)
    port = json.loads(sys.stdin.readline())["port"]
    with socket.create_connection(("127.0.0.1", port)) as link:
        began = time.perf_counter()
        for start in range(0, size, MIB):
            link.sendall(view[start : start + MIB])
        link.shutdown(socket.SHUT_WR)
        link.recv(1)
        _say(seconds=time.perf_counter() - began)
    sys.stdin.read()


def destination(size: int, memory: str) -> None:
    """Receive into memory."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    if memory == "preallocated":
        np.frombuffer(area, np.uint8)[::4096] = 0
    view = memoryview(area)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _say(port=listener.getsockname()[1])
        link, _ = listener.accept()
        at = 0
        with link:
            while count := link.recv_into(view[at : at + MIB]) if at < size else 0:
                at += count
            link.sendall(b"!")
    sys.stdin.read()


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    role, mib, *more = sys.argv[1:]
    if role == "source":
        source(int(mib) * MIB)
    else:
        destination(int(mib) * MIB, *more)
