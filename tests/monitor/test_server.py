"""The server among its clients: many, slow, odd and gone ones; and what it leaves behind, which is nothing."""

import json
import os
import socket
import stat
import threading
import time

import pytest

import whimbrel
from whimbrel.errors import ConfigError, MonitorError, StateError
from whimbrel.events import GuestStopped
from whimbrel.monitor import MonitorClient, MonitorServer, connection
from whimbrel.monitor.server import MOST_CLIENTS


@pytest.fixture
def machine(make_machine):
    return make_machine(busy=False)


def ask(raw, command, **arguments):
    raw.send(json.dumps({"execute": command, "arguments": arguments}).encode())
    return raw.value()


@pytest.mark.parametrize("address", [None, "tcp:127.0.0.1:0", "tcp::0", "tcp:0", "tcp:localhost:0"])
def test_the_first_words(machine, serve, raw, address):
    client = raw(serve(machine, address).address)
    line = client.line()
    assert line.endswith(b"\r\n")
    greeting = json.loads(line)["QMP"]
    assert greeting["capabilities"] == []
    assert greeting["version"]["qemu"] == {"major": 7, "minor": 2, "micro": 22}
    client.send(b'{"execute": "qmp_capabilities"}\n')
    assert client.line() == b'{"return": {}}\r\n'


def test_several_clients_are_told_the_same(machine, serve, connect):
    server = serve(machine)
    clients = [connect(server.address) for _ in range(4)]
    clients[0].execute("cont")
    clients[1].execute("stop")
    for client in clients:
        assert client.wait_event("RESUME", 20)["event"] == "RESUME"
        assert client.wait_event("STOP", 20)["event"] == "STOP"
        assert not client.execute("query-status")["running"]


def test_who_has_not_negotiated_is_told_nothing(machine, serve, raw, connect):
    server = serve(machine)
    silent, other = raw(server.address), connect(server.address)
    assert "QMP" in silent.value()
    other.execute("cont")
    assert other.wait_event("RESUME", 20)
    silent.send(b'{"execute": "qmp_capabilities"}')
    assert silent.value() == {"return": {}}


def test_a_slow_command_holds_up_no_other_client(machine, serve, connect):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(whimbrel.IdleGuest):
        def stop(self):
            begun.set()
            assert go_on.wait(20)

    machine.guest = Slow()
    server = serve(machine)
    slow, quick = connect(server.address), connect(server.address)
    slow.execute("cont")
    asking = threading.Thread(target=slow.execute, args=("stop",))
    asking.start()
    assert begun.wait(20)
    assert quick.execute("query-status")["running"]
    assert quick.execute("query-migrate") == {}
    go_on.set()
    asking.join()
    assert not quick.execute("query-status")["running"]


