"""Drives move with their machine: byte for byte, however often, wherever the link is cut, and never two write."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from whimbrel import LoopGuest, Machine, Settings
from whimbrel.errors import (
    HandoverUndecided,
    IncompatibleError,
    MigrationError,
    MigrationRefused,
    StateError,
)
from whimbrel.machine import RawImage, RunState
from whimbrel.monitor.commands import COMMANDS
from whimbrel.monitor.context import Context
from whimbrel.monitor.session import Session
from whimbrel.testing.faults import Faults
from whimbrel_savevm._block_loader import BlockLoader

LONG = 60.0
MIB = 1 << 20
PAGE = 4096
SIZES = {"disk0": 3 * MIB + 512, "sparse": 12 * MIB}
RAM = 64 * PAGE


def image_of(folder, name):
    return folder / f"{name}.img"


def marker_of(path):
    return path.with_name(path.name + ".whimbrel-incomplete")


def first_difference(found, expected):
    """Where two buffers differ first, or None."""
    found, expected = np.frombuffer(found, np.uint8), np.frombuffer(expected, np.uint8)
    assert len(found) == len(expected)
    where = np.flatnonzero(found != expected)
    return int(where[0]) if len(where) else None


class World:
    """Machines with two drives and RAM on two hosts by turns, and the perfect copy of what their guest has written.

    The guest writes to everything all the time, and appends (host, n) to a log in the drive `log`; n is in RAM.
    `appended` has what every guest ever appended, in the order in which they did.
    """

    def __init__(self, folder, *, shared=False):
        self.folder, self.shared = folder, shared
        self.copies = {name: bytearray(size) for name, size in SIZES.items()}
        self.ram_copy = bytearray(RAM)
        self.appended = []
        self.built = 0
        self.dice = random.Random(7)
        self.changed = threading.Condition()
        for host in ("a", "b"):
            (folder / host).mkdir()
            for name, size in {**SIZES, "log": MIB}.items():
                with image_of(folder / host, name).open("wb") as file:
                    file.truncate(size)

    def host(self, number):
        return self.folder / ("a" if self.shared or number % 2 == 0 else "b")

    def __call__(self, settings, plugins):
        machine = Machine("driven", settings=settings, plugins=plugins)
        number, folder = self.built, self.host(self.built)
        self.built += 1
        ram = machine.ram.add("ram", RAM).view
        count = machine.ram.add("count", PAGE).view.view(np.uint64)
        for name in (*SIZES, "log"):
            machine.drives.add(name, image_of(folder, name))

        def step():
            self.turn(machine, ram)
            self.append(machine, number, count)
            time.sleep(0.0005)

        machine.guest = LoopGuest(step, power_on=lambda: self.fill(machine, ram))
        return machine

    def fill(self, machine, ram):
        data = self.dice.randbytes(SIZES["disk0"])
        machine.drives["disk0"].write(0, data)
        self.copies["disk0"][:] = data
        ram[:] = np.frombuffer(data[:RAM], np.uint8)
        self.ram_copy[:] = data[:RAM]

    def turn(self, machine, ram):
        """Write somewhere, sometimes zeros, sometimes a hole."""
        dice = self.dice
        for name, copy in self.copies.items():
            size = dice.choice((1, 16, 512, 4096, 70000))
            at = dice.randrange(len(copy) - size + 1)
            drive = machine.drives[name]
            if dice.random() < 0.1:
                drive.discard(at, size)
                copy[at : at + size] = bytes(size)
            else:
                data = dice.randbytes(size) if dice.random() < 0.9 else bytes(size)
                drive.write(at, data)
                copy[at : at + size] = data
        at = dice.randrange(RAM - 8)
        data = dice.randbytes(8)
        ram[at : at + 8] = np.frombuffer(data, np.uint8)
        self.ram_copy[at : at + 8] = data

    def append(self, machine, host, count):
        number = int(count[0])
        machine.drives["log"].write(number * 16 % MIB, host.to_bytes(8, "big") + number.to_bytes(8, "big"))
        with self.changed:
            self.appended.append((host, number))
            self.changed.notify_all()
        count[0] += 1

    def wait_more(self, count=5):
        with self.changed:
            goal = len(self.appended) + count
            assert self.changed.wait_for(lambda: len(self.appended) >= goal, LONG), "the guest stands still"

    def check(self, machine):
        """The machine, which is stopped, has what its guests wrote, and nobody wrote beside them."""
        for name, copy in self.copies.items():
            assert first_difference(machine.drives[name].read(0, len(copy)), copy) is None, name
        assert first_difference(machine.ram["ram"].view, self.ram_copy) is None
        assert [number for _, number in self.appended] == list(range(len(self.appended))), "a gap, a fork or a repeat"
        log = machine.drives["log"].read(0, MIB)
        for host, number in self.appended[-(MIB // 16) :]:
            at = number * 16 % MIB
            assert log[at : at + 16] == host.to_bytes(8, "big") + number.to_bytes(8, "big")


@pytest.fixture
def driven():
    """Settings with which the drives go along."""
    settings = Settings()
    settings.parameters.max_bandwidth = 0
    settings.parameters.announce_rounds = 1
    settings.capabilities.block = True
    return settings


@pytest.fixture
def moving(make_pair, tmp_path, driven):
    """`moving(…)`: a World and its Pair, whose source runs."""

    def make(*, shared=False, **more):
        world = World(tmp_path, shared=shared)
        pair = make_pair(world, settings=driven, **more)
        pair.source.start()
        world.wait_more()
        return world, pair

    return make


def succeed(world, pair):
    incoming, outgoing = pair.run(timeout=LONG)
    assert (incoming.error, outgoing.error) == (None, None)
    return incoming, outgoing


def there_and_back(moving, times, **more):
    world, pair = moving(uri="tcp:127.0.0.1:0", **more)
    for _ in range(times):
        succeed(world, pair)
        world.wait_more()
        pair.destination.stop()
        world.check(pair.destination)
        pair.destination.start()
        pair.move_on()


def test_two_drives_under_constant_writes_move_there_and_back_and_there(moving):
    there_and_back(moving, 3)


@pytest.mark.long
def test_two_drives_under_constant_writes_move_twenty_times(moving):
    there_and_back(moving, 20)


@pytest.mark.parametrize("zero_blocks", [False, True])
def test_what_is_sparse_stays_sparse(moving, driven, zero_blocks):
    driven.capabilities.zero_blocks = zero_blocks
    world, pair = moving()
    pair.source.stop()
    sent = image_of(world.host(0), "sparse")
    _, outgoing = succeed(world, pair)
    came = image_of(world.host(1), "sparse")
    world.check(pair.destination)
    assert came.stat().st_blocks * 512 <= sent.stat().st_blocks * 512 + MIB
    disk = outgoing.info.transfers["disk"]
    assert disk.total == sum(SIZES.values()) + MIB
    assert disk.remaining == 0
    if not zero_blocks:
        assert disk.transferred > disk.total


def test_marks_for_zeros_take_no_room_on_the_link(moving, driven):
    driven.capabilities.zero_blocks = True
    world, pair = moving()
    pair.source.stop()
    allocated = sum(int(drive.allocated().sum()) for drive in pair.source.drives)
    chunks = sum(drive.chunks for drive in pair.source.drives)
    assert allocated < chunks
    _, outgoing = succeed(world, pair)
    assert outgoing.info.transfers["disk"].transferred < (allocated + 0.1) * MIB


def test_with_inc_only_what_is_allocated_goes_along(moving, driven):
    """The destination has the rest: what is there, where nothing was allocated, stays."""
    driven.parameters.block_incremental = True
    world, pair = moving()
    pair.source.stop()
    drive = pair.source.drives["sparse"]
    hole = int(np.flatnonzero(~drive.allocated())[-1])
    base = image_of(world.host(1), "sparse")
    with base.open("r+b") as file:
        file.seek(hole * MIB)
        file.write(b"from the base")
    succeed(world, pair)
    assert pair.destination.drives["sparse"].read(hole * MIB, 13) == b"from the base"
    assert pair.destination.drives["disk0"].read(0, 100) == world.copies["disk0"][:100]


@pytest.mark.parametrize("flag", ["blk", "inc"])
def test_a_monitor_sends_them_along_and_tells_of_them(moving, driven, flag):
    driven.capabilities.block = False
    world, pair = moving()
    pair.source.stop()
    console = Session(Context(pair.source), COMMANDS)

    def ask(command, **arguments):
        (answer,) = console.receive(json.dumps({"execute": command, "arguments": arguments}).encode())
        return json.loads(answer.line)["return"]

    ask("qmp_capabilities")
    pair.source.settings.capabilities.pause_before_switchover = True
    arriving = pair.destination.incoming(pair.uri)
    assert ask("migrate", uri=arriving.uri, **{flag: True}) == {}
    while ask("query-migrate").get("status") != "pre-switchover":
        assert not pair.source.migration.status.finished
    disk = ask("query-migrate")["disk"]
    assert disk["total"] == sum(SIZES.values()) + MIB
    assert disk["remaining"] == 0
    ask("migrate-continue", state="pre-switchover")
    arriving.wait(LONG)
    pair.source.migration.wait(LONG)
    assert "disk" not in ask("query-migrate")
    world.check(pair.destination)


# ------------------------------------------------------------------------------------------------------ cut links


def cut_anywhere(moving, times):
    world, pair = moving()
    succeed(world, pair)
    pair.move_on()
    size = 30 * MIB
    dice = random.Random(11)
    cut = 0
    for _ in range(times):
        pair.faults = Faults(cut_sent=dice.randrange(size) if dice.random() < 0.7 else dice.randrange(3000))
        incoming, outgoing = pair.run(timeout=LONG)
        if outgoing.error is None:
            assert incoming.error is None
            pair.move_on()
            continue
        if isinstance(outgoing.error, HandoverUndecided):
            # The last bytes: it has let go, and whoever looks at both sides can tell that the other has not run.
            assert not pair.source.drives["disk0"].device.acquired
            if incoming.error is not None:
                incoming.adopt()
            pair.move_on()
            continue
        cut += 1
        assert incoming.error is not None
        world.wait_more(2)
        pair.source.stop()
        world.check(pair.source)
        pair.source.start()
        for drive in pair.destination.drives:
            assert not drive.device.acquired
    assert cut >= times // 2
    pair.faults = Faults()
    succeed(world, pair)
    pair.destination.stop()
    world.check(pair.destination)
    assert not any(marker_of(Path(drive.device.place)).exists() for drive in pair.destination.drives)


def test_a_link_that_is_cut_anywhere_leaves_the_source_its_drives(moving):
    cut_anywhere(moving, 6)


@pytest.mark.long
def test_a_link_that_is_cut_at_two_hundred_places(moving):
    cut_anywhere(moving, 200)


def test_an_image_that_was_not_loaded_to_the_end_is_not_used_until_it_is(moving):
    world, pair = moving()
    pair.faults = Faults(cut_sent=12 * MIB)  # so much further than is kept in memory that some must be written
    incoming, outgoing = pair.run(timeout=LONG)
    assert isinstance(incoming.error, MigrationError)
    assert isinstance(outgoing.error, MigrationError)
    image = image_of(world.host(1), "disk0")
    assert marker_of(image).exists()
    fresh = Machine("other")
    fresh.drives.add("d", image)
    with pytest.raises(StateError, match="not whole"):
        fresh.start()
    fresh.close()
    pair.faults = Faults()
    succeed(world, pair)
    world.wait_more()
    pair.destination.stop()
    world.check(pair.destination)
    assert not marker_of(image).exists()


def test_what_was_not_whole_is_not_made_so_by_a_part(moving, driven):
    driven.parameters.block_incremental = True
    world, pair = moving()
    pair.source.stop()
    image = image_of(world.host(1), "sparse")
    marker_of(image).write_text("from an earlier load")
    incoming, outgoing = pair.run(timeout=LONG)
    assert isinstance(incoming.error, IncompatibleError)
    assert "load all of it" in str(incoming.error)
    assert outgoing.error is not None
    assert marker_of(image).exists()
    assert all(drive.device.acquired for drive in pair.source.drives)


# -------------------------------------------------------------------------------------------- what is not loaded


def refused(world, pair, match):
    incoming, outgoing = pair.run(timeout=LONG)
    assert match in str(incoming.error)
    assert isinstance(outgoing.error, MigrationError)
    assert not isinstance(outgoing.error, HandoverUndecided)
    world.wait_more()
    assert all(drive.device.acquired for drive in pair.source.drives)
    return incoming


def test_an_image_that_is_too_small(moving):
    world, pair = moving()
    pair.destination.close()
    image = image_of(world.host(1), "sparse")
    with image.open("r+b") as file:
        file.truncate(11 * MIB)
    world.built = 1  # again one of host b
    pair.new_destination()
    refused(world, pair, "which has 11534336 here")
    assert marker_of(image).exists() or not image.stat().st_blocks, "changed, and not marked"


def test_an_image_that_somebody_else_uses_is_refused_before_a_byte_of_any_changes(moving):
    world, pair = moving()
    other = RawImage(image_of(world.host(1), "log"))
    other.acquire()
    incoming = refused(world, pair, "drive 'log' cannot be loaded")
    assert isinstance(incoming.error, IncompatibleError)
    for name in (*SIZES, "log"):
        assert not image_of(world.host(1), name).stat().st_blocks
        assert not marker_of(image_of(world.host(1), name)).exists()
        assert not pair.destination.drives[name].device.acquired
    other.close()
    succeed(world, pair)


def test_the_same_image_on_both_sides_is_not_sent_into_itself(moving):
    world, pair = moving(shared=True)
    refused(world, pair, "migrate without block")


def test_a_chunk_that_the_destination_passes_over_is_found_out(moving, monkeypatch):
    """Before the source lets go: both ends tell how many chunks of each drive they have dealt with."""
    world, pair = moving(uri="tcp:127.0.0.1:0", handover="auto")
    load = BlockLoader._load_chunk
    monkeypatch.setattr(
        BlockLoader, "_load_chunk", lambda self, drive, record: record.number == 1 or load(self, drive, record)
    )
    refused(world, pair, "the source has sent")


def test_a_drive_that_fails_when_it_is_read(moving, monkeypatch):
    world, pair = moving()
    device = pair.source.drives["sparse"].device
    monkeypatch.setattr(device, "read_at_once", lambda *_: False)
    monkeypatch.setattr(device, "read_into", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    incoming, outgoing = pair.run(timeout=LONG)
    assert "drive 'sparse' cannot be read at" in str(outgoing.error)
    assert incoming.error is not None
    world.wait_more()


def test_a_drive_that_fails_when_it_is_written(moving, monkeypatch):
    world, pair = moving()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pair.destination.drives["disk0"].device, "write", fail)
    refused(world, pair, "No space left on device")


def test_without_a_handler_drives_are_not_left_behind_in_silence(moving, driven):
    driven.plugins.savevm = ("ram", "devices")
    world, pair = moving()
    with pytest.raises(MigrationRefused, match="savevm lacks 'block'"):
        pair.migrate()
    world.wait_more()


# ------------------------------------------------------------------------------------------------------- ownership


def test_the_source_lets_go_of_its_locks_with_the_machine(moving):
    world, pair = moving()
    succeed(world, pair)
    assert not any(drive.device.acquired for drive in pair.source.drives)
    assert all(drive.device.acquired for drive in pair.destination.drives)
    with pytest.raises(StateError):
        pair.source.drives["disk0"].write(0, b"x")
    with pytest.raises(StateError, match="lock is not held"):
        pair.source.drives["disk0"].device.write(0, b"x")


def test_a_shared_image_is_not_sent_and_its_lock_passes(moving, driven):
    driven.capabilities.block = False
    world, pair = moving(shared=True)
    _, outgoing = succeed(world, pair)
    assert "disk" not in outgoing.info.transfers
    world.wait_more()
    pair.destination.stop()
    world.check(pair.destination)
    pair.source.reclaim()  # the operator's word is wrong, and the lock knows better
    with pytest.raises(StateError, match="in use"):
        pair.source.start()


def test_images_that_only_look_the_same_are_refused_while_the_source_has_the_machine(moving, driven):
    driven.capabilities.block = False
    world, pair = moving()
    incoming = refused(world, pair, "was not sent")
    assert isinstance(incoming.error, IncompatibleError)
    driven.capabilities.block = True
    pair.source.settings.capabilities.block = True
    succeed(world, pair)


def test_a_lock_that_somebody_else_takes_in_between_keeps_the_machine_from_running(moving, driven, monkeypatch):
    """Nobody runs then, both sides say so, and the machine is there for when the image is free."""
    driven.capabilities.block = False
    world, pair = moving(shared=True)
    thief = RawImage(image_of(world.host(0), "sparse"))
    release = pair.source.drives.release

    def release_to_the_thief():
        release()
        thief.acquire()

    monkeypatch.setattr(pair.source.drives, "release", release_to_the_thief)
    incoming, outgoing = pair.run(timeout=LONG)
    assert isinstance(incoming.error, HandoverUndecided)
    assert "may not run" in str(incoming.error)
    assert "in use" in str(incoming.error)
    assert isinstance(outgoing.error, HandoverUndecided)
    assert pair.source.run_state is RunState.POSTMIGRATE
    assert pair.destination.run_state is RunState.INMIGRATE
    assert not any(drive.device.acquired for drive in pair.destination.drives)
    with pytest.raises(StateError, match="in use"):
        incoming.adopt()
    thief.close()
    incoming.adopt()
    world.wait_more()
    pair.destination.stop()
    world.check(pair.destination)


def test_a_source_that_cannot_flush_what_the_destination_is_to_read_keeps_the_machine(moving, driven, monkeypatch):
    driven.capabilities.block = False
    world, pair = moving(shared=True)

    def fail():
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pair.source.drives["disk0"].device, "flush", fail)
    incoming, outgoing = pair.run(timeout=LONG)
    assert "cannot be flushed" in str(outgoing.error)
    assert incoming.error is not None
    world.wait_more()


def test_a_prepared_machine_that_is_discarded_lets_go_of_its_images(moving, monkeypatch):
    world, pair = moving()
    release = pair.source.drives.release

    def release_and_die():
        release()
        pair.channel.reset()

    monkeypatch.setattr(pair.source.drives, "release", release_and_die)
    incoming, outgoing = pair.run(timeout=LONG)
    assert isinstance(incoming.error, HandoverUndecided)
    assert isinstance(outgoing.error, HandoverUndecided)
    image = image_of(world.host(1), "disk0")
    assert pair.destination.drives["disk0"].device.acquired
    assert marker_of(image).exists()
    incoming.discard()
    assert not any(drive.device.acquired for drive in pair.destination.drives)
    assert marker_of(image).exists(), "what is there is older than what the source goes on with"
    pair.source.reclaim()
    pair.source.start()
    world.wait_more()
    pair.source.stop()
    world.check(pair.source)


DESTINATION = """
import sys, time
import numpy as np
from whimbrel import LoopGuest, Machine, Settings

