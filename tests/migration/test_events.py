"""What is told, and in which order: QEMU's, as the wire format's section 10.5 has them."""

from __future__ import annotations

import itertools
import threading
from contextlib import suppress

import pytest

from whimbrel import MigrationError, MigrationStatus, RunState, hookimpl
from whimbrel.errors import MigrationCancelled
from whimbrel.events import (
    Arrived,
    GuestStarted,
    GuestStopped,
    MigrationFinished,
    RoundFinished,
    RoundStarted,
    RunStateChanged,
    StateChanged,
)
from whimbrel.testing.faults import Faults

LONG = 60.0


def told(events):
    """The events in QEMU's short words: statuses, PASS n, STOP, RESUME."""
    words = []
    for event in events:
        match event:
            case StateChanged():
                words.append(str(event.new))
            case RoundStarted():
                words.append(f"PASS {event.number}")
            case GuestStopped():
                words.append("STOP")
            case GuestStarted():
                words.append("RESUME")
    return words


@pytest.fixture
def build(churning):
    return churning({"a": 40, "b": 5})


class Rounds:
    """Three rounds, so that there is a middle."""

    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        return round.number >= 3


def test_a_plain_migration(make_pair, build, settings):
    pair = make_pair(build, settings=settings, plugins=[Rounds()])
    pair.source.start()
    pair.forget_events()
    pair.run()
    assert told(pair.source_events) == [
        "setup", "PASS 1", "active", "PASS 2", "PASS 3", "PASS 4", "STOP", "PASS 5", "completed",
    ]  # fmt: skip
    assert told(pair.destination_events) == ["setup", "active", "RESUME", "completed"]
    assert [(event.old, event.new) for event in pair.source_events if isinstance(event, RunStateChanged)] == [
        ("running", "finish-migrate"),
        ("finish-migrate", "postmigrate"),
    ]
    assert [(event.old, event.new) for event in pair.destination_events if isinstance(event, RunStateChanged)] == [
        ("prelaunch", "inmigrate"),
        ("inmigrate", "running"),
    ]
    assert [event.running for event in pair.destination_events if isinstance(event, Arrived)] == [True]


def test_the_passes_are_the_dirty_sync_count_and_the_rounds_are_whole(make_pair, build, settings):
    pair = make_pair(build, settings=settings, plugins=[Rounds()])
    pair.source.start()
    _, outgoing = pair.run()
    passes = [event.number for event in pair.source_events if isinstance(event, RoundStarted)]
    rounds = [event.round for event in pair.source_events if isinstance(event, RoundFinished)]
    assert passes == list(range(1, outgoing.info.ram.dirty_sync_count + 1))
    assert [round_.number for round_ in rounds] == [1, 2, 3] == list(range(1, outgoing.info.rounds + 1))
    for round_, after in itertools.pairwise(rounds):
        assert after.previous_remaining == round_.remaining
    assert rounds[0].total == rounds[0].previous_remaining == 45 * 4096


def test_timestamps_never_go_back_and_events_are_frozen(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    pair.run()
    for events in (pair.source_events, pair.destination_events):
        stamps = [event.timestamp for event in events]
        assert stamps == sorted(stamps)
        for event in events:
            with pytest.raises(AttributeError):
                event.timestamp = 0
            assert event.as_dict()["event"] == type(event).__name__


def test_pause_before_switchover(make_pair, build, settings):
    settings.capabilities.pause_before_switchover = True
    pair = make_pair(build, settings=settings)
    reached = threading.Event()
    pair.source.notifiers.add(lambda event: getattr(event, "new", "") == "pre-switchover" and reached.set())
    pair.source.start()
    pair.forget_events()
    incoming, outgoing = pair.migrate()
    assert reached.wait(LONG)  # told while it waits, and not only after
    outgoing.proceed()
    outgoing.wait(LONG)
    incoming.wait(LONG)
    passes = outgoing.info.ram.dirty_sync_count
    assert told(pair.source_events) == [
        "setup", "PASS 1", "active", *(f"PASS {number}" for number in range(2, passes)),
        "STOP", "pre-switchover", "device", f"PASS {passes}", "completed",
    ]  # fmt: skip


def test_cancelled(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=20_000)
    pair.source.start()
    pair.forget_events()
    _, outgoing = pair.migrate()
    pair.wait_stalled(LONG)
    assert outgoing.cancel()
    with pytest.raises(MigrationCancelled):
        outgoing.wait(LONG)
    assert told(pair.source_events) == ["setup", "PASS 1", "active", "cancelling", "cancelled"]


def test_connection_refused(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    pair.forget_events()
    outgoing = pair.source.migrate("memory:nobody")
    with suppress(MigrationError):
        outgoing.wait(LONG)
    assert told(pair.source_events) == ["setup", "failed"]
    assert "nobody listens" in outgoing.info.error
    assert pair.source.run_state is RunState.RUNNING


def test_the_peer_goes_away(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(cut_sent=20_000)
    pair.source.start()
    pair.forget_events()
    pair.run()
    assert told(pair.source_events) == ["setup", "PASS 1", "active", "failed"]
    assert told(pair.destination_events) == ["setup", "active", "failed"]
    finished = [event for event in pair.source_events if isinstance(event, MigrationFinished)]
    assert [(event.role, event.status, event.downtime) for event in finished] == [("source", "failed", None)]
    assert "cut" in finished[0].error


def test_failing_while_the_guest_is_stopped_starts_it_again(make_pair, build, settings):
    def on_load():
        raise ValueError("this dial cannot be turned")

    pair = make_pair(build, settings=settings)
    build.destination.on_load = on_load
    pair.source.start()
    pair.forget_events()
    pair.run()
    words = told(pair.source_events)
    assert words[:3] == ["setup", "PASS 1", "active"]
    assert [words[-4], *words[-2:]] == ["STOP", "RESUME", "failed"]
    assert words[-3].startswith("PASS")
    assert told(pair.destination_events) == ["setup", "active", "failed"]


def test_a_finished_migration_is_told_once_with_its_downtime(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    _, outgoing = pair.run()
    finished = [event for event in pair.source_events if isinstance(event, MigrationFinished)]
    assert [(event.status, event.error) for event in finished] == [("completed", "")]
    assert finished[0].downtime * 1000 == pytest.approx(outgoing.info.downtime_exact)
    arrived = [event for event in pair.destination_events if isinstance(event, MigrationFinished)]
    assert [(event.role, event.status) for event in arrived] == [("destination", "completed")]


def test_nothing_is_told_inside_the_blackout(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    inside = []

    def look(event):
        if pair.source.run_state is RunState.FINISH_MIGRATE:
            inside.append(event)

    pair.source.notifiers.add(look)
    pair.source.start()
    pair.run()
    assert any(isinstance(event, GuestStopped) for event in pair.source_events)
    assert inside == []


def test_what_wait_returns_has_been_told(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert outgoing.wait(LONG).status is MigrationStatus.COMPLETED
    assert "completed" in told(pair.source_events)
    assert incoming.wait(LONG).status is MigrationStatus.COMPLETED
    assert "completed" in told(pair.destination_events)
