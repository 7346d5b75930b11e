"""The rounds of an outgoing migration: send what is dirty, learn what has become dirty meanwhile, and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from whimbrel.events import Round
from whimbrel.migration.echoes import Bursts
from whimbrel.migration.saver import StreamSaver
from whimbrel.migration.savevm import Registry
from whimbrel.migration.statistics import Statistics
from whimbrel.settings import Parameters
from whimbrel.stream import Pacer


class Rounds:
    """Sends rounds, one for each step of its iterator, which tells what each has done; never ends by itself.

    `sync` reads the dirty marks. `drain` returns when everything written so far has arrived, as far as that can be
    told: the time until then belongs to the round, so that the bandwidth is the link's own and the blackout has
    nothing to wait for but its own bytes. `bursts` times what goes in each window, or none without a way back;
    `within_rounds` says whether an echo in the middle of a round means that all before it is there. `waiting` is
    entered where the link alone is waited for. On the migration thread; raises what sending raises, and `pacer`'s
    reasons.
    """

    def __init__(
        self,
        registry: Registry,
        saver: StreamSaver,
        pacer: Pacer,
        statistics: Statistics,
        parameters: Parameters,
        *,
        sync: Callable[[], None],
        drain: Callable[[], None],
        bursts: Bursts | None = None,
        within_rounds: bool = True,
        waiting: AbstractContextManager[object] | None = None,
    ) -> None:
        self._registry, self._saver, self._pacer = registry, saver, pacer
        self._statistics, self._parameters = statistics, parameters
        self._bursts, self._within_rounds = bursts, within_rounds
        self._sync, self._drain, self._waiting = sync, drain, waiting or nullcontext()

    def __iter__(self) -> Iterator[Round]:
        total = remaining = self._registry.pending()
        while True:
            self._send()
            size, span = self._statistics.round_sent()
            previous = remaining
            self._measure()
            self._sync()
            remaining = self._registry.pending()
            yield self._statistics.round_ended(
                total=total,
                previous=previous,
                remaining=remaining,
                size=size,
                span=span,
                limit=self._parameters.downtime_limit / 1000,
                switchover_bandwidth=self._parameters.avail_switchover_bandwidth,
            )

    def _send(self) -> None:
        while self._registry.pending():
            pauses = self._pacer.pauses
            slice_ = self._pacer.next_slice()
            if self._pacer.pauses > pauses:
                self._statistics.held_back()
                if self._bursts is not None:
                    self._bursts.begin()
            with self._waiting:
                self._saver.part(slice_)
                if self._bursts is not None and self._within_rounds and slice_.bytes_left() <= 0:
                    self._bursts.end()
            self._statistics.tick()
        with self._waiting:
            if self._bursts is not None:
                self._bursts.end()
            self._drain()

    def _measure(self) -> None:
        for size, span in [] if self._bursts is None else self._bursts.measured():
            self._statistics.burst(size, span)
