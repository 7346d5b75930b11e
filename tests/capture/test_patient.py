"""`PatientChannel`: waits for a while, gives back, and never has two readers inside of the channel it reads."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.capture.patient import PatientChannel
from whimbrel.errors import ChannelClosed, ChannelLost
from whimbrel.stream import Reader
from whimbrel.testing.memory import ReplayChannel, memory_pair

from .live import LONG, Watched


@pytest.fixture
def ends():
    near, far = memory_pair()
    watched = Watched(far)
    channel = PatientChannel(watched)
    yield near, channel, watched
    channel.close()
    channel.rest()
    assert not watched.crowded


def receive(channel, size):
    data = bytearray(size)
    return bytes(data[: channel.recv_into(data)])


def test_it_is_the_channel(ends):
    near, channel, _ = ends
    assert (channel.duplex, channel.peer) == (True, "memory:pair")
    near.send(b"there")
    assert receive(channel, 10) == b"there"
    channel.send(b"back")
    assert receive(near, 10) == b"back"
    channel.end_writing()
    assert receive(near, 10) == b""


def test_nothing_comes(ends):
    near, channel, _ = ends
    assert not channel.wait(0.0)
    assert not channel.wait(0.02)
    near.send(b"now")
    assert channel.wait(LONG)
    assert channel.wait(0.0), "it is still there"
    assert receive(channel, 2) == b"no"
    assert channel.wait(0.0)
    assert receive(channel, 9) == b"w"
    assert not channel.wait(0.0)


def test_what_was_looked_for_comes_first(ends):
    """The look that was given up brings the first bytes, whoever asks next and however."""
    near, channel, watched = ends
    assert not channel.wait(0.0)
    watched.wait_for(0)
    taken = []
    reader = threading.Thread(target=lambda: taken.append(receive(channel, 3)))
    reader.start()
    near.send(b"first")
    reader.join(LONG)
    near.send(b"second")
    assert taken == [b"fir"]
    assert receive(channel, 99) == b"st"
    assert receive(channel, 99) == b"second"


def test_the_end(ends):
    near, channel, _ = ends
    assert not channel.wait(0.0)
    near.close()
    assert channel.wait(LONG)
    for _ in range(3):
        assert receive(channel, 9) == b""
        assert channel.wait(LONG)


def test_a_break(ends):
    near, channel, _ = ends
    assert not channel.wait(0.0)
    near.reset()
    assert channel.wait(LONG)
    for _ in range(3):
        with pytest.raises(ChannelLost):
            receive(channel, 9)


def test_a_close_ends_the_look(ends):
    _, channel, _ = ends
    assert not channel.wait(0.0)
    channel.close()
    assert channel.wait(LONG)
    with pytest.raises(ChannelClosed):
        receive(channel, 9)
    channel.rest()


def test_a_failure_of_the_channel_is_raised_by_whoever_reads(ends):
    _, channel, watched = ends

    def fail():
        raise ZeroDivisionError("a bug")

    watched.failing = fail
    assert channel.wait(LONG)
    with pytest.raises(ZeroDivisionError):
        receive(channel, 9)


def test_given_back(ends):
    near, channel, _ = ends
    near.send(b"abcdef")
    assert receive(channel, 4) == b"abcd"
    channel.give_back(b"cd")
    assert channel.wait(0.0)
    assert receive(channel, 1) == b"c"
    channel.give_back(b"bc")
    assert receive(channel, 9) == b"bcd"
    assert receive(channel, 9) == b"ef"


@given(st.binary(max_size=300), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=40))
def test_any_giving_back(data, steps):
    """What is given back comes again; in the end everything came, in order, and nothing twice."""
    channel = PatientChannel(ReplayChannel(data))
    got = b""
    for size, back in steps:
        got += receive(channel, size)
        back = min(back, len(got))
        channel.give_back(got[len(got) - back :])
        got = got[: len(got) - back]
    while more := receive(channel, 7):
        got += more
    assert got == data


def test_a_reader_begun_anew():
    """As a walk does it: what one reader has read too far, the next one reads."""
    data = bytes(range(256)) * 40
    channel = PatientChannel(ReplayChannel(data))
    reader = Reader(channel, capacity=1000)
    offset = 0
    for step in (10, 300, 999, 5, 700):
        window = bytes(reader.window(min(step, len(data) - offset)))
        reader.advance(len(window))
        channel.give_back(window[step:])
        offset += step
        reader = Reader(channel, capacity=1000, offset=offset)
        assert reader.offset == offset
        assert bytes(reader.window(20)[:20]) == data[offset : offset + 20]
        channel.give_back(bytes(reader.window(0)))
        reader = Reader(channel, capacity=1000, offset=offset)
