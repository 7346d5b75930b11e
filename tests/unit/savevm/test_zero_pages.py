"""The zero test against the obvious one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel_savevm._ram_saver import zero_pages

PAGE = 4096


def naive(memory, indices):
    return [not memory[i * PAGE : (i + 1) * PAGE].any() for i in indices.tolist()]


@given(
    st.integers(1, 24),
    st.lists(
        st.tuples(st.integers(0, 23), st.sampled_from((0, 1, 7, 8, 2047, 4088, 4095)), st.integers(0, 255)), max_size=30
    ),
    st.data(),
)
def test_it_agrees_with_the_obvious_one(pages, writes, data):
    memory = np.zeros(pages * PAGE, np.uint8)
    for page, offset, value in writes:
        memory[page % pages * PAGE + offset] = value
    some = data.draw(st.sets(st.integers(0, pages - 1), min_size=1))
    indices = np.array(sorted(some), np.intp)
    before = memory.copy()
    found = zero_pages(memory, indices)
    assert found.dtype == np.bool_
    assert found.tolist() == naive(memory, indices)
    assert (memory == before).all()


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 9, 4094, 4095])
def test_a_single_bit_anywhere_counts(offset):
    memory = np.zeros(4 * PAGE, np.uint8)
    memory[2 * PAGE + offset] = 0x80
    assert zero_pages(memory, np.arange(4)).tolist() == [True, True, False, True]
    assert zero_pages(memory, np.array([1, 3])).tolist() == [True, True]
    assert zero_pages(memory, np.array([2])).tolist() == [False]


def test_read_only_memory_is_fine():
    memory = np.zeros(2 * PAGE, np.uint8)
    memory.flags.writeable = False
    assert zero_pages(memory, np.arange(2)).tolist() == [True, True]
