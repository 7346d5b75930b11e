"""Changes and compressed pages at the destination: in order, of pages that came, through codecs it finds."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.abc import Codec, CodecSpec, DeltaCodec, SectionKind
from whimbrel.errors import (
    BrokenPlugin,
    ChannelLost,
    IncompatibleError,
    ProtocolError,
    StreamError,
    UnknownNameError,
)
from whimbrel.machine import BareMachine
from whimbrel.stream import Reader
from whimbrel_codecs.xbzrle import XbzrleCodec
from whimbrel_codecs.zlib import ZlibCodec
from whimbrel_savevm import _ram_changes
from whimbrel_savevm._ram_loader import RamLoader
from whimbrel_savevm.ram import RamHandler

PAGE = 4096
EOS = bytes.fromhex("00 00 00 00 00 00 00 10")


def record(kind, number, payload, name):
    flags = kind | (0x20 if name is None else 0)
    named = b"" if name is None else bytes([len(name)]) + name.encode()
    return (number * PAGE | flags).to_bytes(8, "big") + named + payload


def page(number, fill, name=None):
    return record(0x08, number, bytes([fill]) * PAGE, name)


def zero(number, name=None, fill=0):
    return record(0x02, number, bytes([fill]), name)


def change(number, payload, name=None):
    return record(0x40, number, b"\x01" + len(payload).to_bytes(2, "big") + payload, name)


def squeezed(number, content, name=None):
    return deflated(number, zlib.compress(content), name)


def deflated(number, data, name=None):
    return record(0x100, number, len(data).to_bytes(4, "big") + data, name)


def at(offset, *values):
    """A payload that changes some bytes at one place."""
    head = bytes([offset]) if offset < 128 else bytes([offset & 0x7F | 0x80, offset >> 7])
    return head + bytes([len(values), *values])


@pytest.fixture
def load(bench):
    """Loads PART bodies, each given as its bytes, into a machine; loaders are finished in the end."""
    loaders = []

    def load(machine, *bodies, capacity=1 << 20):
        loader = RamLoader(machine)
        loaders.append(loader)
        reader = Reader(bench.Tape(b"".join(bodies)), capacity=capacity)
        for _ in bodies:
            loader.load(reader, SectionKind.PART)
        return loader

    yield load
    for loader in loaders:
        loader.finish()


def expect(machine, block, number, fill, **places):
    """That a page is `fill` everywhere but at some places: `_12=7` is byte 12."""
    wanted = np.full(PAGE, fill, np.uint8)
    for place, value in places.items():
        wanted[int(place[1:])] = value
    found = machine.ram[block].view[number * PAGE : (number + 1) * PAGE]
    assert (found == wanted).all(), f"page {number} differs at {np.flatnonzero(found != wanted)[:10]}"


# ------------------------------------------------------------------------------------------------------- changes


def test_changes_of_pages_that_came(bench, load):
    machine = bench.machine({"a": 4, "b": 2})
    load(
        machine,
        page(0, 1, "a") + page(1, 2) + zero(2) + zero(3, fill=9) + page(1, 5, "b") + EOS,
        change(0, at(7, 77), "a") + change(2, at(200, 5, 6)) + change(3, at(0, 8)) + change(1, at(4, 4), "b") + EOS,
    )
    expect(machine, "a", 0, 1, _7=77)
    expect(machine, "a", 1, 2)
    expect(machine, "a", 2, 0, _200=5, _201=6)
    expect(machine, "a", 3, 9, _0=8)
    expect(machine, "b", 0, 0)
    expect(machine, "b", 1, 5, _4=4)


def test_an_empty_change_changes_nothing(bench, load):
    machine = bench.machine({"a": 2})
    load(machine, page(1, 3, "a") + change(1, b"") + EOS)
    expect(machine, "a", 1, 3)


@pytest.mark.parametrize("before", [[], [page(1, 7)], [page(1, 7), zero(2)]])
def test_a_change_of_a_page_that_never_came(bench, load, before):
    machine = bench.machine({"a": 8})
    machine.ram["a"].view[3 * PAGE :] = 0x55  # what was here before the stream does not count
    body = page(0, 1, "a") + b"".join(before) + change(0, at(0, 2)) + change(3, at(1, 1)) + EOS
    with pytest.raises(StreamError, match="changes the page at 0x3000 of block 'a', which has not come") as caught:
        load(machine, body)
    assert caught.value.place.block == "a"


def test_a_page_that_came_in_another_block_does_not_count(bench, load):
    machine = bench.machine({"a": 2, "b": 2})
    with pytest.raises(StreamError, match="at 0x0 of block 'b', which has not come"):
        load(machine, page(0, 1, "a") + change(0, at(0, 1), "b") + EOS)


def test_a_page_that_came_in_another_stream_does_not_count(bench, load):
    machine = bench.machine({"a": 2})
    load(machine, page(0, 1, "a") + EOS)
    with pytest.raises(StreamError, match="has not come in this stream"):
        load(machine, change(0, at(0, 1), "a") + EOS)


@pytest.mark.parametrize("number", [4, 2**40, 2**52 - 1])
def test_encoded_pages_outside_of_their_block(bench, load, number):
    for make in (lambda: change(number, at(0, 1)), lambda: squeezed(number, bytes(PAGE))):
        with pytest.raises(StreamError, match=rf"{number * PAGE:#x} is outside of block 'a' of 0x4000"):
            load(bench.machine({"a": 4}), page(3, 1, "a") + make() + EOS)


ORDERS = {
    "change, page": ([at(0, 1)], page(1, 9), {}),
    "change, zero": ([at(0, 1)], zero(1, fill=9), {}),
    "change, squeezed": ([at(0, 1)], squeezed(1, b"\x09" * PAGE), {}),
    "change, page, change": ([at(0, 1)], page(1, 9) + change(1, at(5, 5)), {"_5": 5}),
}


@pytest.mark.parametrize("case", ORDERS)
def test_the_last_record_of_a_page_wins(bench, load, case):
    changes, then, places = ORDERS[case]
    machine = bench.machine({"a": 40})
    load(
        machine,
        page(0, 7, "a") + page(1, 7) + b"".join(change(1, one) for one in changes) + change(0, b"") + then + EOS,
    )
    expect(machine, "a", 1, 9, **places)


def test_changes_of_one_page_are_made_in_their_order(bench, load):
    machine = bench.machine({"a": 40})
    body = page(0, 7, "a") + page(1, 7)
    body += change(1, at(0, 1, 1, 1)) + change(1, at(1, 2, 2)) + change(0, at(9, 9)) + change(1, at(2, 3)) + EOS
    load(machine, body)
    expect(machine, "a", 1, 7, _0=1, _1=2, _2=3)
    expect(machine, "a", 0, 7, _9=9)


def test_a_change_is_not_made_in_another_block(bench, load):
    machine = bench.machine({"a": 4, "b": 4})
    body = (
        page(1, 7, "a") + page(1, 8, "b") + change(1, at(0, 1), "a") + change(1, at(0, 2), "b") + page(1, 9, "a") + EOS
    )
    load(machine, body)
    expect(machine, "a", 1, 9)
    expect(machine, "b", 1, 8, _0=2)


def test_a_malformed_change_is_refused_before_the_body_is_done(bench, load):
    machine = bench.machine({"a": 4, "b": 1})
    good = page(0, 1, "a") + page(1, 1) + change(0, at(0, 9))
    for behind in (b"", page(3, 4), zero(0, "b"), page(1, 4), squeezed(2, bytes(PAGE))):
        with pytest.raises(StreamError, match="a run of 0 changed bytes") as caught:
            load(machine, good + change(1, b"\0\0\0") + behind + EOS)
        assert caught.value.place.block == "a", "the block of the change, not the one that followed"


class CountingCodec(DeltaCodec):
    """Passes on, and counts how many payloads it gets at a time."""

    def __init__(self):
        self.counts = []

    def encode(self, old, new):
        return XbzrleCodec().encode(old, new)

    def decode(self, data, starts, ends, memory, offsets):
        assert len(np.unique(offsets)) == len(offsets), "the contract: pages are apart"
        assert (starts >= 0).all()
        assert (ends <= len(data)).all()
        self.counts.append(len(starts))
        XbzrleCodec().decode(data, starts, ends, memory, offsets)


def counting_machine(pages):
    codec, made = CountingCodec(), []
    spec = CodecSpec(name="xbzrle", summary="", create=lambda: made.append(1) or codec)
    machine = BareMachine("m", codec_spec={"xbzrle": spec}.__getitem__)
    machine.ram.add("a", pages * PAGE)
    return machine, codec, made


def test_changes_are_gathered_over_other_records(load):
    machine, codec, made = counting_machine(64)
    came = zero(0, "a") + b"".join(zero(n) for n in range(1, 64)) + EOS
    body = b"".join(change(n, at(1, 1)) + page(n + 1, 5) for n in range(0, 60, 2)) + EOS
    load(machine, came, body, body)
    assert codec.counts == [30, 30], "once a body"
    assert made == [1], "and one codec"


def test_records_in_another_block_do_not_disturb_what_waits(load):
    machine, codec, _ = counting_machine(4)
    machine.ram.add("larger", 64 * PAGE)
    body = page(0, 1, "a") + page(1, 1) + change(0, at(0, 9)) + page(0, 7, "larger") + page(50, 7)
    load(machine, body + change(1, at(0, 9), "a") + EOS)
    assert codec.counts == [2]


def test_no_codec_is_made_before_it_is_needed(load):
    machine, _, made = counting_machine(4)
    load(machine, page(0, 1, "a") + zero(1) + EOS)
    assert made == []


@pytest.mark.parametrize(("enough", "enough_bytes"), [(10, 1 << 20), (1 << 20, 30), (1, 1)])
def test_no_more_waits_than_is_enough(load, monkeypatch, enough, enough_bytes):
    monkeypatch.setattr(_ram_changes, "ENOUGH", enough)
    monkeypatch.setattr(_ram_changes, "ENOUGH_BYTES", enough_bytes)
    machine, codec, _ = counting_machine(64)
    came = zero(0, "a") + b"".join(zero(n) for n in range(1, 64)) + EOS
    load(machine, came, b"".join(change(n, at(1, 1)) + page(n + 1, 5) for n in range(0, 60, 2)) + EOS)
    assert sum(codec.counts) == 30
    assert max(codec.counts) <= min(enough, -(-enough_bytes // 3) + 4)


def test_one_page_over_and_over_in_one_run(load):
    machine, codec, _ = counting_machine(40)
    body = zero(2, "a") + zero(3) + change(3, at(0, 200)) + EOS
    load(machine, body, b"".join(change(2, at(n, n)) for n in range(1, 40)) + change(3, at(0, 1)) + EOS)
    expect(machine, "a", 2, 0, **{f"_{n}": n for n in range(1, 40)})
    expect(machine, "a", 3, 0, _0=1)
    assert sum(codec.counts) == 41


# --------------------------------------------------------------------------------------------------- compressed pages


def test_compressed_pages_in_any_order(bench, load):
    machine = bench.machine({"a": 6})
    random = np.random.default_rng(3).integers(0, 256, (6, PAGE), np.uint8)
    body = page(5, 1, "a") + b"".join(squeezed(n, random[n].tobytes()) for n in (4, 0, 3)) + squeezed(0, b"\x08" * PAGE)
    load(machine, body + zero(1) + EOS)
    for number in (3, 4):
        assert (machine.ram["a"].view[number * PAGE : (number + 1) * PAGE] == random[number]).all()
    expect(machine, "a", 0, 8)
    expect(machine, "a", 5, 1)


BAD_STREAMS = {
    "too long": (zlib.compress(bytes(PAGE + 1)), "inflates to more than the 4096"),
    "too short": (zlib.compress(bytes(PAGE - 1)), "inflates to 4095 bytes"),
    "a bomb": (zlib.compress(bytes(4 << 20))[:4110], "inflates to more than the 4096"),
    "cut": (zlib.compress(bytes(PAGE))[:-1], "ends in the middle"),
    "more behind": (zlib.compress(bytes(PAGE)) + b"\0", "1 bytes follow"),
    "nonsense": (b"nonsense", "no zlib stream"),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_streams_that_are_refused(bench, load, case):
    data, words = BAD_STREAMS[case]
    machine = bench.machine({"a": 4})
    loader = RamLoader(machine)
    body = page(0, 1, "a") + squeezed(1, b"\x02" * PAGE) + deflated(2, data) + EOS
    with pytest.raises(StreamError, match=words) as caught:
        loader.load(Reader(bench.Tape(body)), SectionKind.PART)
    assert caught.value.place.block == "a"
    loader.rollback()
    assert not machine.ram["a"].view.any()


# ------------------------------------------------------------------------------------------------------- any order


@st.composite
def bodies(draw):
    """Records of every kind in two blocks, of the same few pages again and again."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        body = []
        for _ in range(draw(st.integers(0, 14))):
            kind = draw(st.sampled_from(("page", "zero", "fill", "change", "change", "change", "squeezed")))
            places = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 255)), min_size=0, max_size=4)
            what = draw(places) if kind == "change" else draw(st.integers(1, 255))
            body.append((kind, draw(st.sampled_from("ab")), draw(st.integers(0, 4)), what))
        found.append(body)
    return found


