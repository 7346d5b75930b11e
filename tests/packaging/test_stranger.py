"""A stranger's plugin: a transport of its own, in a wheel of its own, installed beside whimbrel, moves a machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MOVE = """
import sys
import numpy as np
import whimbrel

def machine():
    built = whimbrel.Machine("stranger")
    return built, built.ram.array("data", 1 << 20, "uint8")

source, here = machine()
destination, there = machine()
with source, destination:
    here[:] = np.random.default_rng(7).integers(0, 256, here.size, dtype=np.uint8)
    arriving = destination.incoming("pigeon:" + sys.argv[1])
    info = source.migrate(arriving.uri).wait(30)
    arriving.wait(30)
    print(info.status, destination.run_state, bool((here == there).all()), info.ownership)
"""


@pytest.fixture(scope="module")
def environment(pigeon_wheel, tmp_path_factory):
    """An environment in which the stranger's wheel is installed beside whatever runs the tests."""
    where = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(where)]
    subprocess.run([*install, str(pigeon_wheel)], check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": str(where)}


def test_it_is_offered(environment):
    command = [sys.executable, "-m", "whimbrel", "plugins", "--json"]
    rows = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)["plugins"]
    (row,) = [row for row in rows if row["name"] == "pigeon"]
    assert row["state"] == "offered"
    assert row["distribution"] == "whimbrel-pigeon"
    assert row["kinds"] == ["transport"]


def test_it_moves_a_machine(environment, tmp_path):
    command = [sys.executable, "-c", MOVE, str(tmp_path / "loft")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["completed", "paused", "True", "done"], done.stderr


def test_without_it_its_scheme_is_unknown_and_the_known_ones_are_listed():
    done = subprocess.run([sys.executable, "-c", MOVE, "/nowhere"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "unknown transport 'pigeon'" in done.stderr
    assert "tcp, unix" in done.stderr
