"""Streams that cost as much as they can: each within a second for 64 KiB, by the processor's clock."""

from __future__ import annotations

import json

import numpy as np
import pytest

from whimbrel import Machine, PluginManager, Settings
from whimbrel.abc import SectionKind
from whimbrel.capture.tail import FITS_MAX
from whimbrel.capture.taking import Capture
from whimbrel.errors import ChannelLost, MigrationError, StreamError
from whimbrel.migration.loader import StreamLoader
from whimbrel.stream import Reader, Replay
from whimbrel.wire import description, ram, skeleton

from .conftest import PAGE, head, ram_part, section, word

from fuzz.target import Target, judge  # isort: skip
from fuzz import machines  # isort: skip

LARGE = 8192  # pages, so that no storm is one of too many records
CHANGE = b"\1\0\3\0\1x"


class Large(Target):
    """A machine with enough memory for storms to be legal."""

    name = "large"

    def seeds(self):
        return []

    def try_one(self, data):
        machine = Machine("tiny", settings=Settings(), plugins=machines.plugins())
        machine.ram.add("a", LARGE * PAGE)
        machine.ram.add("b", PAGE)
        machine.expect_arrival()
        registry, _ = machine._register()
        loader = StreamLoader(machine, registry, Reader(Replay(data)), lambda _: None, on_prepared=lambda: None)
        with machine:
            try:
                loader.load_header()
                loader.load()
            except MigrationError as exc:
                return exc.code
            finally:
                loader.rollback()
                registry.finish()
        return "loaded"


START = section(
    SectionKind.START,
    ram.block_list([ram.ListedBlock("a", LARGE * PAGE), ram.ListedBlock("b", PAGE)]) + ram.EOS_RECORD,
)
CAME = word(0x08) + b"\x01b" + bytes([1]) * PAGE + word(0x08) + b"\x01a" + bytes([7]) * PAGE


@pytest.mark.parametrize(
    "storm",
    [
        (word(0x60) + CHANGE) * 4600,
        (word(0x60) + b"\1\0\0") * 5900,
        (word(0x60) + CHANGE + word(0x22) + b"\0") * 2700,
        (word(0x40) + b"\x01a" + CHANGE + word(0x40) + b"\x01b" + CHANGE) * 2000,
        (word(0x02) + b"\x01a\0" + word(0x02) + b"\x01b\0") * 2900,
    ],
    ids=["one page again and again", "with nothing", "changed and zero in turn", "blocks in turn", "names in turn"],
)
def test_a_storm_of_records_within_the_time_of_any(storm):
    assert judge(Large(), head(START, ram_part(CAME + storm))) == ChannelLost.code


def nested(count):
    """A device whose bytes are descriptions of what stands before them, each of which fits."""
    body = b""
    for _ in range(count):
        field = {"name": "x", "type": "buffer", "size": len(body)}
        device = {"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, "fields": [field]}
        text = json.dumps({"page_size": PAGE, "devices": [device]}).encode()
        body += skeleton.section_footer(9) + b"\0" + description.frame(text)
    header = skeleton.SectionHeader(9, "d", 0, 1)
    return head(ram_nothing(), skeleton.section_header(SectionKind.FULL, header) + body)


def ram_nothing():
    start = section(SectionKind.START, ram.block_list([ram.ListedBlock("a", PAGE)]) + ram.EOS_RECORD)
    return start + section(SectionKind.END, ram.EOS_RECORD)


def taken(data):
    return Capture(Replay(data), settings=Settings(), plugins=PluginManager(), max_ram=1 << 20).run()


def test_descriptions_within_descriptions_are_counted():
    """Of those that fit the last one counts, and each costs a look at all before it: so there is a limit to them."""
    with taken(nested(FITS_MAX)) as machine:
        assert len(machine.captured[0].body) == len(nested(FITS_MAX - 1)) - len(nested(0))
    with pytest.raises(StreamError, match=f"more than {FITS_MAX} descriptions"):
        taken(nested(FITS_MAX + 2) + b"x")


def test_a_tail_of_footers_is_the_devices():
    """Bytes that look like footers, with nothing behind them that may stand there, end nothing."""
    header = skeleton.section_header(SectionKind.FULL, skeleton.SectionHeader(9, "d", 0, 1))
    body = skeleton.section_footer(9) * 20_000
    with taken(head(ram_nothing(), header, body, skeleton.section_footer(9), b"\0")) as machine:
        assert np.array_equal(np.frombuffer(machine.captured[0].body, np.uint8), np.frombuffer(body, np.uint8))
