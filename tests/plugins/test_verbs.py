"""The emulated verbs: the conformance suite over each way, and what is the emulation's own."""

import os
import socket
import stat
import struct
import tempfile
import threading
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.abc import Patience
from whimbrel.errors import ConnectError, StreamError
from whimbrel.plugins import PluginManager
from whimbrel.testing.verbs import VerbsBench, VerbsConformance
from whimbrel.verbs import Access, ConnectRejected, QpState, WcStatus
from whimbrel_transports import _verbs_copy, verbs
from whimbrel_transports._verbs_frames import HEADER, PIECE, REGION, Frame, Kind, pack, parse
from whimbrel_transports._verbs_rendezvous import Emulation, Ways

BOTH = Ways.SHARED | Ways.SOCKET


class TestShared(VerbsConformance):
    def make(self):
        return Emulation(Ways.SHARED)


class TestSocket(VerbsConformance):
    memories = ("anonymous",)

    def make(self):
        return Emulation(Ways.SOCKET)


# ------------------------------------------------------------------------------------------------- the offer


def test_the_bundled_providers_are_offered_and_auto_takes_the_one_that_agrees():
    manager = PluginManager()
    assert [spec.name for spec in manager.verbs_providers()] == ["shared", "socket", "software"]
    assert manager.provider().name == "software"
    assert all(isinstance(spec.create(), Emulation) for spec in verbs.whimbrel_verbs_providers())
    (row,) = (row for row in manager.catalogue() if row.name == "verbs")
    assert (row.kinds, row.offers) == (("verbs provider",), ("software", "shared", "socket"))


def be_rejected(near, private_data):
    with pytest.raises(ConnectRejected):
        near.connect(private_data, Patience(20))


def connected(listening, connecting):
    """Which way two ends take; both are closed."""
    with ExitStack() as stack:
        listener = stack.enter_context(closing(Emulation(listening).listen("127.0.0.1", 0)))
        found = []
        hearing = threading.Thread(target=lambda: found.append(listener.get_request(Patience(20))))
        hearing.start()
        try:
            near = stack.enter_context(closing(Emulation(connecting).resolve("127.0.0.1", listener.port, Patience(20))))
            queue = near.context.create_cq(8)
            near.create_qp(near.context.alloc_pd(), queue, queue, max_send_wr=1, max_recv_wr=1)
            asking = threading.Thread(target=be_rejected, args=(near, b""))
            asking.start()
            hearing.join()
            stack.enter_context(closing(found[0]))
            found[0].reject()
            asking.join()
            return near.context.attributes.name
        finally:
            listener.close()
            hearing.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of a listener that is closed
@pytest.mark.parametrize(
    ("listening", "connecting", "expected"),
    [
        (BOTH, BOTH, "shared"),
        (BOTH, Ways.SOCKET, "socket"),
        (Ways.SOCKET, BOTH, "socket"),
        (Ways.SHARED, BOTH, "shared"),
        (Ways.SHARED, Ways.SOCKET, None),
        (Ways.SOCKET, Ways.SHARED, None),
    ],
)
def test_two_ends_agree_on_the_fastest_way_that_both_have(listening, connecting, expected):
    if expected is None:
        with pytest.raises(ConnectError, match="no way in common"):
            connected(listening, connecting)
    else:
        assert connected(listening, connecting) == expected


@pytest.mark.parametrize("why", ["another boot", "a path that leads nowhere"])
def test_without_shared_memory_in_reach_tcp_is_taken(why, monkeypatch):
    rendezvous = "whimbrel_transports._verbs_rendezvous."
    if why == "another boot":
        boots = [bytes(16), bytes(15) + b"x"]
        monkeypatch.setattr(rendezvous + "_boot", lambda: boots[threading.current_thread() is threading.main_thread()])
    else:
        monkeypatch.setattr(rendezvous + "_knock", lambda *_: None)
    assert connected(BOTH, BOTH) == "socket"


