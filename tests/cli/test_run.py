"""`whimbrel run` as real processes: moves between them, signals, and what is left to an operator."""

from __future__ import annotations

import signal
import socket
from contextlib import suppress

import pytest

from whimbrel.errors import MonitorError
from whimbrel.monitor import MonitorClient

pytestmark = pytest.mark.slow

LISTENING = r"^listening on (\S+)$"
MONITOR = r"^monitor on (\S+)$"
HERE, THERE = "unix:here.qmp", "unix:there.qmp"


@pytest.fixture
def pair(start, app, monkeypatch):
    """Starts a destination that waits and a source that runs; yields them and the URI that leads from one to the other.

    Their monitors are HERE, the source's, and THERE, the destination's, in the current folder.
    """
    monkeypatch.chdir(app.parent)

    def begin(source=(), destination=()):
        waiting = start("run", "app.py:small", "--incoming", "tcp:127.0.0.1:0", "--qmp", THERE, *destination)
        running = start("run", "app.py:small", "--qmp", HERE, *source)
        running.wait_line(r"^machine 'records' runs$")
        return running, waiting, waiting.wait_line(LISTENING)[1]

    return begin


def status_of(qmp):
    with MonitorClient.connect(qmp) as monitor:
        return monitor.execute("x-whimbrel-info")


def test_a_machine_moves_from_one_process_to_another(start, pair):
    source, destination, uri = pair(["--set", "max-bandwidth=0"])
    migrate = start("migrate", uri, "--qmp", HERE, "--json")
    assert migrate.exit_code == 0
    info = migrate.json()
    assert (info["status"], info["ram"]["total"]) == ("completed", 16 << 20)
    source.wait_line(r"^the machine has moved away \(downtime ")
    assert source.exit_code == 0
    destination.wait_line("^the machine has arrived and runs here$")
    assert status_of(THERE)["run-state"] == "running"
    destination.interrupt(signal.SIGTERM)
    assert destination.exit_code == 143
    assert (source.stdout, destination.stdout) == ("", "")


def test_ctrl_c_during_a_migration(start, pair):
    source, destination, uri = pair(["--set", "max-bandwidth=1MiB"])
    migrate = start("migrate", uri, "--qmp", HERE)
    migrate.wait_line(r"^round 1, .* left, sends ")
    migrate.interrupt()
    assert migrate.exit_code == 130
    assert "whimbrel: the migration was cancelled; the machine goes on where it is" in migrate.stderr
    source.wait_line("^the migration was cancelled; the machine goes on here$")
    assert status_of(HERE)["run-state"] == "running"
    # The destination had been told to wait for one machine, and that did not come.
    assert destination.exit_code == 1
    assert destination.stderr.splitlines()[-1].startswith("whimbrel: ")
    source.interrupt()
    assert source.exit_code == 130


def test_ctrl_c_ends_the_source_of_a_migration_that_runs(start, pair):
    source, destination, uri = pair(["--set", "max-bandwidth=1MiB", "--capability", "events"])
    with MonitorClient.connect(HERE) as monitor:
        monitor.execute("migrate", uri=uri)
        while monitor.wait_event("MIGRATION", 60)["data"]["status"] != "active":
            pass
        source.interrupt()
        assert source.exit_code == 130
    assert source.stderr.splitlines()[-1] == "SIGINT: the machine is stopped and ends here"
    assert destination.exit_code == 1


def test_a_source_that_stays_is_quit_by_its_monitor(pair):
    source, destination, uri = pair(["--stay"], ["--paused"])
    with MonitorClient.connect(HERE) as monitor:
        monitor.execute("migrate", uri=uri)
        source.wait_line("^the machine has moved away")
        assert monitor.execute("query-status")["status"] == "postmigrate"
        monitor.execute("quit")
    assert source.exit_code == 0
    destination.wait_line("^the machine has arrived and is paused here$")
    with MonitorClient.connect(THERE) as monitor:
        monitor.execute("cont")
        assert monitor.execute("query-status")["running"]
        monitor.execute("quit")
    assert destination.exit_code == 0


def test_paused_and_deferred(start, app):
    destination = start("run", "app.py:small", "--incoming", "defer", "--qmp", "tcp:127.0.0.1:0")
    source = start("run", "app.py:small", "--paused", "--qmp", "tcp:127.0.0.1:0")
    there = destination.wait_line(MONITOR)[1]
    destination.wait_line("^waiting to be told")
    here = source.wait_line(MONITOR)[1]
    source.wait_line("^machine 'records' is ready and paused$")
    with MonitorClient.connect(there) as far, MonitorClient.connect(here) as near:
        # One that fails is not the end of a wait that is told by QMP where to happen.
        far.execute("migrate-incoming", uri="unix:first")
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(app.parent / "first"))
            stranger.sendall(b"QEVM\0\0\0\3GET /")
            stranger.shutdown(socket.SHUT_WR)
            destination.wait_line("^whimbrel: .*; waiting to be told where the next one arrives$")
        far.execute("migrate-incoming", uri="unix:second")
        near.execute("migrate", uri="unix:second")
        destination.wait_line("^the machine has arrived and is paused here$")
        source.wait_line("^the machine has moved away")
        near.execute("quit")  # it would have gone by itself, a little later
        assert source.exit_code == 0
        far.execute("quit")
    assert destination.exit_code == 0


