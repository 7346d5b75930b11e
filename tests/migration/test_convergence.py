"""Whether a migration comes to its end: stalls, what a timeout makes of them, and what is foreseen."""

from __future__ import annotations

import logging
import threading

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel import MigrationStatus, hookimpl
from whimbrel.errors import NotConverged
from whimbrel.events import Converging, Forecast, Round, RoundFinished, Stalled, SwitchoverForced
from whimbrel.migration.convergence import FRUITLESS, StallWatch, forecast
from whimbrel.migration.switchover import Switchover
from whimbrel.testing.faults import Faults

from .simulated import MIB, Link, World, jumpy, saw, steady

LONG = 60.0
TOO_FAST = steady(128 * MIB, 1e9)

ROUND = Round(
    number=2,
    seconds=1.0,
    sent_bytes=1_000_000,
    remaining=500_000,
    previous_remaining=1_000_000,
    total=8_000_000,
    bandwidth=1e6,
    dirty_rate=5e5,
    expected_downtime=0.5,
    downtime_limit=0.3,
)


def watched(*remaining, limit=0.3):
    """What a StallWatch says of rounds that leave so many thousand bytes: S, C or a dot for each."""
    watch, said = StallWatch(), ""
    for each in remaining:
        round_ = attrs.evolve(ROUND, remaining=each * 1000, expected_downtime=each / 1000, downtime_limit=limit)
        changed = watch.heard(round_)
        said += ("S" if watch.stalled else "C") if changed else "."
    return said


# -------------------------------------------------------------------------------------------------------------- a stall


@pytest.mark.parametrize(
    ("remaining", "said"),
    [
        ((8000, 8000, 8000, 8000), "..S."),
        ((4000, 4000, 4000, 4000, 4000), "...S."),
        ((4000, 2000, 1000, 500, 250), "....."),
        ((4000, 3900, 3700, 3500, 3200, 3100), "......"),  # slow, but ever on
        ((4000, 2000, 4000, 2000, 4000), "....S"),  # a saw comes to nothing
        ((4000, 4000, 4000, 4000, 2900, 2900, 2900, 2900), "...SC..S"),
        ((4000, 4000, 4000, 4000, 3500, 3100), "...S.."),  # hardly better is no end of it
        ((4000, 4000, 4000, 4000, 200, 4000, 4000, 4000), "...SC..S"),
        ((290, 290, 290, 290, 290), "....."),  # what fits is no stall
    ],
)
def test_a_stall_is_told_from_round_to_round(remaining, said):
    assert watched(*remaining) == said


@given(st.lists(st.integers(0, 8000), min_size=1, max_size=60))
def test_a_stall_begins_and_ends_by_turns(remaining):
    said = watched(*remaining).replace(".", "")
    assert said == ("SC" * len(said))[: len(said)]
    if all(each > 7200 for each in remaining):
        assert said == ("S" if len(remaining) >= FRUITLESS else "")


def test_a_stall_is_said_once_with_what_helps(caplog):
    world = World(Link(1e8), TOO_FAST, max_bandwidth=50 * MIB)
    with caplog.at_level(logging.WARNING, "whimbrel"):
        assert not world.run(most=30)
    assert len(world.told(Stalled)) == 1
    assert world.told(Stalled)[0].round.number == 4  # the first has shrunk it by half
    (record,) = caplog.records
    for part in (
        "50.6 MiB/s",
        "1.34 s of 300 ms",
        "downtime-limit",
        "max-bandwidth",
        "auto-converge",
        "switchover-policy",
    ):
        assert part in record.message
    info = world.statistics.info(MigrationStatus.ACTIVE)
    assert (info.stalled, info.stalls, info.forecast) == (True, 1, None)
    assert info.as_dict()["stalls"] == 1


def test_what_no_round_can_save_is_said(caplog):
    world = World(Link(1e9), steady(0, 0), downtime_limit=100)
    world.statistics.setup_ended(lambda: world.sent, {"ram": world.progress}, stopping=lambda: 0.15)
    assert not world.run(most=10)
    assert "150 ms of 100 ms allowed, 150 ms of it however little is left" in caplog.text
    world.parameters.downtime_limit = 200
    assert world.run(most=20)


