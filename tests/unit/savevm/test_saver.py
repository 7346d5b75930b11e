"""What the source writes: bodies, names, batches, progress; and what it must never do."""

import numpy as np
import pytest

from whimbrel.abc import SectionKind
from whimbrel.machine import BareMachine
from whimbrel_savevm._ram_saver import BATCH
from whimbrel_savevm._ram_sending import STAGE

PAGE = 4096


def test_the_start_is_the_block_list_and_nothing_else(bench):
    source = bench.Source(bench.machine({"pc.ram": 3, "rom": 1}))
    source.start()
    assert bytes(source.tape.data) == bytes.fromhex(
        "00 00 00 00 00 00 40 04"
        "06 70 63 2e 72 61 6d  00 00 00 00 00 00 30 00"
        "03 72 6f 6d  00 00 00 00 00 00 10 00"
        "00 00 00 00 00 00 00 10"
    )
    assert source.saver.pending() == 4 * PAGE
    assert source.progress.remaining == 4 * PAGE


def test_golden_bodies(bench):
    source = bench.Source(bench.machine({"a": 4, "b": 1}))
    source.write("a", 1, b"\x11" * PAGE)
    source.write("a", 3, b"\x33" * PAGE)
    source.start()
    source.tape.data.clear()
    source.part()
    zero = "00 00 00 00 00 00 {}"
    assert bytes(source.tape.data) == (
        bytes.fromhex(zero.format("00 02") + "01 61" + "00" + zero.format("20 22") + "00")
        + bytes.fromhex(zero.format("10 28"))
        + b"\x11" * PAGE
        + bytes.fromhex(zero.format("30 28"))
        + b"\x33" * PAGE
        + bytes.fromhex(zero.format("00 02") + "01 62" + "00")
        + bytes.fromhex("00 00 00 00 00 00 00 10")
    )
    source.write("b", 0, b"\x44" * PAGE)
    source.saver.sync()
    source.tape.data.clear()
    source.part()
    assert bytes(source.tape.data[:8]) == bytes.fromhex(zero.format("00 28")), "b goes on over the end of a body"
    source.saver.sync()
    source.tape.data.clear()
    source.end()
    assert bytes(source.tape.data) == bytes.fromhex("00 00 00 00 00 00 00 10")


def test_names_stand_where_the_block_changes_and_nowhere_else(bench):
    source = bench.Source(bench.machine({"a": 3, "b": 2, "c": 1}))
    for block, page in (("a", 0), ("a", 2), ("b", 1), ("c", 0)):
        source.write(block, page, b"x")
    source.start()
    source.round(size=1)
    for block, page in (("c", 0), ("a", 1), ("a", 2)):
        source.write(block, page, b"y")
    source.round(size=1)
    source.write("c", 0, b"z")
    source.end()
    _, bodies = bench.parse_bodies(source.tape.data)
    records = [record for body in bodies for record in body]
    named = [name for _, name, _, _ in records if name is not None]
    assert named == ["a", "b", "c", "a", "c"]
    assert [page for _, _, page, _ in records] == [0, 1, 2, 0, 1, 0, 1, 2, 0, 0]
    assert len(bodies) == len(source.bodies) == 11, "each page in a body of its own, behind START"


def test_a_page_is_sent_once_a_round_and_in_order(bench):
    source = bench.Source(bench.machine({"a": 50}))
    for page in range(50):
        source.write("a", page, bytes([page + 1]))
    source.start()
    source.round(size=3 * PAGE)
    _, bodies = bench.parse_bodies(source.tape.data)
    assert [page for body in bodies for _, _, page, _ in body] == list(range(50))
    assert len(bodies) > 12, "it was cut into slices"


@pytest.mark.parametrize("size", [1, PAGE, PAGE + 8, PAGE + 9, 3 * PAGE, 100 * PAGE])
def test_a_slice_is_overdrawn_by_one_page_at_most(bench, size):
    source = bench.Source(bench.machine({"a": 64}))
    for page in range(64):
        source.write("a", page, b"x")
    source.start()
    source.saver.sync()
    while source.saver.pending():
        before, left = source.out.offset, source.saver.pending()
        source.part(size)
        sent = source.out.offset - before
        assert source.saver.pending() < left, "a slice that is not over sends something"
        assert sent <= size + PAGE + 8 + 8 + 2


def test_a_slice_that_is_over_sends_an_empty_body(bench):
    source = bench.Source(bench.machine({"a": 4}))
    source.start()
    source.tape.data.clear()
    source.part(0)
    assert bytes(source.tape.data) == bytes.fromhex("00 00 00 00 00 00 00 10")
    assert source.saver.pending() == 4 * PAGE


