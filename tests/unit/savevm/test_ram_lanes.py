"""RAM over lanes, the handler's side: where syncs are said and heard, what goes where, what a sink takes."""

from __future__ import annotations

import numpy as np
import pytest

from whimbrel.abc import Progress, SectionKind
from whimbrel.errors import StreamError
from whimbrel.machine import Ram
from whimbrel.wire import ram as wire
from whimbrel_savevm._ram_lanes import LaneSender, LaneSink, LaneSyncs

START, PART, END = SectionKind.START, SectionKind.PART, SectionKind.END
FLUSH = wire.FLUSH_RECORD
ONE = np.array([1])


@pytest.fixture
def ram():
    ram = Ram()
    yield ram
    ram.close()


@pytest.fixture
def block(ram):
    return ram.add("a", 100 * wire.PAGE_SIZE)


class Departing:
    """Lanes that only note, in one list with what goes over the main channel."""

    def __init__(self, log, *, each, zeros):
        self.log, self.sync_each_body, self.take_zeros = log, each, zeros

    def send(self, block, memory, indices, zeros):
        self.log.append((block, indices.tolist(), zeros.tolist()))

    def sync(self):
        self.log.append("sync")


class Out:
    gathers = False
    offset = 0

    def __init__(self, log):
        self.log = log

    def write(self, data):
        self.log.append(bytes(data))


class Sending:
    def __init__(self, *, each, zeros, pending=0):
        self.log = []
        self.progress = Progress(page_size=wire.PAGE_SIZE)
        self.left = pending
        lanes = Departing(self.log, each=each, zeros=zeros)
        self.sender = LaneSender(lanes, self.progress, zeros=10, pending=lambda: self.left)
        self.out = Out(self.log)

    def page(self, block):
        self.sender.pages(self.out, block, block.view, ONE)

    def end(self, kind):
        self.sender.end_body(self.out, kind)


def test_a_sync_in_each_body_is_said_by_its_eos(block):
    sending = Sending(each=True, zeros=False, pending=5)
    for kind in (START, PART, PART, END):
        sending.page(block)
        sending.end(kind)
        sending.sender.begin_pass(1)
    assert sending.log == [("a", [1], []), "sync"] * 4


def test_a_sync_per_round_is_said(block):
    sending = Sending(each=False, zeros=False, pending=5)
    sending.end(START)
    sending.page(block)
    sending.end(PART)
    sending.left = 0
    sending.page(block)
    sending.end(PART)
    sending.sender.begin_pass(2)
    sending.page(block)
    sending.end(END)
    page = ("a", [1], [])
    assert sending.log == [FLUSH, "sync", page, page, FLUSH, "sync", page, FLUSH, "sync"]


def test_a_round_that_was_broken_off_is_synced_before_its_pages_come_again(block):
    sending = Sending(each=False, zeros=True, pending=5)
    sending.page(block)
    sending.end(PART)
    sending.sender.begin_pass(2)
    sending.sender.zeros(sending.out, block, ONE)
    sending.page(block)
    assert sending.log == [("a", [1], []), FLUSH, "sync", ("a", [], [1]), ("a", [1], [])]


@pytest.mark.parametrize("over_lanes", [False, True])
def test_zero_pages(block, over_lanes):
    sending = Sending(each=not over_lanes, zeros=over_lanes)
    sending.sender.zeros(sending.out, block, np.array([1, 2]))
    sending.page(block)
    assert (sending.progress.duplicate, sending.progress.normal) == (2, 1)
    if over_lanes:
        assert sending.log[0] == ("a", [], [1, 2])
    else:
        assert b"".join(sending.log[:-1])[:8] == (wire.PAGE_SIZE | wire.Flag.ZERO).to_bytes(8, "big")


class Arriving:
    def __init__(self):
        self.log = []

    def begin(self, sink):
        self.log.append("begin")

    def sync(self):
        self.log.append("sync")

    def complete(self):
        self.log.append("complete")


def heard(*bodies):
    lanes = Arriving()
    syncs = LaneSyncs(lanes)
    for kind, flushes in bodies:
        syncs.body(kind, LaneSink({}, {}, {}))
        for _ in range(flushes):
            syncs.flush()
        syncs.end_body()
    return lanes.log


def test_without_a_word_each_body_has_a_sync():
    assert heard((START, 0), (PART, 0), (END, 0)) == ["begin", "sync", "sync", "sync", "complete"]


def test_with_a_word_in_start_each_word_is_one():
    assert heard((START, 1), (PART, 0), (PART, 1), (END, 2)) == ["begin", "sync", "sync", "sync", "sync", "complete"]


def test_a_word_that_was_not_in_start():
    with pytest.raises(StreamError, match="there was none in START"):
        heard((START, 0), (PART, 1))


def test_an_end_without_a_word():
    with pytest.raises(StreamError, match="ends without a MULTIFD_FLUSH"):
        heard((START, 1), (PART, 1), (END, 0))


# ---------------------------------------------------------------------------------------------------------- the sink


def sink_of(block):
    marks = {"a": np.zeros(block.pages, np.bool_)}, {"a": np.zeros(block.pages, np.bool_)}
    return LaneSink({"a": block}, *marks), marks[0]["a"], marks[1]["a"]


@pytest.mark.parametrize("pages", [[0], [4, 5, 6], [6, 5, 4], [5, 5, 7], [7, 6, 9], [99, 0], [3, 4, 4, 6]])
def test_what_is_about_to_come_is_marked_and_nothing_else(block, pages):
    sink, written, came = sink_of(block)
    sink.arriving("a", np.array(pages))
    assert sorted(np.flatnonzero(written)) == sorted(set(pages))
    assert sorted(np.flatnonzero(came)) == sorted(set(pages))


def test_a_zero_page_costs_nothing_where_nothing_was(block):
    sink, written, came = sink_of(block)
    sink.zeros("a", np.arange(100))
    assert not block.present_pages().any() or block.backing != "anonymous"
    assert not written.any()
    assert came.all()
    block.view[:] = 7
    written[50] = True
    sink.zeros("a", np.array([49, 50, 50]))
    assert not block.view[50 * wire.PAGE_SIZE : 51 * wire.PAGE_SIZE].any()
    assert block.view[49 * wire.PAGE_SIZE] == 7, "what was not written is known to be zero, and not looked at"


def test_blocks_that_are_not_to_be_written(block):
    sink, _, _ = sink_of(block)
    assert sink.memory("a") is not None
    with pytest.raises(StreamError, match="'b', which is not there"):
        sink.memory("b")
    block.shared = True
    with pytest.raises(StreamError, match="both ends share"):
        sink.memory("a")
