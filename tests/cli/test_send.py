"""`whimbrel send`: what it says, what becomes of the file, and when the machine is let go of."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

import whimbrel
from whimbrel.capture.taking import Capture
from whimbrel.cli._meter import Meter
from whimbrel.errors import MigrationError
from whimbrel.events import StateChanged
from whimbrel.migration import OutgoingMigration

from .peers import LONG

SIZE = 4 << 20


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A machine that ran, in a file."""
    path = tmp_path_factory.mktemp("stored") / "machine.stream"
    with whimbrel.Machine("small") as machine:
        machine.ram.array("memory", SIZE, "uint8")[:] = 7
        machine.settings.parameters.max_bandwidth = 0
        machine.start()
        machine.migrate(f"file:{path}").wait(LONG)
    return path


@pytest.fixture
def file(stored, folder):
    """A copy of it, which is as it was in the end; or gone, if a test has it so."""
    path = folder / "machine.stream"
    shutil.copy2(stored, path)
    before = path.stat()
    yield path
    if path.exists():
        after = path.stat()
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def handed_over(end):
    """The URI of a socket for whoever takes it."""
    os.set_inheritable(end.fileno(), True)
    return f"fd:{end.detach()}"


def whole(machine):
    return bool((machine.ram["memory"].view == 7).all())


def table(text):
    """The cells of a table of rows, by their first word."""
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines() if line.strip()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


# ----------------------------------------------------------------------------------------------------- all is well


def test_to_a_machine_of_ours(cli, file, destination, machines):
    """It goes on there, as it ran when it was stored."""
    result = cli("send", file, destination.uri)
    assert result.exit_code == 0, result.stderr
    destination.wait(LONG)
    assert destination._machine.run_state == "running"
    assert whole(destination._machine)
    shown = table(result.stdout)
    assert (shown["migration"], shown["ownership"], shown["memory"]) == ("completed", "done", "4 MiB")
    last = result.stderr.splitlines()[-1]
    assert last == f"{file} is a copy from the past now: the machine goes on at {destination.uri}"


def test_for_programs(cli, file, destination):
    """One document."""
    result = cli("send", file, destination.uri, "--json")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert (shown["status"], shown["ownership"], shown["error-code"]) == ("completed", "done", "")
    assert shown["ram"]["total"] == SIZE


def test_one_that_was_received(cli, machines, folder, destination):
    """From a machine of ours, by way of a file, to a machine of ours."""
    machine = machines(max_bandwidth=0)
    machine.start()
    near, far = (handed_over(end) for end in socket.socketpair())
    migration = machine.migrate(near)
    assert cli("receive", far, folder / "on the way").exit_code == 0
    migration.wait(LONG)
    assert machine.run_state == "postmigrate"
    assert cli("send", folder / "on the way", destination.uri).exit_code == 0
    destination.wait(LONG)
    assert destination._machine.run_state == "running"
    assert whole(destination._machine)


def test_where_nobody_can_answer(cli, file, folder):
    """That it went is all that can be said."""
    result = cli("send", file, f"file:{folder}/copy")
    assert result.exit_code == 0
    assert "which cannot tell whether it arrived" in result.stderr
    assert table(result.stdout)["ownership"] == "released"
    assert cli("inspect", folder / "copy").exit_code == 0


def test_a_link_to_it(cli, file, folder, destination):
    (folder / "link").symlink_to(file)
    assert cli("send", folder / "link", destination.uri).exit_code == 0


