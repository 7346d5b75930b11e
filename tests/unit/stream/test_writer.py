"""The writing end: what is gathered, what goes straight through, errors that stay."""

import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import ChannelLost, Place
from whimbrel.stream import Writer
from whimbrel.stream.writer import GATHER


def test_small_pieces_are_gathered_until_the_flush(scripted):
    channel = scripted()
    writer = Writer(channel)
    for number in range(100):
        writer.write(bytes([number]) * 10)
    assert channel.sent == []
    assert writer.offset == 1000
    writer.flush()
    assert channel.sent == [b"".join(bytes([number]) * 10 for number in range(100))]
    writer.flush()
    assert len(channel.sent) == 1


def test_no_more_than_a_gathering_waits(scripted):
    channel = scripted()
    writer = Writer(channel)
    writer.write(b"a" * GATHER)
    assert channel.sent == []
    writer.write(b"b")
    assert [len(piece) for piece in channel.sent] == [GATHER]
    writer.write(b"c" * (GATHER - 1))
    writer.write(b"d")
    assert [len(piece) for piece in channel.sent] == [GATHER, GATHER]
    writer.flush()
    assert b"".join(channel.sent) == b"a" * GATHER + b"b" + b"c" * (GATHER - 1) + b"d"


def test_large_pieces_are_not_copied_and_keep_their_place(scripted):
    channel = scripted()
    writer = Writer(channel)
    large = np.arange(GATHER + 1, dtype=np.uint8)
    pages = np.arange(20 * 4104, dtype=np.uint16).reshape(20, -1)
    writer.write(b"before")
    writer.write(large)
    writer.write(b"between")
    writer.write(pages[:11])
    writer.write(memoryview(large)[1:])  # one byte less: this one is gathered
    writer.flush()
    assert [len(piece) for piece in channel.sent] == [6, GATHER + 1, 7, 11 * 4104 * 2, GATHER]
    assert channel.addresses[1] == large.ctypes.data
    assert channel.addresses[3] == pages.ctypes.data
    assert channel.addresses[4] != large.ctypes.data + 1
    assert (
        b"".join(channel.sent) == b"before" + large.tobytes() + b"between" + pages[:11].tobytes() + large[1:].tobytes()
    )
    assert writer.offset == sum(map(len, channel.sent))


def test_what_was_written_may_be_overwritten(scripted):
    channel = scripted()
    writer = Writer(channel)
    piece = bytearray(b"piece")
    writer.write(piece)
    piece[:] = b"other"
    writer.flush()
    assert channel.sent == [b"piece"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytearray(),
        memoryview(b""),
        np.empty(0, np.uint8),
        np.empty((0, 4096), np.uint8),
        np.empty((3, 0), np.uint32),
        array.array("d"),
    ],
)
def test_nothing_is_fine_in_any_shape(scripted, data):
    channel = scripted()
    writer = Writer(channel)
    writer.write(data)
    writer.flush()
    assert (channel.sent, writer.offset) == ([], 0)


@pytest.mark.parametrize(
    "data",
    [
        b"\1\2\3\4",
        bytearray(b"\1\2\3\4"),
        memoryview(b"\0\1\2\3\4")[1:],
        np.array([[1, 2], [3, 4]], np.uint8),
        np.array([0x04030201], "<u4"),
        array.array("B", [1, 2, 3, 4]),
    ],
)
def test_any_kind_of_buffer(scripted, data):
    channel = scripted()
    writer = Writer(channel)
    writer.write(data)
    writer.flush()
    assert (channel.sent, writer.offset) == ([b"\1\2\3\4"], 4)


def test_a_buffer_with_gaps_is_our_mistake(scripted):
    writer = Writer(scripted())
    with pytest.raises(TypeError, match="contiguous"):
        writer.write(np.zeros((4, 4), np.uint8)[:, :2])
    assert writer.offset == 0


@given(st.lists(st.integers(0, 200) | st.integers(GATHER - 2, GATHER + 2) | st.just("flush"), max_size=30))
def test_order_and_offset_hold_for_any_sizes(scripted, sizes):
    channel = scripted()
    writer = Writer(channel)
    written = b""
    for number, size in enumerate(sizes):
        if size == "flush":
            writer.flush()
            assert b"".join(channel.sent) == written
            continue
        writer.write(bytes([number % 251]) * size)
        written += bytes([number % 251]) * size
        assert writer.offset == len(written)
        assert len(written) - sum(map(len, channel.sent)) <= GATHER
    writer.flush()
    assert b"".join(channel.sent) == written


def test_an_error_stays_and_says_where(scripted):
    channel = scripted()
    channel.breaks_after = 100
    writer = Writer(channel)
    writer.write(b"a" * 100)
    writer.flush()
    writer.write(b"b" * 10)
    with pytest.raises(ChannelLost, match="went dead") as first:
        writer.flush()
    assert first.value is channel.failure
    assert first.value.place == Place(offset=100, peer="script:1"), "from there on nothing is certain"
    channel.breaks_after = None
    for again in (
        writer.flush,
        lambda: writer.write(b"c"),
        lambda: writer.write(b""),
        lambda: writer.write(b"d" * 99999),
    ):
        with pytest.raises(ChannelLost) as later:
            again()
        assert later.value is first.value
    assert channel.sent == [b"a" * 100]
    assert writer.offset == 110


def test_an_error_in_a_large_piece_says_where_it_begins(scripted):
    channel = scripted()
    channel.breaks_after = 50
    writer = Writer(channel)
    writer.write(b"a" * 50)
    with pytest.raises(ChannelLost) as caught:
        writer.write(b"b" * (GATHER + 1))
    assert caught.value.place.offset == 50
    assert channel.sent == [b"a" * 50]


def by_address(*arrays):
    return np.array([(array.ctypes.data, array.nbytes) for array in arrays], np.uint64).reshape(-1, 2)


def test_memory_by_address_keeps_its_place_between_the_rest(gathering):
    channel = gathering()
    writer = Writer(channel)
    assert writer.gathers
    one, other = np.arange(200, dtype=np.uint8), np.arange(1000, dtype=np.uint32)
    writer.write(b"before")
    writer.write_gathered(by_address(one, other, one[3:7]))
    assert writer.offset == 6 + 200 + 4000 + 4
    writer.write(b"behind")
    writer.flush()
    assert channel.sent == [b"before", one.tobytes() + other.tobytes() + b"\3\4\5\6", b"behind"]
    assert writer.offset == sum(map(len, channel.sent))


def test_a_channel_without_the_ability_does_not_gather(scripted):
    writer = Writer(scripted())
    assert not writer.gathers
    with pytest.raises(AssertionError):
        writer.write_gathered(by_address(np.zeros(1, np.uint8)))


def test_errors_of_memory_by_address_stay_and_say_where(gathering):
    channel = gathering()
    channel.breaks_after = 10
    writer = Writer(channel)
    memory = np.zeros(100, np.uint8)
    writer.write(b"a" * 10)
    with pytest.raises(ChannelLost) as first:
        writer.write_gathered(by_address(memory))
    assert first.value.place == Place(offset=10, peer="script:1")
    channel.breaks_after = None
    for again in (lambda: writer.write_gathered(by_address(memory)), writer.flush, lambda: writer.write(b"x")):
        with pytest.raises(ChannelLost) as later:
            again()
        assert later.value is first.value
    assert (channel.sent, writer.offset) == ([b"a" * 10], 10)
