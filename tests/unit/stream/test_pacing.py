"""The pacer with a clock of its own: the rate holds, pauses are not caught up, changes and cancels are heard."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import MigrationCancelled
from whimbrel.stream import Pacer
from whimbrel.stream.pacing import SLICE, UNLIMITED, WINDOW


class Bench:
    """A pacer whose clock moves when it waits and when something is sent at the link's `speed` (bytes a second)."""

    def __init__(self, limit, *, speed=math.inf, began=1000.0, lateness=0.0):
        self.limit, self.speed, self.now, self.lateness = limit, speed, began, lateness
        self.began = began
        self.sent = 0
        self.waits = 0
        self.is_cancelled = False
        self.pacer = Pacer(
            limit=lambda: self.limit,
            sent=lambda: self.sent,
            wait=self.wait,
            stopping=lambda: self.is_cancelled,
            check=self.check,
            clock=lambda: self.now,
        )

    def wait(self, seconds):
        assert 0 <= seconds <= WINDOW + 1e-9, "it waits for the end of the window, no longer"
        self.waits += 1
        assert self.waits < 100_000, "it spins"
        self.now += seconds + self.lateness

    def check(self):
        if self.is_cancelled:
            raise MigrationCancelled("by the test")

    def send(self, size):
        self.sent += size
        self.now += size / self.speed

    def run(self, seconds, chunk):
        """Send chunks as a handler does for at least `seconds`; returns when a new window begins."""
        end = self.began + seconds
        while True:
            slice_ = self.pacer.next_slice()
            if self.now >= end:
                return
            while not slice_.over():
                assert slice_.bytes_left() >= 1
                self.send(chunk or slice_.bytes_left())

    @property
    def rate(self):
        return self.sent / (self.now - self.began)


LIMITS = [1_000, 19_999, 1_000_000, 134_217_728, 10**10]


@pytest.mark.parametrize("chunk", [0, 9, 137])
@pytest.mark.parametrize("limit", LIMITS)
def test_the_rate_holds_within_five_per_cent_over_a_second(limit, chunk):
    if chunk and limit / chunk > 200_000:
        chunk = limit // 1009
    bench = Bench(limit)
    bench.run(max(1.0, 25 * chunk / limit), chunk)  # a chunk is a part of the second, and the figure no better than it
    assert bench.rate == pytest.approx(limit, rel=0.05)


@pytest.mark.parametrize("windows", [0.3, 0.999, 1, 1.001, 1.7, 4.2, 33])
@pytest.mark.parametrize("limit", LIMITS)
def test_the_rate_holds_with_chunks_larger_than_a_window(limit, windows):
    chunk = max(1, int(limit * WINDOW * windows))
    bench = Bench(limit)
    bench.run(max(1.0, 25 * windows * WINDOW), chunk)
    assert bench.rate == pytest.approx(limit, rel=0.05)


@pytest.mark.parametrize("speed", [1.05, 1.5, 10])
@pytest.mark.parametrize("windows", [0.1, 0.9, 2.5, 7])
def test_the_rate_holds_while_sending_itself_takes_its_time(windows, speed):
    limit = 1_000_000
    bench = Bench(limit, speed=speed * limit)
    bench.run(max(2.0, 25 * windows * WINDOW), int(limit * WINDOW * windows))
    assert bench.rate == pytest.approx(limit, rel=0.05)


@pytest.mark.parametrize("lateness", [0.001, 0.02, 0.08])
def test_the_rate_holds_with_a_timer_that_is_late(lateness):
    bench = Bench(1_000_000, lateness=lateness)
    bench.run(3.0, 4104)
    assert bench.rate == pytest.approx(1_000_000, rel=0.05)


@pytest.mark.parametrize("limit", [1, 3, 9, 10, 11, 15, 99])
def test_the_smallest_limits_hold_too(limit):
    bench = Bench(limit)
    bench.run(60.0, 1)
    assert bench.rate == pytest.approx(limit, rel=0.05)


def test_a_slow_link_is_not_slowed_down_further():
    bench = Bench(10_000_000, speed=1_000_000)
    bench.run(5.0, 50_000)
    assert bench.waits <= 1
    assert bench.rate == pytest.approx(1_000_000, rel=0.001)


