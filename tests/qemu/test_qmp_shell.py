"""The `qmp-shell` of the package qemu.qmp: the same lines typed at a real QEMU's monitor and at ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .ours import Ours
from .peer import Qemu
from .qmp import PATIENCE

LINES = [
    "query-status",
    "query-migrate",
    'migrate-set-capabilities capabilities=[{"capability":"return-path","state":true}]',
    "migrate-set-parameters max-bandwidth=1073741824 downtime-limit=50",
    "query-name",
    "nothing at=all",
    "migrate-continue state=pre-switchover",
    "migrate uri=unix:/nonexistent/x",
]


def typed(where: Path, home: Path) -> list[str]:
    """What the shell prints at the monitor `where`, behind its welcome; a reply in a line each, members in order."""
    shell = Path(sys.executable).with_name("qmp-shell")
    done = subprocess.run(
        [shell, where],
        input="\n".join(LINES) + "\n",
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    welcome, connected, *rest = done.stdout.splitlines()
    assert welcome == "Welcome to the QMP low-level shell!"
    assert re.fullmatch(r"Connected to QEMU 7\.2\.\d+", connected)
    lines = [line.replace("(QEMU) ", "") for line in rest]
    return [json.dumps(json.loads(line), sort_keys=True) if line.startswith("{") else line for line in lines]


def test_the_shell_cannot_tell_them_apart(
    qemu_7_2: None, qemu: Callable[..., Qemu], ours: Callable[..., Ours], tmp_path: Path
) -> None:
    theirs = qemu(1, machine="none", stopped=True, events=False, extra=["-name", "heat"])
    shown = typed(theirs.dir / "qmp", tmp_path), typed(ours(events=False).dir / "qmp", tmp_path)
    assert shown[0] == shown[1]
    assert [line for line in shown[0] if line][-1] == '{"return": {}}'
    assert sum(line.startswith("{") for line in shown[0]) == len(LINES)
