"""What a source sends with `xbzrle`: held against a sender that does one page after the other, and loaded again."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.abc import Progress, SectionKind
from whimbrel.machine import BareMachine
from whimbrel.machine.dirty.plugin import whimbrel_dirty_trackers
from whimbrel.settings import Parameters
from whimbrel.stream import Writer
from whimbrel_codecs import xbzrle, zlib
from whimbrel_codecs.xbzrle import NotEncoded, XbzrleCodec, encode_page
from whimbrel_savevm import _ram_delta
from whimbrel_savevm._ram_delta import DeltaSender
from whimbrel_savevm._ram_saver import BATCH, RamSaver
from whimbrel_savevm.ram import RamHandler

PAGE = 4096
KINDS = {0x02: "ZERO", 0x08: "PAGE", 0x40: "XBZRLE"}


class Clock:
    """Stands still unless it is told."""

    now = 100.0

    def __call__(self):
        return self.now


def parse(data):
    """Records one after the other, by a parser of its own: (kind, block or None, page, payload) and nothing else."""
    records, at = [], 0
    while at < len(data):
        (word,) = struct.unpack_from(">Q", data, at)
        at += 8
        flags, name = word & 0xFFF, None
        if not flags & 0x20:
            size = data[at]
            name = bytes(data[at + 1 : at + 1 + size]).decode()
            at += 1 + size
        kind = KINDS[flags & ~0x20]
        if kind == "XBZRLE":
            assert data[at] == 1, "the encoding flag"
            (size,) = struct.unpack_from(">H", data, at + 1)
            at += 3
        else:
            size = {"ZERO": 1, "PAGE": PAGE}[kind]
        records.append((kind, name, word >> 12, bytes(data[at : at + size])))
        at += size
    assert at == len(data)
    return records


class Sending:
    """A sender, and what it has written since it was last asked."""

    def __init__(self, bench, layout, slots, *, tape=None, clock=None):
        self.machine = bench.machine(layout)
        self.parameters = Parameters()
        self.parameters.xbzrle_cache_size = slots * PAGE
        self.progress = Progress(page_size=PAGE)
        self.tape = tape or bench.Tape()
        self.out = Writer(self.tape)
        self.sender = DeltaSender(
            self.progress,
            XbzrleCodec(),
            list(self.machine.ram),
            self.parameters,
            zeros=BATCH,
            clock=clock or Clock(),
        )

    def pages(self, block="a"):
        return self.machine.ram[block].view.reshape(-1, PAGE)

    def send(self, *numbers, block="a"):
        """Send pages, whatever is in them; what was written."""
        block = self.machine.ram[block]
        self.sender.pages(self.out, block, block.view, np.array(numbers, np.intp))
        return self.taken()

    def zeros(self, *numbers, block="a"):
        self.sender.zeros(self.out, self.machine.ram[block], np.array(numbers, np.intp))
        return self.taken()

    def taken(self):
        self.out.flush()
        records = parse(self.tape.data)
        self.tape.data.clear()
        return records

    def kinds(self, *numbers, block="a"):
        return {page: kind for kind, _, page, _ in self.send(*numbers, block=block)}

    @property
    def counters(self):
        return self.sender.statistics()["xbzrle-cache"]


@pytest.fixture(params=["Tape", "GatheringTape"])
def sending(bench, request):
    """`sending(layout, slots)`: a Sending, over a channel of either sort."""
    return lambda layout, slots, **more: Sending(bench, layout, slots, tape=getattr(bench, request.param)(), **more)


def noise(seed, count=PAGE):
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


# ------------------------------------------------------------------------------------------------------- page by page


def test_the_first_pass_goes_whole_and_counts_nothing(sending):
    one = sending({"a": 4}, 16)
    one.pages()[1:] = 7
    one.sender.begin_pass(1)
    assert [record[0] for record in one.zeros(0) + one.send(1, 2, 3)] == ["ZERO", "PAGE", "PAGE", "PAGE"]
    assert one.counters == {
        "cache-size": 16 * PAGE,
        **dict.fromkeys(["bytes", "pages", "cache-miss", "overflow"], 0),
        **dict.fromkeys(["cache-miss-rate", "encoding-rate"], 0.0),
    }
    assert (one.progress.normal, one.progress.duplicate) == (3, 1)


def test_whole_then_changed_then_nothing(sending):
    one = sending({"a": 4, "b": 4}, 16)
    one.pages("b")[:] = noise(1, 4 * PAGE).reshape(4, PAGE)
    one.sender.begin_pass(2)
    assert one.send(1, 2, block="b") == [("PAGE", n, p, one.pages("b")[p].tobytes()) for n, p in (("b", 1), (None, 2))]
    one.sender.begin_pass(3)
    one.pages("b")[2, 5] ^= 0xFF
    assert one.send(1, 2, block="b") == [("XBZRLE", None, 2, bytes([5, 1, one.pages("b")[2, 5]]))]
    one.pages("a")[0] = 9
    one.pages("b")[2, 4095] ^= 0xFF
    one.sender.begin_pass(4)
    assert one.kinds(0) == {0: "PAGE"}
    assert one.send(2, block="b") == [("XBZRLE", "b", 2, bytes([0xFF, 0x1F, 1, one.pages("b")[2, 4095]]))]
    assert one.send(2, block="b") == []
    assert one.counters | {"cache-size": 0} == {
        "cache-size": 0,
        "cache-miss": 3,
        "pages": 4,
        "overflow": 0,
        "bytes": (3 + 3) + (3 + 2 + 4),  # the name counts, the word does not
        "cache-miss-rate": 0.0,
        "encoding-rate": 0.0,
    }
    assert one.progress.normal == 3


def test_what_is_too_much_goes_whole_and_is_kept(sending):
    one = sending({"a": 2}, 16)
    one.pages()[0] = noise(1)
    one.sender.begin_pass(2)
    one.send(0)
    one.pages()[0] = noise(2)
    assert one.send(0) == [("PAGE", None, 0, noise(2).tobytes())]
    assert (one.counters["overflow"], one.counters["pages"], one.counters["bytes"]) == (1, 1, PAGE)
    one.pages()[0, 9] ^= 1
    assert one.send(0) == [("XBZRLE", None, 0, bytes([9, 1, one.pages()[0, 9]]))]


def test_a_zero_page_that_is_no_longer_one_is_a_change_of_zeros(sending):
    one = sending({"a": 2}, 16)
    one.sender.begin_pass(2)
    one.zeros(1)
    one.pages()[1, 0x10] = 0x77
    assert one.send(1) == [("XBZRLE", None, 1, bytes.fromhex("10 01 77"))]
    one.pages()[1] = 0
    one.zeros(1)
    one.pages()[1, 0] = 1
    assert one.send(1) == [("XBZRLE", None, 1, bytes.fromhex("00 01 01"))]
    assert one.counters["cache-miss"] == 0, "nobody asked"


def test_a_page_that_was_zero_in_the_first_pass_is_not_known(sending):
    one = sending({"a": 2}, 16)
    one.sender.begin_pass(1)
    one.zeros(1)
    one.sender.begin_pass(2)
    one.pages()[1, 0] = 1
    assert one.kinds(1) == {1: "PAGE"}


def test_in_the_last_stage_nothing_is_kept(sending):
    one = sending({"a": 3}, 16)
    one.pages()[:] = noise(3, 3 * PAGE).reshape(3, PAGE)
    one.sender.begin_pass(2)
    one.send(0)
    one.sender.begin_last()
    one.pages()[0, 0] ^= 1
    assert one.kinds(0, 1) == {0: "XBZRLE", 1: "PAGE"}
    first = one.send(0)
    assert first == one.send(0), "the copy is what it was"
    assert one.kinds(1) == {1: "PAGE"}
    one.zeros(2)
    assert one.kinds(2) == {2: "PAGE"}
    assert one.counters["cache-miss"] == 4


def test_blocks_share_the_cache_by_where_they_are_in_ram(sending):
    """a is pages 0 to 2 and b 3 to 5, so of 4 slots page 0 of a and page 1 of b have the same."""
    one = sending({"a": 3, "b": 3}, 4)
    for block in "ab":
        one.pages(block)[:] = 5
    one.sender.begin_pass(2)
    one.send(0)
    one.send(0, 1, block="b")
    for block in "ab":
        one.pages(block)[:, 0] += 1
    one.sender.begin_pass(3)
    assert one.kinds(0) == {0: "XBZRLE"}
    assert one.kinds(0, 1, block="b") == {0: "XBZRLE", 1: "PAGE"}


def test_another_size_drops_everything_at_the_next_batch(sending):
    one = sending({"a": 4}, 4)
    one.pages()[:] = 5
    one.sender.begin_pass(2)
    one.send(0, 1, 2, 3)
    one.pages()[:, 0] += 1
    one.parameters.xbzrle_cache_size = 2 * PAGE
    assert one.counters["cache-size"] == 2 * PAGE
    assert one.kinds(0, 1, 2, 3) == dict.fromkeys(range(4), "PAGE")
    one.pages()[:, 0] += 1
    assert one.kinds(0, 1, 2, 3) == {0: "XBZRLE", 1: "XBZRLE", 2: "PAGE", 3: "PAGE"}
    one.parameters.xbzrle_cache_size = 4 * PAGE
    one.pages()[0] = 0
    one.zeros(0)
    one.pages()[:, 0] += 1
    assert one.kinds(0, 1) == {0: "XBZRLE", 1: "PAGE"}


def test_what_the_guest_writes_meanwhile_is_not_what_is_kept(bench):
    """Whatever the guest does while a batch is compared and sent, the cache holds what has gone."""

    class Meddling(XbzrleCodec):
        def encode(self, old, new):
            encoded = super().encode(old, new)
            one.pages()[:, 77] += 1
            return encoded

    one = Sending(bench, {"a": 8}, 16)
    one.pages()[:] = noise(8, 8 * PAGE).reshape(8, PAGE)
    one.sender._codec = Meddling()
    one.sender.begin_pass(2)
    there = np.zeros((8, PAGE), np.uint8)
    for _ in range(4):
        for kind, _, page, payload in one.send(*range(8)):
            if kind == "PAGE":
                there[page] = np.frombuffer(payload, np.uint8)
            else:
                payload, end = np.frombuffer(payload, np.uint8), np.array([len(payload)])
                XbzrleCodec().decode(payload, end * 0, end, there.reshape(-1), np.array([page * PAGE]))
    one.pages()[:, 77] -= 1  # what was written behind the last batch is not there
    assert not np.flatnonzero((there != one.pages()).any(axis=1)).tolist()


def test_more_pages_than_are_compared_at_once(sending, monkeypatch):
    monkeypatch.setattr(_ram_delta, "AT_ONCE", 7)
    one = sending({"a": 60}, 64)
    one.pages()[:] = noise(4, 60 * PAGE).reshape(60, PAGE)
    one.sender.begin_pass(2)
    one.send(*range(60))
    one.pages()[::3, 8] ^= 1
    one.pages()[::4] = noise(5)
    expected = {page: "PAGE" if page % 4 == 0 else "XBZRLE" for page in range(60) if not page % 3 or not page % 4}
    assert one.kinds(*range(60)) == expected
    assert one.send(*range(60)) == []


def test_the_memory_is_given_back(bench):
    one = Sending(bench, {"a": 1}, 4)
    one.sender.begin_pass(2)
    one.zeros(0)
    assert one.sender._cache is not None
    one.sender.finish()
    assert one.sender._cache is None


# ----------------------------------------------------------------------------------------------------------- the rates


def test_the_rates_are_of_a_second_at_least(bench):
    clock = Clock()
    one = Sending(bench, {"a": 8}, 16, clock=clock)
    one.pages()[:] = 5
    one.sender.begin_pass(1)
    one.send(*range(8))
    one.sender.begin_pass(2)
    one.send(*range(4))
    clock.now += 0.999
    one.sender.begin_pass(3)
    assert (one.counters["cache-miss-rate"], one.counters["encoding-rate"]) == (0, 0)
    one.pages()[:2, 0] += 1
    one.send(*range(4))
    clock.now += 0.001
    one.sender.begin_pass(4)
    assert one.counters["cache-miss-rate"] == 4 / 16
    assert one.counters["encoding-rate"] == 4 * PAGE / (2 * 6)
    clock.now += 0.5
    one.zeros(7)
    one.sender.begin_pass(5)
    assert one.counters["cache-miss-rate"] == 4 / 16
    clock.now += 0.5
    one.sender.begin_pass(6)
    assert (one.counters["cache-miss-rate"], one.counters["encoding-rate"]) == (0, 0)
    clock.now += 5
    one.sender.begin_pass(7)
    assert (one.counters["cache-miss-rate"], one.counters["encoding-rate"]) == (0, 0)


# ------------------------------------------------------------------------------------------------ against a slow sender


class Slow:
    """Sections 3.4 and 3.5 for one page after the other."""

    def __init__(self, slots):
        self.slots, self.cache = slots, {}  # slot -> number, age, copy
        self.miss = self.pages = self.overflow = self.payload = 0

    def insert(self, number, age, copy):
        holder, since, _ = self.cache.get(number % self.slots, (number, 0, None))
        if holder == number or since + 2 <= age:
            self.cache[number % self.slots] = (number, age, copy.copy())

    def zero(self, number, age, *, last):
        if not last:
            self.insert(number, age, np.zeros(PAGE, np.uint8))

    def page(self, number, age, page, *, last):
        """(kind, payload), or None for nothing."""
        holder, _, copy = self.cache.get(number % self.slots, (None, 0, None))
        if holder != number:
            self.miss += 1
            if not last:
                self.insert(number, age, page)
            return "PAGE", page.tobytes()
        self.pages += 1
        payload = encode_page(copy, page)
        kept = copy if last or payload is NotEncoded.UNCHANGED else page.copy()
        self.cache[number % self.slots] = (number, age, kept)
        if payload is NotEncoded.UNCHANGED:
            return None
        if payload is NotEncoded.OVERFLOW:
            self.overflow += 1
            return "PAGE", page.tobytes()
        self.payload += len(payload) + 3
        return "XBZRLE", payload


LAYOUT = {"a": 7, "bb": 6}
BASES = {"a": 0, "bb": 7}
EDITS = st.dictionaries(st.integers(0, 12), st.sampled_from(("byte", "bytes", "all", "zero", "same")), max_size=13)


def edit(page, how, dice):
    match how:
        case "byte":
            page[dice.integers(PAGE)] = dice.integers(256)
        case "bytes":
            page[dice.integers(0, PAGE, 300)] ^= 0x31
        case "all":
            page[:] = dice.integers(0, 256, PAGE)
        case "zero":
            page[:] = 0


@given(st.sampled_from([1, 2, 4, 8, 16]), st.lists(EDITS, max_size=9), st.integers(0, 2**32))
@settings(max_examples=200)
def test_it_sends_what_a_slow_sender_sends(bench, slots, passes, seed):
    dice = np.random.default_rng(seed)
    one, slow = Sending(bench, LAYOUT, slots), Slow(slots)
    names = 0
    for age, edits in enumerate(passes, 2):
        one.sender.begin_pass(age)
        if last := age == len(passes) + 1:
            one.sender.begin_last()
        for number, how in edits.items():
            edit(one.pages("bb" if number > 6 else "a")[number - 7 * (number > 6)], how, dice)
        for block, base in BASES.items():
            mine = sorted(number - base for number in edits if (number > 6) == (block == "bb"))
            zeros = [page for page in mine if not one.pages(block)[page].any()]
            others = [page for page in mine if page not in zeros]
            for page in zeros:
                slow.zero(base + page, age, last=last)
            found = one.zeros(*zeros, block=block) if zeros else []
            assert [(kind, page) for kind, _, page, _ in found] == [("ZERO", page) for page in zeros]
            expected = {page: slow.page(base + page, age, one.pages(block)[page], last=last) for page in others}
            found = one.send(*others, block=block) if others else []
            assert len(found) == len({page for _, _, page, _ in found})
            assert {page: (kind, payload) for kind, _, page, payload in found} == {
                page: what for page, what in expected.items() if what is not None
            }
            names += sum(1 + len(name) for kind, name, _, _ in found if kind == "XBZRLE" and name is not None)
    counters = one.counters
    assert counters["cache-miss"] == slow.miss
    assert counters["pages"] == slow.pages
    assert counters["overflow"] == slow.overflow
    assert counters["bytes"] == slow.payload + names + slow.overflow * PAGE


# ----------------------------------------------------------------------------------------------------- and loaded again


@given(st.sampled_from([1, 4, 16]), st.lists(EDITS, min_size=1, max_size=6), st.integers(0, 2**32), st.booleans())
@settings(max_examples=60)
def test_what_was_sent_loads_to_what_the_source_has(bench, slots, passes, seed, gathers):
    dice = np.random.default_rng(seed)
    machine = bench.machine(LAYOUT)
    source = bench.Source(machine, tape=bench.GatheringTape() if gathers else bench.Tape())
    parameters = Parameters()
    parameters.xbzrle_cache_size = slots * PAGE
    sender = DeltaSender(source.progress, XbzrleCodec(), list(machine.ram), parameters, zeros=BATCH)
    source.saver = RamSaver(list(machine.ram), source.tracker, source.progress, sender)
    source.start()
    source.round(size=3 * PAGE)
    for edits in passes:
        write(source, edits, dice)
        source.round(size=3 * PAGE)
    write(source, passes[0], dice)
    source.end()
    assert source.bodies[-1][0] is SectionKind.END
    there = bench.machine(LAYOUT)
    loader = bench.load_all(there, source.tape, [kind for kind, _ in source.bodies])
    loader.finish()
    for block in machine.ram:
        wrong = np.flatnonzero(block.view != there.ram[block.name].view)
        assert not len(wrong), f"{len(wrong)} bytes of {block.name!r} are wrong, the first at {wrong[0]:#x}"


def write(source, edits, dice):
    for number, how in edits.items():
        block, page = ("bb", number - 7) if number > 6 else ("a", number)
        content = source.machine.ram[block].view.reshape(-1, PAGE)[page].copy()
        edit(content, how, dice)
        source.write(block, page, content.tobytes())


# --------------------------------------------------------------------------------------------------------- the handler


def handler_of(codec_spec, *, multifd=False):
    machine = BareMachine("m", tracker_specs=whimbrel_dirty_trackers, codec_spec=codec_spec)
    machine.ram.add("a", PAGE)
    machine.settings.capabilities.xbzrle = True
    machine.settings.capabilities.multifd = multifd
    machine.settings.backends.dirty_tracker = "manual"
    return RamHandler(machine)


def test_a_machine_that_has_no_such_codec_is_not_sent():
    (problem,) = handler_of(None).problems()
    assert problem.startswith("unknown codec 'xbzrle'")


def test_nor_one_whose_codec_of_that_name_is_another_thing():
    (problem,) = handler_of(lambda name: zlib.whimbrel_codecs()[0]).problems()
    assert problem == "the codec 'xbzrle' is a ZlibCodec, expected a DeltaCodec"


def test_lanes_need_no_codec_for_changes():
    handler = handler_of(None, multifd=True)
    assert handler.problems() == ()
    handler.finish()


def test_its_counters_are_there_from_the_beginning():
    handler = handler_of(lambda name: xbzrle.whimbrel_codecs()[0])
    assert handler.statistics() == {}
    assert handler.problems() == ()
    assert handler.statistics()["xbzrle-cache"]["cache-size"] == 64 << 20
    handler.finish()
