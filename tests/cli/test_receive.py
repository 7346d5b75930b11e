"""`whimbrel receive`: what it says and leaves behind, however it is used and however it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from whimbrel.capture import CapturedMachine, receiving
from whimbrel.cli import _elsewhere
from whimbrel.cli._meter import Meter

from ..capture.streams import FROM_2_4, PROOF, TO_2_2, Device, Script, page, small
from .peers import LONG, PONG, SHUT, Peer, Terminal


@pytest.fixture
def no_spare(tmp_path, monkeypatch):
    """There is no folder for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spare"))
    return tmp_path / "spare"


@pytest.fixture
def spare(no_spare):
    """The folder for temporary files."""
    no_spare.mkdir()
    return no_spare


@pytest.fixture
def place(tmp_path):
    """A folder for what is received."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def file(place):
    """Where it is received to."""
    return place / "machine.stream"


@pytest.fixture
def peer():
    """Makes sources; each must have come to its end."""
    made = []

    def make(play):
        made.append(Peer(play))
        return made[-1]

    yield make
    for each in made:
        each.join()


def listening(shape=FROM_2_4):
    """The beginning of a stream whose source listens, up to its devices."""
    script = Script(shape, {"a": 2, "b": 1}).header().open_return_path().ping().start()
    script.part(("a", 0, page(1)), ("a", 1, 0), ("b", 0, 0)).end(("a", 1, 9))
    return script.full(Device("timer", 4, b"\x01\x02"), Device("twin", 5, b"one"))


def large(pages):
    """A machine that takes a while, and does not listen."""
    script = Script(FROM_2_4, {"a": pages}).header().start()
    script.part(*(("a", number, page(number % 7)) for number in range(pages))).end()
    return script.full(Device("timer", 4, b"\x01\x02"))


def sends(script):
    """Plays a source that does not listen."""
    return lambda peer: peer.send(script.finish())


def waits(script):
    """Plays one that sends everything and lets go only when it is told; it must hear one of `words`."""

    def play(peer):
        peer.send(script.finish())
        peer.hear_until((SHUT, 0), (SHUT, 1), None)

    return play


def holds(file, script):
    """The machine in the file is the script's, to the last byte."""
    with CapturedMachine.load(file) as machine:
        for name, pages in script.ram.items():
            assert machine.ram[name].view.tobytes() == pages.tobytes()
        assert [device.body for device in machine.captured] == [device.body for device in script.devices]
        assert machine.form().text == (script.text if script.shape.description else None)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600, "a guest's memory is nobody else's to read"
    return True


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def table(text):
    """The cells of a table of rows, by their first."""
    rows = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


# ----------------------------------------------------------------------------------------------------- all is well


def test_what_it_says(cli, peer, file, place):
    script = small(FROM_2_4)
    result = cli("receive", peer(sends(script)).uri, file)
    assert result.exit_code == 0, result.stderr
    shown = table(result.stdout)
    assert shown["machine"] == "bench-1"
    assert shown["memory"] == "12 KiB in 2 blocks"
    assert shown["devices"] == "3"
    assert shown["stored"].startswith(f"{file.stat().st_size / 1024:.1f} KiB in {file}, ")
    assert shown["source"].startswith("did not listen")
    heard = result.stderr.splitlines()
    assert re.fullmatch(r"waiting for a machine at fd:\d+", heard[0])
    assert re.fullmatch(r"a source has connected: fd:\d+", heard[1])
    assert heard[2:] == []
    assert holds(file, script)
    assert names(place) == ["machine.stream"]


def test_for_programs(cli, peer, place, monkeypatch):
    """One document. The file is named so that it is found from every folder."""
    monkeypatch.chdir(place)
    script = listening()
    result = cli("receive", peer(waits(script)).uri, "gäst 1.stream", "--json")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["file"] == str(place / "gäst 1.stream")
    assert (shown["machine"], shown["ram"], shown["blocks"], shown["devices"]) == ("bench-1", 3 * 4096, 2, 2)
    assert shown["received"] == len(script.finish())
    assert shown["stored"] == (place / "gäst 1.stream").stat().st_size
    assert (shown["told"], shown["guessed"]) == (True, False)
    assert 0 <= shown["storing_seconds"] <= shown["seconds"]
    assert holds(place / "gäst 1.stream", script)


