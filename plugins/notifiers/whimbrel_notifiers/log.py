"""Writes every event as a sentence to the logger "whimbrel", at level INFO.

It sets up no handler: whether and where the lines appear is the program's choice, as with all of logging.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from whimbrel import events
from whimbrel.hookspecs import hookimpl
from whimbrel.units import format_rate, format_seconds, format_size

if TYPE_CHECKING:
    from whimbrel.events import Event, Forecast, Round

__all__ = ["sentence", "whimbrel_on_event"]

_log = logging.getLogger("whimbrel")


@hookimpl
def whimbrel_on_event(event: Event) -> None:
    """Write `event` down."""
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s", sentence(event))


def sentence(event: Event) -> str:
    """The event as one line for people; one of a kind not known here shows its fields."""
    match event:
        case events.StateChanged():
            return f"{event.role}: migration is {event.new} (was {event.old})"
        case events.RoundStarted():
            return f"round {event.number} starts"
        case events.RoundFinished():
            return _round(event.round) + _forecast(event.forecast)
        case events.Stalled():
            return f"the migration does not converge: {_left(event.round)}"
        case events.Converging():
            return f"the migration converges again: {_left(event.round)}"
        case events.SwitchoverForced():
            return f"the guest is stopped although the limit cannot be met: {_left(event.round)}"
        case events.GuestThrottled():
            return f"the guest is throttled by {event.percent} %" if event.percent else "the guest is not throttled"
        case events.RunStateChanged():
            return f"the machine is {event.new} (was {event.old})"
        case events.GuestStopped():
            return "the guest has stopped"
        case events.GuestStarted():
            return "the guest runs"
        case events.Arrived():
            return f"the machine has arrived {'and runs' if event.running else 'and is paused'}"
        case events.MigrationFinished():
            return _finished(event)
    fields = {name: value for name, value in event.as_dict().items() if name not in {"event", "timestamp"}}
    listed = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return f"{type(event).__name__}({listed})"


def _round(done: Round) -> str:
    return (
        f"round {done.number}: sent {format_size(done.sent_bytes)} in {_seconds(done.seconds)}"
        f" ({_rate(done.bandwidth)}), {_left(done)}"
    )


def _left(done: Round) -> str:
    return (
        f"{format_size(done.remaining)} of {format_size(done.total)} remain, dirtied at {_rate(done.dirty_rate)};"
        f" expected downtime {_seconds(done.expected_downtime)}, limit {_seconds(done.downtime_limit)}"
    )


def _forecast(made: Forecast | None) -> str:
    return "" if made is None else f"; {_seconds(made.total_time)} in all are foreseen"


def _finished(event: events.MigrationFinished) -> str:
    text = f"{event.role}: migration {event.status}"
    if event.downtime is not None:
        text += f" after a downtime of {_seconds(event.downtime)}"
    return f"{text}: {event.error}" if event.error else text


# A link that has sent nothing yet makes infinities of rates and times.
def _seconds(value: float) -> str:
    return format_seconds(value) if math.isfinite(value) else "unknown"


def _rate(value: float) -> str:
    return format_rate(value) if math.isfinite(value) else "unknown"
