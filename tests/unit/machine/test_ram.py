"""RAM blocks and their collection."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from whimbrel.errors import ConfigError, StateError, UnknownNameError
from whimbrel.machine.ram import PAGE_SIZE, Ram, RamBlock


@pytest.fixture
def ram():
    ram = Ram()
    yield ram
    ram.close()


def test_sizes_are_rounded_up_to_whole_pages(ram):
    assert [ram.add(str(size), size).size for size in (1, PAGE_SIZE, PAGE_SIZE + 1)] == [4096, 4096, 8192]
    assert [block.pages for block in ram] == [1, 1, 2]
    assert ram.total == 4 * PAGE_SIZE


def test_an_array_is_a_view_of_its_block(ram):
    plate = ram.array("plate", (10, 20, 3), "float32")
    assert (plate.shape, plate.dtype, plate.nbytes) == ((10, 20, 3), np.float32, 2400)
    assert not plate.any()
    plate[0, 0, 1] = 1.5
    assert ram["plate"].view[4:8].view(np.float32)[0] == 1.5
    assert ram["plate"].array(dtype="float32")[1] == 1.5
    assert ram["plate"].array(dtype="float32").size == PAGE_SIZE // 4
    assert ram["plate"].array((20, 3), "float32", offset=240).base is not None
    assert ram.array("flat", 7, np.dtype([("a", "u1"), ("b", "f8")])).shape == (7,)


def test_blocks_are_found_by_name_and_iterated_in_order(ram):
    blocks = [ram.add(name, 1) for name in ("z", "a", "m")]
    assert list(ram) == blocks
    assert len(ram) == 3
    assert ram["a"] is blocks[1]
    assert "a" in ram
    assert "b" not in ram
    with pytest.raises(UnknownNameError, match="there are: a, m, z") as caught:
        _ = ram["b"]
    assert isinstance(caught.value, KeyError)


@pytest.mark.parametrize("name", ["", "x" * 256, "käse", "a\nb", "a\0b"])
def test_names_that_the_stream_cannot_carry_are_refused(ram, name):
    with pytest.raises(ConfigError, match="1 to 255 printable ASCII"):
        ram.add(name, 1)
    assert len(ram) == 0


def test_a_name_is_given_once(ram):
    block = ram.add("x" * 255, 1)
    with pytest.raises(ConfigError, match="already a RAM block"):
        ram.array("x" * 255, 3, "u1")
    assert list(ram) == [block]


@pytest.mark.parametrize("size", [0, -1])
def test_blocks_have_a_size(ram, size):
    with pytest.raises(ConfigError, match="1 byte or more"):
        ram.add("a", size)


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((), "O", "no bytes of their own"),
        (3, "S0", "1 byte or more"),
        ((0, 4), "f4", "1 byte or more"),
        ((-2, -2), "f4", "0 or more"),
        (1 << 62, "f8", "cannot map"),
    ],
)
def test_arrays_that_cannot_be_leave_no_block(ram, shape, dtype, words):
    with pytest.raises(ConfigError, match=words):
        ram.array("a", shape, dtype)
    assert len(ram) == 0


def test_an_array_stays_inside_of_its_block(ram):
    block = ram.add("a", PAGE_SIZE)
    for shape, offset in ((1025, 0), (1, PAGE_SIZE - 3), (1, -4), (None, PAGE_SIZE + 4)):
        with pytest.raises(ConfigError, match="do not fit"):
            block.array(shape, "f4", offset)
    assert block.array(None, "f4", PAGE_SIZE - 6).size == 1
    assert block.array(0, "f4", PAGE_SIZE).size == 0


def test_blocks_may_be_refused_by_the_machine():
    def no() -> None:
        raise StateError("the machine is running")

    ram = Ram(check_may_change=no)
    with pytest.raises(StateError, match="running"):
        ram.add("a", 1)
    assert len(ram) == 0


def test_the_setting_chooses_the_memory(tmp_path):
    assert Ram("memfd").add("a", 1).fd is not None
    assert Ram().add("a", 1).fd is None
    ram = Ram(f"file:{tmp_path}/one")
    ram.add("a", 1)
    with pytest.raises(ConfigError, match="two blocks or machines cannot share one"):
        ram.add("b", 1)
    ram.close()
    with pytest.raises(ConfigError, match="no memory backend 'tape'"):
        Ram("tape")


def test_after_the_close_nothing_can_be_added(ram):
    block = ram.add("a", 1)
    array = block.array()
    ram.close()
    ram.close()
    with pytest.raises(StateError, match="closed"):
        ram.add("b", 1)
    with pytest.raises(StateError, match="closed"):
        _ = block.view
    assert array[0] == 0


def test_marks_are_whole_pages_and_taken_once(ram):
    block = ram.add("a", 10 * PAGE_SIZE)
    assert block.take_marks() == []
    block.mark_dirty(1, 1)
    block.mark_dirty(PAGE_SIZE - 1, 2)
    block.mark_dirty(5 * PAGE_SIZE, 0)
    block.mark_dirty(7 * PAGE_SIZE)
    assert block.take_marks() == [(0, 2 * PAGE_SIZE), (7 * PAGE_SIZE, 3 * PAGE_SIZE)]
    assert block.take_marks() == []
    block.mark_dirty()
    assert block.take_marks() == [(0, 10 * PAGE_SIZE)]


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, -1), (0, 10 * PAGE_SIZE + 1), (10 * PAGE_SIZE + 1, None)])
def test_marks_outside_are_refused(ram, offset, length):
    block = ram.add("a", 10 * PAGE_SIZE)
    with pytest.raises(ValueError, match="not inside"):
        block.mark_dirty(offset, length)
    assert block.take_marks() == []


def test_no_mark_is_lost_between_threads(ram):
    block = ram.add("a", 4000 * PAGE_SIZE)
    start = threading.Barrier(5)

    def mark(first: int) -> None:
        start.wait()
        for page in range(first, block.pages, 4):
            block.mark_dirty(page * PAGE_SIZE, 1)

    threads = [threading.Thread(target=mark, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    seen = np.zeros(block.pages, np.bool_)

    def take() -> None:
        for offset, length in block.take_marks():
            seen[offset // PAGE_SIZE : (offset + length) // PAGE_SIZE] = True

    start.wait()
    while any(thread.is_alive() for thread in threads):
        take()
    take()
    assert seen.all()


def test_discarding_marks_what_it_made_zero(ram):
    block = ram.add("a", 4 * PAGE_SIZE)
    block.view[:] = 1
    assert block.populate()
    assert block.present_pages().all()
    block.discard(PAGE_SIZE, PAGE_SIZE)
    assert block.view.reshape(4, -1).any(axis=1).tolist() == [True, False, True, True]
    assert block.take_marks() == [(PAGE_SIZE, PAGE_SIZE)]


def test_a_block_says_what_it_is(ram):
    assert repr(ram.add("a", 1)) == "<RamBlock 'a': 4096 bytes, anonymous>"
    assert isinstance(ram["a"], RamBlock)
