"""The law: never two running, no going back in time, and where nobody runs, both sides say so.

The oracle is the guest: it writes down (host, n) under an exclusive lock while it runs, and keeps n in its memory. Two
running at once meet at the lock; a machine that was started from an old image, or twice, repeats or skips an n.
"""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from whimbrel import LoopGuest, Machine, MigrationStatus, PluginManager, RunState, Settings, hookimpl, vmstate
from whimbrel.abc import Guest, TransportSpec
from whimbrel.errors import HandoverUndecided, MigrationError, StateError
from whimbrel.machine.dirty import plugin as trackers
from whimbrel.testing.faults import Faults, FaultyChannel, FaultyTransport
from whimbrel.testing.memory import MemoryNetwork
from whimbrel.testing.pair import RecordingChannel, settle
from whimbrel_savevm import block, devices, ram
from whimbrel_transports import tcp

LONG = 60.0


class Ledger:
    """What ran where: every n exactly once, in order."""

    def __init__(self):
        self.lock = threading.Lock()
        self.entries = []
        self.conflicts = []

    def enter(self, host):
        if not self.lock.acquire(blocking=False):
            self.conflicts.append((host, self.entries[-1:]))

    def leave(self):
        self.lock.release()

    def append(self, host, n):
        self.entries.append((host, n))

    def check(self):
        assert not self.conflicts
        numbers = [n for _, n in self.entries]
        assert numbers == list(range(1, len(numbers) + 1))


class Witness(Guest):
    """Holds the ledger's lock as long as it runs, and makes one entry whenever it is started."""

    def __init__(self, ledger, host, machine):
        self.ledger, self.host = ledger, host
        self.block = machine.ram["a"]

    def power_on(self):
        pages = self.block.view.reshape(-1, 4096)
        pages[1, 1000:1100] = 7

    def start(self):
        self.ledger.enter(self.host)
        self.tick()

    def stop(self):
        self.ledger.leave()

    def tick(self):
        count = self.block.view[4096 : 4096 + 8].view(np.uint64)
        count += 1
        self.block.mark_dirty(4096, 8)
        self.ledger.append(self.host, int(count[0]))


class Device:
    def __init__(self):
        self.value = 0
        self.rest = bytes(5)


FIRST = vmstate.VMStateDescription("first", 1, fields=[vmstate.uint32("value")])
SECOND = vmstate.VMStateDescription("second", 1, fields=[vmstate.buffer("rest", size=5)])


class Dying(FaultyChannel):
    """A channel that dies under the hands of the source that has let go, before its EOF is sent."""

    def send(self, data):
        if bytes(data[:2]) == b"\0\x06":
            self.die()
        super().send(data)


class OneRound:
    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        return True


