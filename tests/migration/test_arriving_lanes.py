"""The destination's end of lanes by itself: what a source may send, and when the lanes go on."""

from __future__ import annotations

import itertools
import socket
import threading

import numpy as np
import pytest

from whimbrel.errors import ChannelLost, MigrationError, StreamError
from whimbrel.migration.lanes import Arriving, Method
from whimbrel.wire.multifd import PacketStage
from whimbrel_transports._sockets import SocketChannel

PAGE = 4096
LONG = 60.0
NONE = np.empty(0, np.intp)


class Sink:
    """One block of 300 pages, full of ones; notes which pages came."""

    def __init__(self):
        self.view = np.ones(300 * PAGE, np.uint8)
        self.came = []

    def memory(self, block):
        if block != "a":
            raise StreamError(f"there is no block {block!r}")
        return self.view

    def arriving(self, block, indices):
        self.came += indices.tolist()

    def zeros(self, block, indices):
        self.view.reshape(-1, PAGE)[indices] = 0
        self.came += indices.tolist()


class Lanes:
    """Two lanes, and the ends that a source has of them."""

    def __init__(self):
        pairs = [socket.socketpair() for _ in range(2)]
        self.sources = [near for near, _ in pairs]
        self.failed = threading.Event()
        self.numbers = itertools.count(1)
        channels = [SocketChannel(far, f"lane {number}") for number, (_, far) in enumerate(pairs)]
        self.arriving = Arriving(channels, Method(), on_failure=self.failed.set)
        self.sink = Sink()
        self.arriving.begin(self.sink)

    def send(self, lane, pages=(), *, zeros=(), data=None, block="a", sync=False, size=None):
        stage = PacketStage()
        data = bytes(len(pages) * PAGE) if data is None else data
        stage.pages(
            next(self.numbers),
            block,
            0,
            len(data) if size is None else size,
            np.array(pages, np.intp),
            np.array(zeros, np.intp),
        )
        header = bytearray(stage.header.tobytes())
        header[11] |= sync
        self.sources[lane].sendall(header + data)

    def sync(self, lane):
        stage = PacketStage()
        stage.sync(next(self.numbers))
        self.sources[lane].sendall(stage.header.data)

    def fails(self, words, kind=StreamError):
        """It fails so at the next sync, and whoever waits elsewhere is woken if nobody comes to that."""
        assert self.failed.wait(LONG)
        with pytest.raises(kind, match=words) as raised:
            self.arriving.sync()
        assert "lane" in raised.value.place.section
        return raised.value


@pytest.fixture
def lanes():
    made = Lanes()
    yield made
    made.arriving.close()
    for source in made.sources:
        source.close()


