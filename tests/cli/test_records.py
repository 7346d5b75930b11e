"""The demo's machine: what it holds follows from the seed and the number of operations, however they were done."""

from __future__ import annotations

import numpy as np
import pytest

from whimbrel.errors import ConfigError
from whimbrel_examples import records

SIZE = 1 << 16


def table(seed=1):
    fresh = np.zeros(SIZE // 8, np.uint64)
    records.fill(fresh, seed)
    return fresh


@pytest.mark.parametrize("batches", [[5000], [1] * 50 + [4950], [2048, 2048, 904], [1, 4999]])
def test_batches_make_no_difference(batches):
    mine, done = table(), 0
    for count in batches:
        records.apply(mine, 1, done, count)
        done += count
    assert np.array_equal(mine, records.replay(5000, 1, SIZE))


def test_an_operation_that_picks_a_record_twice_counts_twice():
    one_record = np.zeros(records.WORDS, np.uint64)
    records.apply(one_record, 1, 0, 1000)
    again = np.zeros(records.WORDS, np.uint64)
    for number in range(1000):
        records.apply(again, 1, number, 1)
    assert np.array_equal(one_record, again)


def test_every_operation_shows():
    before = table()
    after = before.copy()
    records.apply(after, 1, 0, 1)
    assert np.count_nonzero(before != after) == records.WORDS


def test_every_seed_is_another_table_and_another_stream():
    assert not np.array_equal(table(1), table(2))
    streams = [np.zeros(SIZE // 8, np.uint64) for _ in range(2)]
    for seed, stream in enumerate(streams):
        records.apply(stream, seed, 0, 100)
    assert not np.array_equal(*streams)


FROZEN = (11427573041276509894, 2531369506843307072, 16238233209326713584)


def test_the_bytes_are_the_same_for_ever():
    # Whoever changes this breaks the comparison between two versions.
    mine = records.replay(1000, seed=7, size=SIZE)
    assert (int(mine[0]), int(mine.sum()), int(np.bitwise_xor.reduce(mine))) == FROZEN


def test_all_records_are_reached():
    touched = np.zeros(SIZE // 8, np.uint64)
    records.apply(touched, 1, 0, 100_000)
    assert np.count_nonzero(touched) == touched.size


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def paced(rate):
    clock = Clock()
    return clock, records.Records(table(), rate=rate, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize("rate", [3, 999, 40_000])
def test_operations_fall_due_by_the_clock(rate):
    clock, mine = paced(rate)
    while clock.now < 101.0:
        mine.step()
    assert mine.operations == pytest.approx(rate, abs=max(1, rate * 0.003))
    assert np.array_equal(mine.table, records.replay(mine.operations, 1, SIZE))


def test_a_long_pause_is_not_made_up_for():
    clock, mine = paced(10_000)
    mine.step()
    clock.sleep(3600)
    for _ in range(10):
        mine.step()
    assert mine.operations <= 10_000 * (records.BACKLOG + 10 * records.PAUSE)


def test_a_step_is_short():
    clock, mine = paced(10_000_000)
    mine.step()
    clock.sleep(1)
    mine.step()
    assert mine.operations == records.BATCH


def test_flat_out_never_rests():
    clock, mine = paced(0)
    for _ in range(3):
        mine.step()
    assert mine.operations == 3 * records.BATCH
    assert clock.now == 100.0


@pytest.mark.parametrize("size", [0, -64, 63, 100, 64 << 32])
def test_a_size_that_cannot_be(size):
    with pytest.raises(ConfigError, match="whole records"):
        records.machine(size=size)


def test_a_machine_is_filled_when_it_is_started():
    with records.machine(size=SIZE, rate=1) as machine:
        machine.start()
        machine.stop()
        mine = records.records_of(machine)
        assert np.array_equal(mine.table, records.replay(mine.operations, size=SIZE))
