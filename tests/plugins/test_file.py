"""file: the conformance suite for what is stored, and what is the file system's own."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest

from whimbrel.abc import Patience
from whimbrel.errors import (
    ChannelClosed,
    ChannelLost,
    ConfigError,
    ConnectError,
    HandoverUndecided,
    MigrationCancelled,
    MigrationRefused,
)
from whimbrel.plugins import PluginManager
from whimbrel.stream import Writer
from whimbrel.testing.stored import StoredTransportConformance
from whimbrel.testing.transports import receive_all
from whimbrel_transports import _files
from whimbrel_transports.file import FileTransport

LONG = 20.0


class TestFile(StoredTransportConformance):
    bad_addresses = ("", "/", ".", "..", "folder/", "\0", "\udfff", ",offset=1", "a,offset=", "a,offset=-1")

    def make(self):
        return FileTransport()

    def address(self, tmp_path):
        return f"{tmp_path}/machine"


class TestFileWithAnOffset(StoredTransportConformance):
    def make(self):
        return FileTransport()

    def address(self, tmp_path):
        return f"{tmp_path}/machine,offset=4KiB"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "machine"


@pytest.fixture
def write(tidy):
    """Begins a file."""
    made = []

    def begin(address):
        made.append(FileTransport().connect(str(address), Patience(LONG)))
        return made[-1]

    yield begin
    for channel in made:
        channel.close()


def read(address):
    listener = FileTransport().listen(str(address))
    try:
        channel = listener.accept(Patience(LONG))
        try:
            return receive_all(channel)
        finally:
            channel.close()
    finally:
        listener.close()


def store(write, address, data):
    channel = write(address)
    channel.send(data)
    channel.end_writing()


# ------------------------------------------------------------------------------------------------ one step, or nothing


def test_it_is_the_owners_alone_and_nothing_else_is_left(write, path):
    before = os.umask(0)
    try:
        channel = write(path)
        (temporary,) = path.parent.iterdir()
        assert temporary.name.startswith(".whimbrel-")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        channel.end_writing()
    finally:
        os.umask(before)
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_whoever_has_the_old_file_open_keeps_it(write, path):
    path.write_bytes(b"old")
    with path.open("rb") as old:
        store(write, path, b"new")
        assert old.read() == b"old"
    assert path.read_bytes() == b"new"


def test_a_path_relative_to_the_working_directory_of_the_beginning(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    channel = write("machine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    channel.end_writing()
    assert (tmp_path / "machine").exists()


def test_a_folder_that_gets_another_name_meanwhile(write, tmp_path):
    (tmp_path / "folder").mkdir()
    channel = write(tmp_path / "folder" / "machine")
    channel.send(b"whole")
    (tmp_path / "folder").rename(tmp_path / "moved")
    channel.end_writing()
    assert (tmp_path / "moved" / "machine").read_bytes() == b"whole"


def test_something_else_in_its_place_at_the_end_is_left_alone(write, path):
    channel = write(path)
    channel.send(b"half")
    path.mkdir()
    for _ in range(2):
        with pytest.raises(ChannelLost, match=r"failed at its end: .* is a folder; expected a regular file"):
            channel.end_writing()
    channel.close()
    assert list(path.parent.iterdir()) == [path]


def test_a_close_while_it_is_brought_to_the_disk_is_in_time(write, path, monkeypatch):
    path.write_bytes(b"old")
    channel = write(path)
    closing = threading.Thread(target=channel.close)
    real = os.fsync

    def fsync(descriptor):
        closing.start()
        while not channel._closed:
            closing.join(0.001)
        real(descriptor)

    monkeypatch.setattr(_files.os, "fsync", fsync)
    with pytest.raises(ChannelClosed):
        channel.end_writing()
    closing.join()
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


KILLED = """
import os, signal, sys
from whimbrel.abc import Patience
from whimbrel_transports.file import FileTransport
channel = FileTransport().connect(sys.argv[1], Patience(20))
channel.send(bytes(1 << 20))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_leaves_what_was_there(path):
    path.write_bytes(b"old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert {one.name[:10] for one in path.parent.iterdir()} == {"machine", ".whimbrel-"}


# ------------------------------------------------------------------------------------------------- what is no such file


@pytest.mark.parametrize("side", ["connect", "listen"])
@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: path.mkdir(), "a folder"),
        (os.mkfifo, "a named pipe"),
        (lambda path: path.symlink_to("precious"), "a symbolic link, which is not followed"),
    ],
)
def test_what_is_no_regular_file_is_left_alone(tidy, path, side, make, complaint):
    (path.parent / "precious").write_text("precious")
    make(path)
    before = path.lstat()
    with pytest.raises(ConfigError, match=f"{complaint}; expected a regular file; write exec:sh -c"):
        if side == "connect":
            FileTransport().connect(str(path), Patience(LONG))
        else:
            FileTransport().listen(str(path))
    assert path.lstat() == before
    assert (path.parent / "precious").read_text() == "precious"
    assert len(list(path.parent.iterdir())) == 2


