"""The bundled notifier: a sentence for every event."""

import inspect
import logging

import pytest

from whimbrel import events
from whimbrel_notifiers import log

ROUND = events.Round(
    number=3,
    seconds=0.25,
    sent_bytes=12 * 1024**2,
    remaining=3 * 1024**2,
    previous_remaining=9 * 1024**2,
    total=1024**3,
    bandwidth=48.0 * 1024**2,
    dirty_rate=12.0 * 1024**2,
    expected_downtime=0.0625,
    downtime_limit=0.3,
)

LEFT = "3 MiB of 1 GiB remain, dirtied at 12 MiB/s; expected downtime 62.5 ms, limit 300 ms"

SENTENCES = [
    (events.StateChanged(role="source", old="setup", new="active"), "source: migration is active (was setup)"),
    (events.RoundStarted(number=2), "round 2 starts"),
    (
        events.RoundFinished(round=ROUND),
        (
            "round 3: sent 12 MiB in 250 ms (48 MiB/s), 3 MiB of 1 GiB remain, dirtied at 12 MiB/s;"
            " expected downtime 62.5 ms, limit 300 ms"
        ),
    ),
    (
        events.RoundFinished(round=ROUND, forecast=events.Forecast(number=3, total_time=2.5, downtime=0.05)),
        (
            "round 3: sent 12 MiB in 250 ms (48 MiB/s), 3 MiB of 1 GiB remain, dirtied at 12 MiB/s;"
            " expected downtime 62.5 ms, limit 300 ms; 2.5 s in all are foreseen"
        ),
    ),
    (events.Stalled(round=ROUND), f"the migration does not converge: {LEFT}"),
    (events.Converging(round=ROUND), f"the migration converges again: {LEFT}"),
    (events.SwitchoverForced(round=ROUND), f"the guest is stopped although the limit cannot be met: {LEFT}"),
    (events.GuestThrottled(percent=30), "the guest is throttled by 30 %"),
    (events.GuestThrottled(percent=0), "the guest is not throttled"),
    (events.RunStateChanged(old="running", new="finish-migrate"), "the machine is finish-migrate (was running)"),
    (events.GuestStopped(), "the guest has stopped"),
    (events.GuestStarted(), "the guest runs"),
    (events.Arrived(running=True), "the machine has arrived and runs"),
    (events.Arrived(running=False), "the machine has arrived and is paused"),
    (
        events.MigrationFinished(role="source", status="completed", downtime=0.0125, error=""),
        "source: migration completed after a downtime of 12.5 ms",
    ),
    (
        events.MigrationFinished(role="destination", status="failed", downtime=None, error="the path broke"),
        "destination: migration failed: the path broke",
    ),
]


@pytest.mark.parametrize(("event", "sentence"), SENTENCES, ids=lambda value: type(value).__name__)
def test_every_event_is_a_sentence(event, sentence, caplog):
    with caplog.at_level(logging.INFO, logger="whimbrel"):
        log.whimbrel_on_event(event)
    assert caplog.record_tuples == [("whimbrel", logging.INFO, sentence)]


def test_no_event_is_forgotten():
    kinds = {kind for _, kind in inspect.getmembers(events, inspect.isclass) if issubclass(kind, events.Event)}
    assert {type(event) for event, _ in SENTENCES} == kinds - {events.Event}


def test_an_event_of_a_stranger_shows_its_fields():
    class Moulted(events.Event):
        def as_dict(self):
            return {"event": "Moulted", "timestamp": 1.0, "feathers": 12}

    assert log.sentence(Moulted()) == "Moulted(feathers=12)"


def test_what_is_not_known_yet_is_said_so():
    early = events.Round(
        number=1,
        seconds=0.0,
        sent_bytes=0,
        remaining=0,
        previous_remaining=0,
        total=0,
        bandwidth=float("inf"),
        dirty_rate=float("nan"),
        expected_downtime=float("inf"),
        downtime_limit=0.3,
    )
    assert "(unknown)" in log.sentence(events.RoundFinished(round=early))
    assert "expected downtime unknown" in log.sentence(events.RoundFinished(round=early))


def test_nothing_is_written_where_nobody_listens(caplog):
    with caplog.at_level(logging.WARNING, logger="whimbrel"):
        log.whimbrel_on_event(events.GuestStopped())
    assert caplog.record_tuples == []
