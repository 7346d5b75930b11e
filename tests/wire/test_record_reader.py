"""One stream's RAM bodies followed: names that persist, limits, bounds, and what is left in the reader."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import ChannelLost, StreamError
from whimbrel.stream import Reader, Replay
from whimbrel.wire.ram import EOS_RECORD, FLUSH_RECORD, Flag, RecordReader

PAGE = 4096
SIZES = {"a": 4 * PAGE, "b": 2 * PAGE}


def record(kind, page, payload, name=None):
    word = page * PAGE | kind | (Flag.CONTINUE if name is None else 0)
    return word.to_bytes(8, "big") + (b"" if name is None else bytes([len(name)]) + name.encode()) + payload


def zero(page, name=None):
    return record(Flag.ZERO, page, b"\0", name)


def change(page, name=None):
    return record(Flag.XBZRLE, page, b"\x01\0\x03\0\x01\xed", name)


def squeezed(page, name=None):
    return record(Flag.COMPRESS_PAGE, page, b"\0\0\0\x01x", name)


def whole(page, name=None):
    return record(Flag.PAGE, page, b"\x55" * PAGE, name)


def reader_of(data, capacity=1 << 20):
    return Reader(Replay(bytes(data), peer="test"), capacity=capacity)


def body(records, reader, limit=100):
    return [(name, run.flag, run.indices.tolist()) for name, run in records.body(reader, limit)]


@pytest.mark.parametrize("capacity", [5000, 1 << 20])
def test_runs_come_with_the_name_of_their_block(capacity):
    data = whole(0, "a") + whole(1) + change(1) + zero(1, "b") + squeezed(0) + squeezed(1) + EOS_RECORD
    reader = reader_of(data + b"\x7e", capacity)
    assert body(RecordReader(SIZES), reader) == [
        ("a", Flag.PAGE, [0]),
        ("a", Flag.PAGE, [1]),
        ("a", Flag.XBZRLE, [1]),
        ("b", Flag.ZERO, [1]),
        ("b", Flag.COMPRESS_PAGE, [0, 1]),
    ]
    assert reader.offset == len(data)
    assert bytes(reader.window(1)[:1]) == b"\x7e"


def test_the_block_goes_on_over_bodies():
    records = RecordReader(SIZES)
    reader = reader_of(zero(0, "b") + EOS_RECORD + EOS_RECORD + change(1) + EOS_RECORD + squeezed(0) + EOS_RECORD)
    assert records.block is None
    assert [body(records, reader) for _ in range(4)] == [
        [("b", Flag.ZERO, [0])],
        [],
        [("b", Flag.XBZRLE, [1])],
        [("b", Flag.COMPRESS_PAGE, [0])],
    ]
    assert records.block == "b"


@pytest.mark.parametrize("capacity", [5000, 1 << 20])
def test_a_flush_is_told_in_its_place(capacity):
    told = []
    records = RecordReader(SIZES, flush=lambda: told.append("flush"))
    data = FLUSH_RECORD + zero(0, "a") + FLUSH_RECORD + whole(1) + FLUSH_RECORD + FLUSH_RECORD + EOS_RECORD
    reader = reader_of(data + b"\x7e", capacity)
    for _, run in records.body(reader, 2):
        told.append(run.flag.name)
    assert told == ["flush", "ZERO", "flush", "PAGE", "flush", "flush"]
    assert reader.offset == len(data)


def test_a_flush_where_nobody_hears_it_or_with_anything_in_it():
    with pytest.raises(StreamError, match="MULTIFD_FLUSH record came"):
        body(RecordReader(SIZES), reader_of(FLUSH_RECORD + EOS_RECORD))
    for word in (PAGE | Flag.MULTIFD_FLUSH, Flag.MULTIFD_FLUSH | Flag.CONTINUE):
        with pytest.raises(StreamError):
            body(RecordReader(SIZES, flush=lambda: None), reader_of(int(word).to_bytes(8, "big") + EOS_RECORD))


@pytest.mark.parametrize("first", [zero(0), whole(0), change(0), squeezed(0)])
def test_a_first_record_without_a_name_is_refused(first):
    for records in (RecordReader(SIZES), RecordReader()):
        with pytest.raises(StreamError, match="continues a block, but none was named yet"):
            body(records, reader_of(first + EOS_RECORD))


@pytest.mark.parametrize("make", [zero, whole, change, squeezed])
def test_a_block_that_is_not_there(make):
    records = RecordReader(SIZES)
    reader = reader_of(zero(0, "a") + make(0, "c") + EOS_RECORD)
    with pytest.raises(StreamError, match="names RAM block 'c', which is not there") as caught:
        body(records, reader)
    assert caught.value.place.block is None, "it is not in the block that came before"
    with pytest.raises(StreamError, match="none was named yet"):
        body(records, reader_of(zero(0) + EOS_RECORD))


@pytest.mark.parametrize("make", [zero, whole, change, squeezed])
@pytest.mark.parametrize("page", [2, 3, 2**20, 2**52 - 1])
def test_pages_outside_of_their_block(make, page):
    for data in (make(page, "b"), make(1, "b") + make(0) + make(page)):
        with pytest.raises(StreamError, match=rf"{page * PAGE:#x} is outside of block 'b' of 0x2000") as caught:
            body(RecordReader(SIZES), reader_of(data + EOS_RECORD))
        assert caught.value.place.block == "b"


def test_without_sizes_any_block_and_page_will_do():
    reader = reader_of(zero(2**52 - 1, "never heard of") + change(7) + EOS_RECORD)
    assert body(RecordReader(), reader) == [
        ("never heard of", Flag.ZERO, [2**52 - 1]),
        ("never heard of", Flag.XBZRLE, [7]),
    ]


@pytest.mark.parametrize("make", [zero, whole, change, squeezed])
def test_the_limit_of_records_is_each_bodys(make):
    just = make(0, "a") + make(1) * 4 + EOS_RECORD
    records, reader = RecordReader(SIZES), reader_of(just + just)
    for _ in range(2):
        assert sum(len(indices) for _, _, indices in body(records, reader, limit=5)) == 5
    with pytest.raises(StreamError, match="more page records than the 4 that may come"):
        body(RecordReader(SIZES), reader_of(just), limit=4)
    with pytest.raises(StreamError, match="more page records than the 0 that may come"):
        body(RecordReader(SIZES), reader_of(just), limit=0)


def test_a_body_that_is_empty():
    reader = reader_of(EOS_RECORD)
    assert body(RecordReader(SIZES), reader, limit=0) == []
    assert reader.offset == 8


def test_what_read_run_refuses_has_its_block():
    with pytest.raises(StreamError, match="mean nothing") as caught:
        body(RecordReader(SIZES), reader_of(zero(0, "a") + (0x21).to_bytes(8, "big")))
    assert caught.value.place.block == "a"


@given(st.integers(0, 60))
def test_cut_anywhere_it_asks_for_more(cut):
    data = zero(0, "a") + change(1) + squeezed(2) + zero(1, "b") + EOS_RECORD
    cut = min(cut, len(data) - 1)
    with pytest.raises(ChannelLost) as caught:
        body(RecordReader(SIZES), reader_of(data[:cut]))
    assert caught.value.place.offset == cut


def test_a_run_is_consumed_when_the_next_is_asked_for():
    """So its arrays, which are views of the reader's buffer, hold as long as it is worked on."""
    first, second = change(0, "a"), squeezed(1)
    reader = reader_of(first + second + EOS_RECORD)
    offsets = [reader.offset for _ in RecordReader(SIZES).body(reader, 5)]
    assert offsets == [0, len(first)]
    assert reader.offset == len(first + second) + 8
