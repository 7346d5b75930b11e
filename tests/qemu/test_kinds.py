"""Every kind of stream that a QEMU 7.2 can be told to send, taken: XBZRLE, compress, shared memory, UUIDs."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from whimbrel import CapturedMachine
from whimbrel.abc import SectionKind
from whimbrel.stream import Reader, Replay
from whimbrel.wire import ram, skeleton

from . import guests
from .peer import Qemu, capture, migrating
from .qmp import PATIENCE

MIB = 8
StartQemu = Callable[..., Qemu]


@pytest.fixture
def mix(qemu: StartQemu) -> Callable[..., Qemu]:
    """`mix(*capabilities)`: a QEMU whose guest changes its pages in every way."""

    def start(*capabilities: str) -> Qemu:
        fresh = qemu(MIB, guest=guests.mix(MIB))
        fresh.switch_on(*capabilities)
        fresh.serial.wait(b"AB")
        return fresh

    return start


def capture_passes(source: Qemu, bandwidth: int) -> bytes:
    """The stream of a guest that is stopped only in the third pass, so that there are three."""
    source.execute("migrate-set-parameters", max_bandwidth=bandwidth, downtime_limit=1)
    taken = bytearray()
    channel = migrating(source)
    thread = threading.Thread(target=_read, args=(channel, taken))
    thread.start()
    source.qmp.wait("MIGRATION_PASS", **{"pass": 2})
    source.execute("migrate-set-parameters", max_bandwidth=12 << 20)
    source.qmp.wait("MIGRATION_PASS", **{"pass": 3})
    source.execute("stop")
    source.execute("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=2000)
    assert source.wait_status("completed", "failed") == "completed"
    thread.join(PATIENCE)
    return bytes(taken)


def snapshot(source: Qemu) -> bytes:
    """A stream whose source runs on."""
    taken = bytearray()
    channel = migrating(source)
    _read(channel, taken)
    assert source.wait_status("completed", "failed") == "completed"
    return bytes(taken)


def _read(channel: socket.socket, taken: bytearray) -> None:
    with channel:
        while data := channel.recv(1 << 20):
            taken += data


def records(stream: bytes) -> dict[str, int]:
    """How many records of RAM there are of each kind, and how many bodies: what the test says really happened."""
    reader = Reader(Replay(stream))
    reader.parse(skeleton.parse_header())
    reader.advance(1)
    config = reader.parse(skeleton.parse_configuration())
    follow = ram.RecordReader()
    counts: dict[str, int] = {"bodies": 0, "ends": 0}
    while (element := reader.window(1)[0]) in skeleton.KIND_OF_ELEMENT and element != skeleton.Element.SECTION_FULL:
        reader.advance(1)
        kind = skeleton.KIND_OF_ELEMENT[skeleton.Element(element)]
        reader.parse(skeleton.parse_section_header(kind))
        if element == skeleton.Element.SECTION_START:
            addresses = "x-ignore-shared" in config.capabilities
            reader.parse(ram.parse_block_list(total_limit=1 << 40, blocks_limit=4096, guest_addresses=addresses))
        for _, run in follow.body(reader, 1 << 30):
            counts[run.flag.name or ""] = counts.get(run.flag.name or "", 0) + len(run.indices)
        counts["bodies"] += 1
        counts["ends"] += kind is SectionKind.END
        assert reader.window(1)[0] == skeleton.Element.SECTION_FOOTER
        reader.advance(5)
    return counts


def same_ram(machine: CapturedMachine, source: Qemu) -> None:
    taken, real = machine.ram["pc.ram"].view, np.frombuffer(source.memory(0, MIB << 20), np.uint8)
    for first, last in ((0, 640 << 10), (1 << 20, MIB << 20)):
        assert np.array_equal(taken[first:last], real[first:last])


def load(stream: bytes) -> CapturedMachine:
    return CapturedMachine.load(Replay(stream, peer="a capture"))


def goes_through_a_file(machine: CapturedMachine, folder: Path) -> None:
    """Stored, each page is there once and the machine the same."""
    file = folder / "machine.stream"
    machine.settings.parameters.max_bandwidth = 0
    machine.migrate(f"file:{file}").wait(60)
    found = records(file.read_bytes())
    assert found.keys() <= {"bodies", "ends", "PAGE", "ZERO"}
    assert found["ends"] == 1
    assert found["PAGE"] + found["ZERO"] == sum(block.pages for block in machine.ram if not block.shared)
    with CapturedMachine.load(file) as again:
        for block in machine.ram:
            assert np.array_equal(block.view, again.ram[block.name].view)
        assert [(d.header.idstr, d.body) for d in again.captured] == [
            (d.header.idstr, d.body) for d in machine.captured
        ]


@pytest.mark.slow
def test_xbzrle_of_several_passes(mix, tmp_path):
    source = mix("xbzrle")
    stream = capture_passes(source, 12 << 20)
    found = records(stream)
    assert found["XBZRLE"] > 500, found
    with load(stream) as machine:
        same_ram(machine, source)
        goes_through_a_file(machine, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("wait", [True, False])
def test_compressed_pages(mix, wait):
    source = mix("compress")
    source.execute("migrate-set-parameters", compress_wait_thread=wait)
    stream = capture_passes(source, 512 << 10)
    found = records(stream)
    assert found.get("COMPRESS_PAGE", 0) > (100 if wait else 0), found
    with load(stream) as machine:
        same_ram(machine, source)


@pytest.mark.slow
def test_compressed_first_and_xbzrle_after(mix):
    source = mix("compress", "xbzrle")
    stream = capture_passes(source, 512 << 10)
    found = records(stream)
    assert min(found["COMPRESS_PAGE"], found["XBZRLE"]) > 100, found
    with load(stream) as machine:
        same_ram(machine, source)


def test_a_snapshot_in_the_background_has_no_end_of_ram(qemu, tmp_path):
    source = qemu(MIB, guest=guests.sweep(MIB))
    source.switch_on("background-snapshot")
    source.wait_started()
    stream = snapshot(source)
    assert records(stream)["ends"] == 0
    with load(stream) as machine:
        guests.check_sweep(machine.ram["pc.ram"].view[guests.LOW : guests.high(MIB)].tobytes())
        assert machine.captured["globalstate"].decode() is not None
        goes_through_a_file(machine, tmp_path)


def test_memory_that_both_ends_share_is_not_sent(qemu, tmp_path):
    shared = tmp_path / "shared"
    backend = f"memory-backend-file,id=m,size={MIB}M,mem-path={shared},share=on"
    more = {"machine": "pc,memory-backend=m", "extra": ("-object", backend), "guest": guests.sweep(MIB)}
    source = qemu(MIB, **more)
    source.switch_on("x-ignore-shared")
    source.wait_started()
    stream = capture(source)
    source.close()
    with load(stream) as machine:
        assert machine.form().configuration.capabilities == ("x-ignore-shared",)
        assert machine.ram["m"].shared
        assert not machine.ram["pc.bios"].shared
        goes_through_a_file(machine, tmp_path)
    destination = qemu(MIB, **more, incoming="defer")
    destination.switch_on("x-ignore-shared")
    with CapturedMachine.load(tmp_path / "machine.stream") as machine:
        uri = destination.uri("stream")
        destination.execute("migrate-incoming", uri=uri)
        assert str(machine.migrate(uri).wait(60).status) == "completed"
    destination.wait_run_state("running")
    destination.serial.wait_more()
    destination.execute("stop")
    guests.check_sweep(destination.memory(guests.LOW, guests.high(MIB) - guests.LOW))


def test_the_uuid_stays(qemu):
    more = {"extra": ("-uuid", "00112233-4455-6677-8899-aabbccddeeff"), "stopped": True}
    source = qemu(MIB, **more)
    source.switch_on("validate-uuid")
    with load(capture(source)) as machine:
        assert str(machine.uuid) == "00112233-4455-6677-8899-aabbccddeeff"
        destination = qemu(MIB, **more, incoming="defer")
        destination.switch_on("validate-uuid")
        uri = destination.uri("stream")
        destination.execute("migrate-incoming", uri=uri)
        assert str(machine.migrate(uri).wait(60).status) == "completed"
        assert destination.wait_status("completed", "failed") == "completed"


def test_a_stored_machine_of_theirs_is_whole_for_the_command_line(qemu, tmp_path):
    """Two passes at least, over a pipe of their own, by the program and not the library."""
    source = qemu(MIB, guest=guests.mix(MIB))
    source.switch_on("xbzrle", "return-path")
    source.serial.wait(b"AB")
    file = tmp_path / "machine.stream"
    command = [sys.executable, "-m", "whimbrel", "receive", "tcp:127.0.0.1:0", str(file), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as receiving:
        try:
            uri = receiving.stderr.readline().split(" at ")[1].strip()
            source.migrate(uri)
            out, err = receiving.communicate(timeout=60)
        finally:
            receiving.kill()
    assert receiving.returncode == 0, err
    assert '"told": true' in out
    assert source.wait_status("completed", "failed") == "completed"
    with CapturedMachine.load(file) as machine:
        same_ram(machine, source)