def test_devices_that_were_guessed(cli, peer, file):
    result = cli("receive", peer(sends(small(TO_2_2))).uri, file)
    assert result.exit_code == 0
    assert "told apart without description and footers" in result.stderr


def test_a_source_that_is_told(cli, peer, file):
    source = peer(waits(listening()))
    result = cli("receive", source.uri, file)
    assert table(result.stdout)["source"] == "was told that it is safe"
    assert source.heard == [(PONG, 1), (SHUT, 0)]


def test_a_description_that_comes_behind_the_proof(cli, peer, file):
    """It is in the file in the end."""
    script = listening().ping(PROOF)
    upto = len(script.data)

    def play(peer):
        peer.send(script.data[:upto])
        peer.hear_until((PONG, PROOF))
        peer.send(script.finish()[upto:])
        peer.hear_until((SHUT, 0))

    assert cli("receive", peer(play).uri, file).exit_code == 0
    assert holds(file, script)


def test_a_machine_of_ours(start, machines, folder):
    """Over a socket, in two phases, into another process."""
    machine = machines(max_bandwidth=0)
    machine.start()
    receive = start("receive", "unix:socket", "machine.stream", "--json")
    receive.wait_line("waiting for a machine at unix:socket")
    assert str(machine.migrate(f"unix:{folder}/socket").wait(LONG).status) == "completed"
    assert machine.run_state == "postmigrate"
    assert receive.exit_code == 0
    assert receive.json()["told"]
    assert names(folder) == ["machine.stream"]
    with CapturedMachine.load(folder / "machine.stream") as stored:
        assert (stored.ram["memory"].view == 7).all()
        assert stored.form().text is not None


def test_replacing_a_file(cli, peer, file, place):
    file.write_text("somebody's")
    script = small(FROM_2_4)
    assert cli("receive", peer(sends(script)).uri, file, "--force").exit_code == 0
    assert holds(file, script)
    assert names(place) == ["machine.stream"]


def test_a_name_that_is_no_text(cli, peer, place):
    file = os.fsdecode(os.fsencode(place) + b"/g\xffst")
    for options in ((), ("--json", "--force")):
        result = cli("receive", peer(sends(small(FROM_2_4))).uri, file, *options)
        assert result.exit_code == 0, result.stderr
        assert "could not be printed" not in result.stderr
    assert json.loads(result.stdout)["file"] == file


# -------------------------------------------------------------------------------------------------- asked for wrongly


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("pigeon:x", "unknown transport 'pigeon' in 'pigeon:x'; there are: "),
        ("nowhere", "'nowhere' is no migration URI: expected SCHEME:ADDRESS; schemes there are: "),
        ("", "'' is no migration URI"),
        ("tcp:127.0.0.1", "expected HOST:PORT"),
        ("tcp:127.0.0.1:99999", "a port from 0 to 65535"),
        ("unix:", "expected unix:PATH"),
        ("fd:1", "a descriptor from 3"),
    ],
)
def test_uris_that_cannot_be(cli, complaint, file, place, uri, says):
    result = cli("receive", uri, file)
    assert result.exit_code == 2
    assert says in complaint(result)
    assert names(place) == []


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("there", [], "there' is there already; --force replaces it"),
        ("folder", [], "folder' is a folder, expected the path of a file"),
        ("folder", ["--force"], "folder' is a folder, expected the path of a file"),
        ("pipe", ["--force"], "pipe' is no regular file"),
        ("link", ["--force"], "link' is no regular file"),
        ("none/file", [], "no file can be made in"),
        ("there/file", [], "there/file' cannot be the path of a file: "),
        ("n" * 300, [], "cannot be the path of a file: "),
        ("a,offset=4", [], "cannot be told from an offset into a file; give it another name"),
        ("file", ["--max-ram", "much"], "--max-ram: 'much' is not a size in bytes"),
        ("file", ["--max-ram", "-1"], "--max-ram: '-1' is not a size in bytes"),
        ("file", ["--max-ram", ""], "--max-ram: '' is not a size in bytes"),
        ("file", ["--config", "none.toml"], "cannot read none.toml"),
    ],
)
def test_files_and_options_that_cannot_be(cli, complaint, place, tmp_path, name, options, says):
    """Said before anybody can connect."""
    (place / "there").write_text("somebody's")
    (place / "folder").mkdir()
    os.mkfifo(place / "pipe")
    (place / "link").symlink_to("there")
    for form in ([], ["--json"]):
        result = cli("receive", f"unix:{tmp_path}/s", place / name, *options, *form)
        assert result.exit_code == 2
        assert says in complaint(result)
        assert not (tmp_path / "s").exists()
    assert json.loads(result.stdout)["error-code"] == "config"
    assert (place / "there").read_text() == "somebody's"
    assert names(place) == ["folder", "link", "pipe", "there"]