def test_a_device_is_left_alone(tidy):
    with pytest.raises(ConfigError, match="'/dev/null' is a device"):
        FileTransport().connect("/dev/null", Patience(LONG))


@pytest.mark.parametrize(
    ("name", "reason"), [("none/machine", "No such file or directory"), ("file/machine", "Not a directory")]
)
def test_a_folder_that_is_none_says_so_in_the_words_of_qemu(tidy, tmp_path, name, reason):
    (tmp_path / "file").write_text("")
    address = str(tmp_path / name)
    with pytest.raises(ConnectError) as caught:
        FileTransport().connect(address, Patience(LONG))
    assert caught.value.message == f"Failed to connect to '{address}': {reason}"
    with pytest.raises(ConnectError) as caught:
        FileTransport().listen(address)
    assert caught.value.message == f"Failed to listen on '{address}': {reason}"


def test_a_file_that_is_not_there(tidy, path):
    with pytest.raises(ConnectError, match=r"Failed to listen on '.*': No such file or directory"):
        FileTransport().listen(str(path))


# ------------------------------------------------------------------------------------------------------------ offsets


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512", 512), ("4k", 4096), ("4KiB", 4096), ("0x1F", 31), ("0X10", 16), ("1.5K", 1536)]
)
def test_what_is_before_the_offset_is_kept(write, path, text, size):
    header = bytes(np.random.default_rng(3).integers(1, 256, 5000, "uint8"))
    path.write_bytes(header)
    store(write, f"{path},offset={text}", b"the stream")
    assert path.read_bytes() == header[:size] + b"the stream"
    assert read(f"{path},offset={text}") == b"the stream"


@pytest.mark.parametrize("old", [None, b"", b"short"])
def test_what_is_missing_before_the_offset_is_zeros(write, path, old):
    if old is not None:
        path.write_bytes(old)
    store(write, f"{path},offset=64KiB", b"the stream")
    assert path.read_bytes() == (old or b"").ljust(65536, b"\0") + b"the stream"


def test_a_stream_of_nothing_behind_an_offset(write, path):
    store(write, f"{path},offset=100", b"")
    assert path.read_bytes() == bytes(100)
    assert read(f"{path},offset=100") == b""


def test_reading_behind_the_end_is_refused(tidy, path):
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="has 5 bytes, so there is nothing at offset 6"):
        FileTransport().listen(f"{path},offset=6")


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "0x", "0xg", "1MB", "1 2", f"0x8{'0' * 15}", "16777216T", "1,offset=2"]
)
def test_offsets_that_cannot_be(tidy, path, text):
    for side in (FileTransport().listen, lambda address: FileTransport().connect(address, Patience(LONG))):
        with pytest.raises(ConfigError, match="file URI has bad offset"):
            side(f"{path},offset={text}")


def test_an_offset_beyond_what_the_file_system_can(tidy, path):
    with pytest.raises(ConnectError, match=r"Failed to connect to .*: (File too large|Invalid argument)"):
        FileTransport().connect(f"{path},offset={(1 << 63) - 1}", Patience(LONG))
    assert list(path.parent.iterdir()) == []


def test_a_cancel_while_the_beginning_is_copied(tidy, path, monkeypatch):
    path.write_bytes(bytes(100))
    monkeypatch.setattr(_files, "CHUNK", 10)
    patience, real, copied = Patience(LONG), os.sendfile, []

    def sendfile(*arguments):
        copied.append(real(*arguments))
        if len(copied) == 3:
            patience.cancelled.set()
        return copied[-1]

    monkeypatch.setattr(_files.os, "sendfile", sendfile)
    with pytest.raises(MigrationCancelled, match="copying the beginning"):
        FileTransport().connect(f"{path},offset=100", patience)
    assert copied == [10, 10, 10]
    assert list(path.parent.iterdir()) == [path]


# -------------------------------------------------------------------------------------------------------- a full disk

FULL = """
import resource, sys
from whimbrel.abc import Patience
from whimbrel.errors import ChannelLost
from whimbrel_transports.file import FileTransport
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
channel = FileTransport().connect(sys.argv[1], Patience(20))
for attempt in range(2):
    try:
        while True:
            channel.send(bytes(100_000))
    except ChannelLost as error:
        print(error.message)
try:
    channel.end_writing()
except ChannelLost as error:
    print(error.message)
channel.close()
"""


