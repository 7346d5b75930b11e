"""tcp: the conformance suite, and what is TCP's own."""

import errno
import socket
import threading

import numpy as np
import pytest

from whimbrel.abc import Patience
from whimbrel.errors import ChannelClosed, ChannelLost, ConfigError, ConnectError, MigrationCancelled
from whimbrel.plugins import PluginManager
from whimbrel.testing.transports import TransportConformance, receive, send_until_it_fails
from whimbrel_transports import tcp
from whimbrel_transports._sockets import SocketChannel
from whimbrel_transports.tcp import TcpTransport


class TestTcp(TransportConformance):
    bad_addresses = ("", "host", "host:", ":", ":-1", ":65536", "h:0x10", "h:1,ipv4=on", "::1:4444", "[::1]", "[h]:1")

    def make(self):
        return TcpTransport()

    def address(self, tmp_path):
        return "127.0.0.1:0"


class TestTcpOverIPv6(TransportConformance):
    def make(self):
        return TcpTransport()

    def address(self, tmp_path):
        return "[::1]:0"


class TestTcpByName(TransportConformance):
    def make(self):
        return TcpTransport()

    def address(self, tmp_path):
        return "localhost:0"


@pytest.fixture
def accepting():
    """Listens, connects and closes: `accepting(address)` gives both ends and the listener."""
    made = []

    def connect(address, to=None):
        listener = TcpTransport().listen(address)
        made.append(listener)
        near = TcpTransport().connect(to or listener.uri.removeprefix("tcp:"), Patience(10))
        made.append(near)
        far = listener.accept(Patience(10))
        made.append(far)
        return near, far, listener

    yield connect
    for one in made:
        one.close()


def port_of(listener):
    return int(listener.uri.rpartition(":")[2])


@pytest.mark.parametrize("address", ["0", ":0", "127.0.0.1:0"])
def test_without_a_host_it_is_the_loopback_alone(address, accepting):
    near, far, listener = accepting(address)
    assert listener.uri == f"tcp:127.0.0.1:{port_of(listener)}"
    assert near.peer == listener.uri
    assert far.peer.startswith("tcp:127.0.0.1:")
    assert far.peer != near.peer


def test_connecting_without_a_host(accepting):
    listener = TcpTransport().listen(":0")
    try:
        near = TcpTransport().connect(f":{port_of(listener)}", Patience(10))
        near.close()
    finally:
        listener.close()


def test_ipv6_is_in_brackets(accepting):
    near, far, listener = accepting("[::1]:0")
    assert listener.uri == near.peer == f"tcp:[::1]:{port_of(listener)}"
    assert far.peer.startswith("tcp:[::1]:")


def test_every_address_of_a_name_is_tried(accepting, monkeypatch):
    """The name has an address nobody listens on, and then the right one."""
    listener = TcpTransport().listen("127.0.0.1:0")
    port = port_of(listener)
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    try:
        near = TcpTransport().connect(f"two.example:{port}", Patience(10))
        assert near.peer == f"tcp:127.0.0.1:{port}"
        near.close()
    finally:
        listener.close()


def test_refused_in_the_words_of_qemu():
    with pytest.raises(ConnectError) as caught:
        TcpTransport().connect("127.0.0.1:1", Patience(10))
    assert caught.value.message == "Failed to connect to '127.0.0.1:1': Connection refused"
    assert caught.value.__cause__.errno == errno.ECONNREFUSED


