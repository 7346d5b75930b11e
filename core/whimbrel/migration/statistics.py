"""What a migration measures of itself, and `MigrationInfo`, which is what it tells (QEMU's query-migrate).

The migration thread alone writes `Statistics`; any thread reads it through `info`, which copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from whimbrel.abc import Progress
from whimbrel.events import Round
from whimbrel.migration.status import MigrationStatus

WINDOW: Final = 0.1  # seconds over which mbps and pages-per-second are measured
MEASURABLE: Final = 1 << 16  # bytes a round must have sent for its bandwidth to mean something


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

    def as_qmp(self) -> dict[str, Any]:
        """The members under QEMU's names."""
        members = {name.replace("_", "-"): value for name, value in attrs.asdict(self).items()}
        return {**members, "normal-bytes": self.normal_bytes}


@attrs.frozen(kw_only=True)
class MigrationInfo:
    """How a migration stands or ended: the fields of QEMU's query-migrate. Times in milliseconds.

    `rounds` is how many times RAM was gone through before the guest was stopped, `bandwidth` the last measured one
    in bytes per second, `tracker` the dirty tracker at work, `failed_notifiers` those that raised and were muted.
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
    rounds: int = 0
    bandwidth: float = 0.0
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
                answer[key] = transfer.as_qmp()
        return answer

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON (`--json`)."""
        return {
            **self.as_qmp(),
            "rounds": self.rounds,
            "bandwidth": self.bandwidth,
            "ownership": self.ownership,
            "dirty-tracker": self.tracker,
            "downtime-exact": self.downtime_exact,
            "error-code": self.error_code,
            "failed-notifiers": list(self.failed_notifiers),
        }


class Statistics:
    """Measures one outgoing migration. `sent()` is the stream's length so far; times are the clock's seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent: Callable[[], int] = lambda: 0
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
        self.syncs = 0
        self.rounds = 0
        self.bandwidth = 0.0
        self.expected_downtime: float | None = None
        self._mbps = 0.0
        self._pages_per_second = 0
        self._dirty_pages_rate = 0

    # -------------------------------------------------------------------------------- written as it goes

    def setup_ended(self, sent: Callable[[], int], progress: Mapping[str, Progress]) -> None:
        """START sections are out; `progress` is by statistics key."""
        self._sent, self._progress = sent, dict(progress)
        self._setup_ended = self._round_began = self._window_began = self._clock()
        self._round_sent = self._window_sent = sent()

    def synced(self) -> None:
        """The dirty marks were read."""
        self.syncs += 1

    def tick(self) -> None:
        """Close the measuring window if it is full; called between slices."""
        now = self._clock()
        span = now - self._window_began
        if span < WINDOW:
            return
        sent, pages = self._sent(), self._pages()
        self._mbps = (sent - self._window_sent) * 8 / span / 1e6
        self._pages_per_second = int((pages - self._window_pages) / span)
        if self.rounds == 0:
            # Until the first round has given a measured figure the window's own is the best there is.
            self.bandwidth = (sent - self._window_sent) / span
        self._window_began, self._window_sent, self._window_pages = now, sent, pages

    def round_sent(self) -> tuple[int, float]:
        """A round's bytes have arrived: measure them. Returns its bytes and seconds."""
        now, sent = self._clock(), self._sent()
        span, size = max(now - self._round_began, 1e-6), sent - self._round_sent
        if size >= MEASURABLE or self.bandwidth == 0.0:
            self.bandwidth = size / span
        return size, span

    def round_ended(self, *, total: int, previous: int, remaining: int, size: int, span: float, limit: float,
                    switchover_bandwidth: int) -> Round:  # fmt: skip
        """The sync behind a round found `remaining` bytes dirty: what is known now."""
        now = self._clock()
        synced = sum(progress.synced_dirty for progress in self._progress.values())
        dirty_rate = (synced - self._round_synced) / span
        page_size = max((p.page_size for p in self._progress.values()), default=4096)
        self._dirty_pages_rate = int(dirty_rate / page_size)
        self.rounds += 1
        bandwidth = float(switchover_bandwidth) or self.bandwidth
        self.expected_downtime = remaining / bandwidth if bandwidth else float("inf") if remaining else 0.0
        self._round_began, self._round_sent, self._round_synced = now, self._sent(), synced
        return Round(
            number=self.rounds,
            seconds=span,
            sent_bytes=size,
            remaining=remaining,
            previous_remaining=previous,
            total=total,
            bandwidth=self.bandwidth,
            dirty_rate=dirty_rate,
            expected_downtime=self.expected_downtime,
            downtime_limit=limit,
        )

    def guest_stopped(self) -> None:
        """The blackout begins."""
        self._stopped, self._stopped_sent = self._clock(), self._sent()

    def guest_resumed(self) -> None:
        """The blackout is over, wherever the guest runs now."""
        self._resumed = self._clock()

    def ended(self) -> None:
        """Nothing more will happen."""
        self._ended = self._clock()

    def _pages(self) -> int:
        return sum(progress.normal + progress.duplicate for progress in self._progress.values())

    # --------------------------------------------------------------------------------- read at any time

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
        sent = self._sent()
        downtime = self.downtime if completed else None
        expected = None if completed or self.expected_downtime is None else self.expected_downtime
        return MigrationInfo(
            status=status,
            setup_time=None if self._setup_ended is None else round((self._setup_ended - self._began) * 1000),
            total_time=round((now - self._began) * 1000),
            downtime=None if downtime is None else round(downtime * 1000),
            downtime_exact=None if downtime is None else downtime * 1000,
            expected_downtime=_milliseconds(expected),
            transfers={key: self._transfer(key, p, sent, seconds, completed) for key, p in self._progress.items()},
            rounds=self.rounds,
            bandwidth=self.bandwidth,
            tracker=next((p.tracker for p in self._progress.values() if p.tracker), ""),
            **more,
        )

    def _transfer(self, key: str, progress: Progress, sent: int, seconds: float, completed: bool) -> TransferInfo:
        main = key == "ram"
        downtime_bytes = sent - self._stopped_sent if self._stopped is not None else 0
        return TransferInfo(
            total=progress.total,
            transferred=sent if main else progress.transferred,
            remaining=progress.remaining,
            duplicate=progress.duplicate,
            normal=progress.normal,
            page_size=progress.page_size,
            mbps=sent * 8 / seconds / 1e6 if completed else self._mbps,
            dirty_pages_rate=self._dirty_pages_rate,
            dirty_sync_count=self.syncs,
            pages_per_second=self._pages_per_second,
            precopy_bytes=sent - downtime_bytes if main else 0,
            downtime_bytes=downtime_bytes if main else 0,
        )


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(min(seconds, 1e9) * 1000)