def test_a_client_that_does_not_read_delays_nobody_and_is_hung_up_on(machine, serve, raw, connect, monitor_threads):
    server = serve(machine)
    reading, stuck = connect(server.address), raw(server.address).negotiate()
    names = set(monitor_threads())
    emitted = heard = 0
    while set(monitor_threads()) == names:
        for _ in range(connection.MOST_WAITING // 4):
            machine.notifiers.emit(GuestStopped())
            emitted += 1
        assert machine.notifiers.drain(20)
        while heard < emitted:
            assert reading.wait_event("STOP", 20)
            heard += 1
        assert emitted < 100_000
    assert machine.notifiers.failures == []
    assert reading.execute("query-name") == {"name": "heat"}
    # What the system had taken in for it may still be read, and then it is at its end.
    while stuck.line():
        pass


def test_a_client_that_asks_and_does_not_read_waits_for_itself(machine, serve, raw, connect):
    server = serve(machine)
    greedy = raw(server.address).negotiate()
    count = 20_000
    asking = threading.Thread(target=greedy.send, args=(b'{"execute": "query-name"}\n' * count,))
    asking.start()
    assert connect(server.address).execute("query-name") == {"name": "heat"}
    for _ in range(count):
        assert greedy.line() == b'{"return": {"name": "heat"}}\r\n'
    asking.join()


def test_what_waits_is_bounded_in_bytes_too():
    outbox = connection.Outbox()
    line = b"x" * (connection.MOST_BYTES // 4)
    for count in range(4):
        assert outbox.wait_room(0) == (count * len(line) < connection.ENOUGH_BYTES)
        assert outbox.put(line)
    assert not outbox.put(b"x")
    assert outbox.take() == line * 4
    assert outbox.wait_room(0)
    assert outbox.put(line)


def test_a_client_that_asks_for_much_and_does_not_read_costs_no_more_than_the_bound(machine, serve, raw, connect):
    server = serve(machine)
    greedy = raw(server.address).negotiate()
    count, name = 40, "x" * 1_000_000
    asking = threading.Thread(target=greedy.send, args=(json.dumps({"execute": name}).encode() * count,))
    asking.start()
    assert connect(server.address).execute("query-name") == {"name": "heat"}
    for _ in range(count):
        assert greedy.value()["error"]["desc"] == f"The command {name} has not been found"
    asking.join()


@pytest.mark.parametrize("said", [b"", b'{"execute": "query-name"}', b'{"execute": "qmp_capa'])
def test_who_does_not_negotiate_makes_room(machine, serve, raw, monkeypatch, said):
    monkeypatch.setattr(connection, "NEGOTIATION_TIME", 0.2)
    client = raw(serve(machine).address)
    client.send(said)
    lines = [json.loads(line) for line in iter(client.line, b"")]
    assert lines[-1]["error"]["desc"] == "no qmp_capabilities came within 0.2 s"


def test_who_has_negotiated_may_be_silent(machine, serve, raw, monkeypatch):
    monkeypatch.setattr(connection, "NEGOTIATION_TIME", 0.2)
    client = raw(serve(machine).address).negotiate()
    time.sleep(0.4)
    assert ask(client, "query-name") == {"return": {"name": "heat"}}


def test_there_is_a_bound_on_clients(machine, serve, connect, raw, until, monitor_threads):
    server = serve(machine)
    clients = [connect(server.address) for _ in range(MOST_CLIENTS)]
    with pytest.raises(MonitorError, match="the most there may be"):
        MonitorClient.connect(server.address)
    clients[0].close()
    until(lambda: len(monitor_threads()) < 2 * MOST_CLIENTS, "room for another")
    assert connect(server.address).execute("query-name")


def test_garbage_is_answered_or_hung_up_on(machine, serve, raw):
    server = serve(machine)
    client = raw(server.address).negotiate()
    client.send(b'hello\n{"execute": }\n\xff{"execute": "query-name", "id": 1}')
    assert [client.value()["error"]["class"] for _ in range(3)] == ["GenericError"] * 3
    assert client.value() == {"return": {"name": "heat"}, "id": 1}
    browser = raw(server.address)
    assert "QMP" in browser.value()
    browser.send(b'GET / HTTP/1.1\r\nHost: x\r\n\r\n{"execute": "qmp_capabilities"}')
    assert "JSON parse error" in browser.value()["error"]["desc"]
    assert browser.line() == b""


@pytest.mark.parametrize("address", [None, "tcp:127.0.0.1:0"])
def test_a_line_without_end_is_an_error_and_the_end(machine, serve, raw, address):
    client = raw(serve(machine, address).address).negotiate()
    client.send(b"[" + b" " * (2 << 20))
    assert "size limit exceeded" in client.value()["error"]["desc"]
    assert client.line() == b""


def test_a_client_that_has_closed_its_half_gets_its_answers(machine, serve, raw):
    client = raw(serve(machine).address)
    client.send(b'{"execute": "qmp_capabilities"}{"execute": "query-name"}{"execute": "query-blo')
    client.socket.shutdown(socket.SHUT_WR)
    lines = [json.loads(line) for line in iter(client.line, b"")]
    assert [next(iter(line)) for line in lines] == ["QMP", "return", "return"]


def test_clients_may_vanish(machine, serve, raw, connect, until, monitor_threads):
    server = serve(machine)
    for data in (b"", b'{"execute": "qmp_capabilities"}', b'{"execute": "query'):
        client = raw(server.address)
        client.send(data)
        client.close()
    until(lambda: monitor_threads() == ["whimbrel-monitor-accept"], "their threads have ended")
    assert connect(server.address).execute("query-name")


def test_quit_is_answered_told_to_all_and_done_once(machine, serve, connect, raw):
    quitting = threading.Event()
    server = serve(machine, on_quit=quitting.set)
    other, client = connect(server.address), raw(server.address).negotiate()
    assert ask(client, "quit") == {"return": {}}
    assert quitting.wait(20)
    event = client.value()
    assert event["event"] == "SHUTDOWN"
    assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}
    server.close()
    assert client.line() == b""
    assert other.events()[0]["event"] == "SHUTDOWN"
    with pytest.raises(MonitorError, match="is gone"):
        other.execute("query-name")


def test_the_server_may_be_closed_from_within_quit(machine, serve, raw, until, monitor_threads):
    closed = threading.Event()

    def on_quit():
        server.close()
        closed.set()

    server = serve(machine, on_quit=on_quit)
    bystander, client = raw(server.address).negotiate(), raw(server.address).negotiate()
    assert ask(client, "quit") == {"return": {}}
    assert closed.wait(20)
    assert client.value()["event"] == bystander.value()["event"] == "SHUTDOWN"
    assert client.line() == bystander.line() == b""
    until(lambda: monitor_threads() == [], "the last thread has ended")


def test_an_on_quit_that_fails_ends_only_its_client(machine, serve, raw, connect, caplog):
    def on_quit():
        raise ZeroDivisionError("oh")

    server = serve(machine, on_quit=on_quit)
    client = raw(server.address).negotiate()
    assert ask(client, "quit") == {"return": {}}
    assert [json.loads(line)["event"] for line in iter(client.line, b"")] == ["SHUTDOWN"]
    assert connect(server.address).execute("query-name")
    assert "ZeroDivisionError: oh" in caplog.text


def test_without_on_quit_there_is_no_quit(machine, serve, connect):
    client = connect(serve(machine).address)
    with pytest.raises(MonitorError, match="does not end at a monitor's word"):
        client.execute("quit")
    assert client.execute("query-name")


def test_closing_leaves_nothing(machine, tmp_path, raw, monitor_threads, monkeypatch):
    monkeypatch.setattr(connection, "LINGER", 60.0)  # which is for those who have something to read yet
    path = tmp_path / "m.qmp"
    server = MonitorServer(machine, f"unix:{path}")
    server.start()
    clients = [raw(server.address).negotiate() for _ in range(3)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(monitor_threads()) == 7
    began = time.monotonic()
    server.close()
    assert time.monotonic() - began < connection.LINGER / 2
    assert monitor_threads() == []
    assert not path.exists()
    assert [client.line() for client in clients] == [b""] * 3
    machine.notifiers.emit(GuestStopped())
    assert machine.notifiers.drain(20)
    server.close()
    with pytest.raises(StateError):
        server.start()


@pytest.mark.parametrize("address", [None, "tcp:127.0.0.1:0"])
def test_one_that_listens_no_more_keeps_its_clients_and_gives_its_address_back(machine, serve, connect, address):
    server = serve(machine, address)
    client = connect(server.address)
    server.stop_listening()
    server.stop_listening()
    successor = serve(machine, server.address)
    assert connect(successor.address).execute("query-name") == client.execute("query-name") == {"name": "heat"}
    server.close()
    assert connect(successor.address).execute("query-name")
    with pytest.raises(StateError):
        server.start()


def test_closing_before_starting_is_fine(machine):
    MonitorServer(machine, "tcp::0").close()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(machine, tmp_path, raw):
    path = tmp_path / "m.qmp"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with MonitorServer(machine, f"unix:{path}") as server:
        with pytest.raises(ConfigError, match="Address already in use"):
            MonitorServer(machine, f"unix:{path}").start()
        assert raw(server.address).negotiate()
    assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(machine, tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError, match="is not a socket"):
        MonitorServer(machine, f"unix:{path}").start()
    assert path.read_text() == "data"


def test_only_the_socket_that_was_made_is_removed(machine, tmp_path):
    path = tmp_path / "m.qmp"
    with MonitorServer(machine, f"unix:{path}"):
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


def test_a_relative_path_is_removed_wherever_we_are_then(machine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with MonitorServer(machine, "unix:m.qmp") as server:
        assert server.address == f"unix:{tmp_path}/m.qmp"
        monkeypatch.chdir("/")
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@pytest.mark.parametrize(
    "address", ["", "x", "unix:", "unix:a\0b", "tcp:", "tcp:x", "tcp:h:70000", "tcp:::1:5", "http://x:1", "4444"]
)
def test_what_is_no_address_is_refused_with_examples(machine, address):
    with pytest.raises(ConfigError, match=r"unix:PATH or tcp:HOST:PORT; for example unix:/run"):
        MonitorServer(machine, address)


def test_a_path_that_is_too_long_is_refused(machine):
    with pytest.raises(ConfigError, match="the system's limit is 107"):
        MonitorServer(machine, "unix:/" + "a" * 107)


def test_a_port_in_use_is_refused(machine, serve):
    server = serve(machine, "tcp::0")
    with pytest.raises(ConfigError, match="Address already in use"):
        MonitorServer(machine, server.address).start()


def test_an_address_that_others_can_reach_is_warned_of(machine, serve, caplog):
    serve(machine, "tcp:0.0.0.0:0")
    assert "whoever can reach tcp:0.0.0.0:" in caplog.text
