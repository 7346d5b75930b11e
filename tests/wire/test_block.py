"""The records of the block section: golden bytes, every check, and whatever else might come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import StreamError
from whimbrel.wire import block
from whimbrel.wire.block import Chunk, End, Progress

MIB = 1 << 20

GOLDEN = {
    "the first chunk": (Chunk("drive0", 0), "00 00 00 00 00 00 00 01  06 64 72 69 76 65 30"),
    "the third chunk": (Chunk("d", 2), "00 00 00 00 00 20 00 01  01 64"),
    "a chunk of zeros": (Chunk("drive0", 1, zero=True), "00 00 00 00 00 10 00 09  06 64 72 69 76 65 30"),
    "far out": (Chunk("d", (1 << 44) - 1), "ff ff ff ff ff f0 00 01  01 64"),
    "nothing yet": (Progress(0), "00 00 00 00 00 00 00 04"),
    "a third": (Progress(33), "00 00 00 00 00 00 42 04"),
    "everything": (Progress(100), "00 00 00 00 00 00 c8 04"),
    "the end": (End(), "00 00 00 00 00 00 00 02"),
}


def encoded(record):
    match record:
        case Chunk():
            return block.chunk(record.device, record.number, zero=record.zero)
        case Progress():
            return block.progress(record.percent)
    return block.EOS_RECORD


def u64(value):
    return value.to_bytes(8, "big")


@pytest.mark.parametrize("case", GOLDEN)
def test_records(three_ways, case):
    record, data = GOLDEN[case][0], bytes.fromhex(GOLDEN[case][1])
    assert encoded(record) == data
    three_ways(block.parse_record, data, record)


NAMES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=255)
RECORDS = st.one_of(
    st.builds(Chunk, NAMES, st.integers(0, (1 << 44) - 1), st.booleans()),
    st.builds(Progress, st.integers(0, 100)),
    st.just(End()),
)


@given(RECORDS)
def test_whatever_is_written_is_read(three_ways, record):
    three_ways(block.parse_record, encoded(record), record)


@pytest.mark.parametrize("flags", [flags for flags in range(512) if flags not in {0x01, 0x02, 0x04, 0x09}])
def test_flags_of_no_record(refused, flags):
    message = refused(block.parse_record, u64(2048 << 9 | flags) + b"\x01d")
    assert f"flags {flags:#x}" in message


@pytest.mark.parametrize("sector", [1, 2047, 2049, (1 << 55) - 1])
def test_a_chunk_begins_where_chunks_begin(refused, sector):
    assert f"sector {sector}" in refused(block.parse_record, u64(sector << 9 | 1) + b"\x01d")


@pytest.mark.parametrize("percent", [101, 1 << 32, (1 << 55) - 1])
def test_more_than_everything(refused, percent):
    assert str(percent) in refused(block.parse_record, u64(percent << 9 | 4))


@pytest.mark.parametrize("value", [1, 2048, (1 << 55) - 1])
def test_the_end_says_nothing_else(refused, value):
    assert "ends a block section's body" in refused(block.parse_record, u64(value << 9 | 2))


@pytest.mark.parametrize("name", [b"", b"d\0", b"\xff", b"d\n"])
def test_names(refused, name):
    assert "a drive" in refused(block.parse_record, u64(1) + bytes([len(name)]) + name)


SIZES = {"a": 3 * MIB, "odd": 2 * MIB + 512, "small": 1}


@pytest.mark.parametrize(("device", "number"), [("a", 0), ("a", 2), ("odd", 2), ("small", 0)])
def test_chunks_that_begin_inside_of_the_drive(three_ways, device, number):
    three_ways(lambda: block.parse_record(SIZES), block.chunk(device, number), Chunk(device, number))


@pytest.mark.parametrize(("device", "number"), [("a", 3), ("odd", 3), ("small", 1), ("a", (1 << 44) - 1)])
def test_chunks_behind_the_end(refused, device, number):
    message = refused(lambda: block.parse_record(SIZES), block.chunk(device, number))
    assert f"byte {number * MIB}" in message
    assert f"has {SIZES[device]} here" in message


def test_a_drive_that_is_not_there(refused):
    message = refused(lambda: block.parse_record(SIZES), block.chunk("b", 0))
    assert "'b'" in message
    assert "'odd'" in message
    assert "none" in refused(lambda: block.parse_record({}), block.chunk("b", 0))


@given(st.binary(max_size=40))
def test_whatever_comes_is_a_record_or_refused(feeder, data):
    try:
        reader = feeder(block.parse_record(SIZES)).feed(data)
    except StreamError:
        return
    if reader.done and isinstance(reader.value, Chunk):
        assert reader.value.number * MIB < SIZES[reader.value.device]
    assert reader.done or 1 <= reader.missing <= 255
