"""When the guest is stopped: the rule by itself, and with all that feeds it over links and guests made of numbers."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.events import Round, Stalled
from whimbrel.migration.linkspeed import BELIEVED, MEASURABLE, RECENT, LinkSpeed
from whimbrel.migration.switchover import NEGLIGIBLE, SHRINKING, TOLERANCE, Switchover

from .simulated import MIB, PAGE, Link, World, jumpy, saw, steady

ROUND = Round(
    number=1,
    seconds=1.0,
    sent_bytes=1 << 30,
    remaining=0,
    previous_remaining=1 << 30,
    total=1 << 30,
    bandwidth=1e9,
    dirty_rate=0.0,
    expected_downtime=0.0,
    downtime_limit=0.3,
)


def left(remaining, *, limit=0.3, bandwidth=1e9, fixed=0.0):
    """A round that left `remaining` bytes."""
    return attrs.evolve(
        ROUND,
        remaining=int(remaining),
        expected_downtime=fixed + remaining / bandwidth,
        fixed_downtime=fixed,
        downtime_limit=limit,
    )


def decisions(*remaining, **more):
    """What one rule says of rounds that leave so many megabytes, up to its first yes."""
    rule, said = Switchover(), []
    for each in remaining:
        said.append(rule.due(left(each * 1e6, **more)))
        if said[-1]:
            break
    return said


# --------------------------------------------------------------------------------------------------- the rule by itself


def test_never_beyond_the_limit():
    assert decisions(301, 301, 301) == [False] * 3
    assert decisions(301, 299) == [False, True]
    assert decisions(299, limit=0.2) == [False]


def test_the_round_trips_count_towards_the_limit():
    assert decisions(280, 280, fixed=0.03) == [False, False]
    assert decisions(260, 260, fixed=0.03) == [False, True]


def test_on_while_it_shrinks():
    assert decisions(200, 100, 74, 50) == [False, False, False, False]
    assert decisions(200, 151) == [False, True]
    assert decisions(200, 149, 149) == [False, False, True]


def test_what_is_negligible_is_enough():
    assert decisions(2) == [True]
    assert decisions(1.9, fixed=0.2) == [True]
    assert not decisions(2.1)[0]


def test_a_limit_of_nothing_is_met_by_nothing():
    assert decisions(0.004096, 0.004096, 0, limit=0.0) == [False, False, True]
    assert decisions(0, limit=0.0, fixed=0.01) == [True]


def test_a_saw_is_not_left_at_its_peak():
    assert decisions(100, 50, 100, 50) == [False, False, False, True]
    assert decisions(100, 200, 100) == [False, False, True]
    assert decisions(50, 200, 51) == [False, False, True]


def test_a_minimum_that_does_not_come_back_is_not_waited_for_for_ever():
    said = decisions(*[100, 10, *[90] * 50])
    assert said[-1]
    assert 5 <= len(said) <= 2 + 10  # 1.25 ** 10 > 9


def test_a_deeper_minimum_is_taken():
    assert decisions(100, 10, 90, 5, 90, 5.5) == [False] * 5 + [True]


def test_whatever_the_limit_it_is_still_the_minimum():
    rule = Switchover()
    said = [rule.due(left(each * 1e6, limit=0.001), whatever_the_limit=True) for each in (800, 500, 900, 520)]
    assert said == [False, False, False, True]


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=200), st.floats(0.001, 2000))
def test_it_stops_within_bounds_and_near_the_least(remainders, limit):
    rule, least, waited = Switchover(), float(1 << 30), 0
    for remaining in remainders:
        round_ = left(remaining, limit=limit)
        shrunk = remaining < SHRINKING * least
        least = min(least, remaining)
        if rule.due(round_):
            assert round_.expected_downtime <= limit
            if round_.expected_downtime > NEGLIGIBLE:
                assert remaining <= least * TOLERANCE ** (1 + waited)
            return
        if round_.fits and not shrunk:
            waited += 1
    # The tolerance reaches from the least that is not negligible to the limit.
    assert TOLERANCE**waited <= max(1.0, limit / NEGLIGIBLE)


# ------------------------------------------------------------------------------------------------------------- the link


def test_a_round_measures_the_link():
    link = LinkSpeed()
    assert link.seconds_for(0) == 0.0
    assert link.seconds_for(1) == float("inf")
    link.sent(10_000_000, 1.0)
    assert link.seconds_for(5_000_000) == pytest.approx(0.5)
    link.sent(MEASURABLE - 1, 100.0)
    assert link.seconds_for(5_000_000) == pytest.approx(0.5)


def test_a_burst_is_believed_as_far_as_it_was_seen():
    link = LinkSpeed()
    link.sent(10_000_000, 1.0, held_back=True)
    link.burst(1_000_000, 0.001)
    assert link.seconds_for(BELIEVED * 1_000_000) == pytest.approx(BELIEVED * 0.001)
    assert link.seconds_for((BELIEVED + 10) * 1_000_000) == pytest.approx(BELIEVED * 0.001 + 1.0)


def test_bursts_are_taken_together_and_believed_as_far_as_all_were_seen():
    link = LinkSpeed()
    link.sent(10_000_000, 1.0, held_back=True)
    for span in (0.001, 0.003) * (RECENT // 2):
        link.burst(100_000, span)
    assert link.seconds_for(100_000) == pytest.approx(0.002)
    assert link.seconds_for(RECENT * 100_000) == pytest.approx(RECENT * 0.002)
    assert link.seconds_for((RECENT + 10) * 100_000) == pytest.approx(RECENT * 0.002 + 0.1)
    for _ in range(RECENT):
        link.burst(100_000, 0.005)
    assert link.seconds_for(100_000) == pytest.approx(0.005)


def test_small_bursts_mean_something_when_there_are_enough():
    link = LinkSpeed()
    link.sent(100_000, 1.0, held_back=True)
    for _ in range(MEASURABLE // 10_000):
        link.burst(10_000, 0.001)
        assert link.seconds_for(50_000) == pytest.approx(0.5)
    link.burst(10_000, 0.001)
    assert link.seconds_for(50_000) == pytest.approx(0.005)


def test_a_burst_is_forgotten_with_the_first_round_that_was_not_held_back():
    link = LinkSpeed()
    link.sent(10_000_000, 1.0, held_back=True)
    link.burst(1_000_000, 0.001)
    link.sent(10_000_000, 2.0)
    assert link.seconds_for(1_000_000) == pytest.approx(0.2)


def test_a_slow_burst_makes_nothing_slower():
    link = LinkSpeed()
    link.sent(10_000_000, 1.0, held_back=True)
    link.burst(100_000, 1.0)
    assert link.seconds_for(10_000_000) == pytest.approx(1.0)


def test_memory_that_shrinks_on_its_way_goes_quicker():
    link = LinkSpeed()
    link.sent(1_000_000, 1.0)
    link.handled(10_000_000, 1.0)
    link.handled(4_000_000, 1.0)
    assert link.seconds_for(4_000_000) == pytest.approx(1.0)  # by the slower of the two
    link.handled(5_000_000, 1.0)
    link.handled(8_000_000, 1.0)
    assert link.seconds_for(10_000_000) == pytest.approx(2.0)


# --------------------------------------------------------------------------------------------------- with all around it

links = st.builds(
    Link,
    speed=st.floats(1e6, 5e9),
    round_trip=st.floats(1e-5, 0.1),
    buffer=st.integers(1 << 16, 8 * MIB),
)
caps = st.sampled_from([0, 0, 1 * MIB, 10 * MIB, 128 * MIB])
guests = st.one_of(
    st.builds(steady, st.integers(0, 32 * MIB), st.floats(0, 5e9)),
    st.builds(
        saw, st.integers(PAGE, 32 * MIB), st.lists(st.floats(0, 1e9), min_size=1, max_size=4), st.floats(0.05, 5)
    ),
    st.builds(
        jumpy, st.integers(PAGE, 32 * MIB), st.floats(0, 1e9), st.lists(st.floats(0.1, 3), min_size=1, max_size=9)
    ),
)
limits = st.sampled_from([0, 1, 20, 300, 2000])


@settings(deadline=None, max_examples=60)
@given(links, guests, caps, limits)
def test_the_limit_is_kept_in_truth_on_a_link_that_stays_as_it_is(link, guest, cap, limit):
    world = World(link, guest, total=32 * MIB, max_bandwidth=cap, downtime_limit=limit)
    if world.run(most=80):
        assert world.downtime <= limit / 1000 * 1.01 or (limit == 0 and not world.rounds[-1].remaining)
        best = min(round_.remaining for round_ in world.rounds)
        fitting = [round_ for round_ in world.rounds[:-1] if round_.fits]
        assert world.rounds[-1].remaining <= max(
            best * TOLERANCE ** (1 + len(fitting)), world.link.speed * NEGLIGIBLE * 1.01
        )
    else:
        # What goes on for so long does not fit, and that has been said.
        assert world.told(Stalled) or not limit
        assert sum(round_.fits for round_ in world.rounds) < 60


@settings(deadline=None, max_examples=60)
@given(links, guests, caps)
def test_the_estimate_is_no_better_than_the_truth(link, guest, cap):
    world = World(link, guest, total=64 * MIB, max_bandwidth=cap, downtime_limit=300)
    for round_ in world:
        world.rounds.append(round_)
        assert round_.expected_downtime >= world.downtime * 0.99
        if len(world.rounds) >= 8:
            break


@pytest.mark.parametrize("round_trip", [0.0001, 0.002])
def test_an_idle_guest_stands_still_for_next_to_nothing(round_trip):
    world = World(Link(1e9, round_trip), steady(0, 0.0))
    assert world.run()
    assert world.downtime < 0.02
    assert len(world.rounds) == 1


def test_a_guest_that_writes_63_mib_all_the_time_over_a_fast_link():
    world = World(Link(2e9, 0.0002), steady(63 * MIB, 1e11))
    assert world.run()
    assert len(world.rounds) == 2  # the second has shown that it does not shrink
    assert world.downtime == pytest.approx(63 * MIB / 2e9, rel=0.05)


def test_a_steady_guest_is_stopped_at_about_its_minimum():
    world = World(Link(1e9, 0.0002), steady(200 * MIB, 0.5e9), total=1 << 30, downtime_limit=2000)
    assert world.run()
    least = min(round_.remaining for round_ in world.rounds)
    assert world.rounds[-1].remaining <= TOLERANCE * least
    assert world.downtime < 0.01  # although each of the last eight rounds would have fitted the limit


def test_the_limit_of_the_bandwidth_is_not_taken_for_the_links():
    """What is left takes 260 ms at the limit, and 14 ms over the link: the guest is stopped, and that is so."""
    world = World(Link(1e9), steady(13 * MIB, 1e9), max_bandwidth=50 * MIB, downtime_limit=100)
    assert world.run(most=20)
    assert world.rounds[-1].bandwidth < 70 * MIB
    assert world.downtime < 0.1


SMALL = {"max_bandwidth": 500_000, "downtime_limit": 100, "total": MIB}


def test_a_limit_of_small_windows_hides_nothing():
    """What is left takes 330 ms at the limit and 1.6 ms over the link; no round's end has shown so much at once."""
    world = World(Link(1e8), steady(40 * PAGE, 1e9), **SMALL)
    assert world.run(most=10)
    assert world.downtime < 0.1
    without = World(Link(1e8), steady(40 * PAGE, 1e9), way_back=False, **SMALL)
    assert not without.run(most=200)


