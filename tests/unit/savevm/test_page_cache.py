"""The page cache: where pages belong, what is given up and when, held against a cache that takes one page at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel_savevm._page_cache import LIFETIME, PageCache

PAGE = 4096


class Slow:
    """Section 3.4, page by page: number and age of what is in each slot."""

    def __init__(self, slots):
        self.slots, self.held = slots, {}

    def visit(self, number, age, *, insert):
        slot = number % self.slots
        holder, since = self.held.get(slot, (None, None))
        if holder == number:
            self.held[slot] = (number, age)
            return "held"
        if insert and (holder is None or since + LIFETIME <= age):
            self.held[slot] = (number, age)
            return "taken"
        return "out"


def visited(cache, numbers, age, *, insert=True):
    visit = cache.visit(np.array(numbers, np.intp), age, insert=insert)
    assert not (visit.held & visit.taken).any()
    inside = visit.slots[visit.held | visit.taken]
    assert len(set(inside.tolist())) == len(inside), "two pages in one slot"
    return ["held" if h else "taken" if t else "out" for h, t in zip(visit.held, visit.taken, strict=True)]


@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.sets(st.integers(0, 40), max_size=20), st.integers(0, 3), st.booleans()), max_size=12),
)
@settings(max_examples=300)
def test_a_batch_is_as_if_one_page_came_after_the_other(power, batches):
    slots, age = 1 << power, 2
    cache, slow = PageCache(slots * PAGE, 41), Slow(slots)
    for numbers, later, insert in batches:
        age += later
        expected = [slow.visit(number, age, insert=insert) for number in sorted(numbers)]
        assert visited(cache, sorted(numbers), age, insert=insert) == expected


def test_what_was_asked_for_in_the_pass_before_stays():
    cache = PageCache(4 * PAGE, 100)
    assert visited(cache, [1], 2) == ["taken"]
    assert visited(cache, [5], 3) == ["out"]
    assert visited(cache, [1], 3) == ["held"]
    assert visited(cache, [5], 4) == ["out"]
    assert visited(cache, [5], 5) == ["taken"]
    assert visited(cache, [1], 5) == ["out"]


def test_one_that_is_given_up_in_a_batch_is_gone_for_the_rest_of_it():
    cache = PageCache(4 * PAGE, 100)
    assert visited(cache, [9], 2) == ["taken"]
    assert visited(cache, [5, 9, 13], 4) == ["taken", "out", "out"]
    assert visited(cache, [5, 9], 4) == ["held", "out"]


def test_nothing_is_given_up_where_nothing_is_inserted():
    cache = PageCache(4 * PAGE, 100)
    visited(cache, [9], 2)
    assert visited(cache, [5, 9], 9, insert=False) == ["out", "held"]


def test_a_cache_larger_than_ram_needs_no_more_memory_than_ram():
    cache = PageCache(1 << 50, 100)
    assert cache.size == 1 << 50
    assert cache.copies.shape == (100, PAGE)
    assert visited(cache, range(100), 2) == ["taken"] * 100
    assert visited(cache, range(100), 9) == ["held"] * 100


@pytest.mark.parametrize("pages", [1, 2, 4, 5])
def test_of_as_many_pages_as_there_are_slots_all_have_room(pages):
    cache = PageCache(4 * PAGE, pages)
    expected = ["taken"] * min(pages, 4) + ["out"] * (pages - 4)
    assert visited(cache, range(pages), 2) == expected