class World:
    """Machines of one kind, one of which is the source and another the destination; roles change on arrival."""

    def __init__(self, transport, uri, guest):
        self.uri, self.make_guest = uri, guest
        self.ledger = Ledger()
        self.faults = Faults()
        self.channel = self.recorded = None
        self.dies_at_end_of_stream = False
        link = FaultyTransport(transport, on_connect=self.connected)
        self.plugins = PluginManager(load_entry_points=False)
        for plugin in (trackers, ram, block, devices, OneRound(), Link(uri.partition(":")[0], link)):
            self.plugins.register(plugin)
        self.settings = Settings()
        self.settings.backends.dirty_tracker = "manual"
        self.settings.parameters.update({"max_bandwidth": 0, "announce_rounds": 0})
        self.hosts = 0
        self.source, self.destination = self.machine(), self.machine()
        self.source.start()

    def machine(self):
        machine = Machine("tiny", settings=self.settings.copy(), plugins=self.plugins)
        machine.ram.add("a", 2 * 4096)
        machine.ram.add("b", 3 * 4096)
        machine.first, machine.second = Device(), Device()
        machine.devices.add("first", machine.first, FIRST)
        machine.devices.add("second", machine.second, SECOND)
        self.hosts += 1
        machine.guest = self.make_guest(self.ledger, self.hosts, machine)
        machine.first.value, machine.second.rest = 0, bytes(5)
        return machine

    def connected(self, channel):
        self.recorded = RecordingChannel(channel)
        self.channel = (Dying if self.dies_at_end_of_stream else FaultyChannel)(self.recorded, self.faults)
        return self.channel

    def attempt(self, faults):
        """One migration from the source to the destination, to its end on both sides."""
        self.faults = faults
        if self.destination.run_state is RunState.PRELAUNCH:
            self.source.first.value, self.source.second.rest = 0xDEAD, b"12345"
        incoming = self.destination.incoming(self.uri)
        outgoing = self.source.migrate(incoming.uri, handover="proof")
        settle(outgoing, LONG)
        if faults.cut_sent is not None and faults.cut_sent < 8:
            incoming.cancel()  # it never saw a header, and waits on for somebody who has one
        settle(incoming, LONG)
        return incoming, outgoing

    def judge(self, incoming, outgoing, *, running=True):
        """Hold an ended attempt against the law; returns what became of it. What arrives should be `running`."""
        source_runs = self.source.run_state is RunState.RUNNING
        destination_runs = self.destination.run_state is RunState.RUNNING
        assert not (source_runs and destination_runs)
        assert not self.ledger.conflicts
        for migration in (incoming, outgoing):
            if migration.status is MigrationStatus.FAILED:
                assert isinstance(migration.error, MigrationError)
                assert type(migration.error) is not MigrationError
                assert str(migration.error.place)
            else:
                assert migration.status is MigrationStatus.COMPLETED
        mine, theirs = outgoing.info.ownership, incoming.info.ownership
        if mine == "owner":
            # Not let go of: the source runs on, and the destination has nothing, or is held by its own proof.
            assert outgoing.status is MigrationStatus.FAILED
            assert not isinstance(outgoing.error, HandoverUndecided)
            assert source_runs
            assert theirs in {"refused", "prepared"}
        else:
            assert self.source.run_state is RunState.POSTMIGRATE
            assert mine == "done" or isinstance(outgoing.error, HandoverUndecided)
            assert theirs in {"owner", "prepared"}  # it had proved that it holds everything
        if theirs == "refused":
            self.clean()
        elif theirs == "prepared":
            assert isinstance(incoming.error, HandoverUndecided)
            assert self.destination.run_state is RunState.INMIGRATE
        else:
            assert destination_runs or not running
        return mine, theirs

    def clean(self):
        assert self.destination.run_state is RunState.INMIGRATE
        assert not any(block.view.any() for block in self.destination.ram)
        assert (self.destination.first.value, self.destination.second.rest) == (0, bytes(5))

    def decide(self, incoming, mine, theirs, *, adopt):
        """Be the operator, who knows both sides, and set the stage for the next attempt."""
        if theirs == "prepared":
            if mine == "owner" or not adopt:
                incoming.discard()
                self.clean()
                if mine != "owner":
                    self.source.reclaim()
                    self.source.start()
                return
            incoming.adopt()
            theirs = "owner"
        if theirs == "owner":
            assert self.destination.run_state is RunState.RUNNING
            assert (self.destination.first.value, self.destination.second.rest) == (0xDEAD, b"12345")
            assert self.destination.ram["a"].view[4096 + 1000 : 4096 + 1100].tolist() == [7] * 100
            self.source.close()
            self.source, self.destination = self.destination, self.machine()

    def close(self):
        self.source.close()
        self.destination.close()


class Link:
    def __init__(self, scheme, transport):
        self.spec = TransportSpec(name=scheme, summary="", create=lambda: transport)

    @hookimpl
    def whimbrel_transports(self):
        return [self.spec]


@pytest.fixture
def world():
    world = World(MemoryNetwork(), "memory:world", Witness)
    yield world
    world.close()


@pytest.fixture
def measured(world, walk):
    """An undisturbed migration: its elements, and how many bytes went each way."""
    incoming, outgoing = world.attempt(Faults())
    mine, theirs = world.judge(incoming, outgoing)
    assert (mine, theirs) == ("done", "owner")
    elements = {f"{one.element} {one.name}".strip(): one for one in walk(bytes(world.recorded.sent))}
    sent, received = world.channel.sent, world.channel.received
    assert received == 32  # PONG 1, PONG of the round, PONG of the proof, SHUT 0
    world.decide(incoming, mine, theirs, adopt=True)
    return elements, sent, received


ORDERLY = pytest.mark.parametrize("orderly", [False, True], ids=["reset", "orderly"])

REFUSED, HELD, UNDECIDED, LEFT, DONE = (
    ("owner", "refused"),  # the source runs on, the destination is clean
    ("owner", "prepared"),  # the source runs on, the destination holds what it has proved
    ("released", "prepared"),  # nobody runs
    ("released", "owner"),  # the destination runs, and the source does not know
    ("done", "owner"),
)


