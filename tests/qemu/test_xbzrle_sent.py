"""A real QEMU loads the changes of pages that whimbrel sends, and whimbrel makes those that a real QEMU has sent."""

from __future__ import annotations

import collections
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from whimbrel import CapturedMachine, PluginManager, Settings, hookimpl
from whimbrel.abc import ByteArray, Outcome, SectionKind
from whimbrel.events import Round
from whimbrel.stream import Reader, Replay
from whimbrel.wire import commands, ram, skeleton
from whimbrel_codecs.xbzrle import XbzrleCodec, encode_page

from . import guests
from .cutting import WHOLE, Wire
from .peer import Qemu, capture, feed, migrating
from .qmp import PATIENCE

MIB = 8
PAGE = guests.PAGE
PASSES = 6
WORKING_SET = 400  # pages that are written to
StartQemu = Callable[..., Qemu]


def runs(stream: bytes, sizes: dict[str, int] | None = None) -> Iterator[tuple[str, ram.Run]]:
    """All runs of records of RAM with their block; `sizes` gets those of the blocks."""
    reader, follow = Reader(Replay(stream)), ram.RecordReader()
    reader.parse(skeleton.parse_header())
    reader.advance(1)
    reader.parse(skeleton.parse_configuration())
    while (element := reader.parse(skeleton.parse_element())) is not skeleton.Element.SECTION_FULL:
        if element is skeleton.Element.COMMAND:
            reader.parse(commands.parse_command())
            continue
        kind = skeleton.KIND_OF_ELEMENT[element]
        head = reader.parse(skeleton.parse_section_header(kind))
        if kind is SectionKind.START:
            assert not isinstance(head, int)
            number = head.section_id
            listed = reader.parse(ram.parse_block_list(total_limit=1 << 40, blocks_limit=4096))
            if sizes is not None:
                sizes |= {block.name: block.size for block in listed}
        yield from follow.body(reader, 1 << 30)
        reader.parse(skeleton.parse_section_footer(number))


def records(stream: bytes) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for _, run in runs(stream):
        found[run.flag.name or ""] += len(run.indices)
    return found


# ------------------------------------------------------------------------------------------------ ours, read by theirs


class Writing:
    """Has a migration go through `PASSES` rounds, and writes into the pages of a `sweep` after each of them.

    Not into their first bytes, which the guest itself counts in, but where a page changes as a whole: it counts on from
    there.
    """

    def __init__(self) -> None:
        self.dice = np.random.default_rng(3)
        self.pages = np.empty((0, PAGE), np.uint8)
        self.rounds = 0

    @hookimpl
    def whimbrel_choose_switchover(self, round: Round) -> bool | None:  # noqa: A002
        self.rounds = round.number
        if round.number >= PASSES:
            return True
        for page in self.dice.integers(0, WORKING_SET, WORKING_SET).tolist():
            self._write(self.pages[page], int(self.dice.integers(12)))
        return False

    def _write(self, page: ByteArray, how: int) -> None:
        match how:
            case 0:
                page[:] = self.dice.integers(0, 256, PAGE)
            case 1:
                page[1:] = 0
            case 2:
                page[4095] ^= 0xFF
            case 3:
                page[1:4090] = self.dice.integers(0, 256, 4089)
            case 4:
                page[:] = 0
            case 5:
                page[1] = page[1]
            case _:
                page.view(np.uint64)[self.dice.integers(1, 512, 8)] += np.uint64(1)


@pytest.fixture
def theirs(qemu: StartQemu) -> Qemu:
    """A QEMU that waits for a machine, and will not run it by itself."""
    return qemu(MIB, guest=guests.sweep(MIB), incoming="defer", stopped=True)


@pytest.fixture(scope="module")
def swept(real_qemu: None) -> bytes:
    """The stream of a machine whose guest runs."""
    with Qemu(MIB, guest=guests.sweep(MIB)) as source:
        source.wait_started()
        source.execute("migrate-set-parameters", max_bandwidth=1 << 40)
        return capture(source)


def taken(stream: bytes, writing: Writing, cache: int) -> CapturedMachine:
    """The machine of a stream, which sends changes, and is written to while it is sent."""
    settings, plugins = Settings(), PluginManager()
    settings.capabilities.xbzrle = True
    settings.parameters.xbzrle_cache_size = cache
    settings.parameters.max_bandwidth = 0
    plugins.register(writing)
    machine = CapturedMachine.load(Replay(stream, peer="a capture"), settings=settings, plugins=plugins)
    writing.pages = machine.ram["pc.ram"].view[guests.LOW : guests.high(MIB)].reshape(-1, PAGE)
    return machine


