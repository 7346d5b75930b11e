"""What notifiers are told: small frozen values, safe to keep and to pass between threads.

Events are made where a thing happens, stamped with the wall clock there, and delivered in order on one thread of
the machine's own (`whimbrel.machine.notices`); none is delivered inside the downtime window.
"""

from __future__ import annotations

import time
from typing import Any

import attrs

__all__ = [
    "Arrived",
    "Converging",
    "Event",
    "Forecast",
    "GuestStarted",
    "GuestStopped",
    "GuestThrottled",
    "MigrationFinished",
    "Round",
    "RoundFinished",
    "RoundStarted",
    "RunStateChanged",
    "Stalled",
    "StateChanged",
    "SwitchoverForced",
]


@attrs.frozen(kw_only=True)
class Event:
    """The root of all events; `timestamp` is wall-clock seconds since the epoch."""

    timestamp: float = attrs.field(factory=time.time)

    def as_dict(self) -> dict[str, Any]:
        """The event's fields and its name (`event`), ready for JSON."""
        return {"event": type(self).__name__, **attrs.asdict(self)}


@attrs.frozen(kw_only=True)
class StateChanged(Event):
    """A migration's status moved (QEMU's MIGRATION event); `role` is "source" or "destination"."""

    role: str
    old: str
    new: str


@attrs.frozen(kw_only=True)
class RoundStarted(Event):
    """The dirty marks were read for the `number`-th time (QEMU's MIGRATION_PASS event)."""

    number: int


@attrs.frozen(kw_only=True)
class Round:
    """What one round did and what is known at its end; what `whimbrel_choose_switchover` decides from.

    `remaining` is what the sync at the round's end found dirty, `previous_remaining` the same one round earlier.
    """

    number: int
    seconds: float
    sent_bytes: int
    remaining: int
    previous_remaining: int
    total: int
    bandwidth: float  # bytes per second, measured
    dirty_rate: float  # bytes per second, measured over the round
    expected_downtime: float  # seconds
    downtime_limit: float  # seconds
    fixed_downtime: float = 0.0  # seconds of the expected downtime that no further round can save

    @property
    def fits(self) -> bool:
        """Whether the guest could be stopped now within the limit, as far as is known.

        A limit of 0 asks for the least there can be: a round that leaves nothing.
        """
        if self.downtime_limit <= 0:
            return self.remaining == 0
        return self.expected_downtime <= self.downtime_limit


@attrs.frozen(kw_only=True)
class Forecast:
    """What a migration is expected to take in all, said behind round `number`, if nothing changes. In seconds."""

    number: int
    total_time: float  # from its start to its end
    downtime: float


@attrs.frozen(kw_only=True)
class RoundFinished(Event):
    """A round went through every handler and the dirty marks were read again.

    `forecast` is there from the second round on, unless no end can be foreseen.
    """

    round: Round
    forecast: Forecast | None = None


@attrs.frozen(kw_only=True)
class Stalled(Event):
    """For several rounds what is left has not shrunk markedly, and it does not fit the limit; said when that begins."""

    round: Round


@attrs.frozen(kw_only=True)
class Converging(Event):
    """A stall is over: what is left shrinks again, or fits the limit."""

    round: Round


@attrs.frozen(kw_only=True)
class GuestThrottled(Event):
    """The guest is kept from running for `percent` per cent of its time from now on; 0 at the end (auto-converge)."""

    percent: int


@attrs.frozen(kw_only=True)
class SwitchoverForced(Event):
    """`switchover-timeout` has passed: the guest is stopped although that is expected to exceed the limit."""

    round: Round


@attrs.frozen(kw_only=True)
class RunStateChanged(Event):
    """The machine's run state moved."""

    old: str
    new: str


@attrs.frozen(kw_only=True)
class GuestStopped(Event):
    """No guest code runs any more (QEMU's STOP event)."""


@attrs.frozen(kw_only=True)
class GuestStarted(Event):
    """Guest code runs from here on (QEMU's RESUME event)."""


@attrs.frozen(kw_only=True)
class Arrived(Event):
    """A machine was loaded whole and is this process's from now on; `running` says whether its guest was started."""

    running: bool


@attrs.frozen(kw_only=True)
class MigrationFinished(Event):
    """A migration came to its end, whichever; `error` is one sentence, or empty."""

    role: str
    status: str
    downtime: float | None  # seconds
    error: str
