"""unix: the conformance suite, and what is the file system's own."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from whimbrel.abc import Patience
from whimbrel.errors import ConfigError, ConnectError, MigrationCancelled
from whimbrel.plugins import PluginManager
from whimbrel.testing.transports import TransportConformance
from whimbrel_transports import unix
from whimbrel_transports.unix import UnixTransport


class TestUnix(TransportConformance):
    bad_addresses = ("", "/tmp/" + "x" * 103, "/tmp/\0", "\0abstract")

    def make(self):
        return UnixTransport()

    def address(self, tmp_path):
        return f"{tmp_path}/socket"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "socket"


@pytest.fixture
def listener(path):
    made = UnixTransport().listen(str(path))
    yield made
    made.close()


def connect(path, seconds=10.0):
    return UnixTransport().connect(str(path), Patience(seconds))


def test_the_socket_is_the_owners_alone(path):
    before = os.umask(0)
    try:
        listener = UnixTransport().listen(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        listener.close()
    finally:
        os.umask(before)
    assert not path.exists()


def test_both_ends_have_names(path, listener):
    near = connect(path)
    far = listener.accept(Patience(10))
    assert listener.uri == near.peer == f"unix:{path}"
    assert far.peer == f"unix:{path} (process {os.getpid()})"
    near.close()
    far.close()


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file"])
def test_what_is_no_socket_is_left_alone(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("precious")
    else:
        (path.parent / "file").write_text("precious")
        path.symlink_to("file")
    before = path.lstat()
    with pytest.raises(ConfigError, match="exists and is not a socket"):
        UnixTransport().listen(str(path))
    assert path.lstat() == before


def test_a_socket_that_nobody_listens_on_is_replaced(path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    listener = UnixTransport().listen(str(path))
    connect(path).close()
    listener.close()


def test_a_socket_that_somebody_listens_on_is_left_alone(path, listener):
    before = path.lstat()
    with pytest.raises(ConnectError, match=r"Failed to listen on '.*socket': Address already in use"):
        UnixTransport().listen(str(path))
    assert path.lstat().st_ino == before.st_ino
    with pytest.raises(ConnectError, match="no answer within"):
        listener.accept(Patience(0.06))  # looking has not been taken for a peer


def test_only_the_file_it_made_is_removed(path):
    listener = UnixTransport().listen(str(path))
    path.rename(path.with_name("kept"))  # so that its number is not used again
    path.write_text("somebody else's")
    listener.close()
    assert path.read_text() == "somebody else's"


def test_a_changed_working_directory_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listener = UnixTransport().listen("relative")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    listener.close()
    assert not (tmp_path / "relative").exists()


def test_the_longest_path_there_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listener = UnixTransport().listen("x" * 107)
    connect("x" * 107).close()
    listener.close()
    with pytest.raises(ConfigError, match="is 108 bytes long; the system's limit is 107"):
        UnixTransport().listen("ö" * 54)


@pytest.mark.parametrize(("name", "reason"), [("none", "No such file or directory"), ("file", "Connection refused")])
def test_refused_in_the_words_of_qemu(tmp_path, name, reason):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConnectError) as caught:
        connect(tmp_path / name)
    assert caught.value.message == f"Failed to connect to '{tmp_path / name}': {reason}"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConnectError, match=r"Failed to listen on .*: No such file or directory"):
        UnixTransport().listen(str(tmp_path / "none" / "socket"))


def test_a_listener_that_cannot_be_leaves_nothing(path, monkeypatch):
    monkeypatch.setattr(unix, "BACKLOG", "not a number")
    with pytest.raises(TypeError):
        UnixTransport().listen(str(path))
    assert not path.exists()


def test_a_stranger_is_hung_up_on_and_accept_goes_on(path, listener, monkeypatch, caplog):
    users = iter([os.geteuid() + 4711, os.geteuid(), 0])
    monkeypatch.setattr(unix, "_credentials", lambda accepted: (1, next(users)))
    stranger, friend, root = connect(path), connect(path), connect(path)
    for expected in (friend, root):
        far = listener.accept(Patience(10))
        far.send(b"welcome")
        buffer = bytearray(7)
        assert expected.recv_into(buffer) == 7
        far.close()
    assert stranger.recv_into(bytearray(1)) == 0
    assert "refused process 1 of user" in caplog.text
    for end in (stranger, friend, root):
        end.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_real_stranger_is_hung_up_on(caplog):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "socket"
        listener = UnixTransport().listen(str(path))
        path.chmod(0o666)
        # It becomes the stranger after it has started: the interpreter need not be within a stranger's reach.
        code = (
            "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
            "s.connect(sys.argv[1]); print(s.recv(1))"
        )
        stranger = subprocess.Popen([sys.executable, "-ISc", code, str(path)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(ConnectError, match="no answer within"):
            while stranger.poll() is None:
                listener.accept(Patience(0.1)).close()
            listener.accept(Patience(0.1)).close()
        listener.close()
        assert stranger.communicate(timeout=10)[0] == "b''\n"
        assert "of user 65534" in caplog.text


@pytest.fixture
def full(path):
    """A socket whose queue is full."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        waiting = [socket.socket(socket.AF_UNIX)]
        waiting[0].connect(str(path))
        yield listener
        for one in waiting:
            one.close()


def test_a_connect_to_a_full_queue_waits_for_room(path, full):
    accepted = []
    timer = threading.Timer(0.1, lambda: accepted.extend(full.accept() for _ in range(2)))
    timer.start()
    near = connect(path)
    timer.join()
    near.close()
    for one, _ in accepted:
        one.close()


def test_a_connect_to_a_full_queue_can_be_cancelled(path, full):
    patience = Patience(20)
    timer = threading.Timer(0.1, patience.cancelled.set)
    timer.start()
    with pytest.raises(MigrationCancelled):
        UnixTransport().connect(str(path), patience)
    timer.join()
    with pytest.raises(ConnectError, match="no answer within"):
        connect(path, 0.1)


def test_it_is_an_offer_of_the_plugin_unix():
    assert isinstance(PluginManager().transport("unix").create(), UnixTransport)
