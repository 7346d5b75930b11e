"""fd: the conformance suite, and what is a descriptor's own: that it was passed, is taken once, and is of a kind."""

import os
import socket
import subprocess
import sys
import threading

import attrs
import pytest

import whimbrel
from whimbrel.abc import Patience
from whimbrel.errors import ChannelLost, ConfigError, ConnectError, MigrationCancelled, MigrationRefused
from whimbrel.plugins import PluginManager
from whimbrel.testing.memory import MemoryNetwork
from whimbrel.testing.transports import TransportConformance, receive, receive_all
from whimbrel_transports import fd
from whimbrel_transports.fd import FdTransport

LONG = 20.0


def passed(*descriptors):
    """As if they had been inherited; their addresses."""
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    return tuple(str(descriptor) for descriptor in descriptors)


def socket_pair():
    return passed(*(end.detach() for end in socket.socketpair()))


def pipe_pair():
    """The writing end comes first."""
    return passed(*os.pipe()[::-1])


class TestFdSockets(TransportConformance):
    nobody = "1000000"
    bad_addresses = ("", "x", "-1", "0", "1", "2", "0x10", "1e3", "3 ", "٣", "99999999999", "2147483648")

    def make(self):
        return FdTransport()

    def ends(self, tmp_path):
        return socket_pair()


class TestFdPipes(TransportConformance):
    duplex = False
    nobody = "1000000"

    def make(self):
        return FdTransport()

    def ends(self, tmp_path):
        return pipe_pair()


class TestFdPipesOfAnotherUser(TestFdPipes):
    """They cannot be opened anew."""

    @pytest.fixture(autouse=True)
    def _refused(self, monkeypatch):
        real = os.open

        def refuse(path, *more, **named):
            if str(path).startswith("/proc/self/fd/"):
                raise PermissionError(13, "Permission denied")
            return real(path, *more, **named)

        monkeypatch.setattr(os, "open", refuse)


def connect(address):
    return FdTransport().connect(address, Patience(LONG))


def is_open(address):
    try:
        os.fstat(int(address))
    except OSError:
        return False
    return True


def was_passed(address):
    """Whether the number still means what was passed, and not something of this process's own or nothing."""
    return is_open(address) and os.get_inheritable(int(address))


# ---------------------------------------------------------------------------------------------------- taken, and once


@pytest.mark.parametrize("make", [socket_pair, pipe_pair])
def test_it_is_taken_at_once(tidy, make):
    out, into = make()
    near = connect(out)
    assert not was_passed(out)
    listener = FdTransport().listen(into)
    assert not was_passed(into)
    assert near.peer == f"fd:{out}"
    assert listener.uri == f"fd:{into}"
    near.send(b"x")
    far = listener.accept(Patience(LONG))
    assert far.peer == f"fd:{into}"
    for one in (near, far, listener):
        one.close()


@pytest.mark.parametrize("make", [socket_pair, pipe_pair])
@pytest.mark.parametrize("side", ["connect", "listen"])
def test_a_second_use_finds_nothing(tidy, make, side):
    ends = make()
    use, address, other = (connect, *ends) if side == "connect" else (FdTransport().listen, *ends[::-1])
    use(address).close()
    with pytest.raises(
        ConnectError, match=f"^Failed to .* 'fd:{address}': descriptor {address} is not open, or was taken"
    ):
        use(address)
    os.close(int(other))


@pytest.mark.parametrize("side", [connect, FdTransport().listen])
def test_a_number_that_means_something_else_by_now_is_left_alone(tidy, side):
    """The system gives the lowest free number to whatever is opened next: that is ours, and was not passed."""
    out, into = socket_pair()
    connect(out).close()
    near, far = socket.socketpair()
    assert str(near.fileno()) == out
    with pytest.raises(ConnectError, match=r"was not passed to this process but is its own.*os\.set_inheritable"):
        side(out)
    far.send(b"untouched")
    assert near.recv(100) == b"untouched"
    for one in (near, far):
        one.close()
    os.close(int(into))


def test_of_several_who_take_it_at_once_one_has_it(tidy):
    out, into = socket_pair()
    gate, taken, refused = threading.Barrier(8), [], []

    def take():
        gate.wait()
        try:
            taken.append(connect(out))
        except ConnectError:
            refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].close()
    os.close(int(into))


