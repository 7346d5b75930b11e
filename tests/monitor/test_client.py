"""The client: whatever is, or is not, at the other end."""

import contextlib
import socket
import threading

import pytest

from whimbrel.errors import ConfigError, MonitorError
from whimbrel.monitor import MonitorClient


@pytest.fixture
def pretend(resources):
    """A server that says what it is told to, to one client, and then is gone once that is."""

    def pretend(*said, linger=True):
        listener = resources.enter_context(socket.create_server(("127.0.0.1", 0)))

        def run():
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                peer.sendall(b"".join(said))
                while linger and peer.recv(1 << 16):
                    pass

        thread = threading.Thread(target=run)
        thread.start()
        resources.callback(thread.join)
        return f"tcp:127.0.0.1:{listener.getsockname()[1]}"

    return pretend


GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


def test_commands_results_and_errors(make_machine, serve, connect):
    client = connect(serve(make_machine()).address)
    assert client.greeting["capabilities"] == []
    assert client.execute("migrate-set-parameters", downtime_limit=7) == {}
    assert client.execute("query-migrate-parameters")["downtime-limit"] == 7
    with pytest.raises(MonitorError, match="has not been found") as caught:
        client.execute("nothing")
    assert caught.value.error_class == "CommandNotFound"


def test_events_are_kept_until_asked_for(make_machine, serve, connect):
    machine = make_machine(busy=False)
    client = connect(serve(machine).address)
    for command in ("cont", "stop", "cont"):
        client.execute(command)
    machine.notifiers.drain(20)
    assert client.wait_event({"STOP"}, 20)["event"] == "STOP"
    assert client.wait_event("STOP", 0) is None
    client.execute("query-name")
    assert [event["event"] for event in client.events()] == ["RESUME", "RESUME"]
    assert client.events() == []
    assert client.wait_event("RESUME", 0.01) is None


def test_a_server_that_ends(make_machine, serve, connect):
    machine = make_machine(busy=False)
    server = serve(machine)
    client = connect(server.address)
    client.execute("cont")
    machine.notifiers.drain(20)
    server.close()
    assert [event["event"] for event in client.events()] == ["RESUME"]
    for attempt in (client.events, lambda: client.execute("stop"), lambda: client.wait_event("STOP", 1)):
        with pytest.raises(MonitorError, match=r"is gone.*; its process has ended, or closed its monitor"):
            attempt()


@pytest.mark.parametrize("address", ["", "x", "tcp:x", "unix:", "qmp.sock"])
def test_what_is_no_address_is_refused_with_examples(address):
    with pytest.raises(ConfigError, match="for example unix:/run"):
        MonitorClient.connect(address)


def test_nobody_there(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for address in (f"unix:{tmp_path}/x", f"tcp:127.0.0.1:{port}"):
        with pytest.raises(MonitorError) as caught:
            MonitorClient.connect(address)
        assert caught.value.message == f"no machine listens at {address}"
        assert f"--qmp {address}" in caught.value.hint


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "JSON parse error"),
        (b'{"hello": 1}\r\n', "is no QMP monitor"),
        (b"[1]", "is no QMP monitor"),
        (b'{"error": {"class": "GenericError", "desc": "full"}}', "full"),
        (b"[" * 200, "nesting depth"),
        (GREETING + b'{"error": {"class": "X", "desc": "never"}, "id": 1}', "never"),
        (GREETING + b'{"error": 5, "id": 1}', "5"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_what_is_no_monitor(pretend, said, text):
    with pytest.raises(MonitorError, match=text):
        MonitorClient.connect(pretend(said), timeout=20)


def test_one_that_says_nothing(pretend):
    with pytest.raises(MonitorError, match=r"no answer that greets .* within 0\.05 s"):
        MonitorClient.connect(pretend(), timeout=0.05)


def test_one_that_hangs_up(pretend):
    with pytest.raises(MonitorError, match="is gone"):
        MonitorClient.connect(pretend(GREETING, linger=False), timeout=20)


def test_an_answer_that_was_given_up_on_is_not_the_next_ones(pretend):
    late = b'{"return": "late", "id": 2}{"error": {"class": "X", "desc": "nobody\'s"}}{"return": 3, "id": 3}'
    with MonitorClient.connect(pretend(GREETING, b'{"return": {}, "id": 1}'), timeout=20) as client:
        client.timeout = 0.02
        with pytest.raises(MonitorError, match=r"no answer to slow came"):
            client.execute("slow")
    with MonitorClient.connect(pretend(GREETING, b'{"return": {}, "id": 1}', late), timeout=20) as client:
        client._number = 2
        assert client.execute("quick") == 3


def test_a_qemus_greeting_with_out_of_band_is_fine(pretend):
    greeting = b'{"QMP": {"version": {"qemu": {"major": 9}}, "capabilities": ["oob"]}}\r\n'
    with MonitorClient.connect(pretend(greeting, b'{"return": {}, "id": 1}\r\n'), timeout=20) as client:
        assert client.greeting["capabilities"] == ["oob"]
