"""A QEMU's drives stored by `whimbrel receive` and sent on by `whimbrel send`: another QEMU goes on with the same."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest

from whimbrel.capture.receiving import Receipt, Reception
from whimbrel.cli.application import whimbrel as application

from .peer import Qemu

MIB = 1 << 20
LONG = 60.0
FAST = 1 << 40  # 0, for no limit, keeps a QEMU 7.2 from ever sending a chunk
SIZES = {"disk0": 4 * MIB, "disk1": 64 * MIB}
WRITES = 20  # while the migration runs

StartQemu = Callable[..., Qemu]


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """`images(folder, filled=…)`: a folder with an image of each drive, half full or empty."""

    def make(folder: str, *, filled: bool = False) -> dict[str, Path]:
        (tmp_path / folder).mkdir()
        paths = {name: tmp_path / folder / f"{name}.img" for name in SIZES}
        for name, path in paths.items():
            path.write_bytes(random.Random(name).randbytes(SIZES[name] // 2) if filled else b"")
            os.truncate(path, SIZES[name])
        return paths

    return make


def options(paths: dict[str, Path]) -> dict[str, Any]:
    """What gives a QEMU those drives."""
    extra = []
    for name, path in paths.items():
        extra += ["-drive", f"id={name},file={path},format=raw,if=none", "-device", f"ide-hd,drive={name}"]
    return {"extra": extra}


def told(paths: dict[str, Path]) -> list[str]:
    """The same for the command line."""
    return [word for name, path in paths.items() for word in ("--drive", f"{name}={path}")]


def check_equal(one: dict[str, Path], other: dict[str, Path]) -> None:
    for name, path in one.items():
        ours, theirs = path.read_bytes(), other[name].read_bytes()
        assert len(ours) == len(theirs)
        assert (
            next((at for at in range(0, len(ours), 512) if ours[at : at + 512] != theirs[at : at + 512]), None) is None
        )
        assert not list(other[name].parent.glob("*incomplete"))


def received(source: Qemu, reception: Reception, **kind: bool) -> Receipt:
    """Migrate `source` there, with writes to its drives on the way."""
    receipts: list[Any] = []

    def run() -> None:
        try:
            receipts.append(reception.run())
        except BaseException as exc:  # raised below
            receipts.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        source.switch_on("return-path")
        source.execute("migrate-set-parameters", **{"max-bandwidth": FAST, "downtime-limit": 1})
        source.execute("migrate", uri=reception.uri, **kind)
        for number in range(WRITES):
            for name in SIZES:
                write = f'qemu-io {name} "write -P {number + 1} {number * 37 % 3}M 64k"'
                source.execute("human-monitor-command", **{"command-line": write})
        status = source.wait_status("completed", "failed")
    finally:
        thread.join(LONG)
    (receipt,) = receipts
    if isinstance(receipt, BaseException):
        raise receipt
    assert status == "completed"
    assert isinstance(receipt, Receipt)
    return receipt


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blk", "inc"])
def test_a_qemu_goes_on_with_the_drives_of_another(
    qemu_7_2: None, qemu: StartQemu, tiny_machine: dict[str, Any], images: Any, tmp_path: Path, kind: str
) -> None:
    theirs, stored, again = images("theirs", filled=True), images("stored"), images("again")
    source = qemu(**tiny_machine, **options(theirs))
    source.serial.wait(b"AB")
    reception = Reception(f"unix:{tmp_path}/a", tmp_path / "machine.stream", drives=stored)
    receipt = received(source, reception, **{kind: True})
    assert [(drive.name, drive.size, drive.made) for drive in receipt.drives] == [
        (name, size, False) for name, size in SIZES.items()
    ]
    assert receipt.told
    source.close()
    check_equal(theirs, stored)

    destination = qemu(**tiny_machine, **options(again), incoming="defer")
    destination.execute("migrate-incoming", uri=f"unix:{tmp_path}/b")
    arguments = ["send", f"{tmp_path}/machine.stream", f"unix:{tmp_path}/b", *told(stored)]
    sent = click.testing.CliRunner().invoke(
        application, [*arguments, "--set", f"block-incremental={'on' if kind == 'inc' else 'off'}"]
    )
    assert sent.exit_code == 0, sent.stderr
    destination.wait_run_state("running")
    destination.close()
    check_equal(stored, again)
