"""The processes that `bench.py` starts: one source or destination each, told what to do by arguments.

Each prints JSON lines: a destination its address first, a source its result last. A destination ends with its peer.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import whimbrel
from whimbrel.machine.memory import MemoryArea

MIB = 1 << 20


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def ready() -> None:
    """Say that the memory is filled, and wait for the word to go."""
    say(ready=True)
    sys.stdin.readline()


def warm(mib: int) -> None:
    """Touch memory and give it back, so that what is allocated next is backed by the hypervisor already."""
    MemoryArea(mib * MIB).populate()


def random_fill(view: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    generator = np.random.default_rng(1)
    for start in range(0, len(view), 64 * MIB):
        part = view[start : start + 64 * MIB]
        part[:] = np.frombuffer(generator.bytes(len(part)), np.uint8)


def machine(mib: int) -> whimbrel.Machine:
    built = whimbrel.Machine("bench")
    built.ram.add("ram", mib * MIB)
    return built


def resident(what: str) -> int:
    """Bytes resident: "VmRSS" now, "VmHWM" at most since the last `forget_peak`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[what].split()[0]) * 1024


def forget_peak() -> None:
    """Begin to measure "VmHWM" anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def source(uri: str, mib: int, fill: str, tracker: str = "auto") -> None:
    with machine(mib) as built:
        built.settings.backends.dirty_tracker = tracker
        built.settings.parameters.max_bandwidth = 0
        block = built.ram["ram"]
        if fill == "random":
            random_fill(block.view)
        elif fill == "touched":
            block.view[:] = 0
        elif fill == "sparse":
            block.view[:: 64 * MIB] = 1
        if fill == "idle":
            random_fill(block.view)
            built.guest = whimbrel.LoopGuest(lambda: time.sleep(0.001))
        built.start()
        ready()
        forget_peak()
        before = resident("VmRSS")
        cpu = time.process_time()
        began = time.perf_counter()
        info = built.migrate(uri).wait()
        seconds = time.perf_counter() - began
        say(seconds=seconds, downtime=info.downtime_exact, rounds=info.rounds, cpu=time.process_time() - cpu,
            overhead=resident("VmHWM") - before, tracker=info.tracker)  # fmt: skip


def destination(mib: int, memory: str = "fresh") -> None:
    with machine(mib) as built:
        if memory == "populated":
            built.ram["ram"].populate()
        arriving = built.incoming("tcp:127.0.0.1:0")
        say(uri=arriving.uri)
        cpu = time.process_time()
        arriving.wait()
        say(cpu=time.process_time() - cpu)


def raw_source(address: str, mib: int) -> None:
    """Sends its memory as it is: the limit that no protocol can pass."""
    area = MemoryArea(mib * MIB)
    random_fill(area.view)
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port))) as link:
        data = area.view.data
        ready()
        cpu = time.process_time()
        began = time.perf_counter()
        for start in range(0, len(data), MIB):
            link.sendall(data[start : start + MIB])
        link.shutdown(socket.SHUT_WR)
        link.recv(1)
        say(seconds=time.perf_counter() - began, cpu=time.process_time() - cpu)


def raw_destination(mib: int, memory: str) -> None:
    """Receives into memory of its own: untouched, populated beforehand, or one small buffer."""
    import mmap

    mapping = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(mapping)
    if memory == "populated":
        np.frombuffer(mapping, np.uint8)[::4096] = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        say(uri=f"{host}:{port}")
        link, _ = listener.accept()
        with link:
            at = 0
            cpu = time.process_time()
            while at < len(view):
                where = view[:MIB] if memory == "reused" else view[at : at + MIB]
                count = link.recv_into(where)
                if count == 0:
                    break
                at += count
            link.sendall(b"!")
            say(cpu=time.process_time() - cpu)


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    known = {f.__name__: f for f in (source, destination, raw_source, raw_destination, warm)}
    known[role](*(int(a) if a.isdigit() else a for a in arguments))
