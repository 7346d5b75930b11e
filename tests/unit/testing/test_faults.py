"""Faulty channels do what they are told to, at exactly the byte they are told, and are channels otherwise."""

from __future__ import annotations

import threading

import pytest

from whimbrel.abc import Patience
from whimbrel.errors import ChannelClosed, ChannelLost
from whimbrel.testing.faults import Faults, FaultyChannel, FaultyTransport
from whimbrel.testing.memory import MemoryNetwork, memory_pair
from whimbrel.testing.transports import TransportConformance, receive
from whimbrel_transports.tcp import TcpTransport


def in_crumbs(channel):
    return FaultyChannel(channel, Faults(crumbs=509))


class TestFaultlessOverMemory(TransportConformance):
    def make(self):
        return FaultyTransport(MemoryNetwork(), on_connect=in_crumbs, on_accept=in_crumbs)

    def address(self, tmp_path):
        return "nest"


class TestFaultlessOverTcp(TransportConformance):
    bad_addresses = ("", "host")

    def make(self):
        return FaultyTransport(TcpTransport(), on_connect=in_crumbs, on_accept=in_crumbs)

    def address(self, tmp_path):
        return "127.0.0.1:0"


def cut_pair(**faults):
    near, far = memory_pair()
    return FaultyChannel(near, Faults(**faults)), far


@pytest.mark.parametrize("cut", [0, 1, 5, 10])
def test_a_reset_behind_a_sent_byte(cut):
    near, far = cut_pair(cut_sent=cut)
    far.send(b"back")
    if cut < 10:
        with pytest.raises(ChannelLost, match="cut"):
            near.send(b"0123456789")
    else:
        near.send(b"0123456789")
    assert near.dead.is_set()
    assert near.sent == cut
    assert receive(far, cut) == b"0123456789"[:cut]
    for use in (lambda: far.recv_into(bytearray(1)), lambda: far.send(b"x"), lambda: near.recv_into(bytearray(1))):
        for _ in range(2):
            with pytest.raises(ChannelLost):
                use()


def test_an_orderly_cut_is_an_end_for_readers_and_a_break_for_writers():
    near, far = cut_pair(cut_sent=3, orderly=True)
    with pytest.raises(ChannelLost):
        near.send(b"0123456789")
    assert receive(far, 10) == b"012"
    for end in (near, far):
        assert end.recv_into(bytearray(1)) == 0
        with pytest.raises(ChannelLost):
            end.send(b"x")


@pytest.mark.parametrize("orderly", [True, False])
def test_a_cut_behind_a_received_byte(orderly):
    near, far = cut_pair(cut_received=4, orderly=orderly)
    far.send(b"0123456789")
    assert receive(near, 4) == b"0123"
    assert near.dead.is_set()
    if orderly:
        assert near.recv_into(bytearray(1)) == 0
        assert far.recv_into(bytearray(1)) == 0
    else:
        with pytest.raises(ChannelLost):
            near.recv_into(bytearray(1))
        with pytest.raises(ChannelLost):
            far.recv_into(bytearray(1))
    with pytest.raises(ChannelLost):
        near.send(b"x")
    with pytest.raises(ChannelLost):
        far.send(b"x")


@pytest.mark.parametrize("orderly", [True, False])
def test_a_cut_wakes_who_waits_in_the_other_direction(orderly):
    near, far = cut_pair(cut_sent=1, orderly=orderly)
    outcome = []

    def read():
        try:
            outcome.append(near.recv_into(bytearray(1)))
        except ChannelLost:
            outcome.append("lost")

    thread = threading.Thread(target=read)
    thread.start()
    near.send(b"x")
    thread.join(20)
    assert outcome == [0 if orderly else "lost"]
    assert receive(far, 1) == b"x"


def test_after_our_own_close_it_is_closed_and_not_lost():
    near, _ = cut_pair(cut_sent=0)
    with pytest.raises(ChannelLost):
        near.send(b"x")
    near.close()
    with pytest.raises(ChannelClosed):
        near.send(b"x")
    with pytest.raises(ChannelClosed):
        near.recv_into(bytearray(1))


def test_bits_flip_where_they_are_told_to():
    near, far = cut_pair(flip_sent={2: 0x80, 9: 1}, flip_received={0: 0xFF})
    data = bytearray(10)
    near.send(data)
    assert receive(far, 10) == b"\0\0\x80\0\0\0\0\0\0\x01"
    assert data == bytes(10)
    far.send(bytes(2))
    assert receive(near, 2) == b"\xff\0"


def test_crumbs_arrive_alone():
    near, far = cut_pair(crumbs=1)
    far.send(b"0123")
    buffer = bytearray(8)
    assert [near.recv_into(buffer) for _ in range(4)] == [1, 1, 1, 1]
    near.send(b"0123")
    assert receive(far, 4) == b"0123"


@pytest.mark.parametrize("direction", ["sent", "received"])
@pytest.mark.parametrize("ending", ["release", "close"])
def test_it_stands_still_until_released_or_closed(direction, ending):
    near, far = cut_pair(**{f"stall_{direction}": 3})
    outcome = []

    def work():
        try:
            if direction == "sent":
                near.send(b"0123456789")
                outcome.append(b"sent")
            else:
                outcome.append(receive(near, 6))
        except ChannelClosed:
            outcome.append("closed")

    if direction == "received":
        far.send(b"0123456789")
    thread = threading.Thread(target=work)
    thread.start()
    assert near.stalled.wait(20)
    assert not outcome
    if direction == "sent":
        assert receive(far, 3) == b"012"
    getattr(near, ending)()
    thread.join(20)
    assert outcome == (["closed"] if ending == "close" else [b"sent" if direction == "sent" else b"012345"])


def test_over_a_channel_that_cannot_be_reset_the_cut_is_a_close():
    transport = TcpTransport()
    listener = transport.listen("127.0.0.1:0")
    near = FaultyChannel(transport.connect(listener.uri[4:], Patience(20)), Faults(cut_sent=2))
    far = listener.accept(Patience(20))
    with pytest.raises(ChannelLost, match="cut"):
        near.send(b"0123")
    assert receive(far, 4) == b"01"
    for made in (near, far, listener):
        made.close()
