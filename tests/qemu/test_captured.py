"""A guest is taken out of a running QEMU, stored, looked into and handed to another QEMU, where it goes on."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from whimbrel import CapturedMachine
from whimbrel.capture.receiving import Receipt, Reception
from whimbrel.errors import ConfigError, MigrationError

from . import guests
from .peer import Qemu
from .qmp import PATIENCE

MIB = 64
VIRTIO = (
    *("-device", "virtio-rng-pci", "-device", "virtio-balloon-pci", "-device", "virtio-serial-pci"),
    *("-device", "virtio-net-pci,netdev=net,romfile=", "-netdev", "hubport,id=net,hubid=0"),
)
MACHINES: dict[str, dict[str, Any]] = {
    "pc": {"machine": "pc"},
    "q35-virtio": {"machine": "q35", "extra": VIRTIO},
    "2.3": {"machine": "pc-i440fx-2.3"},
    "2.2": {"machine": "pc-i440fx-2.2"},
    "isapc": {"machine": "isapc"},
    "suppress-vmdesc": {"machine": "pc,suppress-vmdesc=on"},
}
UNLIMITED = 1 << 40

StartQemu = Callable[..., Qemu]


def options(name: str) -> dict[str, Any]:
    return {"mib": MIB, "guest": guests.sweep(MIB), **MACHINES[name]}


@pytest.fixture
def source(qemu: StartQemu) -> Callable[..., Qemu]:
    """`source(machine, *capabilities)`: a QEMU in which the guest runs, and which sends as fast as it can."""

    def start(machine: str, *capabilities: str) -> Qemu:
        fresh = qemu(**options(machine))
        fresh.switch_on(*capabilities)
        fresh.execute("migrate-set-parameters", max_bandwidth=UNLIMITED)
        fresh.wait_started()
        return fresh

    return start


# ----------------------------------------------------------------------------------------------------- four ways in


@contextmanager
def tcp(source: Qemu, _: Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    yield "tcp:127.0.0.1:0", source.migrate


@contextmanager
def unix(source: Qemu, folder: Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    yield f"unix:{folder}/socket", source.migrate


@contextmanager
def exec_(source: Qemu, folder: Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    yield f"exec:cat {pipe}", lambda _: source.migrate(f"exec:cat > {pipe}")


@contextmanager
def fd(source: Qemu, _: Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    near, far = socket.socketpair()
    with far:
        source.qmp.pass_descriptor("stream", far.fileno())
    near.set_inheritable(True)  # as one is that a process was started with
    yield f"fd:{near.detach()}", lambda _: source.migrate("fd:stream")


WAYS = {"tcp": tcp, "unix": unix, "exec": exec_, "fd": fd}


def receive(source: Qemu, way: str, folder: Path, **more: Any) -> tuple[Path, Receipt]:
    """Take the guest of `source`; the source is through then."""
    file = folder / "machine.stream"
    with WAYS[way](source, folder) as (uri, migrate):
        reception = Reception(uri, file, **more)
        receipts: list[Receipt] = []
        thread = threading.Thread(target=lambda: receipts.append(reception.run()))
        thread.start()
        migrate(reception.uri)
        thread.join(PATIENCE)
    assert receipts, "nothing was received"
    assert source.wait_status("completed", "failed") == "completed"
    return file, receipts[0]


def refused(source: Qemu, reception: Reception) -> MigrationError:
    """Why the guest of `source` was not taken, of which the source has been told."""
    errors: list[MigrationError] = []

    def run() -> None:
        try:
            reception.run()
        except MigrationError as exc:
            errors.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    source.migrate(reception.uri)
    assert source.wait_status("completed", "failed") == "failed"
    thread.join(PATIENCE)
    return errors[0]


def send(file: Path, destination: Qemu, **more: Any) -> str:
    """Send the machine in `file` on, with the library."""
    uri = destination.uri("stream")
    destination.execute("migrate-incoming", uri=uri)
    with CapturedMachine.load(file) as machine:
        machine.settings.parameters.max_bandwidth = 0
        return str(machine.migrate(uri, **more).wait(PATIENCE).status)


def digest(memory: bytes) -> tuple[str, str]:
    """Of what is memory and nothing else in the address space of a PC: below 640 KiB, and from 1 MiB on."""
    return hashlib.sha256(memory[: 640 << 10]).hexdigest(), hashlib.sha256(memory[1 << 20 :]).hexdigest()


def goes_on(destination: Qemu) -> None:
    """The guest runs, says so, and its memory is whole."""
    destination.wait_run_state("running")
    destination.serial.wait_more()
    destination.execute("stop")
    guests.check_sweep(destination.memory(guests.LOW, guests.high(MIB) - guests.LOW))


# --------------------------------------------------------------------------------------------------------- the whole


QUICK = {("pc", "tcp"), ("pc", "fd"), ("q35-virtio", "unix"), ("2.3", "exec")}
ALL = [(machine, way) for machine in ("pc", "q35-virtio", "2.3") for way in WAYS]


@pytest.mark.parametrize(
    ("machine", "way"),
    [pytest.param(*each, marks=[] if each in QUICK else [pytest.mark.long]) for each in ALL],
)
def test_a_guest_is_taken_stored_and_goes_on_elsewhere(source, qemu, tmp_path, machine, way):
    origin = source(machine, *(["return-path"] if way in ("tcp", "fd") else []))
    file, receipt = receive(origin, way, tmp_path)
    assert receipt.told == (way in ("tcp", "fd"))
    assert origin.run_state() == "postmigrate"
    with CapturedMachine.load(file) as stored:
        assert digest(stored.ram["pc.ram"].view.tobytes()) == digest(origin.memory(0, MIB << 20))
        assert [device.name for device in stored.captured if device.decode() is None] == []
    origin.close()
    destination = qemu(**options(machine), incoming="defer")
    assert send(file, destination) == "completed"
    goes_on(destination)


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["2.2", "isapc", "suppress-vmdesc"])
def test_other_forms_of_streams(source, qemu, tmp_path, machine):
    origin = source(machine, *(["return-path"] if machine == "suppress-vmdesc" else []))
    file, receipt = receive(origin, "unix", tmp_path)
    assert receipt.guessed == (machine == "2.2")
    with CapturedMachine.load(file) as stored:
        assert digest(stored.ram["pc.ram"].view.tobytes()) == digest(origin.memory(0, MIB << 20))
    origin.close()
    # As the file is, without whimbrel.
    destination = qemu(**options(machine), incoming=f"exec:cat {file}")
    goes_on(destination)


def test_old_machines_that_listen_are_refused_in_time(source, tmp_path, monkeypatch):
    """Nothing in their streams tells where the devices end, so the source must not be left waiting."""
    monkeypatch.setattr("whimbrel.capture.walk.SILENCE", 0.5)
    origin = source("2.2", "return-path")
    reception = Reception(f"unix:{tmp_path}/socket", tmp_path / "file")
    error = refused(origin, reception)
    assert "switch return-path off" in str(error)
    assert origin.run_state() == "running"
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- what may go wrong


@pytest.fixture(scope="module")
def stored(real_qemu, tmp_path_factory) -> Path:
    """A stored machine with a device more than most have."""
    folder = tmp_path_factory.mktemp("stored")
    with Qemu(**options("q35-virtio")) as origin:
        origin.execute("migrate-set-parameters", max_bandwidth=UNLIMITED)
        origin.wait_started()
        return receive(origin, "unix", folder)[0]


def whimbrel(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "whimbrel", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_a_destination_that_lacks_a_device_gets_nothing(stored, qemu):
    before = stored.read_bytes()
    poor = qemu(mib=MIB, machine="q35", guest=guests.sweep(MIB), incoming="defer")
    uri = poor.uri("stream")
    poor.execute("migrate-incoming", uri=uri)
    said = whimbrel("send", stored, uri)
    assert said.returncode == 1, said.stderr
    assert "before it proved that it holds the machine" in said.stderr
    assert f"{stored} is as it was, and can be sent again" in said.stderr
    assert stored.read_bytes() == before
    assert poor.wait_exit() == 1
    assert re.search(r"Unknown (savevm section|ramblock)", poor.log())
    # And it is: another one takes it.
    rich = qemu(**options("q35-virtio"), incoming="defer")
    uri = rich.uri("stream")
    rich.execute("migrate-incoming", uri=uri)
    said = whimbrel("send", stored, uri, "--json")
    assert said.returncode == 0, said.stderr
    goes_on(rich)


def test_qemus_own_timing_can_be_asked_for(stored, qemu):
    destination = qemu(**options("q35-virtio"), incoming="defer")
    uri = destination.uri("stream")
    destination.execute("migrate-incoming", uri=uri)
    said = whimbrel("send", stored, uri, "--handover=qemu")
    assert said.returncode == 0, said.stderr
    assert "QEMU's timing" in said.stderr
    goes_on(destination)


def test_nobody_listens(stored, tmp_path):
    said = whimbrel("send", stored, f"unix:{tmp_path}/nobody")
    assert said.returncode == 1
    assert "Failed to connect" in said.stderr


def test_a_machine_larger_than_allowed_stays_at_its_source(source, tmp_path):
    origin = source("pc", "return-path")
    reception = Reception(f"unix:{tmp_path}/socket", tmp_path / "file", max_ram=MIB << 20)
    error = refused(origin, reception)
    assert "--max-ram" in str(error)
    assert origin.run_state() == "running"
    origin.serial.wait_more()


def test_a_file_that_is_there_is_not_replaced_unasked(tmp_path):
    (tmp_path / "file").write_text("somebody's")
    with pytest.raises(ConfigError, match="there already"):
        Reception(f"unix:{tmp_path}/socket", tmp_path / "file")
    assert not (tmp_path / "socket").exists()