def test_a_name_that_nobody_knows(monkeypatch):
    def getaddrinfo(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    message = "address resolution failed for no.example:1: Name or service not known"
    with pytest.raises(ConnectError, match=message):
        TcpTransport().connect("no.example:1", Patience(10))
    with pytest.raises(ConnectError, match=message):
        TcpTransport().listen("no.example:1")


def test_a_name_that_cannot_be():
    with pytest.raises(ConfigError, match="a host that cannot be"):
        TcpTransport().connect(f"{'a' * 64}.example:1", Patience(10))


def test_a_slow_resolver_does_not_hold_up_a_cancel(monkeypatch):
    asked, answer = threading.Event(), threading.Event()

    def getaddrinfo(*_, **__):
        asked.set()
        answer.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    patience = Patience(20)
    threading.Thread(target=lambda: (asked.wait(), patience.cancelled.set())).start()
    with pytest.raises(MigrationCancelled, match="looking up"):
        TcpTransport().connect("slow.example:1", patience)
    answer.set()
    with pytest.raises(ConnectError, match="has no address"):
        TcpTransport().connect("empty.example:1", Patience(20))


@pytest.fixture
def silent():
    """An address whose queue is full, so that a connect to it hangs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(3):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
            waiting.append(one)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        for one in waiting:
            one.close()


def test_a_connect_that_hangs_is_cancelled(silent):
    patience = Patience(20)
    timer = threading.Timer(0.1, patience.cancelled.set)
    timer.start()
    with pytest.raises(MigrationCancelled, match="connecting to"):
        TcpTransport().connect(silent, patience)
    timer.join()


def test_a_connect_that_hangs_runs_out_of_patience(silent):
    with pytest.raises(ConnectError, match="no answer within"):
        TcpTransport().connect(silent, Patience(0.12))


def test_port_0_is_not_to_be_connected_to():
    with pytest.raises(ConfigError, match="port 0 is for listening"):
        TcpTransport().connect("127.0.0.1:0", Patience(10))


def test_a_taken_port_says_so():
    listener = TcpTransport().listen("127.0.0.1:0")
    try:
        address = listener.uri.removeprefix("tcp:")
        with pytest.raises(ConnectError, match=f"Failed to listen on '{address}': Address already in use"):
            TcpTransport().listen(address)
    finally:
        listener.close()


def test_a_connection_to_itself_is_nobody():
    """With nobody listening, TCP may connect a socket to itself."""
    with socket.socket() as narcissus:
        narcissus.bind(("127.0.0.1", 0))
        narcissus.connect(narcissus.getsockname())
        with pytest.raises(ConnectionRefusedError):
            tcp._channel(narcissus, narcissus.getpeername())


def test_small_writes_go_out_at_once_and_dead_peers_are_looked_for(accepting):
    near, far, _ = accepting("127.0.0.1:0")
    for end in (near, far):
        assert end._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert end._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_the_last_words_of_a_peer_that_is_gone_can_be_read(accepting):
    """It refuses what we send and says why before it hangs up: the reason must not be lost with the connection."""
    near, far, _ = accepting("127.0.0.1:0")
    far.send(b"no room")
    far.close()
    with pytest.raises(ChannelLost):
        send_until_it_fails(near)
    assert receive(near, 7) == b"no room"


def test_it_is_an_offer_of_the_plugin_tcp():
    manager = PluginManager()
    spec = manager.transport("tcp")
    assert isinstance(spec.create(), TcpTransport)
    assert spec.duplex


# ------------------------------------------------------------------------------------- receiving into memory by address


def pieces(memory, *bounds):
    """Address and length of parts of `memory`."""
    return np.array([[memory.ctypes.data + start, stop - start] for start, stop in bounds], np.uint64)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_what_is_received_goes_where_it_belongs(family):
    near, far = socket.socketpair(socket.AF_UNIX) if family == socket.AF_UNIX else tcp_pair()
    channel, other = SocketChannel(near, "near"), SocketChannel(far, "far")
    memory = np.zeros(1 << 20, np.uint8)
    data = np.random.default_rng(1).integers(0, 256, 700_000, np.uint8)
    sender = threading.Thread(target=lambda: [other.send(data[:10].data), other.send(data[10:].data)])
    sender.start()
    bounds = [(500_000, 500_007), (3, 3), (0, 400_000), (700_000, 999_993)]
    channel.recv_scattered(pieces(memory, *bounds))
    sender.join()
    expected = np.zeros_like(memory)
    at = 0
    for start, stop in bounds:
        expected[start:stop] = data[at : at + stop - start]
        at += stop - start
    assert not (memory != expected).any()
    other.send(b"abc")
    other.end_writing()
    with pytest.raises(ChannelLost, match="ended where more were expected"):
        channel.recv_scattered(pieces(memory, (0, 4)))
    with pytest.raises(ChannelLost):
        channel.recv_scattered(pieces(memory, (0, 4)))
    assert channel.recv_into(bytearray(1)) == 0
    channel.close()
    other.close()


def test_a_close_wakes_whoever_receives_into_memory():
    near, far = tcp_pair()
    channel, other = SocketChannel(near, "near"), SocketChannel(far, "far")
    memory = np.zeros(100, np.uint8)
    raised = []

    def receive_all():
        try:
            channel.recv_scattered(pieces(memory, (0, 100)))
        except ChannelClosed as exc:
            raised.append(exc)

    receiver = threading.Thread(target=receive_all)
    receiver.start()
    other.send(b"x" * 50)
    while not memory[49]:
        assert receiver.is_alive()
    channel.close()
    receiver.join(30)
    assert raised
    other.close()


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far