settings = Settings()
settings.parameters.announce_rounds = 1
machine = Machine("appending", settings=settings)
count = machine.ram.add("count", 4096).view.view(np.uint64)
drive = machine.drives.add("log", sys.argv[1])

def step():
    number = int(count[0])
    drive.write(number * 16, b"%7s:%7d\\n" % (sys.argv[2].encode(), number))
    count[0] += 1
    time.sleep(0.001)

machine.guest = LoopGuest(step)
try:
    drive.write(0, b"an image that is not ours")
except Exception as error:
    print(type(error).__name__, flush=True)
if sys.argv[3] == "-":
    arriving = machine.incoming("tcp:127.0.0.1:0")
    print(arriving.uri, flush=True)
    arriving.wait(60)
else:
    machine.start()
print(machine.run_state, flush=True)
for line in sys.stdin:
    if line.strip() == "stop":
        machine.stop()
        print(int(count[0]), flush=True)
    else:
        machine.migrate(line.strip()).wait(60)
        print(int(count[0]), flush=True)
machine.close()
"""


class Elsewhere:
    """A process with a machine on an image that another process has too."""

    def __init__(self, image, name, first):
        command = [sys.executable, "-c", DESTINATION, str(image), name, first]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self):
        return self.process.stdout.readline().strip()

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self):
        self.process.stdin.close()
        self.process.wait(LONG)
        self.process.stdout.close()


@pytest.mark.slow
def test_two_processes_on_one_image_append_one_after_the_other(tmp_path):
    """The lock passes with the machine: no gap, no fork, no repeat, and in each moment one who may write."""
    image = tmp_path / "log.img"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    hosts = [Elsewhere(image, "a", "run")]
    try:
        assert hosts[0].read() == "StateError"
        assert hosts[0].read() == "running"
        counts = []
        for name in ("b", "c", "d"):
            hosts.append(Elsewhere(image, name, "-"))
            assert hosts[-1].read() == "StateError"
            uri = hosts[-1].read()
            hosts[-2].ask(uri)
            counts.append(int(hosts[-2].read()))
            assert hosts[-1].read() == "running"
        hosts[-1].ask("stop")
        counts.append(int(hosts[-1].read()))
    finally:
        for host in hosts:
            host.close()
    lines = image.read_bytes()[: counts[-1] * 16].decode().splitlines()
    assert [int(line.split(":")[1]) for line in lines] == list(range(counts[-1]))
    shares = np.diff([0, *counts])
    expected = [name for name, share in zip("abcd", shares, strict=True) for _ in range(share)]
    assert [line.split(":")[0].strip() for line in lines] == expected
    assert not any(image.read_bytes()[counts[-1] * 16 :])
