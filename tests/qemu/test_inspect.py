"""What a real QEMU says that it has sent, and what is found in its stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from whimbrel.capture.inspection import inspect
from whimbrel.cli.application import whimbrel as application
from whimbrel.stream import Replay

from . import guests
from .peer import Qemu, capture

Start = Callable[..., Qemu]


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
    zero, normal = sum(block.zero for block in found.blocks), sum(block.normal for block in found.blocks)
    xbzrle, compressed = sum(block.xbzrle for block in found.blocks), sum(block.compressed for block in found.blocks)
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
    assert [block.distinct for block in found.blocks] == [block.pages for block in found.blocks]


def test_on_the_command_line(tiny_stream: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    path.write_bytes(tiny_stream)
    result = CliRunner().invoke(application, ["inspect", str(path), "--ram", "--device", "cpu"])
    assert result.exit_code == 0
    assert "isapc" in result.stdout
    assert "all decoded to the last byte" in result.stdout
    assert "env.eip" in result.stdout
    assert "pc.ram" in result.stdout
