"""rdma: over each provider of verbs, and over one of the tests' own: the conformance suite, and what is its own."""

from __future__ import annotations

import numpy as np
import pytest

from whimbrel.abc import Patience, RamControl
from whimbrel.errors import ChannelLost, StreamError
from whimbrel.machine import Ram
from whimbrel.plugins import PluginManager
from whimbrel.testing._bench import Task, nothing_left
from whimbrel.testing.transports import TransportConformance
from whimbrel.verbs import Access
from whimbrel.wire import rdma as wire
from whimbrel.wire.rdma import CHUNK
from whimbrel.wire.rdma import ControlType as Kind
from whimbrel_transports._rdma_transport import RdmaTransport

from .loopback_verbs import Offers

LONG = 30.0


class _Rdma(TransportConformance):
    several_peers = False  # the second of a source's connections is its way back
    bad_addresses = ("", "host", "host:", ":", ":-1", ":65536", "h:0x10", "::1:4444", "[::1]", "[h]:1", "[::1:5")

    def address(self, tmp_path):
        return "127.0.0.1:0"


class TestRdmaOverSharedMemory(_Rdma):
    def make(self):
        return RdmaTransport(PluginManager(verbs_provider="shared"))


class TestRdmaOverSockets(_Rdma):
    def make(self):
        return RdmaTransport(PluginManager(verbs_provider="socket"))


class TestRdmaOfAStranger(_Rdma):
    def make(self):
        return RdmaTransport(Offers())


# ------------------------------------------------------------------------------------------- a peer that may not be


