"""migrate, status, cancel and set, against machines behind monitors in this process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time

import pytest

import whimbrel
from whimbrel.cli._monitor import info_of
from whimbrel.events import StateChanged
from whimbrel.monitor import MonitorClient, MonitorServer

SLOW = {"max_bandwidth": 256 << 10}  # sixteen seconds for the machines here; every test ends it before


def when_active(machine, action):
    """Do `action` once a migration of `machine` is active."""

    def notice(event):
        if isinstance(event, StateChanged) and event.new == "active":
            action()

    machine.notifiers.add(notice)


def rows(result):
    """A table of names and values as a dictionary."""
    split = (line.split("  ", 1) for line in result.stdout.splitlines())
    return {name.strip(): value.strip() for name, value in split}


# ------------------------------------------------------------------------------------------------------ migrate


def test_migrate_shows_rounds_and_ends_with_a_table(cli, monitored, destination):
    machine, qmp = monitored()
    result = cli("migrate", destination.uri, "--qmp", qmp, "--downtime-limit", "50ms", "--max-bandwidth", "64MiB")
    assert result.exit_code == 0
    table = rows(result)
    assert table["migration"] == "completed"
    assert table["memory"] == "4 MiB"
    assert table["ownership"] == "done"
    assert {"total time", "downtime", "downtime by cause", "throughput", "rounds", "dirty tracker"} <= set(table)
    assert re.fullmatch(r"(\w+ [\d.]+ \S+, )+start [\d.]+ \S+", table["downtime by cause"])
    assert result.stderr.splitlines()
    assert machine.run_state == "postmigrate"
    assert machine.settings.parameters.downtime_limit == 50
    assert machine.settings.parameters.max_bandwidth == 64 << 20
    assert destination.wait(10).ownership == "owner"


def test_migrate_for_programs(cli, monitored, destination):
    _, qmp = monitored()
    result = cli("migrate", destination.uri, "--qmp", qmp, "--capability", "return-path", "--json")
    assert result.exit_code == 0
    info = json.loads(result.stdout)
    assert (info["status"], info["ownership"]) == ("completed", "done")
    assert info["ram"]["total"] == 4 << 20
    assert result.stderr == ""


def test_migrate_detached(cli, monitored, destination):
    machine, qmp = monitored()
    result = cli("migrate", destination.uri, "--qmp", qmp, "--detach")
    assert result.exit_code == 0
    assert machine.migration.wait(10).status == "completed"


def test_a_dead_peer(cli, complaint, monitored):
    machine, qmp = monitored()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        uri = f"tcp:127.0.0.1:{nobody.getsockname()[1]}"
        result = cli("migrate", uri, "--qmp", qmp)
    assert result.exit_code == 1
    assert "Connection refused" in complaint(result)
    assert (result.stdout + result.stderr).count("Connection refused") == 1
    assert rows(result)["migration"] == "failed"
    assert machine.run_state == "running"


def test_a_peer_that_hangs_up(cli, complaint, monitored):
    machine, qmp = monitored()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        result = cli("migrate", f"tcp:127.0.0.1:{listener.getsockname()[1]}", "--qmp", qmp, "--json")
        thread.join()
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error-code"] in {"lost", "peer-refused"}
    assert json.loads(result.stdout)["error-desc"] == complaint(result)
    assert machine.run_state == "running"


def test_an_unknown_scheme_is_the_machines_to_judge(cli, complaint, monitored):
    machine, qmp = monitored()
    result = cli("migrate", "pigeon:roof", "--qmp", qmp)
    assert result.exit_code == 1
    assert "'pigeon'" in complaint(result)
    assert machine.migration is None


def test_what_blocks_a_migration_is_said(cli, complaint, monitored, destination):
    machine, qmp = monitored()
    machine.blockers.add("it has a cold")
    result = cli("migrate", destination.uri, "--qmp", qmp)
    assert result.exit_code == 1
    assert "it has a cold" in complaint(result)
    assert rows(cli("status", "--qmp", qmp))["cannot migrate"] == "it has a cold"


def test_a_second_migration_is_refused_and_does_not_touch_the_first(cli, complaint, monitored, destination):
    machine, qmp = monitored(**SLOW)
    machine.migrate(destination.uri)
    result = cli("migrate", destination.uri, "--qmp", qmp, "--max-bandwidth", "1GiB")
    assert result.exit_code == 1
    assert "a migration of this machine is" in complaint(result)
    assert machine.settings.parameters.max_bandwidth == SLOW["max_bandwidth"]
    assert machine.cancel_migration()


def test_ctrl_c_cancels_and_the_machine_goes_on(cli, complaint, monitored, destination):
    machine, qmp = monitored(**SLOW)
    when_active(machine, lambda: os.kill(os.getpid(), signal.SIGINT))
    result = cli("migrate", destination.uri, "--qmp", qmp)
    assert result.exit_code == 130
    assert complaint(result) == "the migration was cancelled; the machine goes on where it is"
    assert rows(result)["migration"] == "cancelled"
    assert machine.run_state == "running"


@pytest.mark.parametrize("detach", [(), ("--detach",)])
def test_ctrl_c_cancels_from_before_the_command_is_sent(cli, complaint, monitored, destination, monkeypatch, detach):
    machine, qmp = monitored(**SLOW)
    execute = MonitorClient.execute

    def interrupted_at_once(client, command, **arguments):
        if command == "migrate":
            os.kill(os.getpid(), signal.SIGINT)
        return execute(client, command, **arguments)

    monkeypatch.setattr(MonitorClient, "execute", interrupted_at_once)
    result = cli("migrate", destination.uri, "--qmp", qmp, *detach)
    assert result.exit_code == 130
    assert complaint(result) == "the migration was cancelled; the machine goes on where it is"
    assert machine.migration.status == "cancelled"
    assert machine.run_state == "running"


def test_ctrl_c_before_anything_is_begun_begins_nothing(cli, complaint, monitored, destination, monkeypatch):
    machine, qmp = monitored(**SLOW)

    def interrupted(client):
        os.kill(os.getpid(), signal.SIGINT)
        return info_of(client)

    monkeypatch.setattr("whimbrel.cli.migrate.info_of", interrupted)
    result = cli("migrate", destination.uri, "--qmp", qmp, "--json")
    assert result.exit_code == 130
    assert complaint(result) == "interrupted"
    assert json.loads(result.stdout) == {"error-code": "cancelled", "error-desc": "interrupted"}
    assert machine.migration is None


def test_a_guest_that_fails_is_the_reason(cli, complaint, machines, folder, destination):
    machine = machines(**SLOW)
    fail = threading.Event()

    def step():
        if fail.wait(0.001):
            raise ValueError("the disk is on fire")

    machine.guest = whimbrel.LoopGuest(step)
    when_active(machine, fail.set)
    with MonitorServer(machine, f"unix:{folder}/m.qmp") as server:
        machine.start()
        result = cli("migrate", destination.uri, "--qmp", server.address)
    assert result.exit_code == 1
    assert complaint(result) == "the guest failed: ValueError('the disk is on fire')"


def test_a_migration_that_began_and_failed_has_not_changed_nothing(cli, complaint, monitored):
    _, qmp = monitored()
    result = cli("migrate", "tcp:", "--qmp", qmp, "--max-bandwidth", "1MiB")
    assert result.exit_code == 1
    assert complaint(result)


def test_a_cancel_by_somebody_else_shows(cli, monitored, destination):
    machine, qmp = monitored(**SLOW)
    when_active(machine, machine.cancel_migration)
    result = cli("migrate", destination.uri, "--qmp", qmp, "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["status"] == "cancelled"


def test_an_answer_that_does_not_come_is_waited_for_until_ctrl_c(
    cli, complaint, monitored, destination, cut_after_the_proof
):
    machine, qmp = monitored()
    with cut_after_the_proof(destination.uri, lambda: os.kill(os.getpid(), signal.SIGINT)) as uri:
        result = cli("migrate", uri, "--qmp", qmp)
    assert result.exit_code == 3
    assert "is asked again until it does" in result.stderr
    assert "it goes on being asked" in complaint(result)
    assert machine.run_state == "finish-migrate"
    assert rows(cli("status", "--qmp", qmp))["ownership"] == "released"


def test_an_undecided_end_has_a_status_of_its_own(cli, complaint, monitored, destination, cut_after_the_proof):
    machine, qmp = monitored()
    decisions = []

    def decide():
        decisions.append(threading.Thread(target=machine.reclaim))
        decisions[0].start()

    with cut_after_the_proof(destination.uri, decide) as uri:
        result = cli("migrate", uri, "--qmp", qmp)
    decisions[0].join()
    assert result.exit_code == 3
    assert "was let go of" in complaint(result)
    assert machine.run_state == "paused"


# ------------------------------------------------------------------------------------------------------- status


def test_status_of_a_machine_at_rest(cli, monitored):
    _, qmp = monitored()
    result = cli("status", "--qmp", qmp)
    assert result.exit_code == 0
    owner = {"owner": "here, in epoch 1"}
    assert rows(result) == {"machine": "small", "run state": "running", "migration": "none"} | owner


def test_the_monitor_may_be_named_in_the_environment(cli, monitored, monkeypatch):
    _, qmp = monitored()
    monkeypatch.setenv("WHIMBREL_QMP", qmp)
    assert rows(cli("status"))["machine"] == "small"


def test_status_of_a_migration(cli, monitored, destination):
    machine, qmp = monitored(**SLOW)
    active = threading.Event()
    when_active(machine, active.set)
    machine.migrate(destination.uri)
    assert active.wait(10)
    table = rows(cli("status", "--qmp", qmp))
    assert table["migration"] == "active"
    assert table["to"] == destination.uri
    assert table["memory"] == "4 MiB"
    assert table["max-bandwidth"] == "256 KiB/s"
    info = json.loads(cli("status", "--qmp", qmp, "--json").stdout)
    assert (info["status"], info["role"], info["run-state"]) == ("active", "source", "running")
    assert info["changed-parameters"] == {"max-bandwidth": 256 << 10}
    assert machine.cancel_migration()


# ------------------------------------------------------------------------------------------------------- cancel


def test_cancel(cli, monitored, destination):
    machine, qmp = monitored(**SLOW)
    migration = machine.migrate(destination.uri)
    result = cli("cancel", "--qmp", qmp)
    assert result.exit_code == 0
    assert migration.status == "cancelled"
    assert machine.run_state == "running"


def test_cancel_for_programs(cli, monitored, destination):
    machine, qmp = monitored(**SLOW)
    machine.migrate(destination.uri)
    result = cli("cancel", "--qmp", qmp, "--json")
    assert json.loads(result.stdout)["status"] == "cancelled"


def test_there_is_nothing_to_cancel(cli, complaint, monitored):
    _, qmp = monitored()
    result = cli("cancel", "--qmp", qmp)
    assert result.exit_code == 1
    assert complaint(result) == "no migration runs: the last one's status is none"


# ---------------------------------------------------------------------------------------------------------- set


@pytest.mark.parametrize(
    ("name", "value", "stored", "shows"),
    [
        ("downtime-limit", "50ms", 50, "50 ms"),
        ("downtime_limit", "2s", 2000, "2000 ms"),
        ("max-bandwidth", "1GiB", 1 << 30, "1 GiB/s"),
        ("xbzrle-cache-size", "1MiB", 1 << 20, "1 MiB"),
        ("max-cpu-throttle", "80", 80, "80 %"),
        ("multifd-compression", "zstd", "zstd", "zstd"),
        ("return-path", "on", True, "on"),
        ("events", "off", False, "off"),
    ],
)
def test_set(cli, monitored, name, value, stored, shows):
    machine, qmp = monitored()
    result = cli("set", name, value, "--qmp", qmp)
    assert result.exit_code == 0
    assert rows(result) == {name.replace("_", "-"): shows}
    everything = machine.settings.parameters.as_dict() | machine.settings.capabilities.as_dict()
    assert everything[name.replace("_", "-")] == stored
    again = cli("set", name, value, "--qmp", qmp, "--json")
    assert json.loads(again.stdout) == {"name": name.replace("_", "-"), "value": stored}


def test_set_says_what_the_machine_says(cli, complaint, monitored, destination):
    machine, qmp = monitored(**SLOW)
    machine.migrate(destination.uri)
    result = cli("set", "return-path", "on", "--qmp", qmp)
    assert result.exit_code == 1
    assert complaint(result) == "There's a migration process in progress"
    assert machine.cancel_migration()


def test_bandwidth_can_be_set_while_a_migration_runs(cli, monitored, destination):
    machine, qmp = monitored(**SLOW)
    migration = machine.migrate(destination.uri)
    began = time.monotonic()
    assert cli("set", "max-bandwidth", "0", "--qmp", qmp).exit_code == 0
    assert migration.wait(10).status == "completed"
    assert time.monotonic() - began < 10  # at its old speed it would have taken sixteen