@given(bodies(), st.sampled_from((4500, 9000, 1 << 20)), st.sampled_from((1, 3, 1 << 13)))
@settings(max_examples=150)
def test_records_of_all_kinds_do_what_one_after_the_other_would(bench, found, capacity, enough):
    machine = bench.machine({"a": 70, "b": 70})  # more than ever come: the limit is another test's
    memory = {name: np.zeros((5, PAGE), np.uint8) for name in "ab"}
    data, current, came = b"", None, set()
    for body in found:
        for kind, block, number, what in body:
            name = None if block == current else block
            current = block
            target = memory[block][number]
            if kind == "change" and (block, number) not in came:
                kind, what = "zero", 0
            came.add((block, number))
            match kind:
                case "page":
                    target[:] = what
                    data += page(number, what, name)
                case "zero":
                    target[:] = 0
                    data += zero(number, name)
                case "fill":
                    target[:] = what
                    data += zero(number, name, what)
                case "squeezed":
                    target[:] = what
                    data += squeezed(number, bytes([what]) * PAGE, name)
                case "change":
                    payload, reach = b"", 0
                    for same, value in what:
                        payload += at(same, value)
                        reach += same
                        target[reach] = value
                        reach += 1
                    data += change(number, payload, name)
        data += EOS
    loader = RamLoader(machine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ram_changes, "ENOUGH", enough)
        reader = Reader(bench.Tape(data), capacity=capacity)
        for _ in found:
            loader.load(reader, SectionKind.PART)
    loader.finish()
    for name in "ab":
        view = machine.ram[name].view.reshape(-1, PAGE)
        assert (view[:5] == memory[name]).all()
        assert not view[5:].any()
        assert np.flatnonzero(loader.came(name)).tolist() == sorted(number for block, number in came if block == name)