def test_one_that_is_refused_or_cancelled_is_closed_all_the_same(tidy):
    out, into = pipe_pair()
    patience = Patience(LONG)
    patience.cancelled.set()
    with pytest.raises(MigrationCancelled):
        FdTransport().connect(out, patience)
    with pytest.raises(ConfigError, match="is the reading end of a pipe; expected the writing end"):
        connect(into)
    assert not is_open(out)
    assert not is_open(into)


def test_no_child_inherits_what_was_taken(tidy):
    out, into = pipe_pair()
    near = connect(out)
    with subprocess.Popen(["sleep", "1000"], close_fds=False) as child:
        near.close()
        assert os.read(int(into), 1) == b""  # nobody else has the writing end
        child.kill()
    os.close(int(into))


CHILD = """
import sys
from whimbrel.abc import Patience
from whimbrel_transports.fd import FdTransport
channel = FdTransport().connect(sys.argv[1], Patience(20))
channel.send(b"from afar")
channel.end_writing()
channel.close()
"""


@pytest.mark.parametrize("make", [socket_pair, pipe_pair])
def test_what_a_process_inherits_was_passed(tidy, make):
    out, into = make()
    with subprocess.Popen([sys.executable, "-c", CHILD, out], pass_fds=[int(out)]) as child:
        os.close(int(out))
        listener = FdTransport().listen(into)
        far = listener.accept(Patience(LONG))
        assert receive_all(far) == b"from afar"
        assert child.wait(LONG) == 0
    far.close()
    listener.close()


# ------------------------------------------------------------------------------------------------------------- kinds


def listening():
    one = socket.socket()
    one.listen()
    return one.detach()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: os.open(path / "f", os.O_RDWR | os.O_CREAT), "a regular file; .*; write file:PATH for a file"),
        (lambda path: os.open(path, os.O_RDONLY), "a folder; expected a socket or a pipe"),
        (lambda path: os.open(os.devnull, os.O_RDWR), "a character device; expected a socket or a pipe"),
        (lambda path: os.eventfd(0), "neither a socket, a pipe nor a file; expected a socket or a pipe"),
        (lambda path: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach(), "a socket of messages"),
        (lambda path: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach(), "a socket of messages"),
        (lambda path: socket.socket().detach(), "a socket that is not connected: Transport endpoint is not connected"),
        (lambda path: listening(), "a listening socket; expected a connected one"),
    ],
)
@pytest.mark.parametrize("side", [connect, FdTransport().listen])
def test_other_kinds_are_refused_by_name(tidy, tmp_path, side, make, complaint):
    (address,) = passed(make(tmp_path))
    with pytest.raises(ConfigError, match=f"^descriptor {address} is {complaint}"):
        side(address)
    assert not is_open(address)


def test_a_pipe_has_one_way(tidy):
    for side, end, complaint in (
        (connect, 1, "the reading end of a pipe; expected the writing end"),
        (FdTransport().listen, 0, "the writing end of a pipe; expected the reading end"),
    ):
        pair = pipe_pair()
        with pytest.raises(ConfigError, match=complaint):
            side(pair[end])
        os.close(int(pair[1 - end]))