def expected_of(cut, elements, sent):
    """What may become of a link that is cut behind `cut` bytes to the destination."""
    proof, end = elements["COMMAND PING 0x77686d62"], elements["EOF"]
    assert proof.end == end.offset
    if cut < proof.end:
        return {REFUSED}
    if cut == proof.end:
        return {HELD, UNDECIDED}  # with the last byte of the PING; its PONG may be quicker than the cut
    # The EOF is through. Its answer may be quicker than the cut, too, which then has done no harm.
    return {LEFT, DONE}


def cut_at(world, elements, sent, cuts, *, orderly):
    for number, cut in enumerate(cuts):
        incoming, outgoing = world.attempt(Faults(cut_sent=cut, orderly=orderly))
        outcome = world.judge(incoming, outgoing)
        assert outcome in expected_of(cut, elements, sent), cut
        world.decide(incoming, *outcome, adopt=bool(number % 2))
    world.ledger.check()


def page_of(elements):
    """The bytes in the middle of the one page that travels: a cut there is like the cut one byte before."""
    (part,) = [one for one in elements.values() if "PAGE" in {kind for _, kind, _ in one.pages}]
    return range(part.offset + 100, part.end - 100)


@pytest.mark.slow
@ORDERLY
def test_a_link_that_is_cut_all_along_to_the_destination(world, measured, orderly):
    """About the ends of all elements, at every byte from the proof on, and here and there: the next have the rest."""
    elements, sent, _ = measured
    proof = elements["COMMAND PING 0x77686d62"].offset
    ends = {end + near for one in elements.values() for end in (one.offset, one.end) for near in (-1, 0, 1)}
    cuts = [cut for cut in range(sent + 1) if cut in ends or proof <= cut <= proof + 24 or cut % 67 == 0]
    cut_at(world, elements, sent, cuts, orderly=orderly)
    assert len(world.ledger.entries) > 25  # whoever was stopped went on, here or there


@pytest.mark.long
@ORDERLY
def test_a_link_that_is_cut_at_every_byte_to_the_destination(world, measured, orderly):
    """Every byte, but of the inside of a page every 32nd: the next test has the others."""
    elements, sent, _ = measured
    inside = page_of(elements)
    assert 3_800 < len(inside) < 4_096
    cuts = [cut for cut in range(sent + 1) if cut not in inside or cut % 32 == 0]
    cut_at(world, elements, sent, cuts, orderly=orderly)
    assert len(world.ledger.entries) > 500  # whoever was stopped went on, here or there


@pytest.mark.long
@ORDERLY
def test_a_link_that_is_cut_at_every_byte_in_a_page(world, measured, orderly):
    elements, sent, _ = measured
    cut_at(world, elements, sent, page_of(elements), orderly=orderly)


@ORDERLY
@pytest.mark.parametrize("adopt", [False, True])
def test_a_link_that_is_cut_at_every_byte_from_the_destination(world, measured, orderly, adopt):
    _, _, received = measured
    for cut in range(received + 1):
        incoming, outgoing = world.attempt(Faults(cut_received=cut, orderly=orderly))
        outcome = world.judge(incoming, outgoing)
        if cut <= 16:
            expected = {REFUSED}
        elif cut < 24:
            expected = {HELD}
        elif cut == 24:
            expected = {HELD, UNDECIDED, LEFT}  # with the last byte of the proof
        else:
            expected = {DONE} if cut == received else {LEFT}
        assert outcome in expected, cut
        world.decide(incoming, *outcome, adopt=adopt)
    world.ledger.check()


@ORDERLY
@pytest.mark.parametrize("adopt", [False, True])
def test_a_link_that_dies_between_the_release_and_the_order(world, measured, orderly, adopt):
    """The one window in which nobody runs: both sides hold the machine, both stand still, and both say so."""
    world.dies_at_end_of_stream = True
    ran = len(world.ledger.entries)
    incoming, outgoing = world.attempt(Faults(orderly=orderly))
    assert world.judge(incoming, outgoing) == UNDECIDED
    assert len(world.ledger.entries) == ran
    assert (world.source.run_state, world.destination.run_state) == (RunState.POSTMIGRATE, RunState.INMIGRATE)
    assert "reclaim()" in str(outgoing.error)
    assert "adopt()" in str(incoming.error)
    with pytest.raises(StateError):
        world.source.start()
    with pytest.raises(StateError):
        world.destination.start()
    # Whoever is told to by an operator goes on from where the machine stood, and the other never does.
    world.dies_at_end_of_stream = False
    host = world.destination.guest.host if adopt else world.source.guest.host
    world.decide(incoming, *UNDECIDED, adopt=adopt)
    assert world.ledger.entries[ran:] == [(host, ran + 1)]
    incoming, outgoing = world.attempt(Faults())
    assert world.judge(incoming, outgoing) == DONE
    world.ledger.check()


