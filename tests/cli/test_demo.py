"""`whimbrel demo`: two real processes, a move under load, and a comparison of every byte."""

from __future__ import annotations

import json
import os
import queue
import signal

import numpy as np
import pytest

from whimbrel.cli import _children, _demonstration
from whimbrel.cli._children import ENDED, Child
from whimbrel.cli._demonstration import Result

INTERRUPTED = "interrupted; both processes were ended, and the machine with them"
SMALL = ("demo", "--size", "32MiB", "--rate", "5000")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Work for less long where nothing is measured."""
    monkeypatch.setattr(_demonstration, "BEFORE", 0.2)
    monkeypatch.setattr(_demonstration, "AFTER", 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_the_machine_arrives_whole(cli, transport):
    demo = cli(*SMALL, "--transport", transport, "--json", "--seed", "5")
    assert demo.exit_code == 0, demo.stderr
    assert demo.stderr == ""
    told = json.loads(demo.stdout)
    assert told["identical"] is True
    assert told["check"]["bytes"] == 32 << 20
    assert told["migration"]["status"] == "completed"
    assert told["migration"]["ram"]["total"] == 32 << 20
    assert told["problem"] == ""
    # It was under load before, during and after, and every operation was counted.
    assert min(told["operations-per-second"].values()) > 0
    assert told["check"]["operations"] > 1000


@pytest.mark.slow
def test_the_updates_may_be_made_in_a_process_of_their_own(cli):
    demo = cli(*SMALL, "--guest", "process", "--json")
    assert demo.exit_code == 0, demo.stderr
    told = json.loads(demo.stdout)
    assert told["identical"] is True
    assert told["check"]["bytes"] == 32 << 20
    assert told["migration"]["dirty-tracker"] in {"userfaultfd+guest", "compare"}
    assert min(told["operations-per-second"].values()) > 0


@pytest.mark.slow
def test_a_guest_that_writes_faster_than_the_link_is_said_so(cli, complaint):
    demo = cli("demo", "--size", "4MiB", "--rate", "0", "--max-bandwidth", "1MiB", "--timeout", "500ms")
    assert demo.exit_code == 1
    assert complaint(demo).startswith("the migration was cancelled because it did not converge within 0.5 s")
    assert "cancelled" in demo.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "number", "status"), [("^two processes", signal.SIGTERM, 143), ("^round 1, .* left", signal.SIGINT, 130)]
)
def test_no_child_is_left_behind(start, line, number, status):
    demo = start(*SMALL, "--max-bandwidth", "1MiB")
    demo.wait_line(line)
    children = demo.children
    assert len(children) == 2
    demo.interrupt(number)
    assert demo.exit_code == status
    assert not any(map(is_there, children))
    assert "Traceback" not in demo.stderr
    assert demo.stdout == ""
    if number is signal.SIGINT:
        assert demo.stderr.splitlines()[-1] == f"whimbrel: {INTERRUPTED}"


@pytest.mark.slow
def test_ctrl_c_is_told_to_programs(start):
    demo = start(*SMALL, "--json")
    while len(demo.children) < 2:
        assert demo.process.poll() is None
    demo.interrupt()
    assert demo.exit_code == 130
    assert demo.stderr.strip() == f"whimbrel: {INTERRUPTED}"
    assert demo.json() == {"error-code": "cancelled", "error-desc": INTERRUPTED}


def test_a_child_that_dies_is_said_so():
    inbox = queue.SimpleQueue()
    with Child("source", [_demonstration.ROLES, "--role", "source", "--size", "64"], inbox) as child:
        assert inbox.get(timeout=60)[1]["event"] == "ready"
        os.kill(child.pid, signal.SIGKILL)
        while inbox.get(timeout=60)[1]["event"] != ENDED:
            pass
        child.tell({"do": "stop"})  # to nobody, which is no error
        assert str(child.fate()) == "the source process ended with status -9: it said nothing"
    assert not is_there(child.pid)


def test_a_child_that_does_not_listen_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(_children, "GRACE", 0.1)
    (tmp_path / "deaf.py").write_text('print(\'{"event": "ready"}\', flush=True)\nwhile True: pass\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    inbox = queue.SimpleQueue()
    with Child("deaf", ["deaf"], inbox) as child:
        assert inbox.get(timeout=60)[1]["event"] == "ready"
    assert not is_there(child.pid)


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_difference_is_shown_with_its_place():
    checked = {"differing": 3, "bytes": 64, "first": 17, "operations": 5}
    result = Result(
        size=64,
        before=100.0,
        during=90.0,
        after=100.0,
        migration={"status": "completed"},
        expected_downtime=1.0,
        checked=checked,
        problem="3 bytes are not what they should be",
    )
    assert result.as_dict()["identical"] is False
    assert dict(result.rows())["check"] == "3 of 64 bytes differ, the first at offset 17"
    assert dict(result.rows())["operations/s during"] == "90 (90%)"


def test_the_check_finds_a_single_wrong_bit():
    from whimbrel_examples import records, roles

    with records.machine(size=1 << 16) as machine:
        role = roles.Role(machine)
        mine = records.records_of(machine)
        mine.fill()
        records.apply(mine.table, mine.seed, 0, 1000)
        mine.operations = 1000
        assert role._checked() == {"bytes": 1 << 16, "differing": 0, "first": None}
        mine.table.view(np.uint8)[4711] ^= 1
        assert role._checked() == {"bytes": 1 << 16, "differing": 1, "first": 4711}
