"""Builds the wheels once: whimbrel's own and a stranger's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def build(project: Path, into: Path) -> Path:
    """Build a wheel of `project` with what is installed here, as an author would without an index."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(into), str(project)], check=True, capture_output=True)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def pigeon_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT / "tests" / "plugins" / "whimbrel-pigeon", tmp_path_factory.mktemp("pigeon"))
