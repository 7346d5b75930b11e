"""Memory that both ends have already (x-ignore-shared): listed with its address, never sent, never touched."""

import numpy as np
import pytest

from whimbrel.abc import SectionKind
from whimbrel.errors import IncompatibleError, StreamError
from whimbrel.machine.dirty import plugin as trackers
from whimbrel.stream import Reader
from whimbrel_savevm._ram_loader import RamLoader
from whimbrel_savevm.ram import RamHandler

START, PART = SectionKind.START, SectionKind.PART
PAGE = 4096
EOS = bytes.fromhex("00 00 00 00 00 00 00 10")


def machine_of(bench, *blocks):
    """A machine of (name, pages, guest address or None, shared) blocks."""
    machine = bench.machine({name: pages for name, pages, _, _ in blocks})
    for name, _, address, shared in blocks:
        machine.ram[name].guest_address, machine.ram[name].shared = address, shared
    return machine


def loaded(machine, bench, *bodies):
    loader = RamLoader(machine)
    reader = Reader(bench.Tape(b"".join(data for _, data in bodies)))
    try:
        for kind, _ in bodies:
            loader.load(reader, kind)
    finally:
        loader.finish()
    return loader


BLOCKS = [("ram", 4, 0, True), ("rom", 2, 0xC0000, False), ("table", 1, None, False)]
LISTED = bytes.fromhex(
    "00 00 00 00 00 00 70 04"
    "03 72 61 6d        00 00 00 00 00 00 40 00  00 00 00 00 00 00 00 00"
    "03 72 6f 6d        00 00 00 00 00 00 20 00  00 00 00 00 00 0c 00 00"
    "05 74 61 62 6c 65  00 00 00 00 00 00 10 00  00 00 00 00 00 00 00 00"
    "00 00 00 00 00 00 00 10"
)


def test_if_one_block_has_an_address_all_are_listed_with_one(bench):
    source = bench.Source(machine_of(bench, *BLOCKS))
    source.start()
    assert bytes(source.tape.data) == LISTED


def test_without_addresses_a_shared_block_is_listed_like_the_others(bench):
    source = bench.Source(machine_of(bench, ("a", 1, None, True)))
    source.start()
    assert bytes(source.tape.data) == bytes.fromhex(
        "00 00 00 00 00 00 10 04  01 61  00 00 00 00 00 00 10 00  00 00 00 00 00 00 00 10"
    )


def test_no_page_of_a_shared_block_is_sent_nor_tracked(bench):
    source = bench.Source(machine_of(bench, *BLOCKS))
    source.machine.ram["ram"].view[:] = 7
    source.start()
    assert set(source.tracker.written) == {"rom", "table"}
    assert source.saver.pending() == 3 * PAGE
    begin = len(source.tape.data)
    source.round()
    source.machine.ram["ram"].view[:] = 8
    source.machine.ram["ram"].mark_dirty()
    source.end()
    _, bodies = bench.parse_bodies(bytes(source.tape.data[begin:]))
    records = [record for body in bodies for record in body]
    assert [(name, page) for _, name, page, _ in records] == [("rom", 0), (None, 1), ("table", 0)]
    assert source.progress.remaining == 0


def test_a_machine_that_shares_all_its_memory(bench):
    source = bench.Source(machine_of(bench, ("a", 4, 0, True)))
    source.start()
    source.round()
    source.end()
    lists = bytes(source.tape.data)
    assert lists.endswith(EOS + EOS)
    other = machine_of(bench, ("a", 4, 0, True))
    loaded(other, bench, (START, lists[: len(lists) - 8]), (SectionKind.END, EOS))


def test_it_does_not_count_as_memory_to_be_sent(bench):
    machine = machine_of(bench, *BLOCKS)
    machine._tracker_specs = trackers.whimbrel_dirty_trackers
    assert RamHandler(machine).progress.total == 3 * PAGE


def test_the_destination_takes_the_list_and_leaves_the_memory(bench):
    machine = machine_of(bench, *BLOCKS)
    machine.ram["ram"].view[:] = 7
    body = bytes.fromhex("00 00 00 00 00 00 10 02  03 72 6f 6d  05") + EOS
    loader = loaded(machine, bench, (START, LISTED), (PART, body))
    assert not loader.came("ram").any()
    assert np.flatnonzero(loader.came("rom")).tolist() == [1]
    loader.rollback()
    assert (machine.ram["ram"].view == 7).all(), "it is the source's as well"
    assert not machine.ram["rom"].view.any()


@pytest.mark.parametrize(
    "record",
    [
        b"\x02\x03ram\x00",
        b"\x02\x03ram\x07",
        b"\x08\x03ram" + bytes(PAGE),
        b"\x40\x03ram\x01\x00\x00",
    ],
)
def test_a_record_of_shared_memory_is_refused(bench, record):
    machine = machine_of(bench, *BLOCKS)
    machine.ram["ram"].view[:] = 7
    with pytest.raises(StreamError, match="a record came for block 'ram', which both ends share") as caught:
        loaded(machine, bench, (START, LISTED), (PART, bytes(7) + record + EOS))
    assert caught.value.place.block == "ram"
    assert (machine.ram["ram"].view == 7).all()


@pytest.mark.parametrize("address", [None, 4096, 2**64 - 1])
def test_shared_memory_at_another_address(bench, address):
    blocks = [("ram", 4, address, True), *BLOCKS[1:]]
    with pytest.raises(IncompatibleError, match="the shared RAM block 'ram' is at 0x0 in the source's guest, and at"):
        loaded(machine_of(bench, *blocks), bench, (START, LISTED))


def test_memory_that_is_sent_may_be_anywhere(bench):
    blocks = [BLOCKS[0], ("rom", 2, 0xE0000, False), ("table", 1, 5, False)]
    loaded(machine_of(bench, *blocks), bench, (START, LISTED))


def test_addresses_where_none_are_expected(bench):
    with pytest.raises(StreamError, match="the name of a RAM block is empty"):
        loaded(bench.machine({"ram": 4, "rom": 2, "table": 1}), bench, (START, LISTED))


def test_no_addresses_where_they_are_expected(bench):
    plain = bench.Source(bench.machine({"ram": 4, "rom": 2, "table": 1}))
    plain.start()
    with pytest.raises(StreamError):
        loaded(machine_of(bench, *BLOCKS), bench, (START, bytes(plain.tape.data)))
