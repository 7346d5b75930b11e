"""The transport suite on trial: each of these broken transports must fail the check that is there for it."""

import contextlib
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from whimbrel.errors import ChannelError, ChannelLost, ConnectError
from whimbrel.testing import stored
from whimbrel.testing import transports as suite
from whimbrel.testing._bench import Bench, nothing_left
from whimbrel_transports import _files, file, tcp
from whimbrel_transports._one_way import OnceListener
from whimbrel_transports._sockets import SocketChannel, SocketListener
from whimbrel_transports.fd import FdTransport
from whimbrel_transports.file import FileTransport
from whimbrel_transports.tcp import TcpTransport


class EmptySendEnds(SocketChannel):
    def send(self, data):
        super().send(data)
        if not memoryview(data).nbytes:
            self.end_writing()


class BytesOnly(SocketChannel):
    def send(self, data):
        super().send(data if isinstance(data, bytes) else bytes(memoryview(data).nbytes))


class Keeps(SocketChannel):
    kept = b""

    def send(self, data):
        super().send(self.kept)
        self.kept = data


class WaitsForAll(SocketChannel):
    def recv_into(self, buffer):
        return self._socket.recv_into(buffer, 0, socket.MSG_WAITALL)


class Reorders(SocketChannel):
    def send(self, data):
        super().send(bytes(data)[::-1])


class HalfCloseIsClose(SocketChannel):
    def end_writing(self):
        self.close()


class ForgetsItIsClosed(SocketChannel):
    def recv_into(self, buffer):
        return 0 if self._closed else super().recv_into(buffer)


class CloseIsTheEnd(SocketChannel):
    def recv_into(self, buffer):
        return self._socket.recv_into(buffer)


class DoesNotWake(SocketChannel):
    def close(self):
        with self._in.lock, self._out.lock:
            super().close()


class LosesAtClose(SocketChannel):
    def close(self):
        if not self._closed:
            self._closed = True
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self._socket.close()


class Recovers(SocketChannel):
    def send(self, data):
        try:
            super().send(data)
        except ChannelLost:
            if self._out.lost == "told":
                return
            self._out.lost = "told"
            raise


class ChangesItsMind(SocketChannel):
    asked = 0

    def recv_into(self, buffer):
        count = super().recv_into(buffer)
        self.asked += count == 0
        if self.asked > 1:
            raise ChannelLost("or was it?")
        return count


class Leaks(SocketChannel):
    leaked: ClassVar = []

    def close(self):
        if not self._closed:
            self.leaked.append(os.dup(self._socket.fileno()))
        super().close()


CHANNELS = {
    EmptySendEnds: "an_empty_send_is_no_end",
    BytesOnly: "any_buffer_is_sent",
    Keeps: "sent_memory_is_free_again",
    WaitsForAll: "a_receive_returns_what_is_there",
    Reorders: "bytes_arrive_in_order",
    HalfCloseIsClose: "ending_one_direction_keeps_the_other",
    ForgetsItIsClosed: "use_after_close",
    CloseIsTheEnd: "close_wakes_a_reader",
    DoesNotWake: "close_wakes_a_reader",
    LosesAtClose: "data_before_a_close_arrives",
    Recovers: "a_gone_peer_stays_gone_for_a_writer",
    ChangesItsMind: "a_gone_peer_stays_gone_for_a_reader",
}


class SlowToCancel(SocketListener):
    def accept(self, patience):
        while True:
            try:
                return super().accept(type(patience)(0.02))
            except ConnectError:
                if patience.remaining() == 0:
                    raise


class OnePeerAtATime(SocketListener):
    def accept(self, patience):
        channel = super().accept(patience)
        self.close()
        return channel


class TakesItsChannelsAlong(SocketListener):
    taken = None

    def accept(self, patience):
        self.taken = super().accept(patience)
        return self.taken

    def close(self):
        if self.taken is not None:
            self.taken.close()
        super().close()


LISTENERS = {
    SlowToCancel: "a_cancelled_accept",
    OnePeerAtATime: "every_peer_has_a_channel_of_its_own",
    TakesItsChannelsAlong: "a_closed_listener_keeps_what_it_accepted",
}


def judged(name, timeout=0.5):
    bench = Bench(TcpTransport(), "127.0.0.1:0", timeout=timeout, prompt=0.3)
    try:
        getattr(suite, f"check_{name}")(bench)
    finally:
        for made in bench._made:  # these do not close well, so a bench would wait for them in vain
            made._socket.close() if isinstance(made, DoesNotWake) else made.close()


@pytest.mark.parametrize("check", sorted({*CHANNELS.values(), *LISTENERS.values()}))
def test_a_good_transport_passes(check):
    judged(check, timeout=10)


