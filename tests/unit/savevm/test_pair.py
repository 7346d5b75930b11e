"""Saver and loader together: random memory, written to at random while it is sent, arrives as a perfect copy."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whimbrel.abc import SectionKind

PAGE = 4096

layouts = st.dictionaries(
    st.sampled_from(("a", "pc.ram", "n" * 255)), st.integers(1, 5) | st.integers(1, 40), min_size=1, max_size=3
)
# (which block, which page, what): None makes a page zero, (offset, byte) writes a few bytes into it.
writes = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 39),
        st.none() | st.tuples(st.sampled_from((0, 1, 4090)), st.integers(0, 255)),
    ),
    max_size=25,
)
budgets = st.sampled_from((1, PAGE, 3 * PAGE + 11, 30 * PAGE, 1 << 30))


def write(source, blocks, change):
    block, page, what = change
    name = blocks[block % len(blocks)]
    page %= source.machine.ram[name].pages
    if what is None:
        source.write(name, page)
    else:
        source.write(name, page, bytes([what[1]]) * 5, at=what[0])


def fill(machine, seed, zeros):
    """Random memory, of which about `zeros` of ten pages stay untouched."""
    random = np.random.default_rng(seed)
    for block in machine.ram:
        pages = np.flatnonzero(random.integers(0, 10, block.pages) >= zeros)
        block.view.reshape(-1, PAGE)[pages] = random.integers(0, 256, (len(pages), PAGE), np.uint8)


def same(one, other):
    assert [block.name for block in one.ram] == [block.name for block in other.ram]
    for ours, theirs in zip(one.ram, other.ram, strict=True):
        wrong = np.flatnonzero((ours.view != theirs.view).reshape(-1, PAGE).any(axis=1))
        assert not wrong.size, f"block {ours.name!r} differs in pages {wrong[:10]}"


@pytest.mark.parametrize("kind", ["perfect", "silent", "manual"])
@given(
    layout=layouts,
    seed=st.integers(0, 1000),
    zeros=st.integers(0, 10),
    rounds=st.lists(writes, max_size=4),
    between=writes,
    budget=budgets,
    capacity=st.sampled_from((4360, 10_000, 1 << 20)),
    stale=st.booleans(),
    gathers=st.booleans(),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_perfect_copy(bench, kind, layout, seed, zeros, rounds, between, budget, capacity, stale, gathers):
    tracker = {
        "perfect": bench.PerfectTracker,
        "silent": lambda: bench.PerfectTracker(tells_untouched=False),
        "manual": bench.ManualTracker,
    }[kind]()
    machine, other = bench.machine(layout), bench.machine(layout)
    blocks = list(layout)
    fill(machine, seed, zeros)
    if stale:
        fill(other, seed + 1, 5)
    source = bench.Source(machine, tracker, bench.GatheringTape() if gathers else bench.Tape())
    source.start()
    pending = list(between)

    def guest():
        """Writes a little whenever the saver looks up from its work."""
        if pending:
            write(source, blocks, pending.pop())

    for changes in rounds:
        for change in changes:
            write(source, blocks, change)
        source.saver.sync()
        for _ in range(3):
            source.part(budget, between=guest)
    for change in pending:
        write(source, blocks, change)
    source.end()
    source.saver.finish()
    kinds = [kind for kind, _ in source.bodies]
    assert kinds == [SectionKind.START, *[SectionKind.PART] * 3 * len(rounds), SectionKind.END]
    loader = bench.load_all(other, source.tape, kinds, capacity=capacity)
    loader.finish()
    same(machine, other)


@given(layout=layouts, rounds=st.lists(writes, max_size=3), budget=budgets)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_independent_reader_sees_the_same(bench, layout, rounds, budget):
    """Names, order and content as somebody else's parser has them; CONTINUE only where the block is the same."""
    machine, blocks = bench.machine(layout), list(layout)
    fill(machine, 1, 5)
    source = bench.Source(machine)
    source.start()
    source.round(budget)
    for changes in rounds:
        for change in changes:
            write(source, blocks, change)
        source.round(budget)
    source.end()
    lists, bodies = bench.parse_bodies(source.tape.data)
    assert lists == [{name: pages * PAGE for name, pages in layout.items()}]
    memory = {name: bytearray(pages * PAGE) for name, pages in layout.items()}
    current = None
    for body in bodies:
        seen = set()
        for flags, name, page, payload in body:
            assert (name is None) == bool(flags & 0x20)
            assert name != current, "a name where the block goes on"
            current = name or current
            assert (current, page) not in seen, "a page came twice in one body"
            seen.add((current, page))
            memory[current][page * PAGE : (page + 1) * PAGE] = payload if flags & 0x08 else payload * PAGE
    for block in machine.ram:
        assert bytes(memory[block.name]) == block.view.tobytes()


@pytest.mark.parametrize("gathers", [False, True])
def test_a_guest_that_writes_all_the_time_on_its_own_thread(bench, gathers):
    """Real writes at real moments, marked behind each write; what counts is that nothing is lost."""
    machine, other = bench.machine({"a": 512, "b": 64}), bench.machine({"a": 512, "b": 64})
    fill(machine, 3, 3)
    source = bench.Source(machine, bench.ManualTracker(), bench.GatheringTape() if gathers else None)
    stop, progress = threading.Event(), threading.Semaphore(0)

    def guest():
        random = np.random.default_rng(5)
        while not stop.is_set():
            block = machine.ram["a" if random.integers(0, 4) else "b"]
            page = int(random.integers(0, block.pages))
            offset = page * PAGE + int(random.integers(0, PAGE - 64))
            block.view[offset : offset + 64] = random.integers(0, 256, 64, np.uint8)
            block.mark_dirty(offset, 64)
            progress.release()

    thread = threading.Thread(target=guest)
    thread.start()
    try:
        source.start()
        for _ in range(8):
            progress = threading.Semaphore(0)  # writes of before this round, already taken, do not count for it
            for _ in range(50):
                assert progress.acquire(timeout=60)
            source.saver.sync()
            while source.saver.pending():
                source.part(40 * PAGE)
    finally:
        stop.set()
        thread.join()
    source.end()
    source.saver.finish()
    assert source.progress.synced_dirty > 8 * 10 * PAGE, "it was written to meanwhile"
    bench.load_all(other, source.tape, [kind for kind, _ in source.bodies]).finish()
    same(machine, other)


@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
def test_memory_that_is_mostly_untouched_stays_so(bench, memory):
    machine, other = bench.machine({"a": 4096}), bench.machine({"a": 4096}, memory=memory)
    if other.ram["a"].present_pages().any():
        pytest.skip("this kernel cannot tell what is present")
    for page in (0, 700, 4095):
        machine.ram["a"].view[page * PAGE + 9] = 1
    source = bench.Source(machine)
    source.start()
    source.round()
    source.end()
    assert source.progress.normal == 3
    bench.load_all(other, source.tape, [kind for kind, _ in source.bodies]).finish()
    present = np.flatnonzero(other.ram["a"].present_pages())
    # Three pages, or on anonymous memory the three huge ones around them.
    assert len(present) <= (3 if memory == "memfd" else 3 * 512)
    same(machine, other)
