"""A bare socket between two processes, the limit beside which whimbrel stands: `python -m benchmarks.sockets ROLE …`.

A `destination MIB MEMORY` receives into memory of its own, "fresh" or "preallocated"; a `source MIB` sends what it has,
as it is. With an IMAGE behind these, it is written to as it comes, and sent from as it is read, a MiB at a time.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contents import fill
from benchmarks.processes import Role
from benchmarks.warming import check_room, prepare
from benchmarks.watching import Meter
from benchmarks.work import MIB, Run, Work

PATIENCE = 300.0  # seconds


def send(work: Work) -> Run:
    """Send as much memory as `work` has from one process to another, and nothing else; or its drive, if it has one."""
    check_room(work)
    images = [image for image in (work.source_image, work.destination_image) if image]
    size = str(Path(images[0]).stat().st_size // MIB if images else work.mib)
    with (
        Role("sockets", "destination", size, work.destination, *images[1:]) as there,
        Role("sockets", "source", size, *images[:1]) as here,
    ):
        port = there.hear(PATIENCE)["port"]
        here.hear(PATIENCE)
        if not images:
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
            sent=int(size) * MIB,
            cpu=meter.cpu(),
            overhead=meter.overhead(),
        )


def source(size: int, image: str = "") -> None:
    """Send memory, or an image, until all of it is there."""
    if image:
        _send_image(size, image)
        return
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fill(np.frombuffer(area, np.uint8), "random")
    view = memoryview(area)
    _send(view[start : start + MIB] for start in range(0, size, MIB))


def _send_image(size: int, path: str) -> None:
    piece = memoryview(bytearray(MIB))
    with open(path, "rb", buffering=0) as image:  # noqa: PTH123 - as Path.open, and shorter
        _send(piece for start in range(0, size, MIB) if os.preadv(image.fileno(), [piece], start))


def _send(pieces: Iterable[memoryview]) -> None:
    _say(ready=True)
    port = json.loads(sys.stdin.readline())["port"]
    with socket.create_connection(("127.0.0.1", port)) as link:
        began = time.perf_counter()
        for piece in pieces:
            link.sendall(piece)
        link.shutdown(socket.SHUT_WR)
        link.recv(1)
        _say(seconds=time.perf_counter() - began)
    sys.stdin.read()


def destination(size: int, memory: str, image: str = "") -> None:
    """Receive into memory, or into an image."""
    if image:
        _receive_image(size, image)
        return
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


def _receive_image(size: int, path: str) -> None:
    piece = memoryview(bytearray(MIB))
    with socket.create_server(("127.0.0.1", 0)) as listener, open(path, "rb+", buffering=0) as image:  # noqa: PTH123
        _say(port=listener.getsockname()[1])
        link, _ = listener.accept()
        with link:
            for start in range(0, size, MIB):
                count = link.recv_into(piece, MIB, socket.MSG_WAITALL)
                os.pwrite(image.fileno(), piece[:count], start)
            link.sendall(b"!")
    sys.stdin.read()


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    role, mib, *more = sys.argv[1:]
    if role == "source":
        source(int(mib) * MIB, *more)
    else:
        destination(int(mib) * MIB, *more)
