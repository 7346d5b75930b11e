"""Small machines with monitors, and a client that says exactly the bytes it is told to."""

import contextlib
import json
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import whimbrel
from whimbrel.monitor import MonitorClient, MonitorServer

SIZE = 1 << 20
PATIENCE = 20.0


class Raw:
    """A connection that sends bytes as they are and reads lines."""

    def __init__(self, address):
        scheme, _, rest = address.partition(":")
        if scheme == "unix":
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(rest)
        else:
            host, _, port = rest.rpartition(":")
            self.socket = socket.create_connection((host, int(port)))
        self.socket.settimeout(PATIENCE)
        self.lines = self.socket.makefile("rb")

    def send(self, data):
        self.socket.sendall(data)

    def line(self):
        """The next line, as it came; empty at the end."""
        return self.lines.readline()

    def value(self):
        return json.loads(self.line())

    def negotiate(self):
        assert "QMP" in self.value()
        self.send(b'{"execute":"qmp_capabilities"}')
        assert self.value() == {"return": {}}
        return self

    def close(self):
        self.lines.close()
        self.socket.close()


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def monitor_threads():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("whimbrel-monitor"))


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"never came about: {what}"
        pause.wait(0.002)


@pytest.fixture(name="monitor_threads")
def _monitor_threads():
    return monitor_threads


def spell(event):
    """An event in a word or two, as the tables of orders have them."""
    data = event.get("data", {})
    if event["event"] == "MIGRATION":
        return data["status"]
    return f"PASS {data['pass']}" if event["event"] == "MIGRATION_PASS" else event["event"]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = descriptors()
    yield
    assert monitor_threads() == []
    wait_until(lambda: descriptors() <= before, "all descriptors closed")


@pytest.fixture
def resources(_nothing_is_left):
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def make_machine(resources):
    """Machines of one kind, with a guest that writes a page now and then, and random RAM."""

    def make(*, busy=True):
        machine = resources.enter_context(whimbrel.Machine("heat"))
        plate = machine.ram.array("plate", (SIZE,), "uint8")
        pause = threading.Event()

        def power_on():
            plate[:] = np.random.default_rng(1).integers(0, 256, SIZE, "uint8")

        def step():
            plate[0] = (int(plate[0]) + 1) % 256
            pause.wait(0.001)

        machine.guest = whimbrel.LoopGuest(step, power_on=power_on) if busy else whimbrel.IdleGuest()
        return machine

    return make


@pytest.fixture
def serve(resources, tmp_path):
    """A server of a machine's monitor; without an address at a unix socket of its own."""
    numbers = iter(range(100))

    def serve(machine, address=None, **options):
        return resources.enter_context(
            MonitorServer(machine, address or f"unix:{tmp_path}/{next(numbers)}.qmp", **options)
        )

    return serve


@pytest.fixture
def until():
    return wait_until


@pytest.fixture
def connect(resources):
    return lambda address: resources.enter_context(MonitorClient.connect(address, timeout=PATIENCE))


@pytest.fixture
def raw(resources):
    def open_raw(address):
        fresh = Raw(address)
        resources.callback(fresh.close)
        return fresh

    return open_raw


@pytest.fixture
def pair(make_machine, serve, connect):
    """A running source and a fresh destination, each with a client at its monitor."""
    source, destination = make_machine(), make_machine()
    source.start()
    source.notifiers.drain(PATIENCE)
    clients = [connect(serve(machine).address) for machine in (source, destination)]
    return SimpleNamespace(source=source, destination=destination, at_source=clients[0], at_destination=clients[1])


@pytest.fixture
def hear():
    """What comes up to the event `last`, spelled."""

    def hear(client, last):
        heard = []
        while last not in heard:
            event = client.wait_event({"STOP", "RESUME", "MIGRATION", "MIGRATION_PASS", "SHUTDOWN"}, PATIENCE)
            assert event is not None, f"{last} has not come; heard {heard}"
            heard.append(spell(event))
        return heard

    return hear


@pytest.fixture
def switch_on():
    def switch_on(client, *names):
        wanted = [{"capability": name, "state": True} for name in names]
        client.execute("migrate-set-capabilities", capabilities=wanted)

    return switch_on


@pytest.fixture
def listen():
    """Let a machine wait; returns the URI to migrate to."""

    def listen(client):
        client.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        answer = client.execute("query-migrate")
        (address,) = answer.pop("socket-address")
        assert answer == {}
        assert address == {"type": "inet", "host": "127.0.0.1", "port": address["port"], "ipv4": True}
        return f"tcp:127.0.0.1:{address['port']}"

    return listen
