"""`whimbrel inspect`: what it prints, for people and for programs, and how it ends."""

import json
import os
import pty
import re
import struct
import subprocess
import sys

import pytest

import whimbrel
from whimbrel import vmstate
from whimbrel.capture import inspection
from whimbrel.settings import Settings

PAGE = 4096


class Corner:
    x, y = -1, 2


class Clock:
    ticks = 2**40
    serial = b"no. 7"
    due = [1, 2, 3]  # noqa: RUF012 - the only one
    log = bytes(range(100))
    corners = [Corner(), Corner()]  # noqa: RUF012 - the only one
    lit = True


CORNER = vmstate.VMStateDescription("corner", 1, fields=[vmstate.int32("x"), vmstate.uint8("y")])
LIGHT = vmstate.VMStateDescription("clock/light", 2, fields=[vmstate.bool_("lit")], needed=lambda clock: clock.lit)
CLOCK = vmstate.VMStateDescription(
    "clock",
    3,
    fields=[
        vmstate.uint64("ticks"),
        vmstate.buffer("serial", size=5),
        vmstate.uint16("due", length=3),
        vmstate.buffer("log", size=100),
        vmstate.struct("corners", CORNER, length=2),
    ],
    subsections=[LIGHT],
)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A machine of ours, in a file."""
    path = tmp_path_factory.mktemp("streams") / "stored"
    with whimbrel.Machine("bench-7", settings=Settings()) as machine:
        plate = machine.ram.array("plate", (8, PAGE), "u1")
        plate[:3] = 7
        plate[3] = 8
        machine.devices.add("clock", Clock(), CLOCK)
        machine.devices.add("clock", Clock(), CLOCK, instance_id=1)
        machine.start()
        machine.migrate(f"file:{path}").wait(60)
    return path


@pytest.fixture
def cut(stream, tmp_path):
    """`cut(size)`: the first bytes of the stream, in a file."""

    def cut(size):
        path = tmp_path / "cut"
        path.write_bytes(stream.read_bytes()[:size])
        return path

    return cut


def rows(text):
    """The cells of each line, which two spaces part."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines() if line.strip()]


def row(text, *first):
    """The cells behind the first ones of the one line that begins so."""
    (found,) = [cells[len(first) :] for cells in rows(text) if cells[: len(first)] == list(first)]
    return found


# -------------------------------------------------------------------------------------------------------- people


def test_the_head(cli, stream):
    result = cli("inspect", stream)
    assert result.exit_code == 0
    assert result.stderr == ""
    shown = result.stdout
    assert row(shown, "machine") == ["bench-7"]
    assert re.fullmatch(r"1\d.\d KiB, with a configuration, footers, a description of 1.\d KiB", *row(shown, "stream"))
    assert row(shown, "sent") == ["to nobody who listens"]
    assert row(shown, "memory") == ["32 KiB in 1 blocks"]
    assert row(shown, "passes") == ["at least 1"]
    assert row(shown, "devices", "3, all decoded to the last byte") == []
    for nothing in ("uuid", "capabilities", "behind", "cut"):
        assert not any(cells[0] == nothing for cells in rows(shown))


def test_the_blocks(cli, stream):
    shown = cli("inspect", stream).stdout
    assert row(shown, "RAM block") == ["size", "zero", "normal", "distinct", "records", "bytes"]
    assert row(shown, "plate")[:5] == ["32 KiB", "4", "4", "2", "8"]
    assert not any(cells[0] == "came" for cells in rows(shown)), "all came once"


def test_the_sections(cli, stream):
    shown = cli("inspect", stream).stdout
    assert next(cells[1] for cells in rows(shown) if cells[0] == "ram") == "START"
    assert [cells[1] for cells in rows(shown) if cells[0] == "ram"][-1] == "END"
    devices = [cells for cells in rows(shown) if "FULL" in cells]
    assert devices == [
        ["clock", "FULL", "0", "3", "147", "9 fields, 1 subsection"],
        ["clock", "FULL", "1", "3", "147", "9 fields, 1 subsection"],
        ["globalstate", "FULL", "0", "1", "104", "2 fields"],
    ]


def test_where_the_bytes_went(cli, stream):
    shown = cli("inspect", stream).stdout
    assert row(shown, "whole pages")[0] == str(4 * PAGE)
    assert row(shown, "devices", "398") != []
    assert row(shown, "all") == [str(stream.stat().st_size)]
    table = rows(shown)[[cells[0] for cells in rows(shown)].index("where the bytes went") + 2 :]
    assert sum(int(cells[1]) for cells in table[:-1]) == stream.stat().st_size


