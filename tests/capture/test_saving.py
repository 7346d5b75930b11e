"""A captured machine goes out in the form it came in: each page once, the devices byte for byte, and comes in again."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.capture import CapturedDevices, CapturedMachine
from whimbrel.capture.receiving import save
from whimbrel.errors import ConnectError, StateError, WhimbrelError

from .analyser import Refused, analyse
from .conftest import Crumbs, check
from .streams import FROM_2_4, PAGE, SHAPES, SUPPRESSED, Device, Script, page, random_stream, small


def compare(stream, script):
    """The saved stream is valid, and is the machine that `script` has written."""
    found = analyse(stream, script)
    shape = script.shape
    assert found.machine == (script.machine if shape.configuration else None)
    assert (found.capabilities, found.uuid) == (tuple(script.capabilities), script.uuid)
    assert found.footers == shape.footers
    assert list(found.ram) == list(script.ram)
    for name, pages in script.ram.items():
        assert np.array_equal(found.ram[name], pages), name
    assert found.addresses == (script.addresses or {})
    assert found.devices == [device.key for device in script.devices]
    assert found.text == (script.text if shape.description else None)
    assert found.commands == []
    assert found.elements[0] == 1
    assert found.elements[-len(script.devices) - 1 :] == [3, *[4] * len(script.devices)]
    return found


def check_pages(found, script, shared=()):
    """Each page came once, and as a ZERO record if there is nothing in it; none of a shared block came."""
    there = sorted((name, n) for name, pages in script.ram.items() for n in range(len(pages)) if name not in shared)
    assert sorted(record[:2] for record in found.records) == there
    for name, number, zero in found.records:
        assert zero == (not script.ram[name][number].any())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_saved_and_loaded_again(tmp_path, plugins, load, check, settings, shape):
    script = small(shape, uuid=bytes(range(16)))
    machine = load(script.finish(), settings=settings)
    save(machine, tmp_path / "again")
    stream = (tmp_path / "again").read_bytes()
    check_pages(compare(stream, script), script)
    again = load(stream)
    check(again, script, ids=False)
    assert again.guessed == machine.guessed


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SHAPES))
def test_any_machine_saved_and_loaded_again(tmp_path_factory, plugins, seed, shape):
    script = random_stream(random.Random(seed), shape)
    file = tmp_path_factory.mktemp("saved") / "stream"
    with CapturedMachine.load(Crumbs(script.finish(), [1 << 20]), plugins=plugins) as machine:
        machine.settings.parameters.max_bandwidth = 0
        save(machine, file)
    shared = script.shared()
    check_pages(compare(file.read_bytes(), script), script, shared)
    with CapturedMachine.load(file, plugins=plugins) as again:
        check(again, script, ids=False)
        assert {block.name for block in again.ram if block.shared} == shared


def test_a_fill_byte_becomes_a_page(tmp_path, load, settings):
    script = Script(FROM_2_4, {"a": 3}).header().start()
    script.end(("a", 0, 0xEE), ("a", 1, bytes(PAGE)), ("a", 2, 0))
    save(load(script.finish(), settings=settings), tmp_path / "again")
    found = compare((tmp_path / "again").read_bytes(), script)
    assert sorted(found.records) == [("a", 0, False), ("a", 1, True), ("a", 2, True)]


def test_blocks_that_are_shared_stay_so(tmp_path, load, settings):
    """No page of a block came, since the destination has it already: none may go out, or it would be made zero."""
    script = Script(
        SUPPRESSED,
        {"shared": 4, "own": 2},
        capabilities=("x-ignore-shared",),
        addresses={"shared": 0x100000, "own": 0},
    )
    script.header().start().part(("own", 0, page(1))).end(("own", 1, 0)).full(Device("d", 4, b"body"))
    machine = load(script.finish(), settings=settings)
    assert [block.shared for block in machine.ram] == [True, False]
    save(machine, tmp_path / "again")
    found = compare((tmp_path / "again").read_bytes(), script)
    assert {name for name, _, _ in found.records} == {"own"}


def test_without_that_capability_no_block_is_shared(load):
    script = Script(FROM_2_4, {"a": 1, "b": 1}).header().start().end(("a", 0, 0))
    assert not any(block.shared for block in load(script.finish()).ram)


def test_the_analyser_notices_damage():
    """So that its word counts."""
    script = small(FROM_2_4)
    stream = script.finish()
    assert compare(stream, script)
    noticed = 0
    for offset in range(0, len(stream), 7):
        damaged = bytearray(stream)
        damaged[offset] ^= 0x15
        try:
            compare(damaged, script)
        except (Refused, AssertionError, ValueError, LookupError):
            noticed += 1
    assert noticed == len(range(0, len(stream), 7))


def test_what_cannot_be_stored_can_be_stored_elsewhere(tmp_path, load, settings):
    script = small(FROM_2_4)
    machine = load(script.finish(), settings=settings)
    with pytest.raises(ConnectError):
        save(machine, tmp_path / "no such folder" / "file")
    save(machine, tmp_path / "file")
    check_pages(compare((tmp_path / "file").read_bytes(), script), script)
    with pytest.raises(StateError):
        save(machine, tmp_path / "third")


class Hindering:
    """A device that is in the way: when it is saved, something else is where the file is to be."""

    def __init__(self, device, hinder):
        self.header, self.described = device.header, device.described
        self._body, self._hinder = device.body, hinder

    @property
    def body(self):
        self._hinder()
        return self._body


def test_what_fails_when_it_was_let_go_of_is_taken_back(tmp_path, load, settings):
    """The last step of storing fails, behind the point of no return: nothing but this machine has it, and it stays."""
    script = small(FROM_2_4)
    machine = load(script.finish(), settings=settings)
    place = tmp_path / "file"
    kept = machine.captured
    machine.captured = CapturedDevices([Hindering(kept[0], place.mkdir), *kept[1:]])
    with pytest.raises(WhimbrelError, match="folder"):
        save(machine, place)
    assert machine.run_state == "paused"
    machine.captured = kept
    place.rmdir()
    save(machine, place)
    check_pages(compare(place.read_bytes(), script), script)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