GOOD = (
    page(0, 0x11, "a")
    + zero(1)
    + squeezed(2, b"\x12" * PAGE)
    + change(0, at(3, 3) + at(1, 4))
    + change(1, at(0, 5))
    + page(0, 0x21, "b")
    + change(0, b"")
    + change(0, at(200, 7))
    + squeezed(1, b"\x22" * PAGE)
    + EOS
)


def test_cut_anywhere_it_asks_for_more_and_nothing_else(bench, load):
    for cut in {*range(20), *range(4090, 4210), *range(8250, len(GOOD)), *range(0, len(GOOD), 97)}:
        with pytest.raises(ChannelLost, match="the stream ended where at least") as caught:
            load(bench.machine({"a": 6, "b": 6}), GOOD[:cut])
        assert caught.value.place.offset == cut


PLACES = [*range(20), *range(4106, 4190), *range(len(GOOD) - 120, len(GOOD))]


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.integers(0, 7)), min_size=1, max_size=4))
@settings(max_examples=200)
def test_damaged_bodies_are_loaded_or_refused_and_rolled_back(bench, flips):
    data = bytearray(GOOD)
    for place, bit in flips:
        data[place] ^= 1 << bit
    machine = bench.machine({"a": 6, "b": 6})
    loader = RamLoader(machine)
    try:
        loader.load(Reader(bench.Tape(data)), SectionKind.PART)
    except (ProtocolError, ChannelLost):
        pass
    finally:
        loader.rollback()
        loader.finish()
    assert not any(block.view.any() for block in machine.ram)