def test_a_stall_ends_when_the_limit_is_raised():
    world = World(Link(1e8), TOO_FAST)
    assert not world.run(most=10)
    world.parameters.downtime_limit = 2000
    assert world.run(most=20)
    assert len(world.told(Converging)) == 1
    info = world.statistics.info(MigrationStatus.ACTIVE)
    assert (info.stalled, info.stalls) == (False, 1)


# --------------------------------------------------------------------------------------------------------- the policies


def test_waiting_is_said_once(caplog):
    world = World(Link(1e8), TOO_FAST, switchover_timeout=5000)
    with caplog.at_level(logging.WARNING, "whimbrel"):
        assert not world.run(most=50)
    assert [record.message for record in caplog.records if "switchover-timeout has passed" in record.message] == [
        caplog.records[-1].message
    ]


def test_giving_up_counts_from_the_end_of_the_first_round():
    world = World(Link(1e8), TOO_FAST, total=1 << 30, switchover_timeout=5000, switchover_policy="cancel")
    with pytest.raises(NotConverged, match="switchover-timeout") as caught:
        world.run()
    assert caught.value.code == "not-converged"
    bulk, *others = (round_.seconds for round_ in world.rounds)
    assert bulk > 10
    assert 5.0 <= sum(others) < 5.0 + others[-1]


def test_stopping_says_by_how_much_it_exceeds(caplog):
    world = World(Link(1e8), TOO_FAST, switchover_timeout=5000, switchover_policy="stop")
    assert world.run()
    (forced,) = world.told(SwitchoverForced)
    assert forced.round is world.rounds[-1]
    assert forced.round.expected_downtime == pytest.approx(world.downtime, rel=0.05)
    assert "1.34 s of 300 ms allowed" in caplog.text
    info = world.statistics.info(MigrationStatus.COMPLETED)
    assert info.decision == "forced"
    assert info.switchover_expected > info.switchover_limit == 300


def test_even_then_a_saw_is_not_left_at_its_peak():
    guest = jumpy(128 * MIB, 1e8, [4.0, 0.4])
    world = World(Link(1e8), guest, switchover_timeout=4000, switchover_policy="stop")
    assert world.run()
    remaining = [round_.remaining for round_ in world.rounds]
    assert max(remaining[1:]) > 1.25 * min(remaining)
    assert remaining[-1] <= 1.25 * min(remaining)


@pytest.mark.parametrize("policy", ["wait", "stop", "cancel"])
def test_a_policy_changes_nothing_where_the_limit_is_met(policy):
    world = World(Link(1e9), steady(20 * MIB, 1e8), switchover_timeout=1, switchover_policy=policy)
    assert world.run()
    assert not world.told(SwitchoverForced)
    assert world.statistics.decision == "within the limit"


def test_without_the_destinations_agreement_nobody_stops_the_guest():
    world = World(Link(1e9), steady(0, 0), switchover_timeout=1000, switchover_policy="stop")
    assert not world.run(most=300, agreed=False)
    world.parameters.switchover_policy = "cancel"
    with pytest.raises(NotConverged, match="has not agreed"):
        world.run(agreed=False)


def test_a_plugin_comes_before_the_limit_and_behind_giving_up():
    world = World(Link(1e8), TOO_FAST)
    assert world.run(choice=True)
    assert (len(world.rounds), world.statistics.decision) == (1, "a plugin's choice")
    world = World(Link(1e8), steady(0, 0), switchover_timeout=1000, switchover_policy="stop")
    assert not world.run(most=200, choice=False)
    world.parameters.switchover_policy = "cancel"
    with pytest.raises(NotConverged):
        world.run(choice=False)


# --------------------------------------------------------------------------------------------------------- the forecast


def test_what_shrinks_by_half_each_time():
    made = forecast(ROUND, Switchover(), 10.0)
    # 0.5 s to send 500 kB, after which 250 kB fit; and so on to what is negligible.
    assert made.number == 2
    assert made.downtime <= 0.002
    assert made.total_time == pytest.approx(11.0, abs=0.01)


