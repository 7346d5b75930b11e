"""What the tests of transports share: small machines to move, and a look at processes."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import whimbrel
from whimbrel.testing._bench import nothing_left

SIZE = 1 << 20
LONG = 60.0  # seconds; only what hangs ever waits so long


@pytest.fixture
def tidy():
    """No descriptor, thread or process outlives the test."""
    with nothing_left(5):
        yield


@pytest.fixture
def make_machine(tidy):
    """Makes machines of one kind, with random RAM and a guest that writes and counts."""
    with contextlib.ExitStack() as stack:

        def make(size=SIZE, **settings):
            machine = stack.enter_context(whimbrel.Machine("heat", settings=whimbrel.Settings()))
            machine.settings.parameters.update({"max-bandwidth": 0})
            machine.settings.capabilities.update(settings)
            plate = machine.ram.array("plate", (size,), "uint8")
            pause = threading.Event()

            def power_on():
                plate[4096:] = np.random.default_rng(1).integers(0, 256, size - 4096, "uint8")

            def step():
                plate[:8].view("uint64")[0] += 1
                pause.wait(0.0005)

            machine.guest = whimbrel.LoopGuest(step, power_on=power_on)
            return machine

        yield make


@pytest.fixture
def moved():
    """Lets a source go to `out`, then a fresh machine arrive from `into`, and compares them; returns both ends' infos.

    `out` may be under way before `into` begins, or side by side with it.
    """

    def move(source, destination, out, into, *, together, start=None):
        source.start()
        incoming = destination.incoming(into, start=start) if together else None
        outgoing = source.migrate(out)
        if together:
            there = outgoing.wait(LONG)
        else:
            there = outgoing.wait(LONG)
            incoming = destination.incoming(into, start=start)
        here = incoming.wait(LONG)
        assert source.run_state == "postmigrate"
        runs = destination.run_state == "running"
        if runs:
            destination.stop()
        sent, arrived = (next(iter(machine.ram)).view for machine in (source, destination))
        assert np.array_equal(sent[8:], arrived[8:])
        before, after = (int(view[:8].view("uint64")[0]) for view in (sent, arrived))
        assert after >= before if runs else after == before
        return SimpleNamespace(there=there, here=here, runs=runs)

    return move


@pytest.fixture
def has_ended():
    """Whether a process has, asked of the kernel through a handle made while it lived."""

    def ended(handle):
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        return bool(poller.poll(0))

    return ended


@pytest.fixture
def handles():
    """Makes handles of processes, by which their end can be told even if their number is used again."""
    made = []

    def make(*numbers):
        made.extend(os.pidfd_open(number) for number in numbers)
        return made[-len(numbers) :]

    yield make
    for handle in made:
        os.close(handle)
