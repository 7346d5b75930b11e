"""whimbrel's side of a comparison: a machine moves from one process to another."""

from __future__ import annotations

import json
import time
from typing import Any, Final

import attrs

from benchmarks.processes import Role
from benchmarks.warming import check_room, prepare
from benchmarks.watching import Meter, cpu_seconds
from benchmarks.work import Run, RunFailed, Work

START: Final = 300.0  # seconds to fill the memory, where the host has to find it first
END: Final = 30.0


def missing() -> str:
    """Why this side cannot be measured here; never."""
    return ""


def migrate(work: Work) -> Run:
    """Move a machine as `work` says. Raises RunFailed."""
    check_room(work)
    text = json.dumps(attrs.asdict(work))
    with Role("roles", "destination", text) as destination, Role("roles", "source", text) as source:
        uri = destination.hear(START)["uri"]
        source.hear(START)
        prepare(work)
        before = _pages_per_second(source, work)
        meter = Meter(source.pid, destination.pid)
        idle = cpu_seconds(destination.pid)
        began = time.perf_counter()
        told = source.ask(work.bound + END, do="migrate", uri=uri)
        arrived = destination.hear(END)
        outside = time.perf_counter() - began
        if told["converged"] and not arrived["arrived"]:
            raise RunFailed(f"the destination has failed: {arrived['error']}")
        return Run(
            converged=told["converged"],
            seconds=told["milliseconds"] / 1000,
            outside=outside,
            downtime=told["downtime"],
            rounds=told["rounds"],
            sent=told["sent"],
            cpu=meter.cpu(),
            destination_cpu=cpu_seconds(destination.pid) - idle,
            overhead=meter.overhead(),
            pages_before=before,
            pages_during=told["pages_during"],
        )


def _pages_per_second(source: Role, work: Work) -> float:
    if work.pattern is None or not work.pattern.working_set:
        return 0.0
    first = _count(source)
    time.sleep(work.before)
    last = _count(source)
    rate: float = (last["pages"] - first["pages"]) / (last["at"] - first["at"])
    return rate


def _count(source: Role) -> dict[str, Any]:
    return source.ask(END, do="count")
