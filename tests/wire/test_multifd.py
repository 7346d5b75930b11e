"""What goes over lanes: golden bytes, and whatever a peer may send instead."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import StreamError
from whimbrel.wire import multifd
from whimbrel.wire.multifd import HEADER_SIZE, Init, LaneMode, PacketStage, mode_of, parse_init, parse_packet

PAGE = 4096
HEAD = struct.Struct(">IIIIIIQI28x256s")
NONE = np.empty(0, np.intp)


def header(*, magic=0x11223344, version=1, flags=0, allocated=128, pages=0, size=0, number=0, zeros=0, name=b"a",
           offsets=()):  # fmt: skip
    """The header of a packet with anything in it."""
    head = HEAD.pack(magic, version, flags, allocated, pages, size, number, zeros, name)
    return memoryview(head + struct.pack(f">{len(offsets)}Q", *offsets).ljust(1024, b"\xee"))


def refused(words, method=0, **fields):
    with pytest.raises(StreamError, match=words):
        parse_packet(header(**fields), method)


# ------------------------------------------------------------------------------------------------------- the beginning


def test_the_first_bytes_of_a_lane():
    uuid = bytes(range(16))
    data = multifd.encode_init(Init(uuid, 254))
    assert data == bytes.fromhex("11223344 00000001") + uuid + b"\xfe" + bytes(39)
    assert parse_init(memoryview(data)) == Init(uuid, 254)


def test_the_first_bytes_of_a_lane_of_an_attempt():
    """The token stands where a QEMU has zeros, which no QEMU reads."""
    token = multifd.token_of(bytes(range(16)))
    assert token.hex() == "4515223e09f4e1025205f005983f97978123c21dce850facd6e9c7b1d90b59f4"
    data = multifd.encode_init(Init(bytes(16), 3, token))
    assert data == bytes.fromhex("11223344 00000001") + bytes(16) + b"\x03whmb\0\0\0" + token
    assert parse_init(memoryview(data)) == Init(bytes(16), 3, token)


@pytest.mark.parametrize("mark", [b"\0" * 7, b"whmb\0\0\1", b"\xff" * 7])
def test_what_is_behind_another_mark_is_no_token(mark):
    data = bytearray(multifd.encode_init(Init(bytes(16), 3, b"t" * multifd.TOKEN_SIZE)))
    data[25:32] = mark
    assert parse_init(memoryview(data)) == Init(bytes(16), 3)


@pytest.mark.parametrize(("at", "words"), [(0, "begins with 0x10223344"), (7, "has version 0")])
def test_first_bytes_of_something_else(at, words):
    data = bytearray(multifd.encode_init(Init(bytes(16), 0)))
    data[at] ^= 1
    with pytest.raises(StreamError, match=words):
        parse_init(memoryview(data))


@pytest.mark.parametrize(
    ("machine", "mode"),
    [
        ("pc-i440fx-2.3", LaneMode.EACH_SECTION),
        ("pc-i440fx-7.2", LaneMode.EACH_SECTION),
        ("pc-q35-8.0", LaneMode.EACH_SECTION),
        ("s390-ccw-virtio-7.1", LaneMode.EACH_SECTION),
        ("pc-q35-8.1", LaneMode.EACH_ROUND),
        ("virt-8.2", LaneMode.EACH_ROUND),
        ("virt-9.0", LaneMode.ZERO_PAGES_IN_PACKETS),
        ("pc-i440fx-10.0", LaneMode.ZERO_PAGES_IN_PACKETS),
        ("isapc", LaneMode.ZERO_PAGES_IN_PACKETS),
        ("bench", LaneMode.ZERO_PAGES_IN_PACKETS),
        ("pc-7.2-beta", LaneMode.ZERO_PAGES_IN_PACKETS),
        ("virt-9.0\n", LaneMode.ZERO_PAGES_IN_PACKETS),
    ],
)
def test_the_mode_is_in_the_machines_name(machine, mode):
    assert mode_of(machine) is mode


def test_what_a_mode_means():
    assert [(mode.sync_each_body, mode.takes_zeros) for mode in LaneMode] == [
        (True, False),
        (False, False),
        (False, True),
    ]


def test_methods():
    assert [multifd.method_bits(name) for name in ("none", "zlib", "zstd", "lz4")] == [0, 2, 4, 0x3E]


# ------------------------------------------------------------------------------------------------------------ packets


def test_a_packet_with_pages():
    stage = PacketStage()
    stage.pages(7, "pc.ram", 2, 100, np.array([1, 2, 0x30]), np.array([5]))
    data = stage.header.tobytes()
    assert len(data) == HEADER_SIZE == 1344
    assert data[:64] == bytes.fromhex(
        "11223344 00000001 00000002 00000080 00000003 00000064 0000000000000007 00000001"
    ) + bytes(28)
    assert data[64:320] == b"pc.ram".ljust(256, b"\0")
    assert data[320:352] == bytes.fromhex("0000000000001000 0000000000002000 0000000000030000 0000000000005000")
    packet = parse_packet(memoryview(data), 2)
    assert (packet.sync, packet.number, packet.block, packet.method, packet.size) == (False, 7, "pc.ram", 2, 100)
    assert packet.pages.tolist() == [1, 2, 0x30]
    assert packet.zeros.tolist() == [5]


def test_a_sync():
    stage = PacketStage()
    stage.pages(1, "a", 4, 100, np.arange(128), NONE)
    stage.sync(9)
    data = stage.header.tobytes()
    assert data[:64] == bytes.fromhex(
        "11223344 00000001 00000001 00000080 00000000 00000000 0000000000000009 00000000"
    ) + bytes(28)
    packet = parse_packet(memoryview(data), 4)
    assert (packet.sync, packet.number, packet.block, packet.size) == (True, 9, "", 0)


def test_zero_pages_alone_have_no_method_and_no_payload():
    stage = PacketStage()
    stage.pages(1, "a", 4, 0, NONE, np.arange(128))
    packet = parse_packet(stage.header.data, 4)
    assert (packet.method, packet.size, len(packet.pages)) == (0, 0, 0)
    assert packet.zeros.tolist() == list(range(128))
    assert struct.unpack_from(">I", stage.header, 8) == (0,)


@given(
    st.lists(st.integers(0, (1 << 52) - 1), max_size=128),
    st.integers(0, 128),
    st.sampled_from([0, 2, 4, 0x3E]),
    st.integers(0, (1 << 64) - 1),
    st.text("abc./@-0", min_size=1, max_size=255),
)
def test_what_is_written_is_read(numbers, split, method, number, name):
    pages, zeros = np.array(numbers[:split], np.intp), np.array(numbers[split:], np.intp)
    size = len(pages) * PAGE
    stage = PacketStage()
    stage.pages(number, name, method, size, pages, zeros)
    packet = parse_packet(stage.header.data, method)
    assert (packet.number, packet.block, packet.size) == (number, name if numbers else "", size)
    assert (packet.pages.tolist(), packet.zeros.tolist()) == (pages.tolist(), zeros.tolist())


# ----------------------------------------------------------------------------------------------- what QEMU 7.2 does


def test_a_sync_merged_with_pages():
    packet = parse_packet(header(flags=1, pages=1, size=PAGE, offsets=[PAGE]), 0)
    assert packet.sync
    assert packet.pages.tolist() == [1]


@pytest.mark.parametrize("flags", [0, 1])
def test_an_empty_packet_repeats_the_last_size_and_name(flags):
    packet = parse_packet(header(flags=flags, size=524288, name=b"pc.ram", number=3), 2)
    assert (packet.sync, packet.block, packet.size, len(packet.pages)) == (bool(flags), "", 0, 0)


def test_an_empty_packet_may_have_any_name():
    for name in (b"", b"\xff" * 256, b"\n"):
        assert parse_packet(header(name=name), 0).block == ""


# ------------------------------------------------------------------------------------------------------------ hostile


def test_heads_that_may_not_be():
    refused("begins with 0x11223345", magic=0x11223345)
    refused("has version 2", version=2)
    refused("holds device state", flags=0x40)
    refused("flags 0x80, of which 0x80 are unknown", flags=0x80)
    refused("room for 129 pages, at most 128", allocated=129)
    refused("128 pages and 1 zero pages, and room for 128", pages=128, zeros=1, size=128 * PAGE)
    refused("2 pages and 0 zero pages, and room for 1", allocated=1, pages=2)
    refused("4294967295 pages", pages=0xFFFFFFFF, zeros=0xFFFFFFFF)


def test_payloads_that_may_not_be():
    refused("1 bytes follow packet 0, expected 4096: 1 pages", pages=1, size=1)
    refused("8192 bytes follow packet 0, expected 4096", pages=1, size=2 * PAGE)
    refused("1048577 bytes follow packet 0, at most 1048576 may", method=2, flags=2, pages=1, size=(1 << 20) + 1)
    refused("4294967295 bytes follow", pages=1, size=0xFFFFFFFF)
    refused("is zlib, expected none", flags=2, pages=1, size=PAGE)
    refused("is none, expected zstd", method=4, pages=1, size=PAGE)
    refused("is qpl, expected zlib", method=2, flags=8, pages=1, size=PAGE)
    refused(r"is another codec's \(0x3e\), expected zlib", method=2, flags=0x3E, pages=1, size=PAGE)


def test_offsets_that_may_not_be():
    refused("not of a whole page", pages=1, size=PAGE, offsets=[1])
    refused("not of a whole page", pages=1, zeros=1, size=PAGE, offsets=[PAGE, 2 * PAGE - 1])
    packet = parse_packet(header(pages=1, zeros=1, size=PAGE, offsets=[PAGE, (1 << 64) - PAGE]), 0)
    with pytest.raises(StreamError, match=r"a page at 0xfffffffffffff000 is outside of block 'a' of 0x2000 bytes"):
        packet.check_inside(2 * PAGE)
    packet.check_inside((1 << 64) - PAGE + PAGE)
    packet = parse_packet(header(pages=1, size=PAGE, offsets=[2 * PAGE]), 0)
    with pytest.raises(StreamError, match="a page at 0x2000"):
        packet.check_inside(2 * PAGE)
    packet.check_inside(3 * PAGE)


def test_names_that_may_not_be():
    refused("names no RAM block", pages=1, size=PAGE, offsets=[0], name=b"")
    refused("printable ASCII", pages=1, size=PAGE, offsets=[0], name=b"\xff")
    refused("printable ASCII", zeros=1, offsets=[0], name=b"a\nb")


def test_a_name_as_long_as_its_field():
    assert parse_packet(header(pages=1, size=PAGE, offsets=[0], name=b"n" * 256), 0).block == "n" * 256


@given(st.binary(min_size=HEADER_SIZE, max_size=HEADER_SIZE), st.sampled_from([0, 2, 4, 0x3E]), st.booleans())
def test_any_bytes_are_a_packet_or_refused(data, method, begins):
    if begins:
        data = header(pages=data[0] & 3, zeros=data[1] & 3, flags=data[2] & 7)[:24].tobytes() + data[24:]
    try:
        packet = parse_packet(memoryview(data), method)
    except StreamError:
        return
    assert len(packet.pages) + len(packet.zeros) <= 128
    assert packet.size <= multifd.PAYLOAD_MAX
    assert (packet.pages >= 0).all()
    assert (packet.zeros >= 0).all()