def test_what_does_not_shrink_has_no_end():
    assert forecast(attrs.evolve(ROUND, remaining=1_000_000, expected_downtime=1.0), Switchover(), 1.0) is None
    assert forecast(attrs.evolve(ROUND, remaining=1, expected_downtime=float("inf")), Switchover(), 1.0) is None


def test_a_forecast_leaves_the_rule_as_it_was():
    rule = Switchover()
    before = attrs.astuple(rule)
    forecast(ROUND, rule, 1.0)
    assert attrs.astuple(rule) == before


@pytest.mark.parametrize(
    ("guest", "parameters"),
    [
        (steady(200 * MIB, 20 * MIB), {}),
        (steady(200 * MIB, 60 * MIB), {}),
        (steady(200 * MIB, 20 * MIB), {"max_bandwidth": 64 * MIB}),
        (steady(10 * MIB, 1e9), {}),
    ],
    ids=["slow", "fast", "capped", "small"],
)
def test_what_is_foreseen_comes(guest, parameters):
    world = World(Link(100 * MIB), guest, **parameters)
    assert world.run()
    told = {event.round.number: event.forecast for event in world.told(RoundFinished)}
    assert told[1] is None
    for number, made in told.items():
        if number > 1:
            assert made.number == number
            assert made.total_time == pytest.approx(world.seconds, rel=0.1)
            assert made.downtime == pytest.approx(world.downtime, abs=0.005)


@settings(deadline=None)
@given(
    st.floats(1e6, 1e9), st.integers(0, 128 * MIB), st.floats(0, 1e9), st.sampled_from([0, 10 * MIB]),
    st.sampled_from([1, 300]),
)  # fmt: skip
def test_there_is_a_forecast_or_none_and_no_nonsense(speed, working_set, rate, cap, limit):
    world = World(Link(speed), saw(working_set, [rate, rate / 3], 1.0), max_bandwidth=cap, downtime_limit=limit)
    ended = world.run(most=30)
    made = [event.forecast for event in world.told(RoundFinished)]
    assert made[0] is None
    for each in filter(None, made):
        assert 0 <= each.downtime <= limit / 1000
        assert each.downtime < each.total_time < float("inf")
    if ended and len(made) > 1:
        assert made[-1] is not None  # whoever stops the guest now has foreseen it


def test_the_result_has_the_first_and_the_last_and_by_how_much_they_were_wrong():
    world = World(Link(100 * MIB), steady(200 * MIB, 60 * MIB))
    assert world.run()
    statistics = world.statistics
    while_it_runs = statistics.info(MigrationStatus.ACTIVE).as_dict()
    assert while_it_runs["first-forecast"].keys() == {"round", "total-time", "downtime"}
    statistics.guest_stopped()
    world.now += 0.25
    statistics.guest_resumed()
    statistics.ended()
    info = statistics.info(MigrationStatus.COMPLETED)
    assert isinstance(info.first_forecast, Forecast)
    told = info.as_dict()
    assert told["first-forecast"]["round"] == 2
    assert told["forecast"]["round"] == len(world.rounds) > 2
    for made in (told["first-forecast"], told["forecast"]):
        assert made["total-time"] + made["total-time-error"] == pytest.approx(info.total_time)
        assert made["downtime"] + made["downtime-error"] == pytest.approx(250)


# ------------------------------------------------------------------------------------------------------------ real runs


@pytest.fixture
def build(churning):
    return churning({"a": 40}, rest=0)


def test_a_link_is_known_within_rounds_though_each_window_is_small(make_pair, churning, settings):
    """At the limit what this guest rewrites takes 330 ms, over the link 25: it is stopped, and that is so."""
    settings.parameters.update({"max-bandwidth": 300_000, "downtime-limit": 150})
    pair = make_pair(churning({"a": 24}, rest=0), settings=settings)
    pair.faults = Faults(speed=4e6)
    pair.source.start()
    incoming, outgoing = pair.run()
    assert (outgoing.error, incoming.error) == (None, None)
    assert outgoing.info.decision == "within the limit"
    *_, last = (event.round for event in pair.source_events if isinstance(event, RoundFinished))
    speed = last.remaining / (last.expected_downtime - last.fixed_downtime)
    assert 2 * 300_000 < speed < 1.1 * 4e6