@pytest.mark.parametrize("round_trip", [0.0001, 0.03, 0.25])
@pytest.mark.parametrize("cap", [100_000, 10 * MIB])
def test_the_destination_is_not_flooded(cap, round_trip):
    world = World(Link(5e7, round_trip), steady(2 * cap, 1e9), total=2 * cap, max_bandwidth=cap, downtime_limit=1)
    assert not world.run(most=2)
    times = world.pings
    assert times
    # Two for each window, and two at the end of each round: in no second more than twenty, but for the edges.
    assert max(sum(1 for each in times if first <= each < first + 1) for first in times) <= 22


@settings(deadline=None, max_examples=40)
@given(links, st.integers(100_000, 10 * MIB), st.integers(1, 8 * MIB))
def test_a_burst_is_never_taken_for_faster_than_the_link(link, cap, dirty):
    world = World(link, steady(dirty, 1e12), total=dirty, max_bandwidth=cap, downtime_limit=1)
    heard = []
    world.statistics.burst = lambda size, span: heard.append((size, span))
    world.run(most=3)
    assert all(size <= span * link.speed * 1.001 + 1 for size, span in heard)


def test_a_bandwidth_that_is_told_is_believed():
    world = World(
        Link(1e9), steady(128 * MIB, 1e10), max_bandwidth=1 * MIB, downtime_limit=300,
        avail_switchover_bandwidth=1_000_000_000,
    )  # fmt: skip
    assert world.run(most=20)
    assert world.downtime < 0.3
