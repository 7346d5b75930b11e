"""What came of each page: counted against lists, and contents told apart where sums might not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.capture import pages
from whimbrel.capture.pages import TIMES_MAX, Kinds, PageSums, PageTable, kinds_of
from whimbrel.wire.ram import Flag
from whimbrel.wire.ram_batches import Batch

PAGE = 4096
FLAGS = [Flag.PAGE, Flag.ZERO, Flag.XBZRLE, Flag.COMPRESS_PAGE]


def batch_of(records):
    """Each record is (flag, page, bytes); what stands between payloads does not matter here."""
    data, starts, ends = bytearray(), [], []
    for _, _, payload in records:
        data += b"head"
        starts.append(len(data))
        data += payload
        ends.append(len(data))
    return Batch(
        np.array([int(flag) for flag, _, _ in records], np.uint16),
        np.array([page for _, page, _ in records], np.intp),
        np.array(starts, np.intp),
        np.array(ends, np.intp),
        np.frombuffer(bytes(data), np.uint8),
    )


def sums(contents):
    batch = batch_of([(Flag.PAGE, 0, content) for content in contents])
    return PageSums().of(batch.data, batch.starts).tolist()


def page_with(*bytes_at):
    page = bytearray(PAGE)
    for at, value in bytes_at:
        page[at] = value
    return bytes(page)


@pytest.mark.parametrize("value", [1, 0x80, 0xFF])
def test_pages_of_one_byte_are_told_apart_wherever_it_stands(value):
    """The upper bits of a word too, which wrap-around loses most of."""
    found = sums([page_with((at, value)) for at in range(PAGE)] + [bytes(PAGE)])
    assert len(set(found)) == PAGE + 1


def test_pages_of_two_upper_bits_are_told_apart():
    """As of two numbers that are the least of 32 bits, or of 64."""
    tops = range(3, PAGE, 4)
    pairs = [page_with((tops[i], 0x80), (tops[i + 1], 0x80)) for i in range(len(tops) - 1)]
    assert len(set(sums(pairs))) == len(pairs)


def test_words_are_told_apart_in_their_order():
    dice = np.random.default_rng(1)
    page = dice.integers(0, 256, PAGE, np.uint8)
    words = page.view(np.uint64)
    swapped = [page.tobytes()]
    for i in range(511):
        other = words.copy()
        other[[i, i + 1]] = other[[i + 1, i]]
        swapped.append(other.tobytes())
    assert len(set(sums(swapped))) == 512


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=150))
def test_equal_pages_have_equal_sums(choices):
    """Wherever they lie, and whatever is summed with them."""
    dice = np.random.default_rng(2)
    contents = [dice.integers(0, 256, PAGE, np.uint8).tobytes() for _ in range(6)]
    alone = [sums([content])[0] for content in contents]
    assert len(set(alone)) == 6
    assert sums([contents[choice] for choice in choices]) == [alone[choice] for choice in choices]


def test_sums_are_the_same_ever_after():
    """Programs may keep what they counted, and compare it."""
    assert sums([bytes(PAGE)]) == [0]
    first, second = sums([bytes(range(256)) * 16]), sums([bytes(range(256)) * 16])
    assert first == second


RECORDS = st.lists(
    st.lists(st.tuples(st.sampled_from(FLAGS), st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=12),
    max_size=8,
)


@settings(deadline=None)
@given(RECORDS)
def test_against_a_list(bodies):
    """The same page may come twice in one batch, and batches come in any order."""
    table = PageTable(8, PageSums())
    times, last = [0] * 8, [None] * 8
    for body in bodies:
        records = [(flag, page, bytes([seed]) * PAGE) for flag, page, seed in body]
        table.take(batch_of(records))
        for flag, page, content in records:
            times[page] += 1
            last[page] = flag, content
    state = [flag for flag, _ in filter(None, last)]
    assert table.last() == Kinds(*(state.count(flag) for flag in FLAGS))
    assert table.distinct() == len({content for flag, content in filter(None, last) if flag is Flag.PAGE})
    counts = table.times()
    assert counts.tolist() == [times.count(number) for number in range(max(times) + 1)]


def test_so_many_times_are_no_more(monkeypatch):
    table = PageTable(3, PageSums())
    table.take(batch_of([(Flag.ZERO, 1, b"\0")] * (TIMES_MAX - 1)))
    assert table.times().nonzero()[0].tolist() == [0, TIMES_MAX - 1]
    for _ in range(3):
        table.take(batch_of([(Flag.ZERO, 1, b"\0")]))
    assert table.times().nonzero()[0].tolist() == [0, TIMES_MAX]
    table.take(batch_of([(Flag.ZERO, 1, b"\0"), (Flag.ZERO, 0, b"\0")] * 70_000))
    assert table.times().nonzero()[0].tolist() == [0, TIMES_MAX]
    monkeypatch.setattr(pages, "_SCANNED", 1)
    assert table.times()[TIMES_MAX] == 2


def test_tables_are_scanned_in_pieces(monkeypatch):
    table = PageTable(5, PageSums())
    table.take(batch_of([(Flag.PAGE, 4, bytes(PAGE)), (Flag.ZERO, 1, b"\0"), (Flag.ZERO, 4, b"\0")]))
    whole = table.times().tolist(), table.last()
    monkeypatch.setattr(pages, "_SCANNED", 2)
    assert (table.times().tolist(), table.last()) == whole == ([3, 1, 1], Kinds(zero=2))


def test_kinds_by_their_flags():
    batch = batch_of([(flag, 0, b"x") for flag in FLAGS])
    assert kinds_of(batch).tolist() == [0, 1, 2, 3]
    kinds = Kinds(1, 2)
    kinds.add(np.array([1, 1, 5, 0]))
    assert kinds == Kinds(2, 3, 5, 0)
    assert kinds.total == 10