def test_a_file_that_may_not_grow_is_lost_and_says_so(path):
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL, str(path), "250000"], capture_output=True, text=True, check=True)
    message = f"writing file:{path} failed after 250000 bytes: the file may not be so large (File too large)"
    assert done.stdout.splitlines() == [message] * 3
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_lost_and_says_so(path):
    """A real one, of a megabyte, in a name space of its own."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no name spaces here")
    folder = path.parent
    text = f'mount -t tmpfs -o size=1m none {folder} && echo old > {path} && "$@" && ls -A {folder} && cat {path}'
    done = subprocess.run(
        [*alone, "sh", "-c", text, "sh", sys.executable, "-c", FULL, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    *messages, left, content = done.stdout.splitlines()
    assert len(messages) == 3
    for message in messages:
        assert message.startswith(f"writing file:{path} failed after ")
        assert message.endswith(" bytes: the disk is full (No space left on device)")
    assert (left, content) == (path.name, "old")


# ------------------------------------------------------------------------------------------------ large, and by address


def test_what_was_written_is_brought_to_the_disk_on_the_way(write, path, monkeypatch):
    told = []
    monkeypatch.setattr(_files, "BEHIND", 1000)
    monkeypatch.setattr(_files, "_sync_file_range", lambda _, start, size, flag: told.append((start, size, flag)))
    channel = write(f"{path},offset=100")
    for size in (999, 1, 1, 2500):
        channel.send(bytes(size))
    channel.end_writing()
    assert told == [(100, 1000, 2), (1100, 2501, 2)]


def test_memory_is_written_by_address(write, path, monkeypatch):
    """What a writer of streams does with it; and a close is noticed between two system calls."""
    channel = write(path)
    writer = Writer(channel)
    assert writer.gathers
    memory = np.arange(1 << 16, dtype=np.uint64)
    vectors = np.stack([memory.ctypes.data + np.arange(0, memory.nbytes, 64), np.full(memory.nbytes // 64, 64)], axis=1)
    writer.write(b"head")
    writer.write_gathered(vectors.astype(np.uint64))
    channel.end_writing()
    assert path.read_bytes() == b"head" + memory.tobytes()


def test_a_close_between_two_gathered_writes(write, path, monkeypatch):
    channel = write(path)
    memory = np.zeros(1 << 20, np.uint8)
    vectors = np.stack([np.full(4000, memory.ctypes.data), np.full(4000, 256)], axis=1).astype(np.uint64)
    told = channel._check_open
    closing = threading.Thread(target=channel.close)

    def check():
        if not closing.is_alive() and not channel._closed:
            closing.start()
        while not channel._closed:
            closing.join(0.001)
        told()

    monkeypatch.setattr(channel, "_check_open", check)
    with pytest.raises(ChannelClosed):
        channel.send_gathered(vectors)
    closing.join()
    assert list(path.parent.iterdir()) == []


# ----------------------------------------------------------------------------------------------------- whole machines


@pytest.mark.parametrize("offset", ["", ",offset=4KiB"])
@pytest.mark.parametrize("start", [None, True, False])
def test_a_machine_goes_into_a_file_and_out_of_it(make_machine, moved, path, offset, start):
    path.write_bytes(b"header".ljust(4096, b"."))
    uri = f"file:{path}{offset}"
    done = moved(make_machine(), make_machine(), uri, uri, together=False, start=start)
    assert done.there.ownership == "released"
    assert done.runs == (start is True)
    assert path.read_bytes().startswith(b"header." if offset else b"QEVM")
    assert list(path.parent.iterdir()) == [path]


def test_it_can_be_read_again_and_again(make_machine, moved, path):
    uri = f"file:{path}"
    moved(make_machine(), make_machine(), uri, uri, together=False)
    again = make_machine()
    again.incoming(uri).wait(LONG)
    assert again.run_state == "paused"


def test_a_cancel_leaves_what_was_there(make_machine, path):
    path.write_bytes(b"old")
    source = make_machine(size=16 << 20)
    source.settings.parameters.update({"max-bandwidth": "1MiB"})
    source.start()
    outgoing = source.migrate(f"file:{path}")
    outgoing.cancel()
    with pytest.raises(MigrationCancelled):
        outgoing.wait(LONG)
    assert source.run_state == "running"
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_put_in_its_place_leaves_it_undecided(make_machine, path):
    source = make_machine(size=4 << 20)
    source.settings.capabilities.update({"pause-before-switchover": True})
    source.start()
    outgoing = source.migrate(f"file:{path}")
    while outgoing.status != "pre-switchover":
        assert not outgoing._status.wait_finished(0.001)
    path.mkdir()
    outgoing.proceed()
    with pytest.raises(HandoverUndecided, match="is a folder; expected a regular file"):
        outgoing.wait(LONG)
    assert list(path.parent.iterdir()) == [path]
    source.reclaim()
    source.start()


def test_half_a_machine_is_none(make_machine, moved, path):
    uri = f"file:{path}"
    moved(make_machine(), make_machine(), uri, uri, together=False)
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(ChannelLost, match="the stream ended where at least"):
        make_machine().incoming(uri).wait(LONG)


def test_what_needs_a_way_back_is_refused(make_machine, path):
    with pytest.raises(MigrationRefused, match="transport 'file' has no way back"):
        make_machine(**{"return-path": True}).migrate(f"file:{path}")
    assert list(path.parent.iterdir()) == []


def test_it_is_an_offer_of_the_plugin_file():
    spec = PluginManager().transport("file")
    assert isinstance(spec.create(), FileTransport)
    assert (spec.duplex, spec.runs_programs) == (False, False)
