"""Machines whose guest has a process of its own move as any other: live, and with nothing lost or done twice."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from whimbrel import Machine, MigrationCancelled, MigrationStatus, ProcessGuest
from whimbrel.errors import ConfigError, GuestError, TrackerUnavailable
from whimbrel.testing.faults import Faults
from whimbrel.testing.pair import settle

LEDGER = Path(__file__).parent / "process_ledger.py"
LONG = 60.0


@pytest.fixture(scope="module")
def ledger():
    """The workload's module, as the children have it."""
    from whimbrel.machine.factories import find_factory

    return find_factory(f"{LEDGER}:ledger", kind="workload", makes="a guest").__globals__


@pytest.fixture
def build(ledger):
    """Builds the machines for a Pair: the first is host 1, the second host 2, and so on."""
    hosts = []

    def build(settings, plugins, rest=0.0001):
        machine = Machine("ledger", settings=settings, plugins=plugins)
        machine.ram.array("words", 8, "uint64")
        machine.ram.add("ledger", ledger["LEDGER"])
        machine.ram.add("field", ledger["FIELD"])
        hosts.append(len(hosts) + 1)
        machine.guest = ProcessGuest(f"{LEDGER}:ledger", arguments={"host": hosts[-1], "rest": rest})
        return machine

    return build


@pytest.fixture
def pair(make_pair, build, settings):
    settings.backends.memory = "memfd"
    return make_pair(build, settings=settings, uri="tcp:127.0.0.1:0")


def words(machine):
    return machine.ram["words"].array(8, "uint64")


def wait_until(condition):
    looks = threading.Event()
    for _ in range(int(LONG / 0.001)):
        if condition():
            return
        looks.wait(0.001)
    raise AssertionError("it does not come to it")


def wait_lines(machine, more):
    """Wait until the guest has written that many more lines."""
    goal = int(words(machine)[0]) + more
    wait_until(lambda: words(machine)[0] >= goal)