def check(machine: CapturedMachine, destination: Qemu, sent: collections.Counter[str], *, fits: bool) -> None:
    """The destination has all of the machine's RAM, which has come by changes too, and its guest runs on."""
    assert sent["XBZRLE"] > (300 if fits else 10), sent
    ours, real = machine.ram["pc.ram"].view, np.frombuffer(destination.memory(0, MIB << 20), np.uint8)
    for first, last in ((0, 640 << 10), (1 << 20, MIB << 20)):
        wrong = np.flatnonzero(ours[first:last] != real[first:last])
        assert not len(wrong), f"{len(wrong)} bytes are wrong, the first at {first + wrong[0]:#x}"
    destination.execute("cont")
    destination.serial.wait_more()


@pytest.mark.parametrize("cache", [64 << 20, 64 * PAGE])
def test_a_qemu_loads_what_was_stored(swept: bytes, theirs: Qemu, tmp_path: Path, cache: int) -> None:
    writing = Writing()
    with taken(swept, writing, cache) as machine:
        file = tmp_path / "machine.stream"
        info = machine.migrate(f"file:{file}").wait(PATIENCE)
        stream = file.read_bytes()
        found, counters = records(stream), info.details["xbzrle-cache"]
        assert writing.rounds == PASSES
        assert (found["PAGE"], found["ZERO"]) == (info.ram.normal, info.ram.duplicate) if info.ram else False
        assert counters["pages"] >= found["XBZRLE"] + counters["overflow"] > counters["overflow"] > 0
        feed(theirs, stream)
        assert theirs.wait_status("completed", "failed") == "completed"
        check(machine, theirs, found, fits=cache > 64 * PAGE)


def test_a_qemu_takes_a_machine_over_a_socket(swept: bytes, theirs: Qemu) -> None:
    writing = Writing()
    theirs.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    (address,) = theirs.execute("query-migrate")["socket-address"]
    with taken(swept, writing, 64 << 20) as machine, Wire((address["host"], int(address["port"])), WHOLE) as wire:
        machine.migrate(wire.uri).wait(PATIENCE)
        wire.end()
        check(machine, theirs, records(bytes(wire.forth)), fits=True)


# ------------------------------------------------------------------------------------------------ theirs, made by ours


def capture_passes(source: Qemu) -> bytes:
    """The stream of a guest that is stopped only in the third pass, so that there are three."""
    source.execute("migrate-set-parameters", max_bandwidth=12 << 20, downtime_limit=1)
    got = bytearray()
    channel = migrating(source)
    thread = threading.Thread(target=_read, args=(channel, got))
    thread.start()
    source.qmp.wait("MIGRATION_PASS", **{"pass": 3})
    source.execute("stop")
    source.execute("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=2000)
    assert source.wait_status("completed", "failed") == "completed"
    thread.join(PATIENCE)
    return bytes(got)


def _read(channel: socket.socket, got: bytearray) -> None:
    with channel:
        while data := channel.recv(1 << 20):
            got += data


@pytest.mark.slow
@pytest.mark.parametrize("cache", [64 << 20, pytest.param(256 * PAGE, marks=pytest.mark.long)])
def test_every_record_of_a_qemu_is_made_again_of_the_old_page_and_the_new(qemu: StartQemu, cache: int) -> None:
    source = qemu(MIB, guest=guests.mix(MIB))
    source.switch_on("xbzrle")
    source.execute("migrate-set-parameters", xbzrle_cache_size=cache)
    source.serial.wait(b"AB")
    codec, memory, sizes, compared = XbzrleCodec(), dict[str, ByteArray](), dict[str, int](), 0
    for block, run in runs(capture_passes(source), sizes):
        memory.setdefault(block, np.zeros(sizes[block], np.uint8))
        pages = memory[block].reshape(-1, PAGE)
        if run.flag is not ram.Flag.XBZRLE:
            pages[run.indices] = run.payload if run.flag is ram.Flag.PAGE else 0
            continue
        assert len(np.unique(run.indices)) == len(run.indices)
        old = pages[run.indices]
        codec.decode(run.data, run.starts, run.ends, memory[block], run.indices * PAGE)
        new = pages[run.indices]
        made = codec.encode(old, new)
        assert (made.outcomes == Outcome.ENCODED).all()
        for number, (start, end) in enumerate(zip(run.starts.tolist(), run.ends.tolist(), strict=True)):
            theirs = run.data[start:end].tobytes()
            ours = made.data[made.starts[number] : made.ends[number]].tobytes()
            if ours != theirs or encode_page(old[number], new[number]) != theirs:
                pytest.fail(f"page {run.indices[number]:#x}: {theirs[:60].hex(' ')}, and ours {ours[:60].hex(' ')}")
        compared += len(old)
    assert compared > 100
    real = np.frombuffer(source.memory(1 << 20, (MIB - 1) << 20), np.uint8)
    wrong = np.flatnonzero(memory["pc.ram"][1 << 20 : MIB << 20] != real)
    assert not len(wrong), f"{len(wrong)} bytes are wrong, the first at {(1 << 20) + wrong[0]:#x}"
