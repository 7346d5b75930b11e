"""Drives on QEMU's wire: what a QEMU 7.2 sends is loaded, and what our handler writes a QEMU 7.2 loads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from whimbrel.abc import SectionKind
from whimbrel.errors import StateError, StreamError
from whimbrel.machine import BareMachine
from whimbrel.machine.drives import Leaving
from whimbrel.settings import Settings
from whimbrel.stream import Reader, Writer
from whimbrel.testing.memory import ReplayChannel
from whimbrel.wire import block, ram, skeleton
from whimbrel_savevm.block import BlockHandler

from .peer import Qemu, capture, feed

MIB = 1 << 20
SIZE = 4 * MIB
FAST = 1 << 40  # 0, for no limit, keeps a QEMU 7.2 from ever sending a chunk

StartQemu = Callable[..., Qemu]


def make_image(path: Path, size: int = SIZE) -> bytes:
    """An image with data, zeros between, and a hole at its end; returns what it holds."""
    dice = random.Random(3)
    data = bytearray(dice.randbytes(size // 2 + 100)) + bytes(size - size // 2 - 100)
    data[MIB : MIB + MIB] = bytes(MIB)
    path.write_bytes(data[: size // 2 + 100])
    with path.open("r+b") as file:
        file.truncate(size)
    return bytes(data)


def drive_options(path: Path) -> dict[str, Any]:
    """What gives a QEMU that drive. It belongs to a disk: a QEMU 7.2 aborts when one comes for a drive of no device."""
    return {"extra": ["-drive", f"id=disk0,file={path},format=raw,if=none", "-device", "ide-hd,drive=disk0"]}


@pytest.fixture
def bare() -> Iterator[Callable[[Path], BareMachine]]:
    """`bare(image, …)`: a machine of ours with that drive."""
    made: list[BareMachine] = []

    def make(image: Path, *, zero_blocks: bool = False) -> BareMachine:
        settings = Settings()
        settings.capabilities.zero_blocks = zero_blocks
        machine = BareMachine("m", settings=settings)
        made.append(machine)
        machine.drives.add("disk0", image)
        return machine

    yield make
    for machine in made:
        machine.close()


def load_blocks(stream: bytes, handler: BlockHandler) -> list[SectionKind]:
    """Walk a stream up to its first device, and have `handler` load its block section; returns what came."""
    reader = Reader(ReplayChannel(stream))
    reader.parse(skeleton.parse_header())
    if reader.window(1)[0] == skeleton.Element.CONFIGURATION:
        reader.advance(1)
        reader.parse(skeleton.parse_configuration())
    names: dict[int, str] = {}
    found = []
    records = ram.RecordReader()
    while (element := reader.parse(skeleton.parse_element())) is not skeleton.Element.SECTION_FULL:
        kind = skeleton.KIND_OF_ELEMENT[element]
        head = reader.parse(skeleton.parse_section_header(kind))
        number = head if isinstance(head, int) else head.section_id
        if not isinstance(head, int):
            names[number] = head.idstr
        if names[number] == "block":
            found.append(kind)
            handler.load(reader, kind, 1)
        else:
            if kind is SectionKind.START:
                reader.parse(ram.parse_block_list(total_limit=1 << 40, blocks_limit=100))
            for _ in records.body(reader, 0 if kind is SectionKind.START else 1 << 40):
                pass
        reader.parse(skeleton.parse_section_footer(number))
    return found


@pytest.mark.parametrize("capabilities", [(), ("zero-blocks",)])
def test_what_a_qemu_sends_is_loaded(
    qemu_7_2: None, qemu: StartQemu, tiny_machine: dict[str, Any], bare: Any, tmp_path: Path, capabilities: tuple[str]
) -> None:
    data = make_image(tmp_path / "source.img")
    source = qemu(**tiny_machine, **drive_options(tmp_path / "source.img"))
    source.serial.wait(b"AB")
    source.switch_on("block", *capabilities)
    source.execute("migrate-set-parameters", max_bandwidth=FAST)
    stream = capture(source)
    source.close()

    (tmp_path / "ours.img").write_bytes(b"\xee" * SIZE)
    machine = bare(tmp_path / "ours.img")
    machine.expect_arrival()
    handler = BlockHandler(machine)
    found = load_blocks(stream, handler)
    handler.commit()
    handler.finish()
    machine.drives.take_over()
    assert found[0] is SectionKind.START
    assert found[-1] is SectionKind.END
    assert SectionKind.PART in found
    came = (tmp_path / "ours.img").read_bytes()
    assert len(came) == SIZE
    assert next((at for at in range(SIZE) if came[at] != data[at]), None) is None


@pytest.mark.slow
@pytest.mark.parametrize("downtime_limit", [1, 300])
def test_what_a_qemu_leaves_out_is_noticed(
    qemu_7_2: None, qemu: StartQemu, tiny_machine: dict[str, Any], bare: Any, tmp_path: Path, downtime_limit: int
) -> None:
    """With its own defaults a QEMU 7.2 sends half of such a disk and says that it was all: never taken as whole."""
    size = 64 * MIB
    data = random.Random(4).randbytes(size)
    (tmp_path / "source.img").write_bytes(data)
    source = qemu(**tiny_machine, **drive_options(tmp_path / "source.img"))
    source.serial.wait(b"AB")
    source.switch_on("block")
    source.execute("migrate-set-parameters", **{"downtime-limit": downtime_limit})
    stream = capture(source)
    source.close()

    (tmp_path / "ours.img").write_bytes(bytes(size))
    machine = bare(tmp_path / "ours.img")
    machine.expect_arrival()
    handler = BlockHandler(machine)
    refused = ""
    try:
        load_blocks(stream, handler)
        handler.commit()
    except StreamError as exc:
        refused = str(exc)
        handler.rollback()
    finally:
        handler.finish()
    if refused:
        assert "per cent through" in refused
        assert machine.drives["disk0"].device.incomplete
    else:
        came = (tmp_path / "ours.img").read_bytes()
        assert next((at for at in range(0, size, 512) if came[at : at + 512] != data[at : at + 512]), None) is None


class _Endless:
    """A slice that is never over."""

    def bytes_left(self) -> int:
        return 1 << 60

    def over(self) -> bool:
        return False


def block_section(machine: BareMachine, write: Callable[[], None]) -> bytes:
    """The whole block section of a machine of ours, as it goes into a stream; `write` is called half-way."""
    machine.drives.leaving = Leaving.EVERYTHING
    machine.start()
    handler = BlockHandler(machine)
    tape = _Tape()
    out = Writer(tape)

    def section(kind: SectionKind, body: Callable[[], None]) -> None:
        out.write(skeleton.section_header(kind, skeleton.SectionHeader(900, "block", 0, block.VERSION_ID)))
        body()
        out.write(skeleton.section_footer(900))

    section(SectionKind.START, lambda: handler.save_start(out))
    while handler.pending():
        section(SectionKind.PART, lambda: handler.save_part(out, _Endless()))
    write()
    machine.stop()
    handler.sync()
    section(SectionKind.END, lambda: handler.save_end(out))
    out.flush()
    handler.finish()
    return bytes(tape.data)


class _Tape(ReplayChannel):
    """Keeps what is sent."""

    def __init__(self) -> None:
        super().__init__(b"")
        self.data = bytearray()

    def send(self, data: Any) -> None:
        self.data += memoryview(data).cast("B")


@pytest.mark.parametrize(("zero_blocks", "size"), [(False, SIZE), (True, SIZE), (False, SIZE + 100 * 512)])
def test_a_qemu_loads_what_our_handler_writes(
    qemu_7_2: None,
    qemu: StartQemu,
    tiny_machine: dict[str, Any],
    bare: Any,
    tmp_path: Path,
    zero_blocks: bool,
    size: int,
) -> None:
    """Also where the last part of a MiB is zero, which goes as a mark in any case."""
    make_image(tmp_path / "ours.img", size)
    machine = bare(tmp_path / "ours.img", zero_blocks=zero_blocks)
    drive = machine.drives["disk0"]

    def write() -> None:
        drive.write(3 * MIB + 5, b"written at the end")
        drive.discard(100, 5000)

    section = block_section(machine, write)
    machine.close()

    (tmp_path / "theirs.img").write_bytes(b"\xee" * size)
    with qemu(**tiny_machine, **drive_options(tmp_path / "theirs.img")) as source:
        source.serial.wait(b"AB")
        stream = capture(source)
    destination = qemu(**tiny_machine, **drive_options(tmp_path / "theirs.img"), incoming="defer")
    feed(destination, spliced(stream, section))
    destination.wait_run_state("running")
    destination.close()
    ours, theirs = (tmp_path / "ours.img").read_bytes(), (tmp_path / "theirs.img").read_bytes()
    assert len(ours) == len(theirs) == size
    assert next((at for at in range(size) if ours[at] != theirs[at]), None) is None
    assert ours[3 * MIB + 5 :].startswith(b"written at the end")


def spliced(stream: bytes, section: bytes) -> bytes:
    """`stream` with `section` before its first."""
    reader = Reader(ReplayChannel(stream))
    reader.parse(skeleton.parse_header())
    if reader.window(1)[0] == skeleton.Element.CONFIGURATION:
        reader.advance(1)
        reader.parse(skeleton.parse_configuration())
    return stream[: reader.offset] + section + stream[reader.offset :]


def test_a_qemu_and_a_machine_of_ours_keep_each_other_from_an_image(
    qemu_7_2: None, qemu: StartQemu, tiny_machine: dict[str, Any], bare: Any, tmp_path: Path
) -> None:
    """The lock is one that both take: whoever comes second is refused, and told so."""
    make_image(tmp_path / "disk.img")
    first = qemu(**tiny_machine, **drive_options(tmp_path / "disk.img"))
    machine = bare(tmp_path / "disk.img")
    with pytest.raises(StateError, match=f"process {first.process.pid} "):
        machine.start()
    first.close()
    machine.start()
    with pytest.raises(Exception) as caught:  # it ends before there is a monitor
        qemu(**tiny_machine, **drive_options(tmp_path / "disk.img"))
    assert "lock" in "\n".join(getattr(caught.value, "__notes__", []))