def test_an_oracle_that_sees_two_running(world):
    """The judge itself: two that run meet at the lock, and what is started from an old image repeats a number."""
    world.destination.start()
    assert world.ledger.conflicts
    with pytest.raises(AssertionError):
        world.ledger.check()
    world.ledger.conflicts.clear()
    with pytest.raises(AssertionError):
        world.ledger.check()
    world.destination.guest.stop = lambda: None  # it never got the lock


# ----------------------------------------------------------------------------------------------- with a guest that runs


class Stepper(LoopGuest):
    """Takes the ledger's lock for every step, and makes an entry in it."""

    def __init__(self, ledger, host, machine):
        super().__init__(self.make_step, power_on=lambda: Witness.power_on(self))
        self.ledger, self.host, self.block = ledger, host, machine.ram["a"]

    def make_step(self):
        self.ledger.enter(self.host)
        Witness.tick(self)
        self.ledger.leave()
        threading.Event().wait(0.0001)


def shaken(world, seed):
    """An attempt with whatever `seed` says goes wrong, and what became of it."""
    dice = random.Random(seed)
    typical = 5_500
    direction = dice.choice(["cut_sent", "cut_sent", "cut_sent", "cut_received", "none"])
    faults = {"orderly": dice.random() < 0.5, "crumbs": dice.choice([1 << 20, 1 << 20, 700, 33])}
    if direction == "cut_sent":
        # Half of them where it is delicate: around the end.
        faults["cut_sent"] = dice.randrange(typical) if dice.random() < 0.5 else 4_400 + dice.randrange(1_100)
    elif direction == "cut_received":
        faults["cut_received"] = dice.randrange(40)
    incoming, outgoing = world.attempt(Faults(**faults))
    outcome = world.judge(incoming, outgoing)
    if outcome == UNDECIDED:
        ran = len(world.ledger.entries)
        threading.Event().wait(0.002)  # whoever ran now would make an entry
        assert len(world.ledger.entries) == ran
    world.decide(incoming, *outcome, adopt=dice.random() < 0.5)
    return outcome


@pytest.mark.parametrize("seed", range(60))
def test_bits_that_flip_on_the_way_never_make_it_two(world, measured, seed):
    """Nothing checks the bytes themselves, so some arrive wrong; where that is noticed, it is one error, in order."""
    elements, sent, received = measured
    dice = random.Random(seed)
    inside = page_of(elements)
    delicate = [at for at in range(sent) if at not in inside]
    faults = Faults(
        flip_sent={dice.choice(delicate): 1 << dice.randrange(8) for _ in range(dice.randrange(3))},
        flip_received={dice.randrange(received): 1 << dice.randrange(8) for _ in range(dice.randrange(2) + seed % 2)},
    )
    incoming, outgoing = world.attempt(faults)
    world.judge(incoming, outgoing, running=False)


@pytest.mark.parametrize(
    "seeds", [range(50), pytest.param(range(50, 350), marks=pytest.mark.long)], ids=["some", "many"]
)
@pytest.mark.parametrize("transport", ["memory", "tcp"])
def test_over_many_seeded_cuts_the_ledger_has_every_number_once(transport, seeds):
    if transport == "memory":
        world = World(MemoryNetwork(), "memory:world", Stepper)
    else:
        world = World(tcp.TcpTransport(), "tcp:127.0.0.1:0", Stepper)
    try:
        outcomes = [shaken(world, seed) for seed in seeds]
        world.source.stop()
        world.ledger.check()
    finally:
        world.close()
    assert {REFUSED, LEFT, DONE} <= set(outcomes)
    assert len({host for host, _ in world.ledger.entries}) > len(seeds) // 8
    assert len(world.ledger.entries) > len(outcomes)