def check(machine, ledger, hosts):
    """In a stopped machine: every line once, in order, by `hosts` one after the other; and the field as after those."""
    assert machine.run_state != "running"
    count = int(words(machine)[0])
    lines = machine.ram["ledger"].array(dtype=ledger["LINE"])
    numbers = lines["number"][:count]
    wrong = np.flatnonzero(numbers != np.arange(count, dtype=np.uint64))
    assert not wrong.size, f"line {wrong[0]} of {count} is not there, or is another"
    assert not lines["host"][count:].any(), "there are lines behind the last one"
    wrote = lines["host"][:count]
    assert wrote[np.flatnonzero(np.diff(wrote, prepend=0))].tolist() == hosts
    field = np.arange(ledger["FIELD"] // 8, dtype=np.uint64)
    ledger["write"](field, 0, count)
    wrong = np.flatnonzero(machine.ram["field"].array(dtype="uint64") != field)
    assert not wrong.size, f"{wrong.size} words of the field differ, the first is {wrong[0]}: writes were lost"
    return [int(np.count_nonzero(wrote == host)) for host in hosts]


@pytest.mark.parametrize(
    ("chosen", "named"), [("auto", "userfaultfd+guest"), ("compare", "compare"), ("manual", "manual+guest")]
)
def test_it_moves_live_and_nothing_is_lost_or_done_twice(pair, ledger, chosen, named):
    pair.source.settings.backends.dirty_tracker = chosen
    pair.source.settings.parameters.max_bandwidth = 40 << 20  # so that it is written while it is sent
    pair.source.start()
    wait_lines(pair.source, 100)
    before = int(words(pair.source)[0])
    incoming, outgoing = pair.run(timeout=LONG)
    assert outgoing.error is None
    assert incoming.error is None
    assert outgoing.info.tracker == named
    assert outgoing.info.rounds >= 1, "it was to be live"
    assert words(pair.source)[0] > before, "it was to run meanwhile"
    wait_lines(pair.destination, 100)
    pair.destination.stop()
    first, _ = check(pair.destination, ledger, [1, 2])
    assert check(pair.source, ledger, [1]) == [first], "the source has gone on when it was frozen"
    assert words(pair.destination)[2] == 1, "a machine that arrived is not powered on"


@pytest.mark.slow
def test_it_moves_on_and_on_at_full_speed(make_pair, build, settings, ledger):
    """Writers that never rest, and two migrations in a row."""
    settings.backends.memory = "memfd"

    def flat_out(settings, plugins):
        return build(settings, plugins, rest=0)

    pair = make_pair(flat_out, settings=settings, uri="tcp:127.0.0.1:0")
    pair.source.start()
    for hosts in ([1, 2], [1, 2, 3]):
        wait_lines(pair.source, 1000)
        _, outgoing = pair.run(timeout=LONG)
        assert outgoing.error is None
        wait_lines(pair.destination, 1000)
        pair.destination.stop()
        check(pair.destination, ledger, hosts)
        pair.destination.start()
        pair.move_on()


@pytest.mark.parametrize("cut", [100, 3 << 20])
def test_a_link_that_breaks_leaves_the_guest_running(pair, ledger, cut):
    pair.faults = Faults(cut_sent=cut)
    pair.source.start()
    _, outgoing = pair.run(timeout=LONG)
    assert outgoing.status is MigrationStatus.FAILED
    assert pair.source.run_state == "running"
    wait_lines(pair.source, 100)
    pair.faults = Faults()
    pair.new_destination()
    _, outgoing = pair.run(timeout=LONG)
    assert outgoing.error is None
    wait_lines(pair.destination, 10)
    pair.destination.stop()
    check(pair.destination, ledger, [1, 3])


def test_a_cancel_leaves_the_guest_running(pair, ledger):
    pair.source.settings.parameters.max_bandwidth = 1 << 20
    pair.source.start()
    incoming, outgoing = pair.migrate()
    wait_until(lambda: outgoing.status is MigrationStatus.ACTIVE)
    wait_lines(pair.source, 10)
    assert outgoing.cancel()
    with pytest.raises(MigrationCancelled):
        outgoing.wait(LONG)
    settle(incoming, LONG)
    assert pair.source.run_state == "running"
    wait_lines(pair.source, 100)
    pair.source.stop()
    check(pair.source, ledger, [1])


def test_a_paused_machine_moves_and_stays_paused(pair, ledger):
    pair.source.start()
    wait_lines(pair.source, 10)
    pair.source.stop()
    _, outgoing = pair.run(timeout=LONG)
    assert outgoing.error is None
    assert pair.destination.run_state == "paused"
    check(pair.destination, ledger, [1])
    pair.destination.start()
    wait_lines(pair.destination, 10)
    pair.destination.stop()
    check(pair.destination, ledger, [1, 2])


def test_a_child_that_is_killed_on_the_way_ends_the_migration(pair):
    pair.faults = Faults(stall_sent=3 << 20)
    pair.source.start()
    wait_lines(pair.source, 10)
    incoming, outgoing = pair.migrate()
    stalled = pair.wait_stalled()
    os.kill(pair.source.guest.pid, signal.SIGKILL)
    pair.source.guest._watch.join(LONG)  # the machine knows
    assert pair.source.run_state == "internal-error"
    assert "was killed by SIGKILL" in str(pair.source.failure)
    stalled.release()
    with pytest.raises((GuestError, TrackerUnavailable), match=r"SIGKILL|process that writes to"):
        outgoing.wait(LONG)
    settle(incoming, LONG)
    assert outgoing.status is MigrationStatus.FAILED
    assert incoming.error is not None
    assert pair.destination.run_state != "running"


def test_a_workload_that_fails_on_the_way_ends_the_migration(pair):
    pair.faults = Faults(stall_sent=3 << 20)
    pair.source.start()
    wait_lines(pair.source, 10)
    incoming, outgoing = pair.migrate()
    stalled = pair.wait_stalled()
    failed = threading.Event()
    told = pair.source.guest.on_failure
    pair.source.guest.on_failure = lambda exc: (told(exc), failed.set())
    words(pair.source)[1] = 1
    assert failed.wait(LONG)
    assert pair.source.run_state == "internal-error"
    stalled.release()
    with pytest.raises(GuestError, match="a bug of the guest's") as caught:
        outgoing.wait(LONG)
    settle(incoming, LONG)
    assert "in step" in caught.value.__cause__.__notes__[0], "the child's traceback is told"
    assert pair.destination.run_state != "running"


def test_a_destination_whose_memory_is_not_shared_does_not_listen(make_pair, build, settings):
    shared = settings.copy()
    shared.backends.memory = "memfd"
    pair = make_pair(build, settings=shared, destination_settings=settings, uri="tcp:127.0.0.1:0")
    with pytest.raises(ConfigError, match="needs memory to share"):
        pair.destination.incoming("tcp:127.0.0.1:0")
    assert pair.destination.run_state == "prelaunch"
