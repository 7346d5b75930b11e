"""RAM that a channel writes by itself, the handler's side: where the hooks come, what they are told, what is marked."""

from __future__ import annotations

import numpy as np
import pytest

from whimbrel.abc import Progress, RamControl, SectionKind
from whimbrel.errors import StreamError
from whimbrel.machine import Ram
from whimbrel.stream import Reader
from whimbrel.testing.memory import ReplayChannel
from whimbrel.wire import ram as wire
from whimbrel_savevm._ram_hooked import HookedLoader, HookedSender

START, PART, END = SectionKind.START, SectionKind.PART, SectionKind.END
SETUP, ROUND, FINISH = RamControl.SETUP, RamControl.ROUND, RamControl.FINISH
HOOK = wire.HOOK_RECORD
PAGE = wire.PAGE_SIZE


@pytest.fixture
def ram():
    ram = Ram()
    ram.add("a", 100 * PAGE)
    ram.add("b", 10 * PAGE)
    yield ram
    ram.close()


class Channel:
    """Notes what it is told, in one list with the stream and its flushes; takes every third zero page as zeros."""

    def __init__(self):
        self.log = []
        self.served = []
        self.revoked = 0

    def write(self, data):
        self.log.append(bytes(data))

    def flush(self):
        self.log.append("flush")

    def ram_control_before_iterate(self, flags, regions):
        self.log.append(("before", flags, [region.name for region in regions]))

    def ram_save_pages(self, region, memory, indices, zero):
        self.log.append((region, indices.tolist(), zero.tolist(), memory.ctypes.data))
        return int(zero.sum()) // 3

    def ram_control_after_iterate(self, flags):
        self.log.append(("after", flags))

    def ram_load_hook(self, flags, memory):
        self.served.append((flags, [region.name for region in memory.regions]))

    def ram_revoke(self):
        self.revoked += 1


@pytest.fixture
def channel():
    return Channel()


@pytest.fixture
def progress():
    return Progress(page_size=PAGE)


@pytest.fixture
def sender(channel, ram, progress):
    return HookedSender(channel, list(ram), progress, channel.flush)


def begin(flags):
    return [HOOK, "flush", ("before", flags, ["a", "b"])]


def at(*numbers):
    return np.array(numbers, np.intp)


def test_each_body_has_a_hook_even_an_empty_one(sender, channel):
    for kind in (START, PART, END):
        sender.end_body(channel, kind)
    expected = []
    for flags in (SETUP, ROUND, FINISH):
        expected += [*begin(flags), ("after", flags)]
    assert channel.log == expected


def test_zero_pages_wait_for_the_others_of_their_batch(sender, channel, ram, progress):
    block = ram["b"]
    sender.zeros(channel, block, at(1, 4, 5))
    sender.pages(channel, block, block.view, at(0, 2, 6))
    sender.end_body(channel, PART)
    both = (1, [0, 1, 2, 4, 5, 6], [False, True, False, True, True, False], block.address)
    assert channel.log == [*begin(ROUND), both, ("after", ROUND)]
    assert (progress.duplicate, progress.normal) == (1, 5)


def test_zero_pages_of_another_block_go_before(sender, channel, ram):
    one, other = ram["a"], ram["b"]
    sender.zeros(channel, one, at(7))
    sender.pages(channel, other, other.view, at(1))
    sender.zeros(channel, one, at(8))
    sender.zeros(channel, other, at(9))
    sender.begin_last()
    sender.end_body(channel, PART)
    sender.zeros(channel, one, at(3))
    sender.end_body(channel, END)
    assert channel.log == [
        *begin(ROUND),
        (0, [7], [True], one.address),
        (1, [1], [False], other.address),
        (0, [8], [True], one.address),
        (1, [9], [True], other.address),
        ("after", ROUND),
        *begin(FINISH),
        (0, [3], [True], one.address),
        ("after", FINISH),
    ]


def test_pages_come_from_the_trackers_copy(sender, channel, ram):
    copy = np.zeros(10 * PAGE, np.uint8)
    sender.pages(channel, ram["b"], copy, at(1))
    assert channel.log[-1] == (1, [1], [False], copy.ctypes.data)


# ------------------------------------------------------------------------------------------------------ destination


@pytest.fixture
def marks(ram):
    return [{block.name: np.zeros(block.pages, np.bool_) for block in ram} for _ in range(2)]


@pytest.fixture
def loader(channel, ram, marks):
    loader = HookedLoader(channel, *marks)
    loader.listed([ram["b"], ram["a"]])  # the source's order
    return loader


def test_a_hook_is_served_in_its_body(loader, channel):
    for kind in (START, PART, END):
        loader.body(kind)
        loader.hook()
        loader.end_body()
    assert channel.served == [(flags, ["b", "a"]) for flags in (SETUP, ROUND, FINISH)]
    assert channel.revoked == 1  # behind END


def test_a_body_has_one_hook(loader):
    loader.body(PART)
    loader.hook()
    with pytest.raises(StreamError, match="two HOOK records came in one PART body"):
        loader.hook()


def test_a_body_without_its_hook(loader):
    loader.body(START)
    loader.end_body()  # a source that writes no page itself
    loader.body(PART)
    loader.hook()
    loader.end_body()
    loader.body(END)
    with pytest.raises(StreamError, match="the END body has no HOOK record"):
        loader.end_body()


def test_what_the_peer_may_write_is_marked(loader, ram, marks):
    loader.expose(1, 10 * PAGE, 3 * PAGE)
    for mark in marks:
        assert np.flatnonzero(mark["a"]).tolist() == [10, 11, 12]
        assert not mark["b"].any()
    assert ram["a"].present_pages(10, 3).all()


def test_what_is_filled(loader, ram, marks):
    written, came = marks
    loader.fill(0, PAGE, 2 * PAGE, 0)
    assert not written["b"].any()  # it was zero, and is
    assert np.flatnonzero(came["b"]).tolist() == [1, 2]
    loader.fill(0, PAGE + 1, 3, 0xAB)
    assert ram["b"].view[PAGE : PAGE + 5].tolist() == [0, 0xAB, 0xAB, 0xAB, 0]
    assert np.flatnonzero(written["b"]).tolist() == [1]
    loader.fill(0, 0, 10 * PAGE, 0)
    assert not ram["b"].view.any()


def test_what_both_ends_share_is_not_written(loader, ram):
    ram["a"].shared = True
    for call in (lambda: loader.expose(1, 0, PAGE), lambda: loader.fill(1, 0, PAGE, 0)):
        with pytest.raises(StreamError, match="'a', which both ends share"):
            call()


# ------------------------------------------------------------------------------------------------------- the record


def test_a_hook_among_records_is_called_in_its_place():
    calls = []
    page = (0x2000 | wire.Flag.ZERO).to_bytes(8, "big") + b"\1a\0"
    reader = Reader(ReplayChannel(HOOK + page + HOOK + wire.EOS_RECORD))
    records = wire.RecordReader(hook=lambda: calls.append(reader.offset))
    assert [name for name, _ in records.body(reader, 10)] == ["a"]
    assert calls == [8, 8 + len(page) + 8]


def test_a_hook_that_nobody_waits_for():
    with pytest.raises(StreamError, match=r"a HOOK record came \(word 0x80\), which only an RDMA transport uses"):
        list(wire.RecordReader().body(Reader(ReplayChannel(HOOK + wire.EOS_RECORD)), 10))
