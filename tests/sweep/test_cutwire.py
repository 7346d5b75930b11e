"""The links themselves: exactly so many bytes, and then what was said, in a process and between two."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import pytest

from whimbrel.abc import Patience
from whimbrel.errors import ChannelLost, ConfigError, ConnectError
from whimbrel.testing.cutwire import ACTIONS, Action, Cut, CutNetwork, CutProxy, Way

from .virtual_time import VirtualTime

SENT = bytes(range(100))


def joined(network):
    """Both ends of a connection."""
    listener = network.listen("nest")
    accepted = []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept(Patience(60.0))))
    thread.start()
    near = network.connect("nest", Patience(60.0))
    thread.join()
    listener.close()
    return near, accepted[0]


def take(channel, count):
    """Up to `count` bytes, and how many pieces they came in."""
    data, pieces = b"", 0
    while len(data) < count:
        buffer = bytearray(count - len(data))
        got = channel.recv_into(buffer)
        if not got:
            break
        data, pieces = data + buffer[:got], pieces + 1
    return data, pieces


@pytest.mark.parametrize("at", [0, 1, 40, 99, 100])
@pytest.mark.parametrize("action", ACTIONS)
def test_exactly_so_many_bytes_are_passed_on_inside_of_a_process(at, action):
    network = CutNetwork()
    network.lay(Cut(Way.FORTH, at, action))
    near, far = joined(network)
    try:
        near.send(SENT)
    except ChannelLost:
        assert action in (Action.RESET, Action.CLOSE)
    assert network.was_cut.is_set()
    assert network.passed(Way.FORTH) == (SENT if action is Action.DRIBBLE else SENT[:at])
    data, pieces = take(far, 100 if action is Action.DRIBBLE else at)
    assert data == (SENT if action is Action.DRIBBLE else SENT[:at])
    match action:
        case Action.RESET:
            with pytest.raises(ChannelLost):
                take(far, 1)
        case Action.CLOSE:
            assert take(far, 1) == (b"", 0)
            assert take(near, 1) == (b"", 0)
        case Action.HALF:
            assert take(far, 1) == (b"", 0)
            far.send(b"back")
            assert take(near, 4)[0] == b"back"
        case Action.DRIBBLE:
            assert pieces == 100
        case Action.HOLE | Action.DETOUR:
            far.send(b"lost")
            assert network.passed(Way.BACK) == b""
            far.close()
            near.send(b"nobody tells it")
    near.close()
    far.close()


def test_behind_a_hole_there_is_no_new_connection_and_round_a_detour_there_is():
    with VirtualTime() as clock:
        network = CutNetwork()
        network.lay(Cut(Way.FORTH, 1, Action.DETOUR))
        near, far = joined(network)
        near.send(SENT)
        new, there = joined(network)
        new.send(SENT)
        assert take(there, 100)[0] == SENT
        network.lay(Cut(Way.FORTH, 1, Action.HOLE))
        near, far = joined(network)
        near.send(SENT)
        jumps = clock.jumps
        with pytest.raises(ConnectError):
            network.connect("nest", Patience(3600.0))
        assert clock.jumps == jumps + 1
        for each in (near, far, new, there):
            each.close()


def through(proxy_cut, *, mark=b""):
    """What comes out of a real proxy: bytes, and how they end."""
    data, end = b"", "open"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        with CutProxy(f"tcp:{host}:{port}", [proxy_cut]) as proxy:
            _, _, there = proxy.uri.partition(":")
            name, _, number = there.rpartition(":")
            with socket.create_connection((name, int(number)), 60) as near:
                far, _ = listener.accept()
                with far:
                    far.settimeout(60)
                    with suppress(ConnectionResetError):  # cut at byte 0 it may be gone before a byte is sent
                        near.sendall(SENT)
                    proxy.wait_cut()
                    wanted = len(proxy.passed(Way.FORTH)) + (proxy_cut.action in (Action.CLOSE, Action.HALF))
                    try:
                        while len(data) < wanted:
                            got = far.recv(100)
                            if not got:
                                end = "end"
                                break
                            data += got
                        if proxy_cut.action is Action.RESET:
                            end = "reset" if far.recv(1) else "end"
                    except ConnectionResetError:
                        end = "reset"
    return data, end


@pytest.mark.parametrize("at", [0, 1, 40, 100])
def test_a_real_proxy_passes_on_exactly_so_many_bytes(at):
    assert through(Cut(Way.FORTH, at, Action.CLOSE)) == (SENT[:at], "end")
    assert through(Cut(Way.FORTH, at, Action.HALF)) == (SENT[:at], "end")
    assert through(Cut(Way.FORTH, at, Action.HOLE)) == (SENT[:at], "open")
    data, end = through(Cut(Way.FORTH, at, Action.RESET))
    assert end == "reset"
    assert SENT[:at].startswith(data)  # a reset may overtake what was passed on


def test_a_real_proxy_counts_from_a_mark():
    assert through(Cut(Way.FORTH, 5, Action.CLOSE, mark=SENT[30:40])) == (SENT[:35], "end")
    assert through(Cut(Way.FORTH, 50, Action.CLOSE, mark=SENT[30:40])) == (SENT[:80], "end")


def test_two_cuts_of_one_connection_and_addresses_that_cannot_be_are_refused():
    with pytest.raises(ConfigError):
        CutNetwork().lay(Cut(Way.FORTH, 1, Action.HOLE), Cut(Way.BACK, 1, Action.HOLE))
    with pytest.raises(ConfigError):
        CutNetwork().lay(Cut(Way.FORTH, 1, Action.HOLE, mark=b"x"))
    for uri in ("tcp:4444", "fd:3", "unix:"):
        with pytest.raises(ConfigError):
            CutProxy(uri)