def test_without_an_answer_only_the_limit_is_known(make_pair, churning, settings):
    """The same guest over the same link, one way."""
    settings.parameters.update(
        {"max-bandwidth": 300_000, "downtime-limit": 150, "switchover-timeout": 1, "switchover-policy": "cancel"}
    )
    pair = make_pair(churning({"a": 24}, rest=0), settings=settings, duplex=False)
    pair.source.start()
    _, outgoing = pair.run()
    assert isinstance(outgoing.error, NotConverged)


@pytest.fixture
def slow(settings):
    """Settings for a link of 500 kB/s, on which nothing of this guest's fits."""
    settings.parameters.update(
        {"max-bandwidth": 500_000, "avail-switchover-bandwidth": 500_000, "downtime-limit": 5}
    )  # fmt: skip
    return settings


def test_a_guest_that_does_not_converge_is_given_up_and_runs_on(make_pair, build, slow):
    slow.parameters.update({"switchover-timeout": 1, "switchover-policy": "cancel"})
    pair = make_pair(build, settings=slow)
    pair.source.start()
    incoming, outgoing = pair.run()
    assert isinstance(outgoing.error, NotConverged)
    assert (outgoing.status, outgoing.info.error_code) == (MigrationStatus.FAILED, "not-converged")
    assert outgoing.info.rounds == 2
    assert outgoing.info.ownership == "owner"
    assert incoming.error is not None
    assert pair.source.run_state == "running"
    build.source.wait_steps(5)


def test_a_guest_that_does_not_converge_is_stopped_for_longer(make_pair, build, slow):
    slow.parameters.update({"switchover-timeout": 1, "switchover-policy": "stop"})
    pair = make_pair(build, settings=slow)
    pair.source.start()
    incoming, outgoing = pair.run()
    assert (outgoing.error, incoming.error) == (None, None)
    assert outgoing.info.decision == "forced"
    assert outgoing.info.switchover_expected > outgoing.info.switchover_limit == 5
    (forced,) = [event for event in pair.source_events if isinstance(event, SwitchoverForced)]
    assert forced.round.expected_downtime * 1000 == pytest.approx(outgoing.info.switchover_expected)
    pair.destination.stop()
    build.destination.check()


def test_a_stall_is_heard_of_while_it_lasts(make_pair, build, slow):
    pair = make_pair(build, settings=slow)
    stalled = threading.Event()
    pair.source.notifiers.add(lambda event: isinstance(event, Stalled) and stalled.set())
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert stalled.wait(LONG)
    assert outgoing.info.stalled
    slow.parameters.downtime_limit = 2_000_000
    info = outgoing.wait(LONG)
    incoming.wait(LONG)
    assert (info.stalled, info.stalls) == (False, 1)
    told = [event for event in pair.source_events if isinstance(event, Stalled | Converging)]
    assert [type(event) for event in told] == [Stalled, Converging]


def test_a_forecast_is_told_and_kept(make_pair, churning, settings):
    class Three:
        @hookimpl
        def whimbrel_choose_switchover(self, round):  # noqa: A002
            return round.number >= 3

    build = churning({"a": 40, "b": 5})
    pair = make_pair(build, settings=settings, plugins=[Three()])
    pair.source.start()
    _, outgoing = pair.run()
    told = [event.forecast for event in pair.source_events if isinstance(event, RoundFinished)]
    assert told[0] is None
    assert [outgoing.info.first_forecast, outgoing.info.forecast] == told[1:]
    assert outgoing.info.decision == "a plugin's choice"
    made = outgoing.info.as_dict()["forecast"]
    assert made["round"] == 3
    assert made["downtime"] + made["downtime-error"] == pytest.approx(outgoing.info.downtime_exact)