def test_rollback_leaves_nothing_of_encoded_pages(bench, load):
    machine = bench.machine({"a": 6, "b": 6, "c": 2})
    loader = load(machine, GOOD, squeezed(0, b"\x05" * PAGE, "c") + EOS)
    assert machine.ram["c"].view[0] == 5
    loader.rollback()
    assert not any(block.view.any() for block in machine.ram)


def test_rollback_undoes_changes_of_pages_that_came_as_zero(bench, load):
    machine = bench.machine({"a": 4})
    loader = load(machine, zero(0, "a") + change(0, at(0, 5)) + EOS)
    assert machine.ram["a"].view[0] == 5
    loader.rollback()
    assert not machine.ram["a"].view.any()


def test_a_page_that_was_changed_can_be_zero_again(bench, load):
    machine = bench.machine({"a": 4})
    load(machine, zero(0, "a") + EOS, change(0, at(0, 5)) + EOS, zero(0) + EOS)
    expect(machine, "a", 0, 0)
    load(machine, squeezed(1, b"\x05" * PAGE, "a") + EOS, zero(1) + EOS)
    expect(machine, "a", 1, 0)


# ------------------------------------------------------------------------------------------------- codecs not found


RECORDS = {
    "XBZRLE": ("xbzrle", zero(0, "a") + change(0, at(0, 1)) + EOS),
    "COMPRESS_PAGE": ("zlib", squeezed(0, bytes(PAGE), "a") + EOS),
}


