"""Lanes (multifd) with a real QEMU at the other end, both ways and with each method; all of its RAM is compared."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from whimbrel import CapturedMachine, PluginManager, Settings
from whimbrel.capture.receiving import Receipt, Reception
from whimbrel.errors import MigrationError, StreamError
from whimbrel.machine import Ram

from . import guests
from .peer import Qemu
from .qmp import PATIENCE

MIB = 32
UNLIMITED = 1 << 40
METHODS = ("none", "zlib", "zstd")

pytestmark = pytest.mark.usefixtures("qemu_7_2")

StartQemu = Callable[..., Qemu]


def settings_for(lanes: int, method: str) -> Settings:
    settings = Settings()
    settings.capabilities.multifd = True
    settings.parameters.multifd_channels = lanes
    settings.parameters.multifd_compression = method
    settings.parameters.max_bandwidth = 0
    return settings


def set_lanes(machine: Qemu, lanes: int, method: str) -> None:
    machine.switch_on("multifd")
    machine.execute("migrate-set-parameters", multifd_channels=lanes, multifd_compression=method)


@pytest.fixture
def source(qemu: StartQemu) -> Callable[..., Qemu]:
    """`source(lanes, method)`: a QEMU in which the guest runs."""

    def start(lanes: int, method: str, *capabilities: str, machine: str = "pc") -> Qemu:
        fresh = qemu(MIB, guest=guests.sweep(MIB), machine=machine)
        set_lanes(fresh, lanes, method)
        fresh.switch_on(*capabilities)
        # A guest under TCG may write faster than its QEMU compresses: then the second pass is the last.
        fresh.execute("migrate-set-parameters", max_bandwidth=UNLIMITED, downtime_limit=60_000)
        fresh.wait_started()
        return fresh

    return start


def digest(memory: bytes) -> tuple[str, str]:
    """Of what is memory and nothing else in the address space of a PC: below 640 KiB, and from 1 MiB on."""
    return hashlib.sha256(memory[: 640 << 10]).hexdigest(), hashlib.sha256(memory[1 << 20 :]).hexdigest()


def same_ram(ram: Ram, origin: Qemu) -> bool:
    return digest(ram["pc.ram"].view.tobytes()) == digest(origin.memory(0, MIB << 20))


@contextmanager
def waiting(reception: Reception) -> Iterator[list[Receipt | MigrationError]]:
    """What comes of `reception`, which runs meanwhile; it is there at the end."""
    came: list[Receipt | MigrationError] = []

    def run() -> None:
        try:
            came.append(reception.run())
        except MigrationError as exc:
            came.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield came
        thread.join(PATIENCE)
    finally:
        reception.cancel()
    assert came, "the reception has not ended"


def stored(origin: Qemu, folder: Path) -> Path:
    """The file that the guest of `origin` is in now; it came over one lane."""
    reception = Reception(f"unix:{folder}/socket", folder / "machine", settings=settings_for(1, "none"))
    with waiting(reception) as came:
        origin.migrate(reception.uri)
    assert isinstance(came[0], Receipt), came[0]
    assert origin.wait_status("completed", "failed") == "completed"
    return folder / "machine"


# -------------------------------------------------------------------------------------------------- out of a QEMU


@pytest.mark.parametrize("lanes", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_guest_comes_out_of_a_qemu(source: Callable[..., Qemu], tmp_path: Path, method: str, lanes: int) -> None:
    origin = source(lanes, method, *(["return-path"] if lanes == 5 else []))
    file = tmp_path / "machine"
    reception = Reception(f"unix:{tmp_path}/socket", file, settings=settings_for(lanes, method))
    with waiting(reception) as came:
        origin.migrate(reception.uri)
        assert origin.wait_status("completed", "failed") == "completed"
    assert isinstance(came[0], Receipt), came[0]
    assert origin.execute("query-migrate")["ram"]["multifd-bytes"] > 100_000
    with CapturedMachine.load(file) as stored:
        assert same_ram(stored.ram, origin)


def test_a_listener_will_do(source: Callable[..., Qemu]) -> None:
    origin = source(2, "none", "return-path")
    settings = settings_for(2, "none")
    listener = PluginManager().transport("tcp").create().listen("127.0.0.1:0")
    machines: list[CapturedMachine] = []
    thread = threading.Thread(
        target=lambda: machines.append(CapturedMachine.load(listener, settings=settings)), daemon=True
    )
    thread.start()
    origin.migrate(listener.uri)
    assert origin.wait_status("completed", "failed") == "completed"
    thread.join(PATIENCE)
    with machines[0] as taken:
        assert same_ram(taken.ram, origin)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (3, 1)])
def test_another_number_of_lanes(source: Callable[..., Qemu], tmp_path: Path, theirs: int, ours: int) -> None:
    origin = source(theirs, "none", "return-path")
    settings = settings_for(ours, "none")
    settings.limits.header_timeout = 0.5
    reception = Reception(f"unix:{tmp_path}/socket", tmp_path / "machine", settings=settings)
    with waiting(reception) as came:
        origin.migrate(reception.uri)
    assert isinstance(came[0], MigrationError)
    if theirs < ours:
        assert "multifd-channels" in str(came[0])
    assert [*tmp_path.iterdir()] == []


def test_another_method(source: Callable[..., Qemu], tmp_path: Path) -> None:
    """The source says so only in its packets. A QEMU 7.2 hangs after this, so it is not waited for."""
    origin = source(2, "zlib", "return-path")
    reception = Reception(f"unix:{tmp_path}/socket", tmp_path / "machine", settings=settings_for(2, "zstd"))
    with waiting(reception) as came:
        origin.migrate(reception.uri)
    assert isinstance(came[0], StreamError)
    assert "is zlib, expected zstd" in str(came[0])


# -------------------------------------------------------------------------------------------------- into a QEMU


@pytest.mark.parametrize("lanes", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_guest_goes_into_a_qemu(
    source: Callable[..., Qemu], qemu: StartQemu, tmp_path: Path, method: str, lanes: int
) -> None:
    origin = source(1, "none")
    file = stored(origin, tmp_path)
    expected = digest(origin.memory(0, MIB << 20))
    origin.close()
    destination = qemu(MIB, guest=guests.sweep(MIB), incoming="defer", stopped=True)
    set_lanes(destination, lanes, method)
    uri = destination.uri("stream")
    destination.execute("migrate-incoming", uri=uri)
    with CapturedMachine.load(file, settings=settings_for(lanes, method)) as machine:
        info = machine.migrate(uri).wait(PATIENCE)
        assert info.status == "completed"
        assert 100_000 < info.ram.multifd_bytes < info.ram.transferred
    assert destination.wait_status("completed", "failed") == "completed"
    assert digest(destination.memory(0, MIB << 20)) == expected
    destination.execute("cont")
    destination.serial.wait_more()
    destination.execute("stop")
    guests.check_sweep(destination.memory(guests.LOW, guests.high(MIB) - guests.LOW))


def test_a_qemu_that_wants_no_lanes_is_said_so(source: Callable[..., Qemu], qemu: StartQemu, tmp_path: Path) -> None:
    origin = source(1, "none")
    file = stored(origin, tmp_path)
    origin.close()
    destination = qemu(MIB, guest=guests.sweep(MIB), incoming="defer", stopped=True)
    uri = destination.uri("stream")
    destination.execute("migrate-incoming", uri=uri)
    with CapturedMachine.load(file, settings=settings_for(2, "none")) as machine:
        outgoing = machine.migrate(uri)
        with pytest.raises(MigrationError):
            outgoing.wait(PATIENCE)
        assert outgoing.info.ownership == "owner"
