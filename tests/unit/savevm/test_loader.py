"""What the destination takes, and what it refuses: always with words that help, and never a byte out of bounds."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.abc import SectionKind
from whimbrel.errors import ChannelLost, IncompatibleError, MigrationError, ProtocolError, StreamError
from whimbrel.stream import Reader
from whimbrel.wire import ram as wire
from whimbrel_savevm._ram_loader import RamLoader

START, PART, END, FULL = SectionKind.START, SectionKind.PART, SectionKind.END, SectionKind.FULL
PAGE = 4096
EOS = bytes.fromhex("00 00 00 00 00 00 00 10")


def word(page, flags):
    return (page * PAGE | flags).to_bytes(8, "big")


def page(number, payload, name=None):
    return word(number, 0x28 if name is None else 0x08) + named(name) + payload


def zero(number, name=None, fill=0):
    return word(number, 0x22 if name is None else 0x02) + named(name) + bytes([fill])


def named(name):
    return b"" if name is None else bytes([len(name)]) + name.encode()


def listed(**pages):
    return wire.block_list([wire.ListedBlock(name, count * PAGE) for name, count in pages.items()])


def full(byte):
    return bytes([byte]) * PAGE


@pytest.fixture
def load(bench):
    """Loads bodies of one kind, each given as its bytes, into a machine; loaders are finished in the end."""
    loaders = []

    def load(machine, *bodies, kind=PART, capacity=1 << 20):
        loader = RamLoader(machine)
        loaders.append(loader)
        reader = Reader(bench.Tape(b"".join(bodies)), capacity=capacity)
        for _ in bodies:
            loader.load(reader, kind)
        return loader

    yield load
    for loader in loaders:
        loader.finish()


def contents(machine, block="a"):
    """The first byte of every page, which must all be alike in their page."""
    view = machine.ram[block].view.reshape(-1, PAGE)
    assert (view == view[:, :1]).all()
    return view[:, 0].tolist()


# ------------------------------------------------------------------------------------------------------- records


def test_pages_and_zeros_land_where_they_belong(bench, load):
    machine = bench.machine({"a": 6, "b": 2})
    body = (
        page(1, full(0x11), "a")
        + page(2, full(0x12))
        + zero(3)
        + page(0, full(0x21), "b")
        + zero(1)
        + page(5, full(0x15), "a")
        + page(4, full(0x14))
        + EOS
    )
    load(machine, body)
    assert contents(machine) == [0, 0x11, 0x12, 0, 0x14, 0x15]
    assert contents(machine, "b") == [0x21, 0]


@pytest.mark.parametrize("numbers", [(5, 4, 3, 2), (1, 3, 2, 4), (0, 0, 0, 3), (0, 5), (2, 2, 2), (4, 0, 4, 1)])
def test_pages_in_any_order_and_the_last_one_wins(bench, load, numbers):
    machine = bench.machine({"a": 6})
    body = page(0, full(1), "a") + b"".join(page(n, full(10 * at + n + 10)) for at, n in enumerate(numbers)) + EOS
    load(machine, body)
    expected = [1, 0, 0, 0, 0, 0]
    for at, number in enumerate(numbers):
        expected[number] = 10 * at + number + 10
    assert contents(machine) == expected


def test_the_block_goes_on_over_bodies_and_kinds(bench, load):
    machine = bench.machine({"a": 4})
    loader = RamLoader(machine)
    data = word(4, 0x04) + named("a") + (4 * PAGE).to_bytes(8, "big") + EOS
    data += page(0, full(1), "a") + EOS + page(1, full(2)) + EOS + EOS + page(2, full(3)) + EOS
    reader = Reader(bench.Tape(data))
    for kind in (START, PART, PART, PART, END):
        loader.load(reader, kind)
    loader.finish()
    assert contents(machine) == [1, 2, 3, 0]


def test_a_fill_other_than_zero_fills(bench, load):
    machine = bench.machine({"a": 5})
    load(machine, zero(0, "a", 7) + zero(1, fill=0) + zero(2, fill=9) + zero(3) + EOS, zero(0) + zero(2, fill=3) + EOS)
    assert contents(machine) == [0, 0, 3, 0, 0]


@pytest.mark.parametrize("fills", [(0, 5), (5, 0), (5, 6), (0, 0)])
def test_the_last_fill_of_a_page_wins(bench, load, fills):
    machine = bench.machine({"a": 4})
    load(machine, zero(3, "a") + b"".join(zero(0, fill=fill) for fill in fills) + EOS)
    assert contents(machine) == [fills[-1], 0, 0, 0]


def test_zero_pages_are_not_written_into_memory_that_nobody_has_touched(bench, load):
    machine = bench.machine({"a": 600}, memory="memfd")
    block = machine.ram["a"]
    assert not block.present_pages().any()
    load(machine, zero(0, "a") + b"".join(zero(n) for n in range(1, 600)) + EOS)
    assert not block.present_pages().any(), "a page was written only to be zero"


def test_zero_pages_are_written_over_what_came_before(bench, load):
    machine = bench.machine({"a": 8})
    machine.ram["a"].view[3 * PAGE : 5 * PAGE] = 0xEE  # before the migration
    load(
        machine,
        page(0, full(1), "a") + page(1, full(2)) + zero(6, fill=4) + EOS,
        zero(0, "a") + zero(1) + zero(2) + zero(3) + zero(6) + EOS,
    )
    assert contents(machine) == [0, 0, 0, 0, 0xEE, 0, 0, 0]


@pytest.mark.parametrize("capacity", [8 + 1 + 255 + PAGE, 5000, 9001, 1 << 20])
def test_any_buffer_that_holds_a_record_does(bench, load, capacity):
    machine = bench.machine({"n" * 255: 7, "b": 3})
    body = page(0, full(1), "n" * 255) + b"".join(page(n, full(n + 1)) for n in range(1, 7))
    body += zero(0, "b") + zero(1, fill=2) + page(2, full(3)) + EOS
    load(machine, body, capacity=capacity)
    assert contents(machine, "n" * 255) == [1, 2, 3, 4, 5, 6, 7]
    assert contents(machine, "b") == [0, 2, 3]


# ----------------------------------------------------------------------------------------------------- refused


OUTSIDE = [4, 5, 2**20, 2**40, 2**51, 2**52 - 1]


@pytest.mark.parametrize("number", OUTSIDE)
@pytest.mark.parametrize("form", ["page", "named page", "zero", "named zero", "fill"])
def test_pages_outside_of_their_block(bench, load, number, form):
    machine = bench.machine({"a": 4, "b": 4})
    record = {
        "page": lambda: page(3, full(1), "a") + page(number, full(2)),
        "named page": lambda: page(number, full(2), "a"),
        "zero": lambda: zero(3, "a") + zero(number),
        "named zero": lambda: zero(number, "a"),
        "fill": lambda: zero(3, "a") + zero(number, fill=1),
    }[form]()
    with pytest.raises(StreamError, match=rf"{number * PAGE:#x} is outside of block 'a' of 0x4000") as caught:
        load(machine, record + EOS)
    assert caught.value.place.block == "a"
    assert contents(machine, "b") == [0, 0, 0, 0]


def test_the_last_page_of_a_block_is_inside(bench, load):
    machine = bench.machine({"a": 4})
    load(machine, page(3, full(9), "a") + EOS)
    assert contents(machine) == [0, 0, 0, 9]


def test_a_block_that_is_not_there(bench, load):
    machine = bench.machine({"a": 4})
    with pytest.raises(StreamError, match="names RAM block 'x', which is not there") as caught:
        load(machine, page(0, full(1), "a") + page(0, full(2), "x") + EOS)
    assert caught.value.place.block is None, "it is not in the block that came before"


@pytest.mark.parametrize("record", [page(0, full(1)), zero(0)])
def test_a_record_that_continues_nothing(bench, load, record):
    with pytest.raises(StreamError, match="continues a block, but none was named yet"):
        load(bench.machine({"a": 4}), record + EOS)


def test_more_records_than_there_are_pages(bench, load):
    machine = bench.machine({"a": 3, "b": 2})
    just = zero(0, "a") + zero(0) * 4 + EOS
    load(machine, just, just)
    for body in (zero(0, "a") + zero(0) * 5 + EOS, page(0, full(1), "a") * 6 + EOS):
        with pytest.raises(StreamError, match="more page records than the 5 that may come"):
            load(machine, body)


def test_the_start_has_no_pages(bench, load):
    machine = bench.machine({"a": 1})
    with pytest.raises(StreamError, match="more page records than the 0 that may come"):
        load(machine, listed(a=1) + zero(0, "a") + EOS, kind=START)


def test_the_ram_section_is_never_full(bench, load):
    with pytest.raises(StreamError, match="came as FULL"):
        load(bench.machine({"a": 1}), EOS, kind=FULL)


def test_flags_that_mean_nothing(bench, load):
    with pytest.raises(StreamError, match="mean nothing") as caught:
        load(bench.machine({"a": 1}), zero(0, "a") + word(0, 0x21) + EOS)
    assert caught.value.place.block == "a"


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"a": 2}, ["lacks 'b' of 12288 bytes"]),
        ({"a": 2, "b": 3, "c": 1}, ["it has 'c' of 4096 bytes, this machine has none"]),
        ({"a": 2, "b": 2}, ["its 'b' is 8192 bytes long, this one's 12288"]),
        ({"a": 2, "b": 4}, ["its 'b' is 16384 bytes long, this one's 12288"]),
        ({"a": 3, "b": 2}, ["its 'a' is 12288", "its 'b' is 8192"]),
        ({"a": 2, "c": 3}, ["lacks 'b' of 12288", "it has 'c' of 12288"]),
        ({}, ["lacks 'a'", "lacks 'b'"]),
        ({"a": 1 << 30, "b": 3}, ["its 'a' is 4398046511104 bytes long"]),
    ],
)
def test_a_block_list_that_is_not_ours(bench, load, blocks, words):
    machine = bench.machine({"a": 2, "b": 3})
    with pytest.raises(IncompatibleError, match="RAM blocks are not this machine's") as caught:
        load(machine, listed(**blocks) + EOS, kind=START)
    for word_ in words:
        assert word_ in str(caught.value)


def test_another_order_of_blocks_is_fine(bench, load):
    load(bench.machine({"a": 2, "b": 3}), listed(b=3, a=2) + EOS, kind=START)


def test_a_long_list_of_differences_is_cut_short(bench, load):
    with pytest.raises(IncompatibleError) as caught:
        load(bench.machine({"a": 1}), listed(**{f"{n:0255}": 1 for n in range(500)}) + EOS, kind=START)
    assert "and 493 more" in str(caught.value)
    assert len(str(caught.value)) < 4000


def test_the_limit_of_blocks(bench, load):
    for count, fits in ((3, True), (4, False)):
        machine = bench.machine({str(n): 1 for n in range(count)}, blocks=3)
        body = listed(**{str(n): 1 for n in range(count)}) + EOS
        if fits:
            load(machine, body, kind=START)
        else:
            with pytest.raises(StreamError, match="more than 3 RAM blocks"):
                load(machine, body, kind=START)


def test_absurd_totals(bench, load):
    for total in (1 << 57, 2**64 - PAGE):
        with pytest.raises(StreamError, match=f"has {total} bytes of RAM"):
            load(bench.machine({"a": 1}), (total | 4).to_bytes(8, "big"), kind=START)


GOOD = (
    page(1, full(0x11), "a")
    + page(2, full(0x12))
    + zero(3)
    + page(0, full(0x21), "b")
    + zero(1, fill=2)
    + zero(0)
    + EOS
)


def test_cut_anywhere_it_asks_for_more_and_nothing_else(bench, load):
    cuts = [*range(40), PAGE, len(GOOD) - 1, *range(0, len(GOOD), 97)]
    for cut in cuts:
        with pytest.raises(ChannelLost, match="the stream ended where at least") as caught:
            load(bench.machine({"a": 4, "b": 2}), GOOD[:cut])
        assert caught.value.place.offset == cut


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1) | st.integers(0, 20), st.integers(0, 7)), min_size=1, max_size=4)
)
@settings(max_examples=100)
def test_damaged_bodies_are_loaded_or_refused_and_rolled_back(bench, flips):
    data = bytearray(GOOD)
    for at, bit in flips:
        data[at] ^= 1 << bit
    machine = bench.machine({"a": 4, "b": 2})
    loader = RamLoader(machine)
    try:
        loader.load(Reader(bench.Tape(data)), PART)
    except (ProtocolError, ChannelLost):
        pass
    finally:
        loader.rollback()
        loader.finish()
    assert not any(block.view.any() for block in machine.ram)


# ---------------------------------------------------------------------------------------------------- the end


def test_rollback_leaves_nothing(bench, load):
    machine = bench.machine({"a": 600, "b": 3, "c": 2})
    machine.ram["c"].view[:] = 0x55  # what was there before goes as well: such a machine was never started
    body = page(0, full(1), "a") + b"".join(page(n, full(2)) for n in range(1, 550)) + zero(1, "b", 3) + EOS
    loader = load(machine, body)
    loader.rollback()
    assert not any(block.view.any() for block in machine.ram)
    loader.rollback()
    loader.finish()


def test_what_was_rolled_back_can_be_loaded_again(bench, load):
    machine = bench.machine({"a": 4})
    load(machine, page(0, full(1), "a") + page(3, full(2)) + EOS).rollback()
    load(machine, zero(0, "a") + page(1, full(3)) + EOS)
    assert contents(machine) == [0, 3, 0, 0]


def populators():
    return [thread for thread in threading.enumerate() if thread.name == "whimbrel-populate"]


DENSE = 8192  # pages; 32 MiB


@pytest.fixture
def dense(bench, load):
    """Loads so much in order that memory is made ready ahead of it."""
    machine = bench.machine({"a": DENSE})
    payload = np.arange(2048 * PAGE, dtype=np.uint32).view(np.uint8)[: 2048 * PAGE]
    stage = wire.RecordStage(pages=2048, zeros=1)
    head, rest = stage.pages(payload, np.arange(2048), "a")
    return machine, load(machine, head + bytes(rest) + EOS), payload


@pytest.mark.parametrize("end", ["finish", "rollback"])
def test_the_populating_ends_with_the_loader(dense, end):
    machine, loader, payload = dense
    assert len(populators()) == 1
    assert (machine.ram["a"].view[: payload.size] == payload).all()
    getattr(loader, end)()
    assert populators() == []
    loader.finish()
    if end == "rollback":
        assert not machine.ram["a"].view.any()


def test_populating_that_fails_fails_the_load(bench, load, monkeypatch):
    machine = bench.machine({"a": DENSE})
    block = machine.ram["a"]
    loaded = threading.Event()

    def no_memory(offset, length):
        assert loaded.wait(10)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(block, "populate", no_memory)
    stage = wire.RecordStage(pages=2048, zeros=1)
    payload = np.ones(2048 * PAGE, np.uint8)
    head, rest = stage.pages(payload, np.arange(2048), "a")
    loader = load(machine, head + bytes(rest) + EOS)
    (thread,) = populators()
    loaded.set()
    thread.join(10)
    with pytest.raises(MigrationError, match=r"no memory for RAM block 'a'.*Cannot allocate memory") as caught:
        loader.load(Reader(bench.Tape(page(2048, full(1)) + EOS)), PART)
    assert isinstance(caught.value.__cause__, OSError)
    loader.rollback()
    assert not block.view.any()