def machine_with(codec_spec):
    machine = BareMachine("m", codec_spec=codec_spec)
    machine.ram.add("a", 4 * PAGE)
    return machine


@pytest.mark.parametrize("kind", RECORDS)
def test_without_the_codec_it_says_which_is_missing(load, kind):
    name, body = RECORDS[kind]
    with pytest.raises(IncompatibleError, match=rf"a {kind} record came, and there is no codec '{name}'") as caught:
        load(machine_with(None), body)
    assert "there are: none" in str(caught.value)
    assert isinstance(caught.value.__cause__, UnknownNameError)


@pytest.mark.parametrize("kind", RECORDS)
def test_a_codec_that_is_broken_is_one_that_is_missing(load, kind):
    name, body = RECORDS[kind]

    def broken(name):
        raise BrokenPlugin("it has no bytes", plugin=name)

    with pytest.raises(IncompatibleError, match=rf"no codec '{name}' to read it: .*it has no bytes"):
        load(machine_with(broken), body)


@pytest.mark.parametrize("kind", RECORDS)
def test_a_codec_of_the_wrong_kind(load, kind):
    name, body = RECORDS[kind]
    wrong, expected = {"xbzrle": (ZlibCodec, DeltaCodec), "zlib": (XbzrleCodec, Codec)}[name]
    machine = machine_with(lambda name: CodecSpec(name=name, summary="", create=wrong))
    with pytest.raises(IncompatibleError, match=f"is a {wrong.__name__}, expected a {expected.__name__}"):
        load(machine, body)


# ------------------------------------------------------------------------------------------------------ what came


def test_which_pages_came(bench, load):
    machine = bench.machine({"a": 6, "b": 6, "c": 1})
    loader = load(machine, GOOD, zero(5, "a") + EOS)
    assert np.flatnonzero(loader.came("a")).tolist() == [0, 1, 2, 5]
    assert np.flatnonzero(loader.came("b")).tolist() == [0, 1]
    assert not loader.came("c").any()
    with pytest.raises(ValueError, match="read-only"):
        loader.came("a")[3] = True


def test_how_many_pages_came(bench):
    machine = bench.machine({"a": 6, "b": 6, "c": 1})
    handler = RamHandler(machine)
    assert handler.pages_come("a") == 0
    handler.load(Reader(bench.Tape(GOOD)), SectionKind.PART, 4)
    assert [handler.pages_come(name) for name in "abc"] == [3, 2, 0]
    with pytest.raises(UnknownNameError, match="RAM block 'x'"):
        handler.pages_come("x")
    handler.finish()
