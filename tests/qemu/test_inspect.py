"""What a real QEMU says that it has sent, and what is found in its stream."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from click.testing import CliRunner

from whimbrel.abc import SectionKind
from whimbrel.capture.inspection import inspect
from whimbrel.cli.application import whimbrel as application
from whimbrel.stream import Replay

from . import guests
from .peer import Qemu, capture

Start = Callable[..., Qemu]

PAGE = 4096


@pytest.mark.slow
@pytest.mark.parametrize("capabilities", [(), ("xbzrle",), ("compress",), ("compress", "xbzrle")], ids="-".join)
def test_as_many_pages_as_it_says(qemu: Start, capabilities: tuple[str, ...]) -> None:
    source = qemu(4, guest=guests.mix(4))
    if capabilities:
        source.switch_on(*capabilities)
    # XBZRLE is used from the second pass on, and lets it converge; without it nothing but a long downtime does.
    downtime = 50 if "xbzrle" in capabilities else 2000
    source.execute("migrate-set-parameters", max_bandwidth=8 << 20, downtime_limit=downtime)
    source.serial.wait(b"AB")
    stream = capture(source)
    found = inspect(Replay(stream))
    assert found.error is None
    assert found.size == len(stream)
    assert all(device.decoded is not None for device in found.devices)
    info = source.execute("query-migrate")
    zero, normal, xbzrle, compressed = (
        sum(getattr(block.records, kind) for block in found.blocks)
        for kind in ("zero", "normal", "xbzrle", "compressed")
    )
    assert info["ram"]["total"] == found.ram
    assert normal == info["ram"]["normal"]
    if "compress" in capabilities:
        # It counts idle threads' last pages again whenever it waits for all of them.
        assert zero <= info["ram"]["duplicate"]
        assert 0 < compressed <= info["compression"]["pages"]
    else:
        assert (zero, compressed) == (info["ram"]["duplicate"], 0)
    cache = info.get("xbzrle-cache", {"pages": 0, "overflow": 0})
    # A page that was written with what it had already is a hit without a record.
    assert xbzrle <= cache["pages"] - cache["overflow"]
    if capabilities == ("xbzrle",):
        assert xbzrle > 0
    assert [block.came for block in found.blocks] == [block.pages for block in found.blocks]
    assert found.breakdown.total == len(stream)
    assert found.breakdown.unread == found.breakdown.behind == 0
    assert found.passes is not None
    assert 1 <= found.passes <= info["ram"]["dirty-sync-count"]


def test_contents_are_those_of_its_memory(qemu: Start, tmp_path: Path) -> None:
    """A guest that stands still: what is in its pages is in a file."""
    memory = tmp_path / "memory"
    dice = random.Random(5)
    pages = [dice.choice([bytes(PAGE), b"\1" * PAGE, b"\2" * PAGE, dice.randbytes(PAGE)]) for _ in range(4 << 8)]
    memory.write_bytes(b"".join(pages))
    backend = f"memory-backend-file,id=m,size=4M,mem-path={memory},share=on"
    source = qemu(4, machine="pc,memory-backend=m", stopped=True, extra=("-object", backend))
    found = inspect(Replay(capture(source)))
    (block,) = [block for block in found.blocks if block.name == "m"]
    now = memory.read_bytes()
    pages = [now[at : at + PAGE] for at in range(0, len(now), PAGE)]
    assert block.last is not None
    assert block.last.zero == pages.count(bytes(PAGE)) > 100
    assert block.last.normal == len(pages) - block.last.zero
    assert block.distinct == len({*pages} - {bytes(PAGE)})
    assert 100 < block.distinct < block.last.normal
    assert found.passes == 1


def test_on_the_command_line(tiny_stream: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    path.write_bytes(tiny_stream)
    result = CliRunner().invoke(application, ["inspect", str(path)])
    assert result.exit_code == 0
    assert "isapc" in result.stdout
    assert "all decoded to the last byte" in result.stdout
    assert "pc.ram" in result.stdout
    for name in ("isa-ide", "cpu"):
        result = CliRunner().invoke(application, ["inspect", str(path), "--devices", name])
        assert result.exit_code == 0
        # Of `isa-ide` there are two, with one instance id.
        assert result.stdout.count(f"{name}: instance 0") == (2 if name == "isa-ide" else 1)
    assert "env.eip" in result.stdout


def test_cut_within_its_devices(tiny_stream: bytes) -> None:
    """All devices before the cut are there, and each byte is accounted for."""
    everything = inspect(Replay(tiny_stream))
    sections = [section for section in everything.sections if section.kind is SectionKind.FULL]
    end = sections[-1].offset
    for cut in range(sections[0].offset, end, 97):
        found = inspect(Replay(tiny_stream[:cut]))
        assert found.cut is not None
        assert found.cut.offset == found.breakdown.total == cut
        whole = sum(following.offset <= cut for following in sections[1:])
        assert whole - 1 <= len(found.devices) <= whole
        names = [device.name for device in everything.devices]
        assert [device.name for device in found.devices] == names[: len(found.devices)]
        assert [attrs.astuple(block) for block in found.blocks] == [attrs.astuple(b) for b in everything.blocks]
