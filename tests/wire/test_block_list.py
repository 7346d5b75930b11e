"""The block list of the RAM section: golden bytes and every limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.wire import ram
from whimbrel.wire.ram import ListedBlock

PAGE = 4096
TOTAL, BLOCKS = 1 << 30, 3

GOLDEN = {
    "one": ([("pc.ram", 0x8000000)], "00 00 00 00 08 00 00 04  06 70 63 2e 72 61 6d  00 00 00 00 08 00 00 00"),
    "two": (
        [("a", 0x1000), ("b c", 0x3000)],
        "00 00 00 00 00 00 40 04  01 61  00 00 00 00 00 00 10 00  03 62 20 63  00 00 00 00 00 00 30 00",
    ),
    "none": ([], "00 00 00 00 00 00 00 04"),
    "large": ([("m", 1 << 40)], "00 00 01 00 00 00 00 04  01 6d  00 00 01 00 00 00 00 00"),
}


def parse(total=TOTAL, blocks=BLOCKS, **options):
    return lambda: ram.parse_block_list(total_limit=total, blocks_limit=blocks, **options)


def blocks_of(*pairs):
    return tuple(ListedBlock(name, size) for name, size in pairs)


def u64(value):
    return value.to_bytes(8, "big")


def listing(total, *blocks):
    return u64(total | 4) + b"".join(bytes([len(name)]) + name + u64(length) for name, length in blocks)


@pytest.mark.parametrize("case", GOLDEN)
def test_block_lists(three_ways, case):
    blocks, data = GOLDEN[case][0], bytes.fromhex(GOLDEN[case][1])
    assert ram.block_list(blocks_of(*blocks)) == data
    three_ways(parse(1 << 50), data, blocks_of(*blocks))


def test_the_order_is_kept(feeder):
    blocks = blocks_of(("z", PAGE), ("a", PAGE), ("m", PAGE))
    assert feeder(parse()()).feed(ram.block_list(blocks)).value == blocks


def test_the_end_of_the_body_is_golden():
    assert bytes.fromhex("00 00 00 00 00 00 00 10") == ram.EOS_RECORD


@pytest.mark.parametrize("flags", [*(1 << bit for bit in range(12) if bit != 2), 0, 0x00C, 0x014, 0x024, 0xFFF])
def test_it_begins_with_mem_size_and_nothing_else(refused, flags):
    message = refused(parse(), u64(PAGE | flags))
    assert f"{flags:#x}" in message
    assert "MEM_SIZE" in message


@pytest.mark.parametrize(
    ("total", "fits"), [(TOTAL - PAGE, True), (TOTAL, True), (TOTAL + PAGE, False), ((1 << 64) - PAGE, False)]
)
def test_the_limit_of_the_total(outcome, refused, total, fits):
    if fits:
        assert outcome(parse(), listing(total, (b"a", total))) == ("value", blocks_of(("a", total)))
    else:
        assert f"has {total} bytes of RAM, this machine has {TOTAL}" in refused(parse(), u64(total | 4))


def test_as_many_blocks_as_may_be(three_ways):
    data = listing(BLOCKS * PAGE, (b"a", PAGE), (b"b", PAGE), (b"c", PAGE))
    three_ways(parse(), data, blocks_of(("a", PAGE), ("b", PAGE), ("c", PAGE)))


def test_one_block_too_many(refused):
    data = listing((BLOCKS + 1) * PAGE, (b"a", PAGE), (b"b", PAGE), (b"c", PAGE))
    assert f"more than {BLOCKS} RAM blocks" in refused(parse(), data)


@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE + 1, 4 * PAGE, 1 << 63, 2**64 - PAGE, 2**64 - 1])
def test_lengths_that_are_refused(refused, length):
    message = refused(parse(), listing(3 * PAGE, (b"a", length)))
    assert f"'a' is {length} bytes long" in message
    assert f"at most {3 * PAGE} bytes" in message


def test_lengths_that_add_up_to_more_than_the_total(refused):
    data = listing(3 * PAGE, (b"a", 2 * PAGE), (b"b", 2 * PAGE))
    assert f"'b' is {2 * PAGE} bytes long" in refused(parse(), data)


def test_lengths_that_add_up_to_less_ask_for_more(feeder):
    run = feeder(parse()()).feed(listing(3 * PAGE, (b"a", 2 * PAGE)))
    assert (run.done, run.missing) == (False, 1)


def test_names_that_repeat(refused):
    assert "'a' is listed twice" in refused(parse(), listing(3 * PAGE, (b"a", PAGE), (b"a", PAGE)))


@pytest.mark.parametrize("name", [b"", b"\xff", b"a\0", b"\n"])
def test_names_that_are_refused(refused, name):
    assert "the name of a RAM block" in refused(parse(), listing(PAGE, (name, PAGE)))


@given(st.data())
def test_damaged_bytes(outcome, mutated, data):
    good = listing(3 * PAGE, (b"pc.ram", 2 * PAGE), (b"rom", PAGE))
    kind, what = outcome(parse(), data.draw(mutated(good)))
    if kind == "value":
        assert len(what) <= BLOCKS
        assert all(block.size > 0 and block.size % PAGE == 0 for block in what)
        assert sum(block.size for block in what) <= TOTAL


# ---------------------------------------------------------------------------------------- with guest addresses


ADDRESSED = bytes.fromhex(
    "00 00 00 00 00 00 40 04"
    "01 61  00 00 00 00 00 00 10 00  00 00 00 00 00 0c 00 00"
    "01 62  00 00 00 00 00 00 30 00  00 00 00 00 00 00 00 00"
)


def test_each_block_may_have_its_guest_address(three_ways):
    blocks = (ListedBlock("a", PAGE, 0xC0000), ListedBlock("b", 3 * PAGE, 0))
    assert ram.block_list(blocks) == ADDRESSED
    three_ways(parse(guest_addresses=True), ADDRESSED, blocks)


def test_an_address_may_be_any_number(three_ways):
    blocks = (ListedBlock("a", PAGE, 2**64 - 1),)
    three_ways(parse(guest_addresses=True), ram.block_list(blocks), blocks)


def test_addresses_that_nobody_expects_are_no_list(refused):
    assert "the name of a RAM block is empty" in refused(parse(), ADDRESSED)


@given(st.data())
def test_damaged_bytes_with_addresses(outcome, mutated, data):
    kind, what = outcome(parse(guest_addresses=True), data.draw(mutated(ADDRESSED)))
    if kind == "value":
        assert len(what) <= BLOCKS
        assert all(0 <= block.guest_address < 2**64 for block in what)
        assert sum(block.size for block in what) <= TOTAL


@given(
    st.lists(
        st.tuples(st.text("abc", min_size=1), st.integers(1, 9), st.integers(0, 2**64 - 1)),
        unique_by=lambda block: block[0],
        max_size=3,
    ),
    st.booleans(),
)
def test_round_trip(feeder, blocks, addressed):
    blocks = tuple(ListedBlock(name[:255], pages * PAGE, at if addressed else None) for name, pages, at in blocks)
    run = feeder(parse(guest_addresses=addressed)()).feed(ram.block_list(blocks) + b"\0" * 8)
    assert (run.value, run.taken) == (blocks, len(ram.block_list(blocks)))