def records(*pages):
    """A stream of a machine of a hundred pages; each page is (flags, number, bytes), in a section of its own."""
    data = struct.pack(">IIB", 0x5145564D, 3, 1) + struct.pack(">I4sIIQ", 2, b"\3ram", 0, 4, 100 * PAGE | 4)
    data += b"\1m" + struct.pack(">QQ", 100 * PAGE, 16)
    for flags, number, payload in pages:
        data += struct.pack(">BIQ", 2, 2, number * PAGE | flags) + b"\1m" + payload + struct.pack(">Q", 16)
    return data + b"\0"


def test_how_often_pages_came(cli, tmp_path):
    path = tmp_path / "stream"
    whole, changed = b"\1" * PAGE, b"\1\0\3\0\1\xed"
    path.write_bytes(records(*[(0x08, 1, whole), (0x08, 2, whole), (0x40, 2, changed)], *[(2, 3, b"\0")] * 5))
    shown = cli("inspect", path).stdout
    assert row(shown, "RAM block") == ["size", "zero", "normal", "distinct", "XBZRLE", "never", "records", "bytes"]
    assert row(shown, "m")[:7] == ["400 KiB", "1", "1", "1", "1", "97", "8"]
    assert row(shown, "passes") == ["at least 5"]
    assert [row(shown, often) for often in ("never", "once", "twice", "5 times")] == [["97"], ["1"], ["1"], ["1"]]
    assert row(shown, "ram", "PART x 8")[:2] == ["0", "4"]
    # Of many numbers, those between powers of two are one line.
    path.write_bytes(records(*[(2, number, b"\0") for number in range(1, 20) for _ in range(number)]))
    shown = cli("inspect", path).stdout
    assert [row(shown, often) for often in ("never", "once", "twice", "3 to 4 times")] == [["81"], ["1"], ["1"], ["2"]]
    assert [row(shown, often) for often in ("5 to 8 times", "9 to 16 times", "17 to 19 times")] == [["4"], ["8"], ["3"]]


def test_pages_that_are_too_many_to_be_told_apart(cli, stream, monkeypatch):
    monkeypatch.setattr(inspection, "TRACKED_MAX", 7 * PAGE)
    shown = cli("inspect", stream).stdout
    assert "the pages of more than 28 KiB of RAM are not told apart" in shown
    assert row(shown, "plate")[:2] == ["32 KiB", "8"]
    assert not any(cells[0] == "passes" for cells in rows(shown))


def test_a_device_in_full(cli, stream):
    shown = cli("inspect", stream, "--devices", "clock").stdout
    first, second = shown.split("\n\n")
    assert rows(first)[0] == ["clock: instance 0, version 3, 147 bytes"]
    assert rows(second)[0] == ["clock: instance 1, version 3, 147 bytes"]
    assert row(first, "ticks") == ["uint64", "0", "0x10000000000"]
    assert row(first, "serial") == ["buffer", "8", b"no. 7".hex()]
    assert row(first, "due") == ["uint16[3]", "13", "1 2 3"]
    assert row(first, "log") == ["buffer", "19", bytes(range(32)).hex() + " … and 68 more bytes"]
    assert row(first, "corners[0]") == ["struct", "119", "corner, version 1"]
    assert row(first, "corners[1]") == ["struct", "124", "corner, version 1"]
    assert [cells[1:] for cells in rows(first) if cells[0] == "y"] == [["uint8", "123", "2"], ["uint8", "128", "2"]]
    assert row(first, "clock/light") == ["subsection", "clock/light, version 2"]
    assert row(first, "lit") == ["bool", "146", "True"]
    nested = [line for line in first.splitlines() if line.split()[0] in ("x", "lit")]
    assert all(line.startswith("  ") for line in nested)
    assert "plate" not in shown


def test_several_devices_in_the_streams_order(cli, stream):
    shown = cli("inspect", stream, "--devices", "globalstate", "--devices", "clock").stdout
    heads = [line.partition(":")[0] for line in shown.splitlines() if " bytes" in line and ": instance" in line]
    assert heads == ["clock", "clock", "globalstate"]


def test_a_device_that_is_not_there(cli, stream, complaint):
    result = cli("inspect", stream, "--devices", "clok")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "unknown device 'clok'; did you mean 'clock'? There are: clock, globalstate" in complaint(result)


