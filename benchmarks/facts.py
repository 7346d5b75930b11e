"""Where and with what it was measured: kept beside the results, since figures mean nothing without."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.qemu import peer


def facts() -> dict[str, Any]:
    """The machine and the programs, ready for JSON."""
    return {
        "cpu": _after("model name", Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "memory-gib": round(int(_after("MemTotal", Path("/proc/meminfo")).split()[0]) / (1 << 20), 1),
        "hypervisor": "hypervisor" in _after("flags", Path("/proc/cpuinfo")).split(),
        "kernel": platform.release(),
        "huge-pages": _choice(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "whimbrel": version("whimbrel"),
        "qemu": peer.version(),
    }


def now() -> str:
    """The time, to be kept."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _after(name: str, file: Path) -> str:
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _choice(file: Path) -> str:
    """Which of the choices that a file of the kernel's lists is in brackets."""
    if not file.exists():
        return "unknown"
    return file.read_text().partition("[")[2].partition("]")[0]