def test_a_name_that_is_no_text(cli, file, folder, complaint):
    odd = os.fsdecode(os.fsencode(folder) + b"/g\xffst")
    shutil.copy(file, odd)
    result = cli("send", odd, f"unix:{folder}/nobody", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error-code"] == "connect"


def test_qemus_timing_is_warned_of(cli, file, destination):
    result = cli("send", file, destination.uri, "--handover", "qemu")
    assert result.exit_code == 0
    assert "QEMU's timing: if the destination refuses the machine at the end, nobody may tell" in result.stderr


# -------------------------------------------------------------------------------------------------- asked for wrongly


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("none", 1, "none' cannot be read: No such file or directory"),
        ("folder", 2, "folder' is a folder, expected a file with a stream in it"),
        ("pipe", 2, "pipe' is no regular file, expected a file with a stream in it"),
        ("text", 1, "this is not a migration stream"),
        ("empty", 1, "the file is cut, or not whole yet"),
        ("cut", 1, "the file is cut, or not whole yet"),
        ("loop", 1, "cannot be read: Too many levels of symbolic links"),
        ("", 1, "'' cannot be read"),
    ],
)
@pytest.mark.parametrize("command", ["send", "inspect"])
def test_files_that_cannot_be(cli, complaint, file, folder, command, name, status, says):
    """No word of a listener or a peer: there is none."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "text").write_text("hello, world")
    (folder / "empty").touch()
    (folder / "cut").write_bytes(file.read_bytes()[:-100_000])
    (folder / "loop").symlink_to("loop")
    path = folder / name if name else ""
    result = cli(command, path, *([f"unix:{folder}/nobody"] if command == "send" else []), "--json")
    assert result.exit_code == status
    said = complaint(result)
    if command == "send":
        assert says in said
    assert not re.search("listen|peer has hung up|connect", said)
    assert json.loads(result.stdout)["error-desc"] in (said, said.removesuffix("; what is shown came before that"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pigeon:x"], "unknown transport 'pigeon' in 'pigeon:x'"),
        (["nowhere"], "'nowhere' is no migration URI"),
        (["unix:x", "--max-ram", "much"], "--max-ram: 'much' is not a size in bytes"),
        (["unix:x", "--max-bandwidth", "fast"], "is not a rate"),
        (["unix:x", "--max-bandwidth", "-1"], "max-bandwidth cannot be negative"),
        (["unix:x", "--handover", "later"], "'later' is not one of 'proof', 'qemu'"),
        (["unix:x", "--config", "none.toml"], "cannot read none.toml"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(cli, complaint, arguments, says):
    """The file may be large, or not even there."""
    result = cli("send", "none", *arguments)
    assert result.exit_code == 2
    assert says in complaint(result)


def test_an_address_that_cannot_be(cli, complaint, file):
    result = cli("send", file, "tcp:127.0.0.1:http")
    assert result.exit_code == 2
    assert "the port 'http'" in complaint(result)
    assert complaint(result).endswith(f"{file} is as it was, and can be sent again")


def test_the_file_itself(cli, complaint, file, folder, monkeypatch):
    (folder / "link").symlink_to("machine.stream")
    monkeypatch.chdir(folder)
    for uri in (f"file:{file}", "file:machine.stream", "file:machine.stream,offset=4096"):
        result = cli("send", folder / "link", uri)
        assert result.exit_code == 2
        assert "is the file itself, which is never changed; name another one" in complaint(result)


def test_too_large(cli, complaint, file, folder):
    result = cli("send", file, f"unix:{folder}/x", "--max-ram", "1MiB")
    assert result.exit_code == 1
    assert "the machine has 4 MiB of RAM, and at most 1 MiB may be taken" in complaint(result)
    assert "--max-ram" in complaint(result)


# -------------------------------------------------------------------------------------------------------- it fails


def test_nobody_listens(cli, complaint, file, folder):
    result = cli("send", file, f"unix:{folder}/nobody", "--json")
    assert result.exit_code == 1
    assert complaint(result).startswith(f"Failed to connect to '{folder}/nobody': No such file or directory; ")
    assert complaint(result).endswith(f"{file} is as it was, and can be sent again")
    shown = json.loads(result.stdout)
    assert (shown["status"], shown["error-code"], shown["ownership"]) == ("failed", "connect", "owner")
    assert shown["error-desc"] == complaint(result)


def test_a_destination_that_is_another_machine(cli, complaint, file, destination):
    with whimbrel.Machine("small") as other:
        other.ram.array("another", SIZE, "uint8")
        incoming = other.incoming("tcp:127.0.0.1:0")
        result = cli("send", file, incoming.uri)
    assert result.exit_code == 1
    assert f"{file} is as it was, and can be sent again" in complaint(result)
    assert table(result.stdout)["ownership"] == "owner"
    assert cli("send", file, destination.uri).exit_code == 0, "and it can"


def test_a_destination_that_says_no_more(cli, complaint, file, destination, cut_after_the_proof):
    """Nobody knows then, and the file may only be sent again once somebody does."""
    with cut_after_the_proof(destination.uri) as uri:
        result = cli("send", file, uri, "--json")
    assert result.exit_code == 3
    said = complaint(result)
    assert f"ask the destination: if it does not run and never will, {file} may be sent again" in said
    shown = json.loads(result.stdout)
    assert (shown["status"], shown["error-code"], shown["error-desc"]) == ("failed", "undecided", said)


def test_a_program_that_fails_in_the_end(cli, complaint, file):
    result = cli("send", file, "exec:sh -c 'cat >/dev/null; exit 3'")
    assert result.exit_code == 3
    assert "ended with status 3" in complaint(result)


# -------------------------------------------------------------------------------------------------- it is interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_is_loaded(cli, complaint, file, folder, monkeypatch, number):
    run, cancel, heard = Capture.run, Capture.cancel, threading.Event()

    def cancelling(capture):
        cancel(capture)
        heard.set()

    def running(capture):
        os.kill(os.getpid(), number)
        assert heard.wait(LONG)
        return run(capture)

    monkeypatch.setattr(Capture, "cancel", cancelling)
    monkeypatch.setattr(Capture, "run", running)
    result = cli("send", file, f"unix:{folder}/nobody", "--json")
    assert result.exit_code == 128 + number
    assert json.loads(result.stdout) == {"error-code": "cancelled", "error-desc": complaint(result)}
    assert complaint(result) == f"cancelled; {file} is as it was"


@pytest.fixture
def sending(start, file, destination):
    """Starts a send with options, and returns when it has connected."""

    def begin(*options):
        happened = queue.SimpleQueue()
        destination._machine.notifiers.add(happened.put)
        process = start("send", file, destination.uri, *options)
        while not (isinstance(event := happened.get(timeout=LONG), StateChanged) and event.new == "active"):
            pass
        return process

    return begin


def test_interrupted_while_it_is_sent(sending, cli, complaint, file, destination):
    """Until then nobody else may send it."""
    send = sending("--max-bandwidth", "1MiB", "--json")
    result = cli("send", file, destination.uri)
    assert result.exit_code == 1
    assert f"'{file}' is being sent by another process; wait for its end" in complaint(result)
    send.interrupt(signal.SIGTERM)
    assert send.exit_code == 143
    shown = send.json()
    assert (shown["status"], shown["ownership"], shown["error-code"]) == ("cancelled", "owner", "cancelled")
    assert shown["error-desc"] == f"cancelled; {file} is as it was"
    assert send.stderr.splitlines()[-1] == f"whimbrel: {shown['error-desc']}"
    with pytest.raises(MigrationError):
        destination.wait(LONG)


def test_interrupted_when_it_is_too_late(cli, file, destination, monkeypatch):
    """The machine was let go of: it is waited for."""
    release = OutgoingMigration._let_go
    cancel, heard = OutgoingMigration.cancel, threading.Event()

    def cancelling(migration):
        try:
            return cancel(migration)
        finally:
            heard.set()

    def releasing(migration, out):
        os.kill(os.getpid(), signal.SIGINT)
        assert heard.wait(LONG)
        release(migration, out)

    monkeypatch.setattr(OutgoingMigration, "cancel", cancelling)
    monkeypatch.setattr(OutgoingMigration, "_let_go", releasing)
    result = cli("send", file, destination.uri)
    assert result.exit_code == 0
    assert "too late to cancel: the machine was let go of" in result.stderr
    destination.wait(LONG)


def test_a_file_that_does_not_stay_what_it_was(sending, file, folder, destination):
    """What was loaded is the machine."""
    send = sending("--max-bandwidth", "16MiB")
    other = folder / "other"
    shutil.move(file, other)
    os.truncate(other, 1000)
    file.write_text("another's")
    other.unlink()
    assert send.exit_code == 0
    destination.wait(LONG)
    assert whole(destination._machine)
    file.unlink()  # so that it is not taken for what it was


# ------------------------------------------------------------------------------------------------- nobody looks at it


def test_what_cannot_be_printed(file, destination):
    """The machine goes on there, and so says the status: whoever took it for a failure would send it again."""
    command = [sys.executable, "-m", "whimbrel", "send", str(file), destination.uri]
    said = subprocess.run(
        ["bash", "-c", '"$@" >/dev/full', "bash", *command],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert "how it ended could not be printed" in said.stderr
    destination.wait(LONG)


# ------------------------------------------------------------------------------------------------------------ progress


def test_loading_tells_how_far_it_is(cli, file, destination, monkeypatch):
    """Of the whole file."""
    shown = []
    monkeypatch.setattr(Meter, "show", lambda _, *told: shown.append(told))
    assert cli("send", file, destination.uri).exit_code == 0
    assert shown[-1] == ("loaded", file.stat().st_size, file.stat().st_size)