def test_on_a_terminal(stream):
    """As wide as the terminal is, and nothing of the progress is left on it."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60", "TERM": "xterm", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "whimbrel", "inspect", str(stream)]
    with subprocess.Popen(command, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 1 << 16)
            except OSError:  # its end
                break
        assert process.wait(60) == 0
    os.close(master)
    lines = re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]|\r", "", shown.decode()).splitlines()
    assert row("\n".join(lines), "machine") == ["bench-7"]
    assert 40 < max(map(len, lines)) <= 60


# ------------------------------------------------------------------------------------------------------ programs


def test_for_programs(cli, stream):
    everything = json.loads(cli("inspect", stream, "--json").stdout)
    assert (everything["machine"], everything["ram"], everything["size"]) == (
        "bench-7",
        8 * PAGE,
        stream.stat().st_size,
    )
    assert sum(everything["breakdown"].values()) == everything["size"]
    assert (everything["blocks"][0]["normal"], everything["blocks"][0]["distinct"]) == (4, 2)
    assert [device["name"] for device in everything["devices"]] == ["clock", "clock", "globalstate"]
    values = {field["name"]: field["value"] for field in everything["devices"][0]["fields"]}
    assert (values["ticks"], values["due"]) == (2**40, [1, 2, 3])
    assert values["log"] == bytes(range(100)).hex(), "whole"
    assert [corner["fields"][0]["value"] for corner in values["corners"]] == [-1, -1]
    assert everything["devices"][0]["subsections"][0]["vmsd_name"] == "clock/light"
    one = json.loads(cli("inspect", stream, "--json", "--devices", "globalstate").stdout)
    assert one["devices"] == everything["devices"][2:]
    assert {**one, "devices": []} == {**everything, "devices": []}


# -------------------------------------------------------------------------------------------- cut, and not there


def test_a_stream_that_is_cut(cli, stream, cut, complaint):
    size = stream.read_bytes().index(b"\x05clock")
    result = cli("inspect", cut(size))
    assert result.exit_code == 1
    assert row(result.stdout, "plate")[:5] == ["32 KiB", "4", "4", "2", "8"]
    where = f"at byte {size}, in section devices, expected a device section or the end of the stream"
    assert row(result.stdout, "cut") == [where]
    assert row(result.stdout, "all") == [str(size)]
    said = complaint(result)
    assert "the stream is cut: it ends here, expected a device section or the end of the stream" in said
    assert f"byte {size} of the stream" in said
    assert "what is shown came before that" in said
    result = cli("inspect", cut(size), "--json")
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert shown["error-code"] == "lost"
    assert shown["error-desc"] in complaint(result)
    assert shown["cut"]["offset"] == size == sum(shown["breakdown"].values())
    assert shown["blocks"][0]["zero"] == 4
    result = cli("inspect", cut(size), "--devices", "clock")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the stream is cut" in complaint(result)


def test_a_stream_that_is_cut_within_a_page(cli, cut):
    result = cli("inspect", cut(9000))
    assert result.exit_code == 1
    (where,) = row(result.stdout, "cut")
    assert where.startswith("at byte 9000, in section 'ram' (id ")
    assert "block 'plate', expected at least " in where
    assert where.endswith(" more bytes of a record")


def test_a_description_that_is_cut(cli, stream, cut, complaint):
    path = cut(stream.stat().st_size - 9)
    result = cli("inspect", path)
    assert result.exit_code == 1
    assert "the description is cut: " in complaint(result)
    assert row(result.stdout, "devices", "3, not decoded: the stream does not describe them") == []
    assert "expected 9 more bytes of it" in row(result.stdout, "cut")[0]
    assert len([cells for cells in rows(result.stdout) if "FULL" in cells]) == 3
    result = cli("inspect", path, "--devices", "clock")
    assert result.exit_code == 1
    assert result.stdout.count("not decoded: the stream has no description of it") == 2
    assert row(result.stdout.partition("\n\n")[0], "bytes")[0].endswith(" … and 115 more bytes")


def test_a_stream_without_anything(cli, tmp_path):
    empty = tmp_path / "empty"
    empty.write_bytes(struct.pack(">IIB", 0x5145564D, 3, 0))
    result = cli("inspect", empty)
    assert result.exit_code == 0
    assert row(result.stdout, "machine") == ["not named"]
    assert row(result.stdout, "stream") == ["9 B, without configuration, footers and description"]
    assert not any(cells[0] in ("memory", "passes") for cells in rows(result.stdout))
    assert row(result.stdout, "all") == ["9"]


@pytest.mark.parametrize("data", [b"", b"QEV", b"hello, world"])
def test_what_is_no_stream(cli, tmp_path, complaint, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    result = cli("inspect", path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "shown" not in complaint(result)


def test_what_cannot_be_read(cli, tmp_path, complaint):
    result = cli("inspect", tmp_path / "none")
    assert result.exit_code == 1
    assert complaint(result) == f"'{tmp_path}/none' cannot be read: No such file or directory"
    result = cli("inspect", tmp_path)
    assert result.exit_code == 2
    assert complaint(result) == f"'{tmp_path}' is a folder, expected a file with a stream in it"
    assert cli("inspect").exit_code == 2
