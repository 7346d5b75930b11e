"""`whimbrel receive --drive` that comes to no good end: it says why, and the machine runs on at its source."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from whimbrel import LoopGuest, Machine, Settings
from whimbrel.errors import MigrationError

from ..qemu import peer

MIB = 1 << 20
SIZE = 48 * MIB
LONG = 60.0


@pytest.fixture
def source(tmp_path):
    """A machine that runs, with a full disk of SIZE, whose guest writes to it."""
    image = tmp_path / "source.img"
    image.write_bytes(os.urandom(SIZE))
    settings = Settings()
    settings.capabilities.block = True
    settings.parameters.announce_rounds = 1
    with Machine("m", settings=settings) as machine:
        count = machine.ram.array("count", (1,), "uint64")
        disk = machine.drives.add("disk0", image)

        def step():
            disk.write(int(count[0]) * 16 % SIZE, b"%15d\n" % int(count[0]))
            count[0] += 1
            time.sleep(0.001)

        machine.guest = LoopGuest(step)
        machine.start()
        yield machine


class Receiving:
    """`whimbrel receive` in a process of its own."""

    def __init__(self, folder, image, *options):
        command = [sys.executable, "-m", "whimbrel", "receive", "tcp:127.0.0.1:0", str(folder / "machine.stream")]
        self.process = subprocess.Popen(
            [*command, "--drive", f"disk0={image}", *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def uri(self):
        """Where it waits; it has said so."""
        said = ""
        while line := self.process.stderr.readline():
            said += line
            if found := re.search(r"tcp:127\.0\.0\.1:\d+", line):
                return found[0]
        raise AssertionError(f"it does not wait: {said}")

    def end(self):
        """What else it said; it has failed."""
        _, said = self.process.communicate(timeout=LONG)
        assert self.process.returncode != 0
        return said


def check_runs_on(machine, folder):
    """The source's guest goes on, and nothing was stored."""
    count = machine.ram["count"].array((1,), "uint64")
    before, deadline = int(count[0]), time.monotonic() + LONG
    while int(count[0]) == before:
        assert time.monotonic() < deadline, "the guest stands still"
        time.sleep(0.001)
    assert machine.drives["disk0"].device.acquired
    assert not (folder / "machine.stream").exists()


@pytest.fixture
def small_disk():
    """A file system of 16 MiB."""
    with tempfile.TemporaryDirectory(prefix="whimbrel-") as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip("only root may mount a small file system")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("made", [False, True])
def test_a_disk_that_is_full(source, tmp_path, small_disk, made):
    image = small_disk / "there.img"
    if not made:
        image.touch()
        os.truncate(image, SIZE)
    receiving = Receiving(tmp_path, image, *(["--create"] if made else []))
    with pytest.raises(MigrationError):
        source.migrate(receiving.uri()).wait(LONG)
    said = receiving.end()
    assert "No space left on device" in said
    assert "Traceback" not in said
    check_runs_on(source, tmp_path)
    marked = sorted(path.name for path in small_disk.iterdir())
    assert marked == ([] if made else ["there.img", "there.img.whimbrel-incomplete"])


@pytest.mark.slow
def test_an_interrupt_in_the_middle(source, tmp_path):
    image = tmp_path / "there.img"
    image.touch()
    os.truncate(image, SIZE)
    receiving = Receiving(tmp_path, image)
    source.settings.parameters.max_bandwidth = 16 * MIB
    migration = source.migrate(receiving.uri())
    marker, deadline = image.with_name("there.img.whimbrel-incomplete"), time.monotonic() + LONG
    while not marker.exists():
        assert time.monotonic() < deadline, "nothing arrives"
        time.sleep(0.001)
    receiving.process.send_signal(signal.SIGINT)
    with pytest.raises(MigrationError):
        migration.wait(LONG)
    said = receiving.end()
    assert "Traceback" not in said
    check_runs_on(source, tmp_path)
    assert marker.exists()


@pytest.mark.slow
@pytest.mark.skipif(bool(peer.missing()), reason=peer.missing())
def test_an_image_that_a_qemu_uses(tmp_path):
    image = tmp_path / "there.img"
    image.write_bytes(b"theirs" * 1000)
    os.truncate(image, SIZE)
    extra = ("-drive", f"id=disk0,file={image},format=raw,if=none", "-device", "ide-hd,drive=disk0")
    with peer.Qemu(16, stopped=True, extra=extra) as qemu:
        said = Receiving(tmp_path, image).end()
        assert f"process {qemu.process.pid} " in said
        assert "Traceback" not in said
    assert image.read_bytes()[:6] == b"theirs"
    assert not list(tmp_path.glob("*incomplete"))
    assert not (tmp_path / "machine.stream").exists()