def test_the_socket_is_in_a_folder_of_ones_own_and_goes_with_the_listener(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    listener = Emulation(BOTH).listen("127.0.0.1", 0)
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    listener.close()
    assert not list(tmp_path.iterdir())


def test_strangers_hold_up_nobody():
    with ExitStack() as stack:
        bench = VerbsBench(Emulation(BOTH), "memfd", 20.0, stack)
        listener = stack.enter_context(closing(bench.provider.listen("127.0.0.1", 0)))
        for words in (
            b"",
            b"whimverb",
            b"GET / HTTP/1.1\r\n\r\n" * 4,
            struct.pack("!8sII16s", b"whimverb", 9, 3, bytes(16)),
        ):
            stranger = stack.enter_context(socket.create_connection(("127.0.0.1", listener.port)))
            stranger.sendall(words)
        found = []
        hearing = threading.Thread(target=lambda: found.append(listener.get_request(Patience(20))))
        hearing.start()
        near = stack.enter_context(closing(bench.provider.resolve("127.0.0.1", listener.port, Patience(20))))
        bench.end(near)
        asking = threading.Thread(target=be_rejected, args=(near, b"hi"))
        asking.start()
        hearing.join()
        assert found[0].private_data == b"hi"
        found[0].reject()
        asking.join()


# ------------------------------------------------------------------------------------------------- frames


def test_the_bytes_of_frames():
    assert pack(Frame(Kind.SEND, 0xAABBCCDD, 2, 3, 0, immediate=True)).hex() == (
        "05010000aabbccdd000000000000000200000000000000030000000000000000"
    )
    assert pack(Frame(Kind.WRITE, 0, 7, 40, 1)).hex() == (
        "0600000000000000000000000000000700000000000000280000000000000001"
    )


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_any_header_is_taken_whole_or_refused(data):
    try:
        frame = parse(data)
    except StreamError:
        return
    assert pack(frame) == data
    assert frame.size <= (1 << 30) + (1 << 16) * PIECE.size


BAD = [
    bytes(32),
    pack(Frame(Kind.REQUEST)),
    pack(Frame(Kind.SEND, number=2)),
    pack(Frame(Kind.ACK, number=900)),
    pack(Frame(Kind.ACK, number=0)),
    pack(Frame(Kind.NAK, word=2, number=900)),
    pack(Frame(Kind.NAK, word=77, number=1)),
    pack(Frame(Kind.CONTROL, count=65536)),
    pack(Frame(Kind.FILE, number=1)),
    pack(Frame(Kind.REGION, 5, 1, REGION.size)) + REGION.pack(4096, 4096, 1, 0, 0, 0),
    pack(Frame(Kind.REVOKE, 5)),
    pack(Frame(Kind.WRITE, 0, 2, PIECE.size + 9, 1)) + PIECE.pack(0, 8, 0, 0),
    pack(Frame(Kind.WRITE, 0, 2, 2 * PIECE.size, 2)) + PIECE.pack(0, (1 << 64) - 8, 0, 0) + PIECE.pack(0, 8, 0, 0),
    pack(Frame(Kind.SEND, size=8, number=2))[:20],
]


@pytest.mark.parametrize("ways", [Ways.SHARED, Ways.SOCKET], ids=["shared", "socket"])
@pytest.mark.parametrize("words", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("crumbs", [False, True], ids=["whole", "byte by byte"])
def test_a_peer_that_talks_nonsense_is_hung_up_on_and_touches_nothing(ways, words, crumbs):
    with ExitStack() as stack:
        near, far = VerbsBench(Emulation(ways), "memfd", 20.0, stack).pair()
        before = far.memory.view.tobytes()
        line = near.pair._line._socket
        for part in [words[at : at + 1] for at in range(len(words))] if crumbs else [words]:
            try:
                line.sendall(part)
            except OSError:
                break
        with suppress(OSError):
            line.shutdown(socket.SHUT_WR)
        far.id.get_event(Patience(20))
        assert far.pair.state is QpState.ERR
        assert far.memory.view.tobytes() == before or pytest.fail("memory was touched")


def test_a_control_page_that_could_shrink_is_refused():
    with ExitStack() as stack:
        near, far = VerbsBench(Emulation(Ways.SHARED), "memfd", 20.0, stack).pair()
        other = os.memfd_create("whimbrel-test")
        stack.callback(os.close, other)
        socket.send_fds(near.pair._line._socket, [pack(Frame(Kind.CONTROL, count=65536))], [other])
        far.id.get_event(Patience(20))
        assert far.pair.state is QpState.ERR


def test_descriptors_that_nobody_asked_for_are_closed():
    with ExitStack() as stack:
        near, far = VerbsBench(Emulation(Ways.SHARED), "memfd", 20.0, stack).pair()
        before = len(list(Path("/proc/self/fd").iterdir()))
        with Path(os.devnull).open("rb") as some:
            socket.send_fds(near.pair._line._socket, [pack(Frame(Kind.ACK, number=1))], [some.fileno()] * 3)
            far.id.get_event(Patience(20))
        far.id.close()
        assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_file_that_has_become_too_short_is_written_by_the_line():
    with ExitStack() as stack:
        bench = VerbsBench(Emulation(Ways.SHARED), "memfd", 20.0, stack)
        near, far = bench.pair()
        descriptor = os.memfd_create("whimbrel-test")
        stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, 65536)
        own = np.zeros(65536, np.uint8)
        region = far.pair.pd.reg_mr(own.ctypes.data, 65536, Access.LOCAL_WRITE | Access.REMOTE_WRITE, fd=descriptor)
        os.ftruncate(descriptor, 0)
        bench.settle(near, far)
        near.write(far, own.ctypes.data, 100, rkey=region.rkey)
        assert near.next().status is WcStatus.SUCCESS
        assert bytes(own[:100]) == bytes(near.memory.view[:100])


# ------------------------------------------------------------------------------------------------- copying


@settings(max_examples=200)
@given(st.data())
def test_copies_are_those_of_a_plain_loop(data):
    unit = data.draw(st.sampled_from([1, 512, 4096]))
    size = 64 * unit
    source = np.random.default_rng(3).integers(0, 256, size, np.uint8)
    target, model = np.zeros(size, np.uint8), bytearray(size)
    count = data.draw(st.integers(0, 40))
    same = data.draw(st.booleans())
    starts = data.draw(st.lists(st.integers(0, 63), min_size=count, max_size=count))
    others = starts if same else data.draw(st.lists(st.integers(0, 63), min_size=count, max_size=count))
    lengths = [
        data.draw(st.integers(0, min(3, 64 - max(one, other)))) for one, other in zip(starts, others, strict=True)
    ]
    for one, other, length in zip(starts, others, lengths, strict=True):
        model[other * unit : (other + length) * unit] = source[one * unit : (one + length) * unit].tobytes()
    columns = [np.array(column, np.uint64) * np.uint64(unit) for column in (starts, others, lengths)]
    _verbs_copy.copy_pieces(
        columns[0] + np.uint64(source.ctypes.data), columns[1] + np.uint64(target.ctypes.data), columns[2]
    )
    assert target.tobytes() == bytes(model) or pytest.fail("the copy differs")


def test_copying_into_what_is_not_there_is_an_error():
    own = np.zeros(4096, np.uint8)
    here = np.arange(20, dtype=np.uint64) * np.uint64(3) + np.uint64(own.ctypes.data)
    there = np.arange(20, dtype=np.uint64)[::-1] * np.uint64(5) + np.uint64(64)
    with pytest.raises(OSError, match="copying memory failed"):
        _verbs_copy.copy_pieces(here, there.copy(), np.full(20, 2, np.uint64))
