"""The transport inside one process holds to the contract, whole and in crumbs, both ways and one way."""

from __future__ import annotations

import threading

import pytest

from whimbrel.abc import Patience
from whimbrel.errors import ChannelLost, ConnectError, MigrationCancelled, UnknownNameError
from whimbrel.plugins import PluginManager
from whimbrel.testing.memory import MemoryNetwork, memory_pair
from whimbrel.testing.transports import TransportConformance, receive


class TestMemory(TransportConformance):
    def make(self):
        return MemoryNetwork()

    def address(self, tmp_path):
        return "nest"


class TestMemoryOneWay(TestMemory):
    duplex = False

    def make(self):
        return MemoryNetwork(duplex=False)


class TestMemoryWithLittleRoom(TestMemory):
    def make(self):
        return MemoryNetwork(capacity=1 << 14)


def test_two_networks_are_two_worlds():
    listener = MemoryNetwork().listen("nest")
    with pytest.raises(ConnectError, match="nobody listens"):
        MemoryNetwork().connect("nest", Patience(1))
    listener.close()


@pytest.mark.parametrize("how", ["cancelled", "timed out", "refused"])
def test_a_connect_that_nobody_accepts_waits(how):
    network = MemoryNetwork()
    listener = network.listen("nest")
    patience = Patience(0.06 if how == "timed out" else 20)
    outcome = []

    def connect():
        try:
            network.connect("nest", patience)
        except (ConnectError, MigrationCancelled) as exc:
            outcome.append(exc)

    thread = threading.Thread(target=connect)
    thread.start()
    with network.changed:
        assert network.changed.wait_for(lambda: listener._calls, 20)
    assert not outcome
    if how == "cancelled":
        patience.cancelled.set()
    elif how == "refused":
        listener.close()
    thread.join()
    assert type(outcome[0]) is (MigrationCancelled if how == "cancelled" else ConnectError)
    listener.close()


def test_a_reset_looks_broken_behind_what_was_sent():
    near, far = memory_pair()
    near.send(b"last words")
    near.reset()
    assert receive(far, 10) == b"last words"
    for _ in range(2):
        with pytest.raises(ChannelLost, match="reset"):
            far.recv_into(bytearray(1))
        with pytest.raises(ChannelLost, match="reset"):
            far.send(b"x")


def test_it_is_offered_under_its_scheme():
    plugins = PluginManager(load_entry_points=False)
    network = MemoryNetwork(scheme="ether", duplex=False)
    plugins.register(network.plugin())
    spec = plugins.transport("ether")
    assert spec.create() is network
    assert not spec.duplex
    with pytest.raises(UnknownNameError, match="ether"):
        plugins.transport("memory")
