"""What the tests of captured machines share: loading, comparing with the perfect copy, and what is left behind."""

from __future__ import annotations

import gc
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from whimbrel import Settings
from whimbrel.capture import CapturedMachine
from whimbrel.plugins import PluginManager
from whimbrel.testing.memory import MemoryNetwork, ReplayChannel

LONG = 60.0  # seconds; only what hangs ever waits so long


def _ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("whimbrel-")]


def _descriptors():
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them
            found[path.name] = str(path.readlink())
    return found


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """No thread of ours and no descriptor outlives a test. Threads that were told to end may take a moment."""
    threads, descriptors = set(_ours()), _descriptors()
    yield
    for thread in set(_ours()) - threads:
        thread.join(5)
        assert not thread.is_alive(), f"{thread.name} is left behind"
    left = {number: what for number, what in _descriptors().items() if descriptors.get(number) != what}
    if left:
        gc.collect()  # what only a traceback or a cycle holds is not lost
        left = {number: what for number, what in left.items() if _descriptors().get(number) == what}
    assert not left, f"descriptors are left behind: {left}"


@pytest.fixture(scope="session")
def network():
    """A world of `memory:` for those who have the plugins of these tests."""
    return MemoryNetwork()


@pytest.fixture(scope="session")
def plugins(network):
    """One manager for many machines: making one takes longer than loading a small machine."""
    manager = PluginManager()
    manager.register(network.plugin())
    return manager


@pytest.fixture
def settings():
    """Settings without a bandwidth limit."""
    settings = Settings()
    settings.parameters.max_bandwidth = 0
    return settings


class Crumbs(ReplayChannel):
    """Gives a stream in the pieces that `sizes` says, over and over; nothing can be sent back."""

    def __init__(self, data, sizes=(1,), **more):
        super().__init__(data, duplex=False, **more)
        self._sizes, self._turn = list(sizes), 0

    def recv_into(self, buffer):
        size = self._sizes[self._turn % len(self._sizes)]
        self._turn += 1
        return super().recv_into(memoryview(buffer)[:size])


@pytest.fixture
def load(plugins):
    """`load(stream, …)`: the machine in it, closed after the test; `sizes` are the pieces that it comes in."""
    machines = []

    def load(stream, *, sizes=None, **more):
        channel = Crumbs(stream, sizes or [1 << 30])
        machine = CapturedMachine.load(channel, plugins=plugins, **more)
        machines.append(machine)
        return machine

    yield load
    for machine in machines:
        machine.close()


def check(machine, script, *, ids=True, described=None, order=None):
    """Compare a captured machine with the perfect copy, to the last byte."""
    shape = script.shape
    assert machine.name == (script.machine if shape.configuration else "captured")
    assert [block.name for block in machine.ram] == list(script.ram)
    for name, pages in script.ram.items():
        assert machine.ram[name].view.tobytes() == pages.tobytes(), name
        address = None if script.addresses is None else script.addresses[name]
        assert machine.ram[name].guest_address == address
    headers = [device.header for device in machine.captured]
    found = [
        (header.idstr, header.instance_id, header.version_id, device.body)
        for header, device in zip(headers, machine.captured, strict=True)
    ]
    assert found == [device.key for device in script.devices]
    if ids:
        assert [header.section_id for header in headers] == [device.section_id for device in script.devices]
    form = machine.form()
    assert (form.configuration is not None, form.footers) == (shape.configuration, shape.footers)
    if shape.configuration:
        configuration = form.configuration
        assert configuration.machine == script.machine
        assert configuration.capabilities == tuple(script.capabilities)
        assert configuration.uuid == script.uuid
    if shape.description if described is None else described:
        assert form.text == script.text
        assert form.description
        assert [device.described for device in machine.captured] == [device.described for device in script.devices]
    else:
        assert form.text is None
        assert not form.description
        assert [device.described for device in machine.captured] == [None] * len(script.devices)


@pytest.fixture(name="check", scope="session")
def _check():
    """`check(machine, script)`: it is the machine that the script has written."""
    return check
