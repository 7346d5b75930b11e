"""The reading end: any sizes of what comes and of what is asked for, offsets, early ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.abc import Peek
from whimbrel.errors import ChannelLost, ConfigError, Place, StreamError
from whimbrel.stream import Reader
from whimbrel.stream.reader import CAPACITY, LITTLE

DATA = bytes((7 * i + i // 256) % 256 for i in range(1 << 14))
SIZES = st.lists(st.integers(1, 3) | st.integers(1, 400), min_size=1, max_size=8)


def take(*requests):
    """A parser that makes `requests` and returns what it was given."""
    given = []
    for request in requests:
        given.append(bytes((yield request)))
    return given


def test_requests_are_answered_in_order(scripted):
    reader = Reader(scripted(b"abcdefgh"))
    assert reader.offset == 0
    assert reader.parse(take(2, Peek(3), 1, Peek(1), 4)) == [b"ab", b"cde", b"c", b"d", b"defg"]
    assert reader.offset == 7
    assert reader.parse(take(0, 1)) == [b"", b"h"]
    assert reader.offset == 8


def test_a_parser_that_asks_for_nothing_reads_nothing(scripted):
    channel = scripted(b"abc")
    assert Reader(channel).parse(take()) == []
    assert channel.received == 0


operations = st.one_of(
    st.tuples(st.just("take"), st.lists(st.integers(0, 150), max_size=4)),
    st.tuples(st.just("peek"), st.integers(1, 64)),
    st.tuples(st.just("window"), st.integers(0, 64), st.floats(0, 1)),
    st.tuples(st.just("into"), st.integers(0, 200)),
)


@given(st.lists(operations, max_size=60), SIZES, st.sampled_from((64, 65, 100, 1000)))
@settings(max_examples=300)
def test_any_use_with_any_chunks_reads_the_same(scripted, steps, sizes, capacity):
    channel = scripted(DATA, sizes)
    reader = Reader(channel, capacity=capacity)
    at = 0
    for step in steps:
        match step:
            case "take", requests:
                expected = [DATA[at + sum(requests[:i]) : at + sum(requests[: i + 1])] for i in range(len(requests))]
                assert reader.parse(take(*requests)) == expected
                at += sum(requests)
            case "peek", size:
                assert reader.parse(take(Peek(size), Peek(1))) == [DATA[at : at + size], DATA[at : at + 1]]
            case "window", minimum, share:
                window = reader.window(minimum)
                assert minimum <= len(window) <= capacity
                assert window == DATA[at : at + len(window)]
                assert reader.window(minimum) == window, "a window consumes nothing"
                count = int(share * len(window))
                reader.advance(count)
                at += count
            case "into", size:
                buffer = bytearray(size)
                reader.read_into(buffer)
                assert buffer == DATA[at : at + size]
                at += size
        assert reader.offset == at
    assert channel.largest <= max(capacity, 200)


def test_the_buffer_is_filled_again_without_growing(scripted):
    channel = scripted(DATA, (1000,))
    reader = Reader(channel, capacity=64)
    seen = b""
    while len(seen) < len(DATA):
        window = reader.window(min(33, len(DATA) - len(seen)))
        assert len(window) <= 64
        seen += bytes(window[:33])
        reader.advance(min(33, len(window)))
    assert seen == DATA
    assert channel.largest <= 64


def test_a_window_shows_all_that_is_buffered_and_asks_for_no_more(scripted):
    channel = scripted(DATA, (100,))
    reader = Reader(channel, capacity=1000)
    assert len(reader.window(1)) == 100
    assert len(reader.window(100)) == 100
    assert channel.received == 100
    assert len(reader.window(101)) == 200


def test_what_is_larger_than_the_buffer_gets_one_of_its_own(scripted):
    channel = scripted(DATA, (70, 1))
    reader = Reader(channel, capacity=64)
    reader.parse(take(10))
    assert reader.parse(take(5000, 3, Peek(2), 65)) == [
        DATA[10:5010],
        DATA[5010:5013],
        DATA[5013:5015],
        DATA[5013:5078],
    ]
    assert reader.offset == 5078
    assert bytes(reader.window(64)) == DATA[5078 : 5078 + 64]


def test_a_view_of_a_large_request_stays_when_the_buffer_moves_on(scripted):
    def keeps():
        first = yield 500
        yield 64
        return bytes(first)

    assert Reader(scripted(DATA), capacity=64).parse(keeps()) == DATA[:500]


@pytest.mark.parametrize("sizes", [(1,), (7, 1), (1 << 30,)])
@pytest.mark.parametrize("there", [0, 1, 9, 10, 63, 64])
def test_an_early_end_says_how_many_bytes_are_missing_and_where(scripted, sizes, there):
    reader = Reader(scripted(DATA[: 100 + there], sizes), capacity=64)
    for _ in range(10):
        reader.parse(take(10))
    for ask in (lambda: reader.parse(take(65)), lambda: reader.parse(take(65))):
        with pytest.raises(ChannelLost) as caught:
            ask()
        assert caught.value.place == Place(offset=100 + there, peer="script:1")
        break
    assert f"at least {65 - there} more bytes" in str(caught.value)


def test_behind_what_goes_past_the_buffer_little_is_received_ahead(scripted):
    channel = scripted(DATA, (1 << 30,))
    reader = Reader(channel, capacity=2 * LITTLE)
    size, at = 5 * LITTLE, 0
    for received in (2 * LITTLE, 8 + size + LITTLE, 2 * (8 + size) + LITTLE):
        assert reader.parse(take(8)) == [DATA[at : at + 8]]
        assert channel.received == received, "what was received ahead has to be copied"
        buffer = bytearray(size)
        reader.read_into(buffer)
        at += 8 + size
        assert buffer == DATA[at - size : at]
        assert channel.received == reader.offset == at
    reader.parse(take(1))
    reader.parse(take(LITTLE))
    assert channel.received == at + 1 + 2 * LITTLE, "nothing large has come, and the whole buffer is used again"


def test_an_early_end_of_what_goes_past_the_buffer(scripted):
    reader = Reader(scripted(DATA[:100], (30,)), capacity=64)
    reader.parse(take(10))
    with pytest.raises(ChannelLost, match="at least 110 more bytes") as caught:
        reader.read_into(bytearray(200))
    assert caught.value.place == Place(offset=100, peer="script:1")


@pytest.mark.parametrize("there", [0, 1, 39])
@pytest.mark.parametrize("ask", ["take", "peek", "window"])
def test_an_early_end_inside_of_the_buffer(scripted, ask, there):
    reader = Reader(scripted(DATA[: 30 + there], (3,)), capacity=64)
    reader.parse(take(30))
    with pytest.raises(ChannelLost, match=f"at least {40 - there} more bytes") as caught:
        reader.window(40) if ask == "window" else reader.parse(take(40 if ask == "take" else Peek(40)))
    assert caught.value.place == Place(offset=30 + there, peer="script:1")
    assert reader.offset == 30, "what is missing was not consumed"


def test_a_broken_channel_says_so_itself(scripted):
    channel = scripted(DATA[:10], end="break")
    with pytest.raises(ChannelLost, match="the line went dead") as caught:
        Reader(channel).parse(take(4, 4, 4))
    assert caught.value is channel.failure
    assert caught.value.place.offset == 8


def test_a_refusal_tells_where_the_last_request_began(scripted):
    def refuses():
        yield 3
        yield Peek(8)
        yield 5
        raise StreamError("no")

    reader = Reader(scripted(DATA, (4,)), capacity=8)
    reader.parse(take(100))
    with pytest.raises(StreamError) as caught:
        reader.parse(refuses())
    assert caught.value.place == Place(offset=103)


def test_a_refusal_that_knows_its_place_keeps_it(scripted):
    def refuses():
        yield 3
        try:
            raise KeyError("a cause")
        except KeyError as cause:
            raise StreamError("no", place=Place(offset=7, block="a")) from cause

    with pytest.raises(StreamError) as caught:
        Reader(scripted(DATA)).parse(refuses())
    assert caught.value.place == Place(offset=7, block="a")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [ConfigError("odd"), ZeroDivisionError()])
def test_what_is_no_migration_error_passes_as_it_is(scripted, error):
    def fails():
        yield 1
        raise error

    with pytest.raises(type(error)) as caught:
        Reader(scripted(DATA)).parse(fails())
    assert caught.value is error


def test_misuse_is_told(scripted):
    reader = Reader(scripted(DATA, (100,)), capacity=64)
    for ask in (lambda: reader.window(65), lambda: reader.parse(take(Peek(65)))):
        with pytest.raises(ValueError, match="65 bytes was asked for, and the buffer has 64"):
            ask()
    window = reader.window(1)
    for count in (len(window) + 1, -1):
        with pytest.raises(ValueError, match="cannot be consumed"):
            reader.advance(count)
    reader.advance(len(window))
    assert reader.offset == len(window)


def test_the_usual_buffer_holds_many_pages():
    assert CAPACITY >= 255 * (8 + 4096)
