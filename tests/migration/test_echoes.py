"""What is asked of a destination and when it answered, and the bursts that are timed by it, on a clock of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import StreamError
from whimbrel.migration.echoes import BURST_BEGINS, BURST_ENDS, Bursts, Echoes
from whimbrel.migration.handover import FIRST_PING, PROOF, ROUND_PING


class Way:
    """A sender's side of a link: PINGs that are out, and answers that come when told to."""

    def __init__(self):
        self.now, self.sent, self.out = 0.0, 0, []
        self.echoes = Echoes(clock=lambda: self.now)
        self.bursts = Bursts(
            lambda: self.sent, self.ask, self.echoes.when, lambda: self.echoes.round_trip, clock=lambda: self.now
        )

    def ask(self, value):
        self.echoes.asked(value)
        self.out.append(value)

    def answer(self):
        self.echoes.came(self.out.pop(0))

    def burst(self, size, span):
        self.bursts.begin()
        self.sent += size
        self.now += span
        self.bursts.end()


def test_no_value_means_two_things():
    assert len({FIRST_PING, BURST_BEGINS, BURST_ENDS, PROOF}) == 4
    assert max(BURST_BEGINS, BURST_ENDS) < ROUND_PING


def test_only_what_was_asked_is_answered_and_once():
    echoes = Echoes()
    with pytest.raises(StreamError, match="never sent"):
        echoes.came(BURST_ENDS)
    echoes.asked(BURST_ENDS)
    echoes.came(BURST_ENDS)
    with pytest.raises(StreamError, match="never sent"):
        echoes.came(BURST_ENDS)


def test_what_is_asked_again_is_out_again():
    echoes = Echoes(clock=iter([1.0, 3.0, 5.0, 6.0]).__next__)
    echoes.asked(BURST_ENDS)
    assert echoes.when(BURST_ENDS) is None
    echoes.came(BURST_ENDS)
    assert (echoes.when(BURST_ENDS), echoes.round_trip) == (3.0, 2.0)
    echoes.asked(BURST_ENDS)
    assert echoes.when(BURST_ENDS) is None
    echoes.came(BURST_ENDS)
    assert (echoes.when(BURST_ENDS), echoes.round_trip) == (6.0, 1.0)
    echoes.forget(BURST_ENDS)
    assert echoes.when(BURST_ENDS) is None


def test_a_burst_is_timed_without_the_way_of_its_echo():
    way = Way()
    way.bursts.begin()
    way.now += 0.5
    way.answer()  # the way there and back by itself
    way.sent += 1000
    way.bursts.end()
    assert way.bursts.measured() == []
    way.now += 2.5
    way.answer()
    assert way.bursts.measured() == [(1000, 2.5)]
    assert way.bursts.measured() == []


def test_at_least_half_of_the_time_was_the_bytes():
    way = Way()
    way.burst(1000, 0.0)
    way.now += 1.0
    way.answer()
    way.answer()
    assert way.bursts.measured() == [(1000, 0.5)]


def test_while_the_end_of_one_is_out_the_next_is_not_measured():
    way = Way()
    way.burst(1000, 0.1)
    way.burst(2000, 0.1)
    assert way.out == [BURST_BEGINS, BURST_ENDS]
    way.answer()
    way.now += 1.0
    way.answer()
    way.burst(3000, 0.1)
    way.answer()
    way.answer()
    assert [size for size, _ in way.bursts.measured()] == [1000, 3000]


def test_without_a_beginning_there_is_no_end():
    way = Way()
    way.bursts.end()
    assert not way.out


@given(st.lists(st.sampled_from(["begin", "end", "send", "answer", "take"]), max_size=60))
def test_whatever_comes_no_value_is_out_twice_and_no_byte_counts_twice(steps):
    way, taken = Way(), []
    for step in steps:
        way.now += 0.01
        if step == "begin":
            way.bursts.begin()
        elif step == "end":
            way.bursts.end()
        elif step == "send":
            way.sent += 100
        elif step == "answer" and way.out:
            way.answer()
        elif step == "take":
            taken += way.bursts.measured()
        assert len(way.out) == len(set(way.out)) <= 2
    assert sum(size for size, _ in taken) <= way.sent
    assert all(span > 0 for _, span in taken)
