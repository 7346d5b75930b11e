"""A migration without bytes: the real rounds, pacer, statistics and judgement, over a link and a guest made of numbers.

Time passes only where something takes time, so a run is the same each time, and hours take milliseconds.
"""

from __future__ import annotations

import attrs

from whimbrel.abc import Progress
from whimbrel.migration.convergence import Convergence
from whimbrel.migration.echoes import Bursts, Echoes
from whimbrel.migration.rounds import Rounds
from whimbrel.migration.statistics import Statistics
from whimbrel.settings import Parameters
from whimbrel.stream import Pacer

PAGE = 4096
MIB = 1 << 20
CHUNK = 1 << 20  # bytes that the saver writes at once


@attrs.define
class Link:
    """Carries `speed` bytes per second; an answer takes `round_trip`; `buffer` bytes are taken before they go."""

    speed: float
    round_trip: float = 0.0005
    buffer: int = 4 * MIB


def steady(working_set, rate):
    """A guest that writes `rate` bytes per second all over `working_set` bytes."""
    return lambda began, ended: min(working_set, rate * (ended - began))


def saw(working_set, rates, period):
    """A guest whose rate changes from one of `rates` to the next every `period` seconds."""

    def written(began, ended):
        total, now = 0.0, began
        while now < ended:
            turn = int(now / period)
            until = min(ended, (turn + 1) * period)
            if until <= now:
                until = ended
            total += rates[turn % len(rates)] * (until - now)
            now = until
        return min(working_set, total)

    return written


def jumpy(working_set, rate, factors):
    """A guest of `rate`, times the next of `factors` with each sync."""
    calls = iter(range(1 << 30))
    return lambda began, ended: min(working_set, rate * factors[next(calls) % len(factors)] * (ended - began))


class World:
    """One migration. `run` makes rounds until the decision; a plugin's `choice` and `agreed` may be set."""

    def __init__(self, link, written, *, total=256 * MIB, throttle=None, way_back=True, **parameters):
        self.way_back = way_back
        self.link, self.written, self.total = link, written, total
        self.parameters = Parameters()
        self.parameters.update({"max_bandwidth": 0, **parameters})
        self.now = 1000.0
        self.sent = 0
        self.free_at = self.now  # when the link has carried all that it was given
        self.dirty = total
        self.synced_at = self.now
        self.rounds, self.events = [], []
        self.asked = []  # PINGs that are out: when they will be answered, and their value
        self.pings = []  # when each was sent
        self.echoes = Echoes(clock=lambda: self.now)
        self.progress = Progress(page_size=PAGE, total=total)
        self.statistics = Statistics(clock=lambda: self.now)
        self.statistics.setup_ended(
            lambda: self.sent, {"ram": self.progress}, round_trip=lambda: link.round_trip, round_trips=2
        )
        self.began = self.now
        self.convergence = Convergence(
            self.parameters,
            self.statistics,
            self.events.append,
            throttle and throttle(self.parameters),
            clock=lambda: self.now,
        )

    # ------------------------------------------------------------- what the rounds take for registry and saver

    def pending(self):
        return self.dirty

    def part(self, slice_):
        while self.dirty and not slice_.over():
            size = min(CHUNK, self.dirty, max(PAGE, slice_.bytes_left()))
            self.dirty -= size
            self.sent += size
            self.free_at = max(self.now, self.free_at) + size / self.link.speed
            self.now = max(self.now, self.free_at - self.link.buffer / self.link.speed)

    def sync(self):
        pages = int(min(self.written(self.synced_at - self.began, self.now - self.began), self.total)) // PAGE
        self.progress.synced_dirty += pages * PAGE
        self.dirty += pages * PAGE
        self.synced_at = self.now

    def drain(self):
        self.now = max(self.now, self.free_at) + self.link.round_trip

    def wait(self, seconds):
        self.now += seconds

    def ask(self, value):
        self.echoes.asked(value)
        self.pings.append(self.now)
        self.asked.append((max(self.now, self.free_at) + self.link.round_trip, value))

    def answered(self, value):
        """What an ear hears that is never late."""
        end = self.now
        while self.asked and self.asked[0][0] <= end:
            self.now, heard = self.asked.pop(0)
            self.echoes.came(heard)
        self.now = end
        return self.echoes.when(value)

    def __iter__(self):
        pacer = Pacer(
            limit=lambda: self.parameters.max_bandwidth,
            sent=lambda: self.sent,
            wait=self.wait,
            stopping=lambda: False,
            check=lambda: None,
            clock=lambda: self.now,
        )
        bursts = Bursts(
            pacer.sent, self.ask, self.answered, lambda: self.echoes.round_trip, clock=lambda: self.now
        ) if self.way_back else None  # fmt: skip
        return iter(
            Rounds(self, self, pacer, self.statistics, self.parameters, sync=self.sync, drain=self.drain, bursts=bursts)
        )

    def run(self, most=500, *, choice=None, agreed=True):
        """Go through rounds until the guest is to be stopped; True if it was to be within `most` rounds."""
        for round_ in self:
            self.rounds.append(round_)
            self.convergence.heard(round_)
            if self.convergence.decide(round_, choice=choice, agreed=agreed):
                return True
            if len(self.rounds) >= most:
                return False
            if not round_.remaining:
                self.wait(0.01)
        raise AssertionError("rounds have no end")

    @property
    def downtime(self):
        """What it takes in truth to send what the last round has left, and to hear of it, twice."""
        return self.rounds[-1].remaining / self.link.speed + 2 * self.link.round_trip

    @property
    def seconds(self):
        """What the migration takes in all, in truth."""
        return self.now - self.began + self.downtime

    def told(self, kind):
        """The events of a kind."""
        return [event for event in self.events if isinstance(event, kind)]
