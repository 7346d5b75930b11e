"""A client may have a program run only where whoever started the process allowed it."""

import signal
import subprocess
import sys

import attrs
import pytest

import whimbrel
from whimbrel.errors import MonitorError
from whimbrel.monitor import MonitorClient
from whimbrel.testing.memory import MemoryNetwork

LONG = 20.0
REFUSED = r"^exec: runs a program on this host.*`whimbrel run --allow-exec` lets them.*allow_exec=True"


@pytest.mark.parametrize("command", ["migrate", "migrate-incoming"])
def test_it_is_refused_and_nothing_is_run(make_machine, serve, connect, tmp_path, command):
    machine = make_machine()
    client = connect(serve(machine).address)
    with pytest.raises(MonitorError, match=REFUSED) as caught:
        client.execute(command, uri=f"exec:touch {tmp_path}/run")
    assert caught.value.error_class == "GenericError"
    assert not (tmp_path / "run").exists()
    assert machine.migration is None
    assert machine.run_state == "prelaunch"


def test_it_is_the_offer_that_says_so_and_not_a_name(make_machine, serve, connect):
    class Stranger:
        @whimbrel.hookimpl
        def whimbrel_transports(self):
            return [attrs.evolve(MemoryNetwork(scheme="runner").spec(), runs_programs=True)]

    machine = make_machine()
    machine.plugins.register(Stranger())
    client = connect(serve(machine).address)
    with pytest.raises(MonitorError, match=r"^runner: runs a program"):
        client.execute("migrate-incoming", uri="runner:x")
    allowed = connect(serve(machine, allow_exec=True).address)
    allowed.execute("migrate-incoming", uri="runner:x")


def test_where_it_is_allowed_a_machine_goes_through_programs(make_machine, serve, connect, tmp_path):
    source, destination = make_machine(), make_machine()
    there, here = (connect(serve(machine, allow_exec=True).address) for machine in (source, destination))
    there.execute("cont")
    there.execute("migrate", uri=f"exec:sh -c 'cat > {tmp_path}/machine'")
    source.migration.wait(LONG)
    here.execute("migrate-incoming", uri=f"exec:cat {tmp_path}/machine")
    destination.migration.wait(LONG)
    # There was no proof, so it waits for a word.
    assert here.execute("query-status") == {"running": False, "singlestep": False, "status": "paused"}
    here.execute("cont")
    assert here.execute("query-status")["running"]


APP = """
import whimbrel
def machine():
    machine = whimbrel.Machine("heat")
    machine.ram.array("plate", (1 << 20,), "uint8")
    return machine
"""


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [True, False])
def test_the_command_line_allows_it(tmp_path, monkeypatch, allowed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.py").write_text(APP)
    line = [sys.executable, "-m", "whimbrel", "run", "app.py:machine", "--paused", "--qmp", "unix:qmp"]
    with subprocess.Popen(
        [*line, *(["--allow-exec"] if allowed else [])], stderr=subprocess.PIPE, text=True
    ) as process:
        while "is ready and paused" not in process.stderr.readline():
            assert process.poll() is None
        with MonitorClient.connect("unix:qmp", LONG) as client:
            if allowed:
                client.execute("migrate", uri="exec:sh -c 'cat > machine'")
                assert "moved away" in process.stderr.readline()
            else:
                with pytest.raises(MonitorError, match=REFUSED):
                    client.execute("migrate", uri="exec:sh -c 'cat > machine'")
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert (tmp_path / "machine").exists() == allowed


def test_without_a_monitor_the_option_means_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "whimbrel", "run", "app.py:machine", "--allow-exec"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--allow-exec is about the monitor's clients; give it --qmp as well" in done.stderr
