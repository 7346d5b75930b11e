"""What a migration measures of itself, and `MigrationInfo`, which is what it tells (QEMU's query-migrate).

The migration thread alone writes `Statistics`; any thread reads it through `info`, which copies.

The downtime is told by cause: `mark` ends a stretch of it, stretches follow each other without a gap, and so their sum
is the downtime. What the destination takes to load and to start is seen from here as the wait for its word.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final

import attrs

from whimbrel.abc import Progress
from whimbrel.events import Forecast, Round
from whimbrel.migration.linkspeed import LinkSpeed
from whimbrel.migration.status import MigrationStatus

WINDOW: Final = 0.1  # seconds over which mbps and pages-per-second are measured

LONGEST: Final = 1e9  # seconds; what is unknown is told as this long, for JSON has no infinity
FIRST_FORECAST: Final = 2  # the round behind which there is a first forecast

Details = Mapping[str, Mapping[str, object]]
"""Further members of query-migrate by name, as `IterableHandler.statistics` tells them."""


class Cause(StrEnum):
    """What the guest stands still for, in the order in which it comes."""

    STOP = "stop"  # the guest's way to where it can stop
    PAUSE = "pause"  # waiting for migrate-continue, with pause-before-switchover
    RAM = "ram"  # reading the dirty marks for the last time, and sending what is left
    DRIVES = "drives"  # sending what is left of drives
    DEVICES = "devices"  # saving and sending all else
    TRANSFER = "transfer"  # handing the link what was still held back
    CONFIRM = "confirm"  # until the destination's proof: the rest of the way there, and loading
    RELEASE = "release"  # letting go, and the last bytes
    START = "start"  # until the destination's word that it runs


@attrs.frozen(kw_only=True)
class TransferInfo:
    """The counters of one kind of data (`ram`, `disk`); bytes unless their name says otherwise."""

    total: int = 0
    transferred: int = 0
    remaining: int = 0
    duplicate: int = 0
    normal: int = 0
    skipped: int = 0
    page_size: int = 4096
    mbps: float = 0.0
    dirty_pages_rate: int = 0
    dirty_sync_count: int = 0
    dirty_sync_missed_zero_copy: int = 0
    multifd_bytes: int = 0
    pages_per_second: int = 0
    postcopy_requests: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0

    @property
    def normal_bytes(self) -> int:
        """Bytes of whole pages sent."""
        return self.normal * self.page_size

    def as_qmp(self, *, completed: bool = False) -> dict[str, Any]:
        """The members under QEMU's names. At the end nothing is left, and nothing becomes dirty any more."""
        members = {name.replace("_", "-"): value for name, value in attrs.asdict(self).items()}
        if completed:
            members |= {"remaining": 0, "dirty-pages-rate": 0}
        return {**members, "normal-bytes": self.normal_bytes}