@given(
    st.integers(1, 10**9),
    st.lists(st.tuples(st.floats(0, 3), st.floats(0, 5)), min_size=1, max_size=30),
)
def test_never_more_than_the_limit_and_one_window(limit, steps):
    """Whatever the pauses and the chunks: what was sent by the time of a grant is at most what the time allows."""
    bench = Bench(limit)
    largest = 0
    for pause, windows in steps:
        bench.now += pause
        slice_ = bench.pacer.next_slice()
        allowed = limit * (bench.now - bench.began) + limit * WINDOW
        assert bench.sent <= allowed * (1 + 1e-9) + 1, "granted although more is owed"
        assert slice_.bytes_left() <= math.ceil(limit * WINDOW)
        chunk = int(limit * WINDOW * windows)
        largest = max(largest, chunk)
        bench.send(chunk)


@pytest.mark.parametrize("pause", [0.21, 0.3, 1, 3600, 10**7])
def test_after_a_pause_there_is_one_window_and_no_more(pause):
    bench = Bench(1_000_000)
    bench.run(0.5, 1000)
    bench.now += pause
    began, before = bench.now, bench.sent
    while bench.now < began + 0.99 * WINDOW:
        slice_ = bench.pacer.next_slice()
        if bench.now >= began + 0.99 * WINDOW:
            break
        while not slice_.over():
            bench.send(1000)
    assert bench.sent - before <= 100_000


def test_the_first_slice_is_granted_at_once():
    bench = Bench(1_000_000)
    assert bench.pacer.next_slice().bytes_left() == 100_000
    assert bench.waits == 0


def test_what_was_sent_before_the_first_slice_is_not_held_against_it():
    bench = Bench(1_000_000)
    bench.send(150_000)  # the head of the stream
    assert bench.pacer.next_slice().bytes_left() == 100_000
    assert bench.waits == 0


def test_a_slice_ends_with_its_time_and_the_window_goes_on():
    bench = Bench(1_000_000)
    slice_ = bench.pacer.next_slice()
    bench.send(10)
    bench.now += SLICE - 0.001
    assert not slice_.over()
    assert slice_.bytes_left() == 99_990
    bench.now += 0.001
    assert slice_.over()
    slice_ = bench.pacer.next_slice()
    assert not slice_.over()
    assert slice_.bytes_left() == 99_990
    assert bench.waits == 0


def test_unlimited():
    bench = Bench(0)
    for _ in range(100):
        slice_ = bench.pacer.next_slice()
        assert slice_.bytes_left() > UNLIMITED // 2
        bench.send(10**9)
        assert not slice_.over()
        bench.now += SLICE
        assert slice_.over(), "a slice has an end, so that a cancel is heard"
    assert bench.waits == 0


@pytest.mark.parametrize(("first", "then"), [(1_000_000, 50_000), (50_000, 1_000_000), (0, 1_000_000), (50_000, 0)])
def test_a_change_while_it_runs_holds_from_the_next_window(first, then):
    bench = Bench(first, speed=20_000_000)
    bench.run(1.0, 500)
    bench.limit = then
    if then == 0:
        assert bench.pacer.next_slice().bytes_left() > UNLIMITED // 2
        return
    bench.began, bench.sent_before = bench.now, bench.sent
    bench.run(2.0, 500)
    rate = (bench.sent - bench.sent_before) / (bench.now - bench.began)
    assert rate == pytest.approx(then, rel=0.06)


def test_lowering_the_limit_takes_back_what_the_window_had_left():
    bench = Bench(1_000_000)
    assert bench.pacer.next_slice().bytes_left() == 100_000
    bench.limit = 1000
    assert bench.pacer.next_slice().bytes_left() == 100
    bench.limit = 0
    assert bench.pacer.next_slice().bytes_left() == UNLIMITED
    bench.limit = 1000
    assert bench.pacer.next_slice().bytes_left() == 100


def test_cancelled_before_and_during_a_slice():
    bench = Bench(1_000_000)
    slice_ = bench.pacer.next_slice()
    assert not slice_.over()
    bench.is_cancelled = True
    assert slice_.over()
    with pytest.raises(MigrationCancelled):
        bench.pacer.next_slice()


def test_cancelled_while_it_waits():
    bench = Bench(1_000_000)
    bench.pacer.next_slice()
    bench.send(10_000_000)

    def wait(seconds):
        bench.is_cancelled = True
        return True

    bench.pacer.wait = wait
    with pytest.raises(MigrationCancelled):
        bench.pacer.next_slice()