def synced(lanes):
    """Whether a sync is through; it must not be before all lanes have said SYNC."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (lanes.arriving.sync(), done.set()))
    thread.start()
    return done, thread


def test_pages_go_into_their_places_in_any_order(lanes):
    dice = np.random.default_rng(1)
    for lane, pages in ((0, [5, 3, 200]), (1, [10, 11, 12, 13]), (0, [0, 2, 4, 6, 8, 299]), (1, [77])):
        data = dice.integers(0, 256, (len(pages), PAGE), np.uint8)
        lanes.send(lane, pages, data=data.tobytes(), zeros=[100 + pages[0]])
        lanes.sync(0)
        lanes.sync(1)
        lanes.arriving.sync()
        view = lanes.sink.view.reshape(-1, PAGE)
        assert not (view[pages] != data).any()
        assert not view[100 + pages[0]].any()
    assert sorted(lanes.sink.came) == sorted([5, 3, 200, 105, 10, 11, 12, 13, 110, 0, 2, 4, 6, 8, 299, 100, 77, 177])
    assert (lanes.sink.view.reshape(-1, PAGE)[1] == 1).all()


def test_nobody_goes_past_a_sync_alone(lanes):
    done, thread = synced(lanes)
    lanes.sync(0)
    lanes.send(0, [1])
    assert not done.wait(0.05)
    assert lanes.sink.came == []
    lanes.sync(1)
    thread.join(LONG)
    assert done.is_set()
    lanes.sync(0)
    lanes.sync(1)
    lanes.arriving.sync()
    assert lanes.sink.came == [1]


def test_a_sync_merged_with_pages_and_an_empty_packet_behind_it(lanes):
    """As a QEMU 7.2 sends them: the pages count as before the sync."""
    lanes.send(0, [1, 2], sync=True)
    lanes.send(0, size=2 * PAGE)
    lanes.sync(1)
    lanes.arriving.sync()
    assert lanes.sink.came == [1, 2]
    lanes.arriving.complete()
    lanes.send(0, size=2 * PAGE)


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        ({"pages": [300]}, "outside of block 'a'"),
        ({"zeros": [1 << 51]}, "outside of block 'a'"),
        ({"pages": [1], "block": "b"}, "there is no block 'b'"),
        ({"zeros": [1], "block": "b"}, "there is no block 'b'"),
        ({"pages": [1], "size": PAGE - 1}, "4095 bytes follow packet 1, expected 4096"),
    ],
)
def test_packets_that_may_not_be(lanes, packet, words):
    lanes.send(1, **packet)
    error = lanes.fails(words)
    assert error.place.peer == "lane 1"
    assert (lanes.sink.view == 1).all()


@pytest.mark.parametrize("cut", [1, 1343, 1344, 1344 + PAGE - 1])
def test_a_lane_that_ends_in_a_packet(lanes, cut):
    stage = PacketStage()
    stage.pages(1, "a", 0, PAGE, np.array([1]), NONE)
    lanes.sources[0].sendall((stage.header.tobytes() + bytes(PAGE))[:cut])
    lanes.sources[0].close()
    lanes.fails("ended where", ChannelLost)


def test_a_lane_that_ends_behind_pages(lanes):
    lanes.send(0, [1])
    lanes.sources[0].close()
    lanes.fails("ended where", ChannelLost)


def test_a_lane_that_ends_behind_a_sync_is_missed_at_the_next(lanes):
    lanes.sync(0)
    lanes.sync(1)
    lanes.arriving.sync()
    lanes.sources[0].close()
    lanes.sync(1)
    with pytest.raises(ChannelLost, match="a SYNC was expected"):
        lanes.arriving.sync()


def test_a_lane_that_ends_behind_the_last_sync_is_in_order(lanes):
    lanes.sync(0)
    lanes.sync(1)
    lanes.arriving.sync()
    for source in lanes.sources:
        source.close()
    lanes.arriving.complete()
    lanes.arriving.close()
    assert lanes.arriving.failure is None


def test_pages_behind_the_end_are_not_taken(lanes):
    lanes.sync(0)
    lanes.sync(1)
    lanes.arriving.sync()
    lanes.arriving.complete()
    lanes.send(0, [1])
    lanes.sources[0].close()
    lanes.arriving.close()
    assert lanes.sink.came == []
    assert (lanes.sink.view == 1).all()


def test_pages_behind_the_last_sync(lanes):
    lanes.send(0, [1])
    while not lanes.sink.came:
        assert lanes.arriving.failure is None
    with pytest.raises(StreamError, match="pages came behind the last sync"):
        lanes.arriving.complete()


def test_a_close_ends_a_wait(lanes):
    raised = []

    def wait():
        try:
            lanes.arriving.sync()
        except MigrationError as exc:
            raised.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    lanes.arriving.close()
    thread.join(LONG)
    assert isinstance(raised[0], ChannelLost)


def test_damaged_headers_fail_or_bring_pages_of_the_block(lanes):
    """Bits are turned in a header, one byte after the other; each has two lanes of its own."""
    for at in range(344):
        mine = Lanes()
        stage = PacketStage()
        stage.pages(1, "a", 0, PAGE, np.array([1]), np.array([2]))
        data = bytearray(stage.header.tobytes())
        data[at] ^= 0x55
        mine.sources[0].sendall(data + bytes(PAGE))
        mine.sources[0].shutdown(socket.SHUT_WR)
        with pytest.raises(MigrationError):
            mine.arriving.sync()
        mine.arriving.close()
        for source in mine.sources:
            source.close()
        assert all(0 <= page < 300 for page in mine.sink.came)
