"""Drives that come along with a captured machine: into images that are named, and nowhere else."""

from __future__ import annotations

import os

import pytest

from whimbrel import Machine, Settings
from whimbrel.capture import CapturedMachine
from whimbrel.capture.images import leaving
from whimbrel.capture.inspection import inspect
from whimbrel.errors import ConfigError, MigrationError, StateError, StreamError

MIB = 1 << 20


def filled(path, size, *, data=b"abc"):
    path.write_bytes(data)
    os.truncate(path, size)
    return path


@pytest.fixture
def stream(tmp_path):
    """`stream(size, …)`: a file with a machine of one drive, `disk0`, whose image is `source.img`."""

    def make(size=3 * MIB, *, data=b"abc", **kind):
        file = tmp_path / "machine.stream"
        with Machine("m", settings=Settings()) as machine:
            machine.ram.add("ram", 1 << 16)
            machine.drives.add("disk0", filled(tmp_path / "source.img", size, data=data))
            machine.migrate(f"file:{file}", **(kind or {"block": True})).wait(60)
        return file

    return make


def check_same(one, other, *, size):
    ours, theirs = one.read_bytes(), other.read_bytes()
    assert len(theirs) == size
    assert next((at for at in range(len(ours)) if ours[at] != theirs[at]), None) is None


def test_into_an_image_that_is_there_and_on(stream, tmp_path):
    file, image = stream(3 * MIB + 512), filled(tmp_path / "here.img", 4 * MIB, data=b"\xee" * 4 * MIB)
    with CapturedMachine.load(file, drives={"disk0": image}) as captured:
        assert captured.drives["disk0"].size == 4 * MIB
        assert not list(tmp_path.glob("*incomplete"))
        ours, theirs = (tmp_path / "source.img").read_bytes(), image.read_bytes()
        assert next((at for at in range(len(ours)) if ours[at] != theirs[at]), None) is None
        captured.migrate(f"file:{tmp_path}/on.stream", block=True).wait(60)
    with CapturedMachine.load(tmp_path / "on.stream", drives={"disk0": tmp_path / "made.img"}, create=True):
        check_same(image, tmp_path / "made.img", size=4 * MIB)


@pytest.mark.slow
def test_an_image_that_is_made_has_the_size_of_what_came(stream, tmp_path):
    file, image = stream(40 * MIB), tmp_path / "made.img"
    with CapturedMachine.load(file, drives={"disk0": image}, create=True) as captured:
        assert captured.drives["disk0"].size == 40 * MIB
        check_same(tmp_path / "source.img", image, size=40 * MIB)
        assert image.stat().st_blocks * 512 < MIB, "it is sparse"


def test_what_nothing_tells_the_size_of_is_not_made(stream, tmp_path):
    file = stream(3 * MIB, data=bytes(2 * MIB) + b"x", incremental=True)
    os.truncate(tmp_path / "source.img", 0)
    filled(tmp_path / "source.img", 3 * MIB, data=b"")
    with (tmp_path / "source.img").open("r+b") as disk:
        disk.seek(2 * MIB)
        disk.write(b"x")
    with Machine("m", settings=Settings()) as machine:
        machine.ram.add("ram", 1 << 16)
        machine.drives.add("disk0", tmp_path / "source.img")
        file.unlink()
        machine.migrate(f"file:{file}", incremental=True).wait(60)
    with pytest.raises(MigrationError, match="only 1 of 3 chunks"):
        CapturedMachine.load(file, drives={"disk0": tmp_path / "made.img"}, create=True)
    assert not list(tmp_path.glob("made.img*"))


@pytest.mark.parametrize(
    ("drives", "error", "words"),
    [
        ({}, MigrationError, "--drive NAME=IMAGE"),
        ({"disk0": "nowhere.img"}, ConfigError, "there is no image"),
        ({"disk0": "small.img"}, StreamError, "must be as large as the source's"),
        ({"disk1": "large.img"}, StreamError, "a chunk of drive 'disk0' came"),
        ({"disk0": "large.img", "disk1": "large.img"}, StateError, "in use: this process"),
    ],
)
def test_what_does_not_fit(stream, tmp_path, drives, error, words):
    file = stream()
    filled(tmp_path / "small.img", 2 * MIB)
    filled(tmp_path / "large.img", 3 * MIB, data=b"mine")
    with pytest.raises(error, match=words):
        CapturedMachine.load(file, drives={name: tmp_path / image for name, image in drives.items()})
    assert (tmp_path / "large.img").read_bytes()[:4] == b"mine"
    marked = {path.name for path in tmp_path.glob("*incomplete")}
    assert marked == ({"small.img.whimbrel-incomplete"} if drives == {"disk0": "small.img"} else set())


def test_a_stream_without_drives_that_was_to_have_some(tmp_path, stream):
    file = stream(block=False)
    image = filled(tmp_path / "here.img", 3 * MIB, data=b"mine")
    with pytest.raises(MigrationError, match="the stream has no drives"):
        CapturedMachine.load(file, drives={"disk0": image})
    assert image.read_bytes()[:4] == b"mine"
    assert not list(tmp_path.glob("*incomplete"))


def test_a_stream_that_is_cut_leaves_its_mark(stream, tmp_path):
    file, image = stream(), filled(tmp_path / "here.img", 3 * MIB)
    cut = tmp_path / "cut.stream"
    cut.write_bytes(file.read_bytes()[: 2 * MIB])
    with pytest.raises(MigrationError):
        CapturedMachine.load(cut, drives={"disk0": image})
    assert (tmp_path / "here.img.whimbrel-incomplete").exists()
    with pytest.raises(StateError, match="not whole"), leaving({"disk0": image}, any_size=False):
        pass
    with pytest.raises(MigrationError):
        CapturedMachine.load(cut, drives={"disk0": tmp_path / "made.img"}, create=True)
    assert not list(tmp_path.glob("made.img*"))
    with CapturedMachine.load(file, drives={"disk0": image}):
        check_same(tmp_path / "source.img", image, size=3 * MIB)
    assert not list(tmp_path.glob("*incomplete"))


def test_a_size_that_a_qemu_does_not_take(tmp_path):
    odd = filled(tmp_path / "odd.img", MIB + 512, data=bytes(MIB) + b"x")
    with pytest.raises(ConfigError, match="no multiple of 1 MiB"), leaving({"disk0": odd}, any_size=False):
        pass
    with leaving({"disk0": odd}, any_size=True) as images:
        assert images["disk0"].acquired
    with leaving({"disk0": filled(tmp_path / "zero.img", MIB + 512)}, any_size=False) as images:
        assert images["disk0"].size == MIB + 512


def test_inspect_tells_of_drives(stream):
    found = inspect(stream(3 * MIB + 512))
    assert found.error is None
    (drive,) = found.drives
    assert (drive.name, drive.chunks, drive.zero, drive.distinct, drive.passes, drive.size) == (
        "disk0", 3, 1, 4, 1, 4 * MIB
    )  # fmt: skip
    assert found.breakdown.chunks == 3 * MIB
    assert found.breakdown.total == found.size
    assert found.as_dict()["drives"][0]["bytes"] == drive.bytes
