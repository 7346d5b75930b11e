"""`whimbrel inspect`: what it prints, for people and for programs, and how it ends."""

import json
import struct

import pytest

import whimbrel
from whimbrel import vmstate
from whimbrel.settings import Settings

PAGE = 4096


class Clock:
    ticks = 2**40
    serial = b"no. 7"
    due = [1, 2, 3]  # noqa: RUF012 - the only one


CLOCK = vmstate.VMStateDescription(
    "clock",
    3,
    fields=[vmstate.uint64("ticks"), vmstate.buffer("serial", size=5), vmstate.uint16("due", length=3)],
)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A machine of ours, in a file."""
    path = tmp_path_factory.mktemp("streams") / "stored"
    with whimbrel.Machine("bench-7", settings=Settings()) as machine:
        machine.ram.array("plate", (8, PAGE), "u1")[:3] = 7
        machine.devices.add("clock", Clock(), CLOCK)
        machine.devices.add("clock", Clock(), CLOCK, instance_id=1)
        machine.start()
        machine.migrate(f"file:{path}").wait(60)
    return path


def table(text):
    """The cells of a table of rows, by their first."""
    rows = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def test_the_summary(cli, stream):
    result = cli("inspect", stream)
    assert result.exit_code == 0
    assert result.stderr == ""
    shown = table(result.stdout)
    assert shown["machine"] == "bench-7"
    assert shown["memory"] == "32 KiB in 1 blocks"
    assert shown["pages"].startswith("3 normal, 5 zero;")
    assert shown["devices"] == "3, all decoded to the last byte"
    assert "footers" in shown["stream"]
    assert "uuid" not in shown


def test_the_blocks(cli, stream):
    result = cli("inspect", stream, "--ram")
    assert table(result.stdout)["plate"].split() == ["32", "KiB", "8", "3", "5", "0", "0", "0", "0"]


def test_the_devices(cli, stream):
    rows = cli("inspect", stream, "--devices").stdout.splitlines()
    cells = [row.split() for row in rows if " clock " in row or " globalstate " in row]
    assert [row[1:] for row in cells] == [
        ["clock", "0", "3", "19", "3"],
        ["clock", "1", "3", "19", "3"],
        ["globalstate", "0", "1", "104", "2"],
    ]


def test_the_fields_of_one(cli, stream):
    shown = cli("inspect", stream, "--device", "clock").stdout
    assert "clock, instance 0" in shown
    assert "clock, instance 1" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith(("ticks", "serial", "due"))]
    assert rows[:3] == [
        ["ticks", "uint64", "0", "0x10000000000"],
        ["serial", "buffer", "8", b"no. 7".hex()],
        ["due", "uint16", "13", "1", "2", "3"],
    ]
    assert len(rows) == 6


def test_a_device_that_is_not_there(cli, stream, complaint):
    result = cli("inspect", stream, "--device", "clok")
    assert result.exit_code == 2
    assert "unknown device 'clok'; did you mean 'clock'?" in complaint(result)


def test_for_programs(cli, stream):
    brief = json.loads(cli("inspect", stream, "--json").stdout)
    assert (brief["machine"], brief["ram"], brief["size"]) == ("bench-7", 8 * PAGE, stream.stat().st_size)
    assert brief["blocks"][0]["normal"] == 3
    assert [device["name"] for device in brief["devices"]] == ["clock", "clock", "globalstate"]
    assert not any("fields" in device for device in brief["devices"])
    full = json.loads(cli("inspect", stream, "--json", "--devices").stdout)
    assert [field["value"] for field in full["devices"][0]["fields"]] == [2**40, b"no. 7".hex(), [1, 2, 3]]
    one = json.loads(cli("inspect", stream, "--json", "--device", "globalstate").stdout)
    assert [device["name"] for device in one["devices"]] == ["globalstate"]
    assert one["devices"][0]["fields"][0]["value"] == 8  # "running" and its end


def test_a_stream_that_is_cut(cli, stream, tmp_path, complaint):
    data = stream.read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(data[: data.index(b"\x05clock")])
    result = cli("inspect", cut)
    assert result.exit_code == 1
    assert table(result.stdout)["pages"].startswith("3 normal, 5 zero;")
    assert "what is shown came before that" in complaint(result)
    result = cli("inspect", cut, "--json")
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert shown["error-code"] == "lost"
    assert shown["error-desc"] in complaint(result)
    assert shown["blocks"][0]["zero"] == 5
    assert cli("inspect", cut, "--device", "clock").exit_code == 1


def test_a_description_that_is_cut(cli, stream, tmp_path):
    cut = tmp_path / "cut"
    cut.write_bytes(stream.read_bytes()[:-9])
    result = cli("inspect", cut, "--devices", "--device", "clock")
    assert "no whole description" in result.stdout
    assert "not decoded: the stream has no description of it" in result.stdout
    assert "clock: 19 bytes, not decoded" in result.stderr


def test_a_stream_without_anything(cli, tmp_path):
    empty = tmp_path / "empty"
    empty.write_bytes(struct.pack(">IIB", 0x5145564D, 3, 0))
    result = cli("inspect", empty, "--ram", "--devices")
    assert result.exit_code == 0
    assert table(result.stdout)["machine"] == "not named"
    assert "memory" not in table(result.stdout)


@pytest.mark.parametrize("data", [b"", b"QEV", b"hello, world"])
def test_what_is_no_stream(cli, tmp_path, complaint, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    result = cli("inspect", path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert complaint(result)


def test_what_is_not_there(cli, tmp_path, complaint):
    result = cli("inspect", tmp_path / "none")
    assert result.exit_code in (1, 2)
    assert "none" in complaint(result)
    assert cli("inspect").exit_code == 2