@pytest.mark.parametrize(("channel", "check"), CHANNELS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_channel_is_found(channel, check, monkeypatch):
    monkeypatch.setattr(tcp, "SocketChannel", channel)
    with pytest.raises((AssertionError, ChannelError)):
        judged(check)


@pytest.mark.parametrize(("listener", "check"), LISTENERS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_listener_is_found(listener, check, monkeypatch):
    monkeypatch.setattr(tcp, "SocketListener", listener)
    with pytest.raises((AssertionError, ChannelError)):
        judged(check)


# ------------------------------------------------------------------------------- what is stored, to be read when whole


class InPlace(_files.Place):
    def make(self):
        return os.open(self.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=self.folder), self.name


class OneForAll(_files.Place):
    def make(self):
        return os.open(".temporary", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=self.folder), ".temporary"


class WritesOverTheOld(_files.FileWriter):
    def _keep(self, size, patience):
        if self._place.look() is not None:
            os.write(self._descriptor, Path(self._place.path).read_bytes())
            os.lseek(self._descriptor, 0, os.SEEK_SET)


class KeepsHalves(_files.FileWriter):
    def _release(self):
        if self._temporary:
            self._finish()
        super()._release()


class GathersBackwards(_files.FileWriter):
    def send_gathered(self, vectors):
        super().send_gathered(vectors[::-1].copy())


class SendsOn(_files.FileWriter):
    def _refuse_after_end(self):
        return


class FillsTheBack(_files.FileReader):
    def _read(self, buffer):
        view = memoryview(buffer)
        return super()._read(view[len(view) // 2 :])


class NeverTheSame(_files.FileReader):
    ended = False

    def recv_into(self, buffer):
        if self.ended:
            raise ChannelLost("or was it?")
        count = super().recv_into(buffer)
        self.ended = count == 0
        return count


class GivesTwo(OnceListener):
    def accept(self, patience):
        self._given = False
        return super().accept(patience)


STORED = [
    (_files, "Place", InPlace, "there_is_nothing_before_the_end"),
    (_files, "Place", InPlace, "what_was_there_stays_until_the_end"),
    (_files, "Place", InPlace, "a_close_before_the_end_changes_nothing"),
    (_files, "Place", OneForAll, "two_writers_do_not_mix"),
    (file, "FileWriter", WritesOverTheOld, "what_was_there_stays_until_the_end"),
    (file, "FileWriter", KeepsHalves, "a_close_before_the_end_changes_nothing"),
    (file, "FileWriter", GathersBackwards, "memory_is_stored_by_address"),
    (file, "FileWriter", SendsOn, "the_end_is_the_end"),
    (file, "FileReader", FillsTheBack, "any_buffer_is_read_into"),
    (file, "FileReader", NeverTheSame, "the_end_is_the_end"),
    (file, "OnceListener", GivesTwo, "a_stored_stream_has_one_reader_a_listener"),
]


def judged_stored(name, tmp_path):
    bench = Bench(FileTransport(), f"{tmp_path}/machine", timeout=5, prompt=2, duplex=False)
    try:
        getattr(stored, f"check_{name}")(bench)
    finally:
        for made in bench._made:
            with contextlib.suppress(OSError):
                made.close()


@pytest.mark.parametrize("check", sorted({check for _, _, _, check in STORED}))
def test_a_good_file_passes(check, tmp_path):
    judged_stored(check, tmp_path)


@pytest.mark.parametrize(("module", "name", "broken", "check"), STORED, ids=lambda one: getattr(one, "__name__", one))
def test_a_broken_file_is_found(module, name, broken, check, monkeypatch, tmp_path):
    monkeypatch.setattr(module, name, broken)
    with pytest.raises((AssertionError, ChannelError, OSError)):
        judged_stored(check, tmp_path)


# ------------------------------------------------------------------------------------------------ what is left behind


def test_a_process_that_is_left_behind_is_found():
    with pytest.raises(AssertionError, match="left behind: process "), nothing_left(0.05):
        child = subprocess.Popen(["true"])
        child.returncode = 0  # nobody will wait for it
    os.waitpid(child.pid, 0)


def test_an_end_that_garbles_is_found():
    """A transport whose ends are both there already is looked at as closely."""

    class Garbles(FdTransport):
        def connect(self, address, patience):
            return Reorders(super().connect(address, patience)._socket, "fd")

    bench = Bench(Garbles(), "", timeout=5, ends=lambda: tuple(map(str, passed())))
    with pytest.raises(AssertionError, match="b'kconk' arrived, b'knock' was sent"):
        suite.check_bytes_arrive_in_order(bench)
    bench.close()


def passed():
    for end in (ends := [end.detach() for end in socket.socketpair()]):
        os.set_inheritable(end, True)
    return ends


def test_what_is_left_behind_is_found(monkeypatch):
    monkeypatch.setattr(tcp, "SocketChannel", Leaks)
    with pytest.raises(AssertionError, match="left behind: descriptor"), nothing_left(0.05):
        judged("bytes_arrive_in_order", timeout=10)
    assert Leaks.leaked
    while Leaks.leaked:
        os.close(Leaks.leaked.pop())
    gate = threading.Event()
    lingerer = threading.Thread(target=gate.wait, name="lingerer")
    with pytest.raises(AssertionError, match="left behind: thread lingerer"), nothing_left(0.05):
        lingerer.start()
    gate.set()
    lingerer.join()