@pytest.mark.parametrize("pages", [STAGE - 1, STAGE, STAGE + 1, BATCH, BATCH + 1, 2 * BATCH + 3])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("tape", ["Tape", "GatheringTape"])
def test_batches_of_any_size_are_whole(bench, pages, every, tape):
    source = bench.Source(bench.machine({"a": pages}), tape=getattr(bench, tape)())
    view = source.machine.ram["a"].view.reshape(pages, PAGE)
    view[::every, 0] = 1 + np.arange(len(view[::every])) % 255
    source.start()
    source.saver.sync()
    source.part()
    _, bodies = bench.parse_bodies(source.tape.data)
    records = {page: payload for _, _, page, payload in bodies[1]}
    assert sorted(records) == list(range(pages))
    for page, payload in records.items():
        assert payload == (b"\0" if not view[page].any() else view[page].tobytes())


def test_no_blocks_at_all(bench):
    source = bench.Source(bench.machine({}))
    source.start()
    source.round()
    source.end()
    assert bytes(source.tape.data) == bytes.fromhex(
        "00 00 00 00 00 00 00 04  00 00 00 00 00 00 00 10  00 00 00 00 00 00 00 10"
    )


def test_progress_counts_what_is_sent(bench):
    source = bench.Source(bench.machine({"a": 10, "b": 10}))
    for page in range(4):
        source.write("a", page, b"x")
    source.start()
    assert source.progress.remaining == 20 * PAGE
    source.saver.sync()
    at = source.out.offset
    source.part(1)
    assert source.progress.remaining == 19 * PAGE
    while source.saver.pending():
        source.part()
    progress = source.progress
    assert (progress.normal, progress.duplicate, progress.remaining) == (4, 16, 0)
    assert progress.transferred == source.out.offset - at
    assert progress.synced_dirty == 0, "everything was dirty already"
    source.write("b", 3, b"y")
    source.write("a", 0)
    source.saver.sync()
    assert progress.synced_dirty == 2 * PAGE
    assert progress.remaining == source.saver.pending() == 2 * PAGE
    source.end()
    assert (progress.normal, progress.duplicate, progress.remaining) == (5, 17, 0)
    assert progress.transferred == source.out.offset - at


def test_a_write_at_any_moment_is_in_what_is_sent_or_dirty(bench):
    """The guest writes just as pages are about to be read, and between batches: mark first, read then."""
    source = bench.Source(bench.machine({"a": 40}))
    source.start()
    count = 0

    def guest():
        nonlocal count
        count += 1
        if count < 300:
            source.write("a", count * 7 % 40, bytes([count % 255 + 1]), at=count % PAGE)

    source.tracker.reading = guest
    for _ in range(6):
        source.saver.sync()
        for _ in range(12):
            source.part(3 * PAGE, between=guest)
    source.tracker.reading = lambda: None
    source.end()
    assert count >= 100
    final = {}
    for body in bench.parse_bodies(source.tape.data)[1]:
        final.update({page: payload for _, _, page, payload in body})
    view = source.machine.ram["a"].view.reshape(40, PAGE)
    for page in range(40):
        assert final[page].ljust(PAGE, b"\0") == view[page].tobytes()


@pytest.mark.parametrize("tells", [True, False])
def test_pages_that_were_never_touched_are_sent_as_zero_and_those_written_since_are_not(bench, tells):
    tracker = bench.PerfectTracker(tells_untouched=tells)
    source = bench.Source(bench.machine({"a": 8}), tracker)
    source.write("a", 0, b"x")
    source.start()
    source.write("a", 3, b"y")  # before the first look
    source.saver.sync()
    source.write("a", 5, b"z")  # behind it
    source.part()
    source.end()
    final = {}
    for body in bench.parse_bodies(source.tape.data)[1]:
        final.update({page: payload[:1] for _, _, page, payload in body})
    assert final == {0: b"x", 1: b"\0", 2: b"\0", 3: b"y", 4: b"\0", 5: b"z", 6: b"\0", 7: b"\0"}


def test_what_the_tracker_tells_is_not_changed(bench):
    tracker = bench.PerfectTracker()
    source = bench.Source(bench.machine({"a": 8}), tracker)
    source.start()
    source.write("a", 3, b"y")
    source.saver.sync()
    assert tracker.untouched(source.machine.ram["a"]).all()


def test_pages_come_from_where_the_tracker_says(bench):
    """A tracker with a copy of its own (`compare`) is read from that copy."""
    machine = bench.machine({"a": 2})
    copy = np.full(2 * PAGE, 0x77, np.uint8)

    class Copying(bench.PerfectTracker):
        def pages(self, region):
            return copy

    source = bench.Source(machine, Copying(tells_untouched=False))
    copy.flags.writeable = False
    source.start()
    source.part()
    _, bodies = bench.parse_bodies(source.tape.data)
    assert [payload for _, _, _, payload in bodies[1]] == [b"\x77" * PAGE] * 2


def test_the_end_stops_the_tracking(bench):
    source = bench.Source(bench.machine({"a": 1}))
    source.saver.finish()
    assert source.tracker.stopped == 1


def test_bodies_have_their_kinds(bench):
    source = bench.Source(bench.machine({"a": 1}))
    source.start()
    source.round()
    source.end()
    assert [kind for kind, _ in source.bodies] == [SectionKind.START, SectionKind.PART, SectionKind.END]
    assert isinstance(source.machine, BareMachine)
