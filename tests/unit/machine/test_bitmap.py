"""Dirty bitmaps against a model: a Python set of page numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.machine.bitmap import DirtyBitmap, runs, set_ranges

PAGES = 3000
page = st.integers(0, PAGES - 1)
page_set = st.sets(page, max_size=400)
page_range = st.tuples(page, st.integers(0, 200)).map(lambda pair: (pair[0], min(PAGES, pair[0] + pair[1])))
ranges = st.lists(page_range, max_size=60)


def indices(pages) -> np.ndarray:
    return np.array(sorted(pages), np.intp)


def columns(pairs) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, np.intp).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def union(pairs) -> set[int]:
    return {number for start, end in pairs for number in range(start, end)}


@settings(deadline=None)
@given(st.data())
def test_any_sequence_of_operations_agrees_with_a_set(data):
    bitmap, model, cursor = DirtyBitmap(PAGES), set(), 0
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["pages", "bools", "ranges", "take", "take from", "all", "none"])):
            case "pages":
                new = data.draw(page_set)
                assert bitmap.or_pages(indices(new)) == len(new - model)
                model |= new
            case "bools":
                new = data.draw(page_set)
                bits = np.zeros(PAGES, np.bool_)
                bits[indices(new)] = True
                assert bitmap.or_pages(bits) == len(new - model)
                model |= new
            case "ranges":
                pairs = data.draw(ranges)
                new = union(pairs)
                assert bitmap.or_ranges(*columns(pairs)) == len(new - model)
                model |= new
            case "all":
                bitmap.set_all()
                model, cursor = set(range(PAGES)), 0
            case "none":
                bitmap.clear_all()
                model, cursor = set(), 0
            case kind:
                start = None
                if kind == "take from":
                    start = cursor = data.draw(st.integers(0, PAGES))
                limit = data.draw(st.integers(1, 700))
                expected = sorted(number for number in model if number >= cursor)[:limit]
                taken = bitmap.take(limit, start)
                assert taken.dtype == np.intp
                assert taken.tolist() == expected
                model -= set(expected)
                # The search goes on behind what was found; after an empty answer it goes round.
                cursor = expected[-1] + 1 if expected else 0
        assert bitmap.count == len(model)
        assert set(np.flatnonzero(bitmap.bits).tolist()) == model


@settings(deadline=None)
@given(ranges)
def test_ranges_are_set_and_found_again(pairs):
    bits = np.zeros(PAGES, np.bool_)
    set_ranges(bits, *columns(pairs))
    assert set(np.flatnonzero(bits).tolist()) == union(pairs)
    starts, ends = runs(bits)
    assert union(zip(starts.tolist(), ends.tolist(), strict=True)) == union(pairs)
    assert (starts[1:] > ends[:-1]).all()  # apart, so there are as few as can be


def test_a_sweep_takes_each_page_once_and_then_says_that_it_is_over():
    bitmap = DirtyBitmap(100_000)
    bitmap.set_all()
    batches = iter(lambda: bitmap.take(256).tolist(), [])
    assert [number for batch in batches for number in batch] == list(range(100_000))
    assert bitmap.count == 0


def test_pages_behind_the_cursor_are_for_the_next_sweep():
    bitmap = DirtyBitmap(1000)
    bitmap.or_pages(indices({10, 500}))
    assert bitmap.take(1).tolist() == [10]
    bitmap.or_pages(indices({5}))
    assert bitmap.take(8).tolist() == [500]
    assert bitmap.take(8).tolist() == []
    assert bitmap.take(8).tolist() == [5]


def test_sparse_pages_far_apart_are_one_batch():
    bitmap = DirtyBitmap(5_000_000)
    pages = indices(range(17, 5_000_000, 99_991))
    bitmap.or_pages(pages)
    assert bitmap.take(256).tolist() == pages.tolist()


def test_bits_set_from_outside_are_counted_when_asked():
    bitmap = DirtyBitmap(10)
    bitmap.bits[3:5] = True
    assert bitmap.recount() == 2
    assert (bitmap.count, len(bitmap)) == (2, 10)


def test_a_batch_of_nothing_is_a_mistake():
    with pytest.raises(ValueError, match="1 page or more"):
        DirtyBitmap(10).take(0)
