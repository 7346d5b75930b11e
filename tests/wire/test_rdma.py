"""What two ends of rdma: say to one another: golden bytes, round trips, and whatever a peer may send instead."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import IncompatibleError, StreamError
from whimbrel.wire import rdma
from whimbrel.wire.rdma import CHUNK, ControlType, Layout, parse_message, parse_private_data

MOST = 2**32 - 1
RECORDS = {
    ControlType.RAM_BLOCKS_RESULT: rdma.BLOCK,
    ControlType.COMPRESS: rdma.COMPRESSED,
    ControlType.REGISTER_REQUEST: rdma.REGISTERED,
    ControlType.REGISTER_RESULT: rdma.RESULT,
    ControlType.UNREGISTER_REQUEST: rdma.REGISTERED,
}
EMPTY = [
    ControlType.ERROR,
    ControlType.READY,
    ControlType.RAM_BLOCKS_REQUEST,
    ControlType.REGISTER_FINISHED,
    ControlType.UNREGISTER_FINISHED,
]


def head(kind, length=0, repeat=1, padding=0):
    return struct.pack(">IIII", length, kind, repeat, padding)


def refused(words, data):
    with pytest.raises(StreamError, match=words):
        parse_message(memoryview(data))


def records(kind, *rows):
    return np.array(list(rows), RECORDS[kind])


# ------------------------------------------------------------------------------------------------------ the connection


def test_private_data():
    assert rdma.private_data(pin_all=True) == bytes.fromhex("00000001 00000001")
    assert rdma.private_data(pin_all=False) == bytes.fromhex("00000001 00000000")


@pytest.mark.parametrize(("flags", "pin_all"), [(0, False), (1, True), (2, False), (3, True), (MOST, True)])
@pytest.mark.parametrize("behind", [b"", bytes(48), b"\xff"])
def test_flags_of_others_mean_nothing_and_padding_is_passed_over(flags, pin_all, behind):
    assert parse_private_data(struct.pack(">II", 1, flags) + behind) is pin_all


@pytest.mark.parametrize("length", range(8))
def test_private_data_that_is_cut(length):
    with pytest.raises(StreamError, match=f"is {length} bytes long, expected 8"):
        parse_private_data(rdma.private_data(pin_all=True)[:length])


@pytest.mark.parametrize("version", [0, 2, MOST])
def test_another_version(version):
    with pytest.raises(IncompatibleError, match=f"speaks version {version} of the RDMA protocol, expected 1"):
        parse_private_data(struct.pack(">II", version, 0))


def test_work_ids():
    work = rdma.work_id(1, 0x1234, 0x3_1234_5678)
    assert work == 1 | 0x1234 << 16 | 0x3_1234_5678 << 30
    assert (rdma.work_kind(work), rdma.work_place(work)) == (1, (0x1234, 0x3_1234_5678))
    assert rdma.work_kind(rdma.work_id(4002)) == 4002


@given(st.integers(0, 0xFFFF), st.integers(0, rdma.BLOCKS_MAX - 1), st.integers(0, 2**34 - 1))
def test_work_ids_round_trip(kind, block, chunk):
    work = rdma.work_id(kind, block, chunk)
    assert work < 1 << 64
    assert (rdma.work_kind(work), rdma.work_place(work)) == (kind, (block, chunk))


# ---------------------------------------------------------------------------------------------------- golden messages


def test_messages_without_data():
    assert rdma.message(ControlType.READY) == bytes.fromhex("00000000 00000002 00000001 00000000")
    assert rdma.message(ControlType.RAM_BLOCKS_REQUEST) == bytes.fromhex("00000000 00000004 00000001 00000000")


def test_the_blocks():
    layout = Layout([0x2000, 0x1000])
    data = rdma.message(ControlType.RAM_BLOCKS_RESULT, layout.told([0x7F00_0000_0000, 0x5000], [7, 9]))
    assert data == bytes.fromhex(
        "00000040 00000005 00000001 00000000"
        "00007f0000000000 0000000000000000 0000000000002000 00000007 00000000"
        "0000000000005000 0000000000002000 0000000000001000 00000009 00000000"
    )
    assert layout.told([1, 2])["rkey"].tolist() == [0, 0]


def test_records():
    data = rdma.message(ControlType.REGISTER_REQUEST, records(ControlType.REGISTER_REQUEST, (0x10_0000, 2, 0, 1)))
    assert data == bytes.fromhex(
        "00000018 00000007 00000001 00000000 0000000000100000 00000002 00000000 0000000000000001"
    )
    data = rdma.message(ControlType.REGISTER_RESULT, records(ControlType.REGISTER_RESULT, (5, 0, 0x5000), (6, 0, 1)))
    assert data == bytes.fromhex(
        "00000020 00000008 00000002 00000000 00000005 00000000 0000000000005000 00000006 00000000 0000000000000001"
    )
    data = rdma.message(ControlType.COMPRESS, records(ControlType.COMPRESS, (0, 1, 0x3000, 0x1000)))
    assert data == bytes.fromhex(
        "00000018 00000006 00000001 00000000 00000000 00000001 0000000000003000 0000000000001000"
    )
    data = rdma.message(ControlType.UNREGISTER_REQUEST, records(ControlType.UNREGISTER_REQUEST, (3, 1, 0, 0)))
    assert data == bytes.fromhex(
        "00000018 0000000a 00000001 00000000 0000000000000003 00000001 00000000 0000000000000000"
    )


# ------------------------------------------------------------------------------------------------------- round trips


@given(st.sampled_from(list(RECORDS)), st.integers(1, 40), st.binary(min_size=32 * 40, max_size=32 * 40))
def test_records_round_trip(kind, count, noise):
    rows = np.frombuffer(noise, RECORDS[kind], count)
    came = parse_message(memoryview(rdma.message(kind, rows)))
    assert (came.kind, came.repeat) == (kind, 1 if kind is ControlType.RAM_BLOCKS_RESULT else count)
    assert came.records().tolist() == rows.tolist()


@given(st.binary(min_size=1, max_size=100), st.integers(0, MOST), st.integers(0, MOST))
def test_the_stream_round_trips_whatever_a_qemu_left_in_the_header(data, repeat, padding):
    came = parse_message(memoryview(head(ControlType.QEMU_FILE, len(data), repeat, padding) + data))
    assert (came.kind, bytes(came.data)) == (ControlType.QEMU_FILE, data)


@pytest.mark.parametrize("kind", EMPTY)
def test_messages_without_data_round_trip(kind):
    came = parse_message(memoryview(rdma.message(kind)))
    assert (came.kind, came.repeat, len(came.data)) == (kind, 1, 0)


def examples():
    yield from (rdma.message(kind) for kind in EMPTY)
    yield from (rdma.message(kind, np.zeros(2, dtype)) for kind, dtype in RECORDS.items())
    yield head(ControlType.QEMU_FILE, 5) + b"bytes"


@pytest.mark.parametrize("data", list(examples()), ids=lambda data: ControlType(data[7]).name)
def test_a_message_is_its_bytes_no_more_and_no_less(data):
    """One SEND is one message: cut anywhere, or with something behind it, it is none."""
    assert parse_message(memoryview(data)).kind == data[7]
    for end in range(len(data)):
        refused("bytes", data[:end])
    for behind in (b"\0", bytes(16), data):
        refused("whose header says", data + behind)


# ------------------------------------------------------------------------------------------------------------ hostile


@pytest.mark.parametrize("number", [12, 255, MOST])
def test_unknown_messages(number):
    refused(f"unknown control message {number}", head(number))


def test_none_is_no_message():
    refused("NONE", head(ControlType.NONE))


@pytest.mark.parametrize("length", [1, MOST])
def test_a_length_that_is_not_there(length):
    refused("whose header says", head(ControlType.READY, length))


@pytest.mark.parametrize("kind", EMPTY)
def test_data_where_there_is_none(kind):
    refused("8 bytes of data, expected none", head(kind, 8) + bytes(8))


@pytest.mark.parametrize(
    "kind", [kind for kind in ControlType if kind not in (ControlType.NONE, ControlType.QEMU_FILE)]
)
@pytest.mark.parametrize("repeat", [rdma.REPEAT_MAX + 1, MOST])
def test_more_records_than_there_may_be(kind, repeat):
    size = RECORDS[kind].itemsize if kind in RECORDS else 0
    refused(f"holds {repeat} records, at most 4096 may be", head(kind, size, repeat) + bytes(size))


def test_as_many_records_as_there_may_be():
    rows = np.zeros(rdma.REPEAT_MAX, rdma.REGISTERED)
    assert len(parse_message(memoryview(rdma.message(ControlType.REGISTER_REQUEST, rows))).records()) == 4096
    assert rdma.HEADER_SIZE + rows.nbytes <= rdma.MESSAGE_MAX


@pytest.mark.parametrize("kind", [kind for kind in RECORDS if kind is not ControlType.RAM_BLOCKS_RESULT])
@pytest.mark.parametrize(("count", "repeat"), [(0, 0), (1, 0), (0, 1), (1, 2), (2, 1)])
def test_repeat_times_record_is_the_length(kind, count, repeat):
    size = RECORDS[kind].itemsize * count
    refused("expected .* bytes for each", head(kind, size, repeat) + bytes(size))


@pytest.mark.parametrize("size", [0, 31, 33, 63])
def test_blocks_that_are_not_whole(size):
    refused("expected 32 for each block", head(ControlType.RAM_BLOCKS_RESULT, size) + bytes(size))


@pytest.mark.parametrize("size", [0, rdma.STREAM_MAX + 1])
def test_bytes_of_the_stream_that_are_none_or_too_many(size):
    refused("as QEMU_FILE, expected 1 to 32768", head(ControlType.QEMU_FILE, size) + bytes(size))
    parse_message(memoryview(head(ControlType.QEMU_FILE, rdma.STREAM_MAX) + bytes(rdma.STREAM_MAX)))


@given(st.binary(max_size=80))
def test_any_bytes_are_a_message_or_refused(data):
    try:
        came = parse_message(memoryview(data))
    except StreamError:
        return
    assert len(data) == 16 + len(came.data)


# ------------------------------------------------------------------------------------------------------------- places

SIZES = [3 * CHUNK + 0x1000, 0x2000, CHUNK]
SECOND = SIZES[0]  # where the second block begins in the destination's RAM


@pytest.fixture
def layout():
    return Layout(SIZES)


def place(where):
    return (where.block, where.start, where.length)


def test_what_is_registered_is_whole_chunks(layout):
    rows = records(
        ControlType.REGISTER_REQUEST,
        (0, 0, 0, 0),
        (CHUNK + 5, 0, 0, 1),
        (3 * CHUNK, 0, 0, 0),
        (SECOND + 0x1000, 1, 0, 0),
    )
    assert [place(where) for where in layout.registered(rows)] == [
        (0, 0, CHUNK),
        (0, CHUNK, 2 * CHUNK),
        (0, 3 * CHUNK, 0x1000),
        (1, 0, 0x2000),
    ]


@pytest.mark.parametrize("block", [3, MOST])
def test_a_block_that_is_not_there(layout, block):
    words = f"RAM block {block}, there are 3"
    for kind, call in (
        (ControlType.REGISTER_REQUEST, layout.registered),
        (ControlType.UNREGISTER_REQUEST, layout.unregistered),
    ):
        with pytest.raises(StreamError, match=words):
            call(records(kind, (0, block, 0, 0)))
    with pytest.raises(StreamError, match=words):
        layout.compressed(records(ControlType.COMPRESS, (0, block, 0, 1)))


@pytest.mark.parametrize("where", [0, SECOND - 1, SECOND + 0x2000, 2**64 - 1])
def test_an_address_outside_of_its_block(layout, where):
    with pytest.raises(StreamError, match="RAM block 1, which has 0x2000"):
        layout.registered(records(ControlType.REGISTER_REQUEST, (where, 1, 0, 0)))


@pytest.mark.parametrize(("where", "more"), [(0, 4), (3 * CHUNK, 1), (0, MOST), (0, 2**64 - 1)])
def test_chunks_past_the_end_of_a_block(layout, where, more):
    with pytest.raises(StreamError, match=f"and {more} more, it has 4"):
        layout.registered(records(ControlType.REGISTER_REQUEST, (where, 0, 0, more)))


@pytest.mark.parametrize(("chunk", "more"), [(4, 0), (3, 1), (2**64 - 1, 0), (0, 2**64 - 1)])
def test_chunks_that_were_never_there_are_not_unregistered(layout, chunk, more):
    with pytest.raises(StreamError, match="it has 4"):
        layout.unregistered(records(ControlType.UNREGISTER_REQUEST, (chunk, 0, 0, more)))
    assert place(layout.unregistered(records(ControlType.UNREGISTER_REQUEST, (3, 0, 0, 0)))[0]) == (
        0,
        3 * CHUNK,
        0x1000,
    )


def test_what_is_compressed(layout):
    rows = records(ControlType.COMPRESS, (0, 1, SECOND, 0x2000), (7, 0, SECOND - 1, 1))
    assert [(place(where), value) for where, value in layout.compressed(rows)] == [
        ((1, 0, 0x2000), 0),
        ((0, SECOND - 1, 1), 7),
    ]


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (SECOND - 1, 1),
        (SECOND, 0),
        (SECOND, 0x2001),
        (SECOND + 1, 0x2000),
        (SECOND + 0x2000, 1),
        (SECOND + 0x1FFF, 2**64 - 1),
        (2**64 - 1, 1),
    ],
)
def test_a_range_to_compress_outside_of_its_block(layout, offset, length):
    with pytest.raises(StreamError, match="COMPRESS is about"):
        layout.compressed(records(ControlType.COMPRESS, (0, 1, offset, length)))


@pytest.mark.parametrize("value", [256, MOST])
def test_a_fill_that_is_no_byte(layout, value):
    with pytest.raises(StreamError, match="expected the value of a byte"):
        layout.compressed(records(ControlType.COMPRESS, (value, 1, SECOND, 1)))


def test_blocks_must_agree(layout):
    told = Layout(SIZES).told([1, 2, 3])
    layout.check_told(told)
    with pytest.raises(IncompatibleError, match="tells of 2 RAM blocks, expected 3"):
        layout.check_told(told[:2])
    told["length"][1] += 0x1000
    with pytest.raises(IncompatibleError, match="RAM block 1 is 12288 bytes long at the destination, expected 8192"):
        layout.check_told(told)


def test_more_blocks_than_an_id_has_room_for():
    Layout([4096] * rdma.BLOCKS_MAX)
    with pytest.raises(StreamError, match="there may be 16384"):
        Layout([4096] * (rdma.BLOCKS_MAX + 1))