def test_a_pipe_that_is_open_for_both_goes_either_way_and_ends(tidy, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    out, into = passed(*(os.open(tmp_path / "fifo", os.O_RDWR) for _ in range(2)))
    near = connect(out)
    listener = FdTransport().listen(into)
    near.send(b"whole")
    far = listener.accept(Patience(LONG))
    near.close()
    assert receive_all(far) == b"whole"  # though it was open for writing itself
    far.close()
    listener.close()


@pytest.mark.parametrize("words", [b"", b"last words"])
def test_a_pipe_whose_writer_is_long_gone(tidy, words):
    out, into = pipe_pair()
    os.write(int(out), words)
    os.close(int(out))
    listener = FdTransport().listen(into)
    far = listener.accept(Patience(LONG))
    assert receive_all(far) == words
    far.close()
    listener.close()


def named(path):
    os.mkfifo(path / "fifo")
    into = os.open(path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    return passed(os.open(path / "fifo", os.O_WRONLY), into)


@pytest.mark.parametrize("make", [lambda _: pipe_pair(), named], ids=["anonymous", "named"])
def test_a_pipe_whose_reader_is_long_gone(tidy, tmp_path, make):
    out, into = make(tmp_path)
    os.close(int(into))
    with pytest.raises(ConnectError, match=f"Failed to connect to 'fd:{out}': nobody has the reading end of the pipe"):
        connect(out)


def test_whoever_else_holds_the_pipe_goes_on_as_before(tidy):
    """That reads and writes do not block is a property of what is open, not of a number."""
    out, into = pipe_pair()
    shared = [os.dup(int(end)) for end in (out, into)]
    near = connect(out)
    near.send(b"x")
    listener = FdTransport().listen(into)
    far = listener.accept(Patience(LONG))
    assert receive(far, 1) == b"x"
    assert [os.get_blocking(end) for end in shared] == [True, True]
    for one in (near, far, listener):
        one.close()
    for end in shared:
        os.close(end)


def test_a_tcp_socket_is_tuned_as_one(tidy):
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    near = connect(*passed(ours.detach()))
    assert near._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert near._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    near.send(b"hello")
    assert theirs.recv(5) == b"hello"
    near.close()
    theirs.close()


# -------------------------------------------------------------------------------------------- what the plan is made of


@pytest.mark.parametrize(("make", "way_back"), [(socket_pair, True), (pipe_pair, False)])
def test_whether_there_is_a_way_back_is_told_without_touching_it(tidy, make, way_back):
    spec = PluginManager().transport("fd")
    assert isinstance(spec.create(), FdTransport)
    assert spec.duplex
    assert not spec.runs_programs
    for address in make():
        assert spec.duplex_at(address) is way_back
        os.close(int(address))


@pytest.mark.parametrize("address", ["", "x", "1000000"])
def test_what_cannot_be_told_is_left_to_the_connection(address):
    assert fd.has_way_back(address)


class Judge:
    def __init__(self):
        self.plans = []

    @whimbrel.hookimpl
    def whimbrel_check_migration(self, plan):
        self.plans.append(plan)
        return ["not today"]


@pytest.mark.parametrize(("make", "way_back"), [(socket_pair, True), (pipe_pair, False)])
def test_the_plan_and_the_refusals_know_the_one_from_the_other(make_machine, make, way_back):
    ends = make()
    source, judge = make_machine(**{"return-path": True, "switchover-ack": True}), Judge()
    source.plugins.register(judge)
    with pytest.raises(MigrationRefused) as caught:
        source.migrate(f"fd:{ends[0]}")
    assert judge.plans[0].duplex is way_back
    assert ("return-path is on, and transport 'fd' has no way back" in str(caught.value)) is not way_back
    assert ("switchover-ack needs a way back" in str(caught.value)) is not way_back
    assert os.get_inheritable(int(ends[0]))  # refused before it was taken
    for end in ends:
        os.close(int(end))


@pytest.mark.parametrize("capability", ["return-path", "switchover-ack"])
def test_a_channel_that_is_less_than_its_spec_is_refused_before_a_byte_is_sent(make_machine, capability):
    class Promises:
        network = MemoryNetwork(scheme="promise", duplex=False)

        @whimbrel.hookimpl
        def whimbrel_transports(self):
            return [attrs.evolve(self.network.spec(), duplex=True)]

    source = make_machine(**{capability: True})
    source.plugins.register(Promises())
    listener = Promises.network.listen("there")
    source.start()
    outgoing = source.migrate("promise:there")
    far = listener.accept(Patience(LONG))
    with pytest.raises(MigrationRefused, match=f"capability {capability} .* transport 'promise' has no"):
        outgoing.wait(LONG)
    assert receive_all(far) == b""
    assert source.run_state == "running"
    listener.close()


# ----------------------------------------------------------------------------------------------------- whole machines


@pytest.mark.parametrize("make", [socket_pair, lambda: tcp_pair()], ids=["unix", "tcp"])
def test_a_machine_goes_over_a_socket_with_proof(make_machine, moved, make):
    out, into = make()
    done = moved(make_machine(**{"return-path": True}), make_machine(), f"fd:{out}", f"fd:{into}", together=True)
    assert done.there.ownership == "done"
    assert done.runs


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return passed(near.detach(), far.detach())


@pytest.mark.parametrize("start", [None, True])
def test_a_machine_goes_through_a_pipe_without_proof(make_machine, moved, start):
    out, into = pipe_pair()
    done = moved(make_machine(), make_machine(), f"fd:{out}", f"fd:{into}", together=True, start=start)
    assert done.there.ownership == "released"
    assert done.runs == bool(start)


def test_a_wait_at_a_descriptor_that_is_cancelled_closes_it(make_machine):
    out, into = socket_pair()
    destination = make_machine()
    incoming = destination.incoming(f"fd:{into}")
    incoming.cancel()
    with pytest.raises(MigrationCancelled):
        incoming.wait(LONG)
    near = connect(out)
    with pytest.raises(ChannelLost):
        near.send(b"anybody there?")
    near.close()