@attrs.frozen(kw_only=True)
class MigrationInfo:
    """How a migration stands or ended: the fields of QEMU's query-migrate. Times in milliseconds.

    `rounds` is how many times RAM was gone through before the guest was stopped, `bandwidth` the last measured one
    in bytes per second, `tracker` the dirty tracker at work, `failed_notifiers` those that raised and were muted.
    `details` are the handlers' own members of query-migrate, by name. `cpu_throttle` is the percentage of its time that
    the guest is kept from running, and `stalls` how often the migration has stalled; `stalled` tells whether it does.
    `first_forecast` was made behind the second round, `forecast` is the last; both are in seconds. `decision` says by
    what the guest was stopped, `switchover_expected` and `switchover_limit` what that was expected and allowed to take.
    `downtime_split` has the downtime by cause (`Cause`), whose sum it is.
    """

    status: MigrationStatus
    setup_time: int | None = None
    total_time: int | None = None
    downtime: int | None = None
    expected_downtime: int | None = None
    downtime_exact: float | None = None
    error: str = ""
    error_code: str = ""
    transfers: Mapping[str, TransferInfo] = attrs.field(factory=dict)
    details: Details = attrs.field(factory=dict)
    cpu_throttle: int = 0
    rounds: int = 0
    bandwidth: float = 0.0
    dirty_rate: float = 0.0
    stalled: bool = False
    stalls: int = 0
    first_forecast: Forecast | None = None
    forecast: Forecast | None = None
    decision: str = ""
    switchover_expected: float | None = None
    switchover_limit: float | None = None
    downtime_split: Mapping[str, float] = attrs.field(factory=dict)
    ownership: str = ""
    tracker: str = ""
    blocked_reasons: tuple[str, ...] = ()
    failed_notifiers: tuple[str, ...] = ()

    @property
    def ram(self) -> TransferInfo:
        """The counters of RAM."""
        return self.transfers.get("ram", TransferInfo())

    def as_qmp(self) -> dict[str, Any]:
        """What query-migrate returns (wire format, section 10.4)."""
        answer: dict[str, Any] = {}
        if self.blocked_reasons:
            answer["blocked-reasons"] = list(self.blocked_reasons)
        if self.status is MigrationStatus.NONE:
            return answer
        answer["status"] = str(self.status)
        if self.error:
            answer["error-desc"] = self.error
        if self.status in (MigrationStatus.SETUP, MigrationStatus.CANCELLED, MigrationStatus.FAILED):
            return answer
        for name in ("setup_time", "total_time", "downtime", "expected_downtime"):
            value = getattr(self, name)
            if value is not None:
                answer[name.replace("_", "-")] = value
        completed = self.status is MigrationStatus.COMPLETED
        for key, transfer in self.transfers.items():
            if not (completed and key == "disk"):
                answer[key] = transfer.as_qmp(completed=completed)
        if self.cpu_throttle:
            answer["cpu-throttle-percentage"] = self.cpu_throttle
        return {**{name: dict(members) for name, members in self.details.items()}, **answer}

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON (`--json`)."""
        return {
            **self.as_qmp(),
            "rounds": self.rounds,
            "bandwidth": self.bandwidth,
            "dirty-rate": self.dirty_rate,
            "stalled": self.stalled,
            "stalls": self.stalls,
            "first-forecast": self._forecast(self.first_forecast),
            "forecast": self._forecast(self.forecast),
            "switchover": {
                "decision": self.decision,
                "expected-downtime": self.switchover_expected,
                "downtime-limit": self.switchover_limit,
            },
            "ownership": self.ownership,
            "dirty-tracker": self.tracker,
            "downtime-exact": self.downtime_exact,
            "downtime-split": dict(self.downtime_split),
            "error-code": self.error_code,
            "failed-notifiers": list(self.failed_notifiers),
        }

    def _forecast(self, made: Forecast | None) -> dict[str, Any] | None:
        """A forecast in milliseconds, and by how much what came was more, once that is known."""
        if made is None:
            return None
        told: dict[str, Any] = {
            "round": made.number,
            "total-time": made.total_time * 1000,
            "downtime": made.downtime * 1000,
        }
        if self.downtime_exact is not None and self.total_time is not None:
            told["total-time-error"] = self.total_time - told["total-time"]
            told["downtime-error"] = self.downtime_exact - told["downtime"]
        return told


class Statistics:
    """Measures one outgoing migration. `sent()` is the stream's length so far; times are the clock's seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent: Callable[[], int] = lambda: 0
        self._beside: Callable[[], int] = lambda: 0
        self._details: Callable[[], Details] = dict
        self._round_trip: Callable[[], float] = lambda: 0.0
        self._round_trips = 0
        self._stopping: Callable[[], float] = lambda: 0.0
        self._progress: dict[str, Progress] = {}
        self._began = clock()
        self._setup_ended: float | None = None
        self._ended: float | None = None
        self._stopped: float | None = None
        self._resumed: float | None = None
        self._stopped_sent = 0
        self._window_began = self._began
        self._window_sent = 0
        self._window_pages = 0
        self._round_began = self._began
        self._round_sent = 0
        self._round_synced = 0
        self._held_back = False  # the round that goes on
        self._link = LinkSpeed()
        self._marked = self._began
        self._split: dict[str, float] = {}
        self._forecasts: tuple[Forecast | None, Forecast | None] = (None, None)
        self._dirty_rate = 0.0
        self._last: Round | None = None
        self.syncs = 0
        self.rounds = 0
        self.stalled = False
        self.stalls = 0
        self.decision = ""
        self.expected_downtime: float | None = None
        self._mbps = 0.0
        self._pages_per_second = 0
        self._dirty_pages_rate = 0

    # -------------------------------------------------------------------------------- written as it goes

    def setup_ended(
        self,
        sent: Callable[[], int],
        progress: Mapping[str, Progress],
        *,
        details: Callable[[], Details] = dict,
        round_trip: Callable[[], float] = lambda: 0.0,
        round_trips: int = 0,
        stopping: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """START sections are out; `progress` is by statistics key, `details` asks the handlers for theirs.

        `round_trip()` is how long an answer takes in seconds, `round_trips` how many the switchover waits for,
        `stopping()` how long the guest may take to come to where it can stop.
        """
        self._sent, self._progress, self._details = sent, dict(progress), details
        self._round_trip, self._round_trips, self._stopping = round_trip, round_trips, stopping
        self._setup_ended = self._round_began = self._window_began = self._clock()
        self._round_sent = self._window_sent = self._all_sent()

    def sends_beside(self, count: Callable[[], int]) -> None:
        """`count()` tells the bytes that have gone beside the stream so far (multifd). Before `setup_ended`."""
        self._beside = count

    def synced(self) -> None:
        """The dirty marks were read."""
        self.syncs += 1

    def tick(self) -> None:
        """Close the measuring window if it is full; called between slices."""
        now = self._clock()
        span = now - self._window_began
        if span < WINDOW:
            return
        sent, pages = self._all_sent(), self._pages()
        self._mbps = (sent - self._window_sent) * 8 / span / 1e6
        self._pages_per_second = int((pages - self._window_pages) / span)
        if self.rounds == 0:
            # Until the first round has given a measured figure the window's own is the best there is.
            self._link.average = (sent - self._window_sent) / span
        self._window_began, self._window_sent, self._window_pages = now, sent, pages

    def held_back(self) -> None:
        """Sending had to wait for its bandwidth, and goes on now."""
        self._held_back = True

    def round_sent(self) -> tuple[int, float]:
        """A round's bytes have arrived: measure them. Returns its bytes and seconds."""
        now, sent = self._clock(), self._all_sent()
        span, size = max(now - self._round_began, 1e-6), sent - self._round_sent
        self._link.sent(size, span, held_back=self._held_back)
        self._held_back = False
        return size, span

    def burst(self, size: int, span: float) -> None:
        """In the round that was sent `size` bytes went between two waits, and had arrived after `span` seconds."""
        self._link.burst(size, span)

    def round_ended(self, *, total: int, previous: int, remaining: int, size: int, span: float, limit: float,
                    switchover_bandwidth: int) -> Round:  # fmt: skip
        """The sync behind a round found `remaining` bytes dirty: what is known now."""
        now = self._clock()
        synced = sum(progress.synced_dirty for progress in self._progress.values())
        self._dirty_rate = (synced - self._round_synced) / span
        page_size = max((p.page_size for p in self._progress.values()), default=4096)
        self._dirty_pages_rate = int(self._dirty_rate / page_size)
        self.rounds += 1
        if self.rounds > 1:
            self._link.handled(previous, span)
        fixed = self._stopping() + self._round_trips * self._round_trip()
        told = switchover_bandwidth
        self.expected_downtime = fixed + (remaining / told if told else self._link.seconds_for(remaining))
        self._round_began, self._round_sent, self._round_synced = now, self._all_sent(), synced
        self._last = Round(
            number=self.rounds,
            seconds=span,
            sent_bytes=size,
            remaining=remaining,
            previous_remaining=previous,
            total=total,
            bandwidth=self.bandwidth,
            dirty_rate=self._dirty_rate,
            expected_downtime=self.expected_downtime,
            downtime_limit=limit,
            fixed_downtime=fixed,
        )
        return self._last

    def forecast_made(self, forecast: Forecast | None) -> None:
        """What is foreseen behind a round; None if nothing is."""
        first, _ = self._forecasts
        self._forecasts = (forecast if self.rounds <= FIRST_FORECAST else first, forecast)

    def guest_stopped(self) -> None:
        """The blackout begins."""
        self._stopped, self._stopped_sent = self._clock(), self._sent()
        self._marked = self._stopped

    def mark(self, cause: Cause) -> None:
        """The blackout since the last mark, or since it began, was for `cause`."""
        now = self._clock()
        self._split[str(cause)] = self._split.get(cause, 0.0) + now - self._marked
        self._marked = now

    def guest_resumed(self) -> None:
        """The blackout is over, wherever the guest runs now."""
        self.mark(Cause.START)
        self._resumed = self._marked

    def ended(self) -> None:
        """Nothing more will happen."""
        self._ended = self._clock()

    def _all_sent(self) -> int:
        return self._sent() + self._beside()

    def _pages(self) -> int:
        whole = sum(progress.normal + progress.duplicate for progress in self._progress.values())
        # Pages that went in another form are counted by who made it (xbzrle-cache, compression).
        encoded = [members.get("pages") for members in self._details().values()]
        return whole + sum(count for count in encoded if isinstance(count, int))

    # --------------------------------------------------------------------------------- read at any time

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the last round that says something, its waits for `max-bandwidth` included."""
        return self._link.average

    def elapsed(self) -> float:
        """Seconds since the beginning, up to the end."""
        return (self._clock() if self._ended is None else self._ended) - self._began

    @property
    def downtime(self) -> float | None:
        """The blackout in seconds, once it is over."""
        if self._stopped is None or self._resumed is None:
            return None
        return self._resumed - self._stopped

    def info(self, status: MigrationStatus, **more: Any) -> MigrationInfo:
        """A copy of everything as it stands."""
        completed = status is MigrationStatus.COMPLETED
        now = self._clock() if self._ended is None else self._ended
        seconds = max(now - (self._setup_ended or self._began), 1e-6)
        downtime = self.downtime if completed else None
        expected = None if completed or self.expected_downtime is None else self.expected_downtime
        decided = self._last if self.decision else None
        return MigrationInfo(
            status=status,
            setup_time=None if self._setup_ended is None else round((self._setup_ended - self._began) * 1000),
            total_time=round((now - self._began) * 1000),
            downtime=None if downtime is None else round(downtime * 1000),
            downtime_exact=None if downtime is None else downtime * 1000,
            downtime_split={} if downtime is None else {cause: span * 1000 for cause, span in [*self._split.items()]},
            expected_downtime=_milliseconds(expected),
            transfers={key: self._transfer(key, p, seconds, completed) for key, p in self._progress.items()},
            details=self._details(),
            rounds=self.rounds,
            bandwidth=self.bandwidth,
            dirty_rate=self._dirty_rate,
            stalled=self.stalled,
            stalls=self.stalls,
            first_forecast=self._forecasts[0],
            forecast=self._forecasts[1],
            decision=self.decision,
            switchover_expected=None if decided is None else min(decided.expected_downtime, LONGEST) * 1000,
            switchover_limit=None if decided is None else decided.downtime_limit * 1000,
            tracker=next((p.tracker for p in self._progress.values() if p.tracker), ""),
            **more,
        )

    def _transfer(self, key: str, progress: Progress, seconds: float, completed: bool) -> TransferInfo:
        if key != "ram":
            # A QEMU counts no more of it.
            return TransferInfo(
                total=progress.total, transferred=progress.transferred, remaining=progress.remaining, page_size=0
            )
        stream, beside = self._sent(), self._beside()
        downtime_bytes = stream - self._stopped_sent if self._stopped is not None else 0
        return TransferInfo(
            total=progress.total,
            transferred=stream + beside,
            remaining=progress.remaining,
            duplicate=progress.duplicate,
            normal=progress.normal,
            page_size=progress.page_size,
            mbps=(stream + beside) * 8 / seconds / 1e6 if completed else self._mbps,
            dirty_pages_rate=self._dirty_pages_rate,
            dirty_sync_count=self.syncs,
            multifd_bytes=beside,
            pages_per_second=self._pages_per_second,
            precopy_bytes=stream - downtime_bytes,
            downtime_bytes=downtime_bytes,
        )


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(min(seconds, LONGEST) * 1000)