def test_an_incoming_that_fails_ends_the_process(start, app):
    destination = start("run", "app.py:small", "--incoming", "tcp:127.0.0.1:0")
    _, host, port = destination.wait_line(LISTENING)[1].split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"QEVM\0\0\0\3\7\0\0\0\5other")
        stranger.shutdown(socket.SHUT_WR)
        assert destination.exit_code == 1
    assert destination.stderr.splitlines()[-1].startswith("whimbrel: ")
    assert "Traceback" not in destination.stderr


def test_a_guest_that_fails_ends_the_process(start, app):
    process = start("run", "app.py:breaks")
    assert process.exit_code == 1
    assert process.stderr.splitlines()[-1] == "whimbrel: the guest failed: ValueError('the disk is on fire')"
    assert "Traceback" not in process.stderr


def test_a_guest_that_fails_is_told_to_the_monitors_clients(start, app, monkeypatch):
    monkeypatch.chdir(app.parent)
    process = start("run", "app.py:breaks", "--paused", "--qmp", HERE)
    process.wait_line("is ready and paused$")
    with MonitorClient.connect(HERE) as monitor:
        monitor.execute("cont")
        while (info := monitor.execute("x-whimbrel-info"))["run-state"] != "internal-error":
            pass
        assert info["failure"] == "the guest failed: ValueError('the disk is on fire')"
        assert status_of(HERE)["failure"] == info["failure"]  # a new client may ask as well
        monitor.execute("quit")
    assert process.exit_code == 1
    assert process.stderr.splitlines()[-1] == f"whimbrel: {info['failure']}"


@pytest.mark.parametrize(("factory", "place"), [("breaks", "in step"), ("never", "in power_on")])
def test_debug_shows_where_a_guest_failed(cli, app, factory, place):
    shown = cli("--debug", "run", f"{app}:{factory}")
    assert shown.exit_code == 1
    assert place in shown.stderr
    assert "the disk is on fire" in shown.stderr.splitlines()[-1]


def test_a_source_that_lingers_has_given_its_address_back(start, pair):
    source, destination, uri = pair(["--set", "max-bandwidth=0"])
    with MonitorClient.connect(HERE) as monitor:
        monitor.execute("migrate", uri=uri)
        source.wait_line("^the machine has moved away")
        successor = start("run", "app.py:small", "--incoming", "tcp:127.0.0.1:0", "--qmp", HERE)
        successor.wait_line(LISTENING)
        with suppress(MonitorError):  # it lingers two seconds, and the successor may take longer to begin
            assert monitor.execute("query-status")["status"] == "postmigrate"
    assert source.exit_code == 0
    assert status_of(HERE)["run-state"] == "inmigrate"  # the successor's socket is still there
    for process in (successor, destination):
        process.interrupt()
        assert process.exit_code == 130


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("notifiers=nobody", "unknown notifier 'nobody'"),
        ("active=nobody", "unknown plugin 'nobody'"),
        ("savevm=ram,nobody", "unknown savevm"),
        ("dirty-tracker=nobody", "unknown dirty tracker 'nobody'"),
    ],
)
def test_a_name_that_nobody_has_is_an_error_at_the_start(cli, complaint, app, setting, says):
    result = cli("run", f"{app}:heeds", "--set", setting)
    assert result.exit_code == 2
    assert complaint(result).startswith(says)


def test_a_program_that_fails_ends_the_process(cli, complaint, app):
    result = cli("run", f"{app}:refuses")
    assert result.exit_code == 1
    assert complaint(result) == f"{app}:refuses failed: ValueError: not today; --debug shows where"
    shown = cli("--debug", "run", f"{app}:refuses")
    assert shown.exit_code == 1
    assert "in refuses" in shown.stderr


def test_an_undecided_machine_is_held_until_an_operator_decides(pair, cut_after_the_proof):
    source, destination, uri = pair()
    with cut_after_the_proof(uri) as cut, MonitorClient.connect(HERE) as monitor:
        monitor.execute("migrate", uri=cut)
        source.wait_line("^the machine was let go of, and the answer is missing .*: asking again until it comes$")
        destination.wait_line("^the link has broken with the machine here, whole and stopped .*: waiting for word$")
        assert monitor.execute("query-status")["status"] == "finish-migrate"
        monitor.execute("quit")
    assert source.exit_code == 0
    with MonitorClient.connect(THERE) as monitor:
        monitor.execute("x-whimbrel-adopt")
        assert monitor.execute("query-status")["running"]
    destination.interrupt()
    assert destination.exit_code == 130