class Memory:
    """Two blocks that a peer may be let write into; what is exposed and filled is noted."""

    def __init__(self, ram):
        self.regions = [ram.add("a", 3 * CHUNK), ram.add("b", CHUNK // 2)]
        self.exposed, self.filled = [], []

    def expose(self, region, start, length):
        self.exposed.append((region, start, length))

    def fill(self, region, start, length, value):
        self.filled.append((region, start, length, value))

    @property
    def touched(self):
        return any(region.view.any() for region in self.regions)


class Hostile:
    """The source's end of a connection, without the source's manners; `serving` is the destination's hook."""

    def __init__(self, offers, memory, *, pin_all=False):
        transport = RdmaTransport(offers, pin_all=pin_all)
        listener = transport.listen("127.0.0.1:0")
        accepting = Task(lambda: listener.accept(Patience(LONG)), "accept", LONG)
        self.near = transport.connect(listener.uri.removeprefix("rdma:"), Patience(LONG))
        self.far = accepting.result()
        listener.close()
        self.link = self.near._out
        self.memory = memory
        self.local = np.full(2 * CHUNK, 0xEE, np.uint8)
        self.lkey = self.link.domain.reg_mr(self.local.ctypes.data, self.local.size, Access(0)).lkey
        self.serve()

    def serve(self, flags=RamControl.SETUP):
        self.serving = Task(lambda: self.far.ram_load_hook(flags, self.memory), "hook", LONG)

    def blocks(self):
        return self.link.ask(Kind.RAM_BLOCKS_REQUEST, None, Kind.RAM_BLOCKS_RESULT).records().copy()

    def register(self, where=0, block=0, more=0):
        row = np.array([(where, block, 0, more)], wire.REGISTERED)
        return int(self.link.ask(Kind.REGISTER_REQUEST, row, Kind.REGISTER_RESULT).records()["rkey"][0])

    def write(self, address, length, rkey):
        """One write; raises ChannelLost with the reason if it fails."""
        done = []
        self.link.on_written = lambda: done.append(1)
        one = lambda value: np.array([value], np.uint64)  # noqa: E731
        keys = np.array([self.lkey], np.uint32), np.array([rkey], np.uint32)
        self.link.write(one(self.local.ctypes.data), keys[0], one(address), keys[1], one(length), wire.work_id(1))
        while not done:
            self.link.complete_one()

    def refused(self, words):
        with pytest.raises(StreamError, match=words):
            self.serving.result()
        assert not self.memory.touched

    def close(self):
        self.near.close()
        self.far.close()


@pytest.fixture
def memory():
    ram = Ram("memfd")
    yield Memory(ram)
    ram.close()


@pytest.fixture(params=["shared", "socket", "a stranger's"])
def hostile(request, memory):
    """`hostile(pin_all=…)`, closed behind the test, which must leave nothing."""
    made = []

    def make(**more):
        offers = Offers() if request.param == "a stranger's" else PluginManager(verbs_provider=request.param)
        made.append(Hostile(offers, memory, **more))
        return made[-1]

    with nothing_left(5):
        yield make
        for one in made:
            one.close()


def records(kind, *rows):
    return np.array(list(rows), kind).tobytes()


@pytest.mark.parametrize("pin_all", [False, True])
def test_a_write_inside_of_what_is_registered(hostile, memory, pin_all):
    peer = hostile(pin_all=pin_all)
    told = peer.blocks()
    rkey = int(told["rkey"][0]) if pin_all else peer.register()
    peer.write(memory.regions[0].address + 5, 10, rkey)
    peer.link.tell(Kind.REGISTER_FINISHED)
    peer.serving.result()
    assert np.flatnonzero(memory.regions[0].view).tolist() == list(range(5, 15))
    assert memory.exposed == ([(0, 0, 3 * CHUNK), (1, 0, CHUNK // 2)] if pin_all else [(0, 0, CHUNK)])


@pytest.mark.parametrize(
    ("offset", "length"),
    [(CHUNK - 1, 2), (CHUNK, 1), (-1, 1), (0, CHUNK + 1), (2 * CHUNK, 8)],
    ids=["past a chunk", "behind it", "before its block", "longer than it", "a chunk that is not registered"],
)
def test_a_write_outside_of_what_is_registered(hostile, memory, offset, length):
    peer = hostile()
    peer.blocks()
    rkey = peer.register()
    with pytest.raises(ChannelLost, match="remote access error"):
        peer.write(memory.regions[0].address + offset, length, rkey)
    assert not memory.touched
    with pytest.raises(ChannelLost):
        peer.serving.result()


def test_a_write_into_another_block(hostile, memory):
    peer = hostile()
    peer.blocks()
    rkey = peer.register()
    with pytest.raises(ChannelLost, match="remote access error"):
        peer.write(memory.regions[1].address, 8, rkey)
    assert not memory.touched


def test_a_write_with_a_key_that_was_never_given(hostile, memory):
    peer = hostile()
    peer.blocks()
    rkey = peer.register()
    with pytest.raises(ChannelLost, match="remote access error"):
        peer.write(memory.regions[0].address, 8, rkey ^ 0x5A5A)
    assert not memory.touched


def test_a_write_with_a_stale_key(hostile, memory):
    """Unregistered by the peer's own wish."""
    peer = hostile()
    peer.blocks()
    rkey = peer.register()
    row = np.array([(0, 0, 0, 0)], wire.REGISTERED)
    peer.link.ask(Kind.UNREGISTER_REQUEST, row, Kind.UNREGISTER_FINISHED)
    with pytest.raises(ChannelLost, match="remote access error"):
        peer.write(memory.regions[0].address, 8, rkey)
    assert not memory.touched


def test_a_write_when_all_has_come(hostile, memory):
    """Behind the last body nobody writes any more."""
    peer = hostile()
    peer.blocks()
    rkey = peer.register()
    peer.link.tell(Kind.REGISTER_FINISHED)
    peer.serving.result()
    peer.far.ram_revoke()
    with pytest.raises(ChannelLost, match="remote access error"):
        peer.write(memory.regions[0].address, 8, rkey)
    assert not memory.touched


def test_a_region_after_all_has_come(hostile):
    peer = hostile()
    peer.blocks()
    peer.far.ram_revoke()
    peer.link.tell(Kind.REGISTER_REQUEST, records(wire.REGISTERED, (0, 0, 0, 0)))
    peer.refused("wants to write, and all of its RAM has come")


PLACES = {
    "a block that is not there": (Kind.REGISTER_REQUEST, records(wire.REGISTERED, (0, 2, 0, 0)), "RAM block 2"),
    "chunks past a block": (Kind.REGISTER_REQUEST, records(wire.REGISTERED, (0, 0, 0, 3)), "it has 3"),
    "an address outside": (Kind.REGISTER_REQUEST, records(wire.REGISTERED, (3 * CHUNK, 0, 0, 0)), "which has 0x300000"),
    "zeros past a block": (Kind.COMPRESS, records(wire.COMPRESSED, (0, 1, 3 * CHUNK, CHUNK)), "COMPRESS is about"),
    "no such region": (Kind.UNREGISTER_REQUEST, records(wire.REGISTERED, (0, 0, 0, 0)), "there is no such region"),
    "the stream": (Kind.QEMU_FILE, b"x", "bytes of the stream came"),
    "an answer": (Kind.REGISTER_RESULT, records(wire.RESULT, (0, 0, 0)), "sent REGISTER_RESULT"),
    "READY": (Kind.READY, None, "READY to the end that receives"),
    "the blocks again": (Kind.RAM_BLOCKS_REQUEST, None, "RAM_BLOCKS_REQUEST came twice"),
}


@pytest.mark.parametrize("what", PLACES)
def test_what_a_peer_may_not_say(hostile, what):
    kind, data, words = PLACES[what]
    peer = hostile()
    peer.blocks()
    peer.link.tell(kind, data)
    peer.refused(words)


@pytest.mark.parametrize(
    "kind", [Kind.REGISTER_REQUEST, Kind.COMPRESS, Kind.UNREGISTER_REQUEST, Kind.REGISTER_FINISHED]
)
def test_nothing_comes_before_the_blocks(hostile, kind):
    size = {Kind.COMPRESS: 24, Kind.REGISTER_FINISHED: 0}.get(kind, 24)
    peer = hostile()
    peer.link.tell(kind, bytes(size) if size else None)
    peer.refused("has not asked for the RAM blocks")


def test_repeat_times_record_is_the_length(hostile):
    peer = hostile()
    peer.blocks()
    peer.link.tell(Kind.REGISTER_REQUEST, records(wire.REGISTERED, (0, 0, 0, 0)), repeat=2)
    peer.refused("says 2 records")


def test_chunks_are_registered_once(hostile):
    peer = hostile()
    peer.blocks()
    peer.register(more=1)
    peer.link.tell(Kind.REGISTER_REQUEST, records(wire.REGISTERED, (CHUNK, 0, 0, 0)))
    peer.refused("chunk 1 of RAM block 0, or one behind it, is to be registered twice")


def test_a_chunk_when_all_is_pinned(hostile):
    peer = hostile(pin_all=True)
    peer.blocks()
    peer.link.tell(Kind.REGISTER_REQUEST, records(wire.REGISTERED, (0, 0, 0, 0)))
    peer.refused("all memory is pinned already")


def test_a_peer_that_fails_says_so(hostile):
    peer = hostile()
    peer.blocks()
    peer.link.tell_error()
    with pytest.raises(ChannelLost, match=r"says that it has failed \(ERROR\)"):
        peer.serving.result()


def test_words_of_the_hook_in_the_stream(hostile):
    peer = hostile()
    peer.blocks()
    peer.link.tell(Kind.REGISTER_FINISHED)
    peer.serving.result()
    peer.link.tell(Kind.COMPRESS, records(wire.COMPRESSED, (0, 0, 0, 8)))
    with pytest.raises(StreamError, match="COMPRESS where bytes of the stream were expected"):
        Task(lambda: peer.far.recv_into(bytearray(8)), "receive", LONG).result()