def test_somebody_listens_there_already(cli, complaint, folder, file, place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = cli("receive", f"tcp:127.0.0.1:{taken.getsockname()[1]}", file)
    assert result.exit_code == 1
    assert "Address already in use" in complaint(result)
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(f"{folder}/socket")
        taken.listen()
        result = cli("receive", f"unix:{folder}/socket", file, "--json")
        assert result.exit_code == 1
        assert "Address already in use" in complaint(result)
        assert json.loads(result.stdout)["error-code"] == "connect"
    assert names(folder) == ["socket"]
    assert names(place) == []


# -------------------------------------------------------------------------------------------------------- it fails


def test_a_machine_that_is_too_large_stays_at_its_source(cli, complaint, peer, file, place):
    source = peer(waits(listening()))
    result = cli("receive", source.uri, file, "--max-ram", "8KiB")
    assert result.exit_code == 1
    assert "the machine has 12 KiB of RAM, and at most 8 KiB may be taken" in complaint(result)
    assert "--max-ram" in result.stderr
    assert source.heard[-1] == (SHUT, 1)
    assert names(place) == []


def test_a_source_that_dies_on_the_way(cli, complaint, peer, file, place):
    script = listening()
    for upto in (0, 5, script.at("START"), script.at("END") + 5):
        result = cli("receive", peer(lambda peer, upto=upto: peer.send(script.data[:upto])).uri, file, "--json")
        assert result.exit_code == 1
        shown = json.loads(result.stdout)
        assert shown["error-code"] == "lost"
        assert shown["error-desc"] == complaint(result)
        assert names(place) == []


def test_what_is_no_stream(cli, complaint, peer, file, place):
    result = cli("receive", peer(lambda peer: peer.send(b"GET / HTTP/1.1\r\n\r\n")).uri, file)
    assert result.exit_code == 1
    assert "this is not a migration stream" in complaint(result)
    assert names(place) == []


def test_strangers_are_hung_up_on_and_the_source_is_waited_for(start, machines, folder):
    (folder / "brief.toml").write_text('[limits]\nheader-timeout = "200ms"\n')
    receive = start("receive", "unix:socket", "machine.stream", "--config", "brief.toml")
    receive.wait_line("waiting for a machine at unix:socket")
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(f"{folder}/socket")
            stranger.sendall(said)
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    machine = machines(max_bandwidth=0)
    machine.start()
    assert str(machine.migrate(f"unix:{folder}/socket").wait(LONG).status) == "completed"
    assert receive.exit_code == 0
    assert "no stream header within 0.2 s; [limits] header-timeout says how long to wait" in receive.stderr
    assert "it begins with 0x47455420" in receive.stderr
    assert "this is not a migration stream" in receive.stderr
    assert names(folder) == ["brief.toml", "machine.stream"]


def test_a_source_whose_last_word_is_missing(cli, complaint, peer, file):
    """It may have let go. The file stays, and whoever has to decide is told of it."""
    script = listening().ping(PROOF)

    def play(peer):
        peer.send(script.data)
        peer.hear_until((PONG, PROOF))

    result = cli("receive", peer(play).uri, file, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error-code"] == "undecided"
    assert f"ask the source: if it runs on, '{file}' is a copy from its past and must not be run" in complaint(result)
    with CapturedMachine.load(file) as machine:
        assert len(machine.captured) == 2


# ------------------------------------------------------------------------------- it cannot be stored where it was to be


@pytest.fixture
def gone(monkeypatch, place):
    """The folder of the file goes, as soon as it is to be stored; put back by calling this."""
    put, away = receiving._put, place.with_name("away")

    def putting(machine, file, **more):
        if place.exists() and not away.exists():
            place.rename(away)
        return put(machine, file, **more)

    monkeypatch.setattr(receiving, "_put", putting)
    return lambda: place.mkdir()


def test_a_source_that_listens_keeps_its_machine(cli, complaint, peer, file, spare, gone):
    source = peer(waits(listening()))
    result = cli("receive", source.uri, file)
    assert result.exit_code == 1
    assert "no file can be made in" in complaint(result)
    assert source.heard[-1] == (SHUT, 1)
    assert names(spare) == []


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_one_that_does_not_has_its_machine_put_elsewhere(cli, complaint, peer, file, spare, gone, form):
    """The status says that it is not where it should be."""
    script = small(FROM_2_4)
    result = cli("receive", peer(sends(script)).uri, file, *form)
    assert result.exit_code == 1
    (name,) = names(spare)
    said = complaint(result)
    assert said.startswith(
        f"the machine is in {spare / name}, for it could not be stored in {file}: no file can be made"
    )
    assert "it is in the memory of this process and nowhere else" in result.stderr
    assert holds(spare / name, script)
    if form:
        shown = json.loads(result.stdout)
        assert (shown["file"], shown["error-desc"]) == (str(spare / name), said)
        assert shown["error-code"] == "migration"
    else:
        assert str(spare / name) in table(result.stdout)["stored"]


def test_a_file_that_came_meanwhile_is_not_replaced(cli, complaint, peer, file, spare, monkeypatch):
    """Not even one that comes in the last moment."""
    save = receiving.save

    def saving(machine, path):
        save(machine, path)
        file.write_text("somebody's")

    monkeypatch.setattr(receiving, "save", saving)
    script = small(FROM_2_4)
    result = cli("receive", peer(sends(script)).uri, file)
    assert result.exit_code == 1
    assert "is there already" in complaint(result)
    assert file.read_text() == "somebody's"
    assert names(file.parent) == ["machine.stream"]
    assert holds(spare / names(spare)[0], script)


def test_a_file_that_goes_before_it_has_its_name(cli, peer, file, place, spare, monkeypatch):
    """Somebody cleans up."""
    save = receiving.save

    def saving(machine, path):
        save(machine, path)
        if path.parent == place:
            path.unlink()

    monkeypatch.setattr(receiving, "save", saving)
    script = small(FROM_2_4)
    result = cli("receive", peer(sends(script)).uri, file)
    assert result.exit_code == 1
    assert names(place) == []
    assert holds(spare / names(spare)[0], script)


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_file_system_without_links(cli, peer, file, place, spare, monkeypatch, meanwhile):
    def link(source, target):
        if meanwhile:
            file.write_text("somebody's")
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(receiving.os, "link", link)
    script = small(FROM_2_4)
    result = cli("receive", peer(sends(script)).uri, file)
    assert result.exit_code == meanwhile
    assert names(place) == ["machine.stream"]
    if not meanwhile:
        assert holds(file, script)
    else:
        assert file.read_text() == "somebody's"
        assert "is there already" in result.stderr


FULL = 100_000  # bytes that a file may have


def test_a_full_disk(cli, peer, file, spare, monkeypatch):
    """Without any room the machine waits in memory until somebody makes some."""
    monkeypatch.setattr(_elsewhere, "AGAIN", 0.01)
    rounds = []

    def look(elsewhere):
        rounds.append(1)
        if len(rounds) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return next_(elsewhere)

    next_ = _elsewhere.Elsewhere._next
    monkeypatch.setattr(_elsewhere.Elsewhere, "_next", look)
    script = large(100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, before[1]))
    try:
        result = cli("receive", peer(sends(script)).uri, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 0
    failed = r"writing '{}' failed after \d+ bytes: the file may not be so large \(File too large\)"
    assert re.search(failed.format(file), result.stderr)
    assert re.search(failed.format(rf"{spare}/whimbrel-\d+\.stream"), result.stderr)
    assert result.stderr.count("trying all of them again") == 1
    assert holds(file, script)
    assert names(spare) == []


# ----------------------------------------------------------------------------------------------------- it is asked


@pytest.fixture
def at_a_terminal(peer, tmp_path):
    """`at_a_terminal(terminal, script, …)`: a receive at a terminal, into `machine.stream` in a folder that is gone."""
    started = []

    def begin(terminal, play, *options, room=None):
        source = peer(play)
        command = [sys.executable, "-m", "whimbrel", "receive", source.uri, "machine.stream", *options]
        process = subprocess.Popen(
            command,
            stdin=terminal.end,
            stdout=subprocess.PIPE,
            stderr=terminal.end,
            text=True,
            cwd=tmp_path,
            pass_fds=[source.descriptor],
            preexec_fn=lambda: room and resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY)),
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "24", "TMPDIR": str(tmp_path)},
        )
        os.close(source.descriptor)
        terminal.hand_over()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_somebody_says_where(at_a_terminal, tmp_path):
    """What is there already is not taken; Enter alone is the first place."""
    (tmp_path / "there").write_text("somebody's")
    script = large(100)
    with Terminal() as terminal:
        receive = at_a_terminal(terminal, sends(script), "--json", room=FULL)
        prompt = r"Where to store it\? \(Enter tries machine.stream again, Ctrl-C gives the machine up\)\r\n"
        answers = {
            "there": "is there already",
            "no/such": "no file can be made",
            "": "writing '.*/machine.stream' failed",
        }
        for answer, says in answers.items():
            terminal.wait(prompt)
            terminal.type(f"{answer}\n")
            terminal.wait(says)
        terminal.wait("Where to store it")
        resource.prlimit(receive.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        terminal.type("gäst\n")
        out, _ = receive.communicate(timeout=LONG)
    assert receive.returncode == 0, "somebody knows where it is"
    assert json.loads(out)["file"] == str(tmp_path / "gäst")
    assert holds(tmp_path / "gäst", script)
    assert (tmp_path / "there").read_text() == "somebody's"
    assert names(tmp_path) == ["gäst", "there"]


def test_somebody_gives_it_up(at_a_terminal, tmp_path):
    with Terminal() as terminal:
        receive = at_a_terminal(terminal, sends(large(100)), room=FULL)
        terminal.wait("Where to store it")
        receive.send_signal(signal.SIGINT)
        assert receive.wait(LONG) == 130
        terminal.wait("whimbrel: interrupted; the machine is lost, for it could not be stored: writing")
    assert names(tmp_path) == []


def test_somebody_is_gone(at_a_terminal, tmp_path):
    """Then it is tried without; only a signal gives it up."""
    with Terminal() as terminal:
        receive = at_a_terminal(terminal, sends(large(100)), "--json", room=FULL)
        terminal.wait("Where to store it")
        terminal.type("\x04")
        terminal.wait(rf"trying {tmp_path}/whimbrel-\d+\.stream")
        terminal.wait("trying all of them again")
        receive.send_signal(signal.SIGTERM)
        out, _ = receive.communicate(timeout=LONG)
    assert receive.returncode == 143
    shown = json.loads(out)
    assert shown["error-code"] == "cancelled"
    assert "the machine is lost, for it could not be stored: writing" in shown["error-desc"]
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------------------------- it is interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_interrupted_while_it_waits(start, folder, number):
    receive = start("receive", "unix:socket", "machine.stream", "--json")
    receive.wait_line("waiting for a machine")
    assert names(folder) == ["socket"]
    receive.interrupt(number)
    assert receive.exit_code == 128 + number
    shown = receive.json()
    assert shown == {"error-code": "cancelled", "error-desc": "cancelled while waiting for a peer at unix:socket"}
    assert receive.stderr.splitlines()[-1] == f"whimbrel: {shown['error-desc']}"
    assert names(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_on_the_way(cli, complaint, peer, file, place, number):
    """The source is hung up on, and goes on."""
    script = listening()

    def play(peer):
        peer.send(script.data)
        peer.hear_until((PONG, 1))
        os.kill(os.getpid(), number)
        peer.hear_until(None)

    source = peer(play)
    result = cli("receive", source.uri, file, "--json")
    assert result.exit_code == 128 + number
    assert json.loads(result.stdout) == {"error-code": "cancelled", "error-desc": complaint(result)}
    assert complaint(result) == "cancelled; a source that listens goes on"
    assert source.heard == [(PONG, 1)]
    assert names(place) == []


@pytest.fixture
def interrupted_while_storing(monkeypatch):
    """A Ctrl-C comes when the machine is to be stored, and is heard before it is."""
    save = receiving.save
    heard = threading.Event()
    hear = receiving.Reception.cancel

    def cancelling(reception):
        try:
            return hear(reception)
        finally:
            heard.set()

    def saving(machine, path):
        os.kill(os.getpid(), signal.SIGINT)
        assert heard.wait(LONG)
        save(machine, path)

    monkeypatch.setattr(receiving.Reception, "cancel", cancelling)
    monkeypatch.setattr(receiving, "save", saving)


@pytest.mark.usefixtures("interrupted_while_storing")
def test_interrupted_while_it_is_stored(cli, complaint, peer, file, place):
    file.write_text("an older one")
    source = peer(waits(listening()))
    result = cli("receive", source.uri, file, "--force")
    assert result.exit_code == 130
    assert complaint(result) == "cancelled; a source that listens goes on"
    assert source.heard == [(PONG, 1)]
    assert names(place) == ["machine.stream"]
    assert file.read_text() == "an older one"


@pytest.mark.usefixtures("interrupted_while_storing")
def test_interrupted_when_it_is_here_and_nowhere_else(cli, peer, file):
    script = small(FROM_2_4)
    result = cli("receive", peer(sends(script)).uri, file)
    assert result.exit_code == 0
    assert "too late: everything has come and is being stored; another Ctrl-C may lose the machine" in result.stderr
    assert holds(file, script)


def test_the_terminal_goes(at_a_terminal, tmp_path):
    """While somebody is asked: that is not to say that the machine may be lost."""
    script = large(100)
    with Terminal() as terminal:
        receive = at_a_terminal(terminal, sends(script), "--json", room=FULL)
        terminal.wait("Where to store it")
        resource.prlimit(receive.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        receive.send_signal(signal.SIGHUP)
        receive.send_signal(signal.SIGHUP)
        out, _ = receive.communicate(timeout=LONG)
    assert receive.returncode == 1, "it is where nobody has chosen"
    (name,) = names(tmp_path)
    assert json.loads(out)["file"] == str(tmp_path / name)
    assert holds(tmp_path / name, script)


def test_twice(start, folder, peer):
    """Somebody who cannot wait."""
    script = listening()
    source = peer(lambda peer: [peer.send(script.data), peer.hear_until(None)])
    receive = start("receive", source.uri, "machine.stream", pass_fds=[source.descriptor])
    os.close(source.descriptor)
    receive.wait_line("a source has connected")
    receive.process.send_signal(signal.SIGTERM)
    receive.process.send_signal(signal.SIGINT)
    assert receive.exit_code in (130, 143)
    assert names(folder) == []


# ------------------------------------------------------------------------------------------------- nobody looks at it


@pytest.mark.parametrize(("way", "form"), [("full", ["--json"]), ("gone", []), ("both", [])])
def test_what_cannot_be_printed(peer, file, way, form):
    """The machine is there all the same, and so says the status."""
    script = small(FROM_2_4)
    source = peer(sends(script))
    end = {"full": ">/dev/full", "gone": "| true", "both": ">&- 2>&-"}[way]
    command = f'set -o pipefail; "$@" {end}'
    said = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "whimbrel", "receive", source.uri, str(file), *form],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=LONG,
        check=False,
        pass_fds=[source.descriptor],
    )
    os.close(source.descriptor)
    assert said.returncode == 0, said.stderr
    assert ("how it ended could not be printed" in said.stderr) == (way in ("full", "gone"))
    assert "Traceback" not in said.stderr
    assert "Exception ignored" not in said.stderr
    assert holds(file, script)


# ------------------------------------------------------------------------------------------------------------ progress


def test_progress_at_a_terminal(at_a_terminal, tmp_path):
    """A line that is kept up to date, and none of it left."""
    script = large(100)
    script.finish()

    def play(peer):
        peer.send(script.data[:50000])
        more.wait(LONG)
        peer.send(script.data[50000:])

    more = threading.Event()
    with Terminal() as terminal:
        receive = at_a_terminal(terminal, play)
        terminal.wait("a source has connected: fd:")
        terminal.wait(r"received 48\.\d KiB, 0 B/s")
        more.set()
        out, _ = receive.communicate(timeout=LONG)
    assert receive.returncode == 0
    assert table(out)["received"].startswith(f"{len(script.data) / 1024:.1f} KiB in ")


@pytest.fixture
def clock(monkeypatch):
    """The meter's time: as many seconds as one has put into it."""
    now = [100.0]
    monkeypatch.setattr("whimbrel.cli._meter.time.monotonic", lambda: now[0])
    return now


def told(clock, capsys, *steps):
    """What a meter says of steps of (seconds since the last, what, …)."""
    with Meter() as meter:
        for seconds, *step in steps:
            clock[0] += seconds
            meter.show(*step)
    return capsys.readouterr().err.splitlines()


def test_a_line_a_second(clock, capsys):
    steps = [(0.25, "received", number << 20) for number in range(12)]
    assert told(clock, capsys, *steps) == [
        "received 3 MiB, 4 MiB/s",
        "received 7 MiB, 4 MiB/s",
        "received 11 MiB, 4 MiB/s",
    ]


def test_a_rate_is_that_of_late(clock, capsys):
    fast = [(1, "received", number << 30) for number in range(4)]
    slow = [(1, "received", (3 << 30) + (number << 10)) for number in range(1, 7)]
    lines = told(clock, capsys, *fast, *slow)
    assert lines[3] == "received 3 GiB, 1 GiB/s"
    assert lines[-1].endswith(", 1 KiB/s")


def test_what_comes_next_has_a_rate_of_its_own(clock, capsys):
    lines = told(
        clock,
        capsys,
        *[(1, "received", number << 30) for number in range(4)],
        (1, "stored", 0, 4 << 20),
        (1, "stored", 1 << 20, 4 << 20),
        (1, "stored", 5 << 20, 4 << 20),
    )
    assert lines[-3:] == ["stored 0 B of 4 MiB", "stored 1 MiB of 4 MiB, 1 MiB/s", "stored 4 MiB of 4 MiB, 2.5 MiB/s"]


def test_storing_tells_how_far_it_is(cli, peer, file, monkeypatch):
    """Of all its RAM."""
    seen = []
    save = receiving.save

    def saving(machine, path):
        save(machine, path)
        seen.append(reception[0].progress)

    reception = []
    init = receiving.Reception.__init__

    def noted(self, *arguments, **more):
        init(self, *arguments, **more)
        reception.append(self)
        seen.append(self.progress)

    monkeypatch.setattr(receiving.Reception, "__init__", noted)
    monkeypatch.setattr(receiving, "save", saving)
    assert cli("receive", peer(sends(small(FROM_2_4))).uri, file).exit_code == 0
    assert seen == [(0, 0), (3 * 4096, 3 * 4096)]
