"""`whimbrel run --journal` as real processes that are killed: what is said, what starts, and what does not."""

from __future__ import annotations

import signal

import pytest

from whimbrel.migration import journal as journals

pytestmark = pytest.mark.slow

LISTENING = r"^listening on (\S+)$"
HERE = "unix:here.qmp"


@pytest.fixture
def run(start, app, monkeypatch):
    """Starts `whimbrel run` on the small machine, with a journal."""
    monkeypatch.chdir(app.parent)
    return lambda journal, *more: start("run", "app.py:small", "--journal", journal, *more)


def ownerships(folder):
    return [record.ownership for record in journals.read(folder / "records.journal")]


def test_one_that_was_killed_starts_afresh_and_says_so(run, app):
    first = run("here")
    first.wait_line("^machine 'records' runs$")
    first.interrupt(signal.SIGKILL)
    assert first.exit_code == -signal.SIGKILL
    second = run("here")
    second.wait_line("^the machine ran here in epoch 1 until its process ended; its memory is gone with it$")
    second.wait_line("^machine 'records' runs$")
    third = run("here")
    assert third.exit_code == 1
    assert "held by another process" in third.stderr
    second.interrupt()
    assert second.exit_code == 130
    assert ownerships(app.parent / "here") == ["owner", "owner"]
    waiting = run("here", "--incoming", "tcp:127.0.0.1:0")
    assert waiting.exit_code == 1
    assert "without --incoming it starts afresh" in waiting.stderr


def test_one_that_has_moved_away_does_not_start_again(run, start, app):
    waiting = run("there", "--incoming", "tcp:127.0.0.1:0")
    source = run("here", "--qmp", HERE)
    source.wait_line("^machine 'records' runs$")
    assert start("migrate", waiting.wait_line(LISTENING)[1], "--qmp", HERE).exit_code == 0
    assert source.exit_code == 0
    waiting.wait_line("^the machine has arrived and runs here$")
    assert ownerships(app.parent / "here") == ["owner", "frozen", "prepared", "released", "done"]
    assert ownerships(app.parent / "there") == ["loading", "prepared", "owner"]
    again = run("here")
    assert again.exit_code == 1
    assert "the machine has moved to tcp:127.0.0.1:" in again.stderr
    assert "--incoming waits for it; --afresh starts it here" in again.stderr
    waiting.interrupt()
    assert waiting.exit_code == 130
    back = run("here", "--afresh")
    back.wait_line("^machine 'records' runs$")
    back.interrupt()
    assert back.exit_code == 130


def test_a_source_that_is_killed_in_the_blackout_asks_when_it_is_back(run, start, app):
    """It stands still in pre-switchover: the destination has not everything and says no, so nobody has the machine."""
    waiting = run("there", "--incoming", "tcp:127.0.0.1:0")
    uri = waiting.wait_line(LISTENING)[1]
    source = run("here", "--qmp", HERE, "--capability", "pause-before-switchover")
    source.wait_line("^machine 'records' runs$")
    start("migrate", uri, "--qmp", HERE, "--detach")
    migrating = start("status", "--qmp", HERE)
    assert migrating.exit_code == 0
    while "held still" not in start_status(start):
        pass
    source.interrupt(signal.SIGKILL)
    assert source.exit_code == -signal.SIGKILL
    assert waiting.exit_code == 1
    assert ownerships(app.parent / "here")[-1] == "frozen"
    back = run("here")
    back.wait_line("^the machine was being handed over to .*, which may hold it whole: it has to be asked$")
    again = run("there", "--incoming", uri)
    again.wait_line(LISTENING)
    back.wait_line("^the machine ran here in epoch .* its memory is gone with it$")
    back.wait_line("^machine 'records' runs$")
    assert ownerships(app.parent / "here")[-3:] == ["released", "owner", "owner"]
    for process in (back, again):
        process.interrupt()
        assert process.exit_code == 130


def start_status(start):
    asked = start("status", "--qmp", HERE)
    assert asked.exit_code == 0
    return asked.stdout


def test_what_makes_no_sense(cli, complaint):
    for options in (["--afresh"], ["--afresh", "--journal", "j", "--incoming", "tcp:127.0.0.1:0"]):
        result = cli("run", "app.py:small", *options)
        assert result.exit_code == 2
        assert "--afresh is about what a journal says" in result.stderr
