"""Whether a migration comes to its end: told from round to round, never by a clock alone.

A *stall* is several rounds in a row that do not fit the downtime limit and leave hardly less than any before them. It
is said once when it begins, with what can be done, and once when it ends; by itself it changes nothing.

What then becomes of the migration is the operator's to say (`switchover-timeout`, `switchover-policy`). The time counts
from the end of the first round: how long all of memory takes says nothing about whether the guest lets it end. It is
looked at behind each round.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from copy import copy
from typing import Final

import attrs

from whimbrel.errors import NotConverged
from whimbrel.events import Converging, Event, Forecast, Round, RoundFinished, Stalled, SwitchoverForced
from whimbrel.migration.statistics import Statistics
from whimbrel.migration.switchover import Switchover
from whimbrel.migration.throttle import AutoConverge
from whimbrel.settings import Parameters
from whimbrel.units import format_rate, format_seconds

_log = logging.getLogger("whimbrel")

FRUITLESS: Final = 3  # rounds in a row that make a stall
HARDLY: Final = 0.9  # what leaves more than this share of the least before has hardly shrunk it
RECOVERED: Final = 0.75  # what leaves less than this share of it ends a stall
FARTHEST: Final = 100  # rounds that a forecast looks ahead


@attrs.define
class StallWatch:
    """Recognises a stall, and its end. Hears every round, once. One thread."""

    stalled: bool = attrs.field(default=False, init=False)
    _mark: float | None = attrs.field(default=None, init=False)  # bytes that the last fruitful round left
    _fruitless: int = attrs.field(default=0, init=False)

    def heard(self, round_: Round) -> bool:
        """Take a round in; True if a stall has just begun or ended."""
        mark = round_.total if self._mark is None else self._mark
        if round_.fits or round_.remaining < (RECOVERED if self.stalled else HARDLY) * mark:
            self._mark, self._fruitless = round_.remaining, 0
        else:
            self._mark, self._fruitless = mark, self._fruitless + 1
        before, self.stalled = self.stalled, self._fruitless >= (1 if self.stalled else FRUITLESS)
        return self.stalled != before


def forecast(round_: Round, rule: Switchover, elapsed: float) -> Forecast | None:
    """What the migration takes in all if the guest and the link go on as in `round_`; None if that has no end.

    Each further round is taken to shrink what is left as this one did, and `rule` (which is left as it is, and has not
    heard `round_` yet) to decide. `elapsed` is the migration's time so far in seconds.
    """
    if not round_.previous_remaining:
        ratio = pace = 0.0
    else:
        ratio = min(1.0, round_.remaining / round_.previous_remaining)
        pace = round_.seconds / round_.previous_remaining
    sending = round_.expected_downtime - round_.fixed_downtime
    if not math.isfinite(sending):
        return None
    share = sending / round_.remaining if round_.remaining else 0.0
    rule, ahead = copy(rule), round_
    for _ in range(FARTHEST):
        if rule.due(ahead):
            downtime = ahead.expected_downtime
            return Forecast(number=round_.number, total_time=elapsed + downtime, downtime=downtime)
        elapsed += ahead.remaining * pace
        left = int(ahead.remaining * ratio)
        ahead = attrs.evolve(
            ahead,
            number=ahead.number + 1,
            remaining=left,
            previous_remaining=ahead.remaining,
            expected_downtime=round_.fixed_downtime + left * share,
        )
    return None


class Convergence:
    """Judges the rounds of one outgoing migration: tells of them, throttles the guest, and says when to stop it.

    `tell` takes events; `throttle` is there with the capability `auto-converge`. Parameters are read anew for each
    round. On the migration thread.
    """

    def __init__(
        self,
        parameters: Parameters,
        statistics: Statistics,
        tell: Callable[[Event], object],
        throttle: AutoConverge | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parameters, self._statistics, self._tell, self._throttle = parameters, statistics, tell, throttle
        self._clock = clock
        self._rule = Switchover()
        self._watch = StallWatch()
        self._bulk_ended: float | None = None
        self._ended = 0.0  # when the last round did
        self._waits_said = False

    @property
    def cpu_throttle(self) -> int:
        """How much of its time the guest is kept from running, in per cent. Any thread."""
        return 0 if self._throttle is None else self._throttle.percent

    def heard(self, round_: Round) -> None:
        """Tell of a round that has ended, and of what it means. Raises what throttling the guest raises."""
        self._ended = self._clock()
        if self._bulk_ended is None:
            self._bulk_ended = self._ended
        expected = forecast(round_, self._rule, self._statistics.elapsed()) if round_.number > 1 else None
        self._statistics.forecast_made(expected)
        self._tell(RoundFinished(round=round_, forecast=expected))
        if self._watch.heard(round_):
            self._tell_of_stall(round_)
        if self._throttle is not None:
            self._throttle.heard(round_)

    def decide(self, round_: Round, *, choice: bool | None, agreed: bool) -> bool:
        """Whether to stop the guest behind `round_`, which was `heard`.

        `choice` is a plugin's, `agreed` whether the destination is ready for it. Raises NotConverged if it is time to
        give up.
        """
        overdue = self._overdue()
        policy = self._parameters.switchover_policy if overdue else "wait"
        due = self._rule.due(round_, whatever_the_limit=policy == "stop")
        if choice is not None:
            due = choice
        if due and agreed:
            self._tell_of_decision(round_, chosen=choice is not None)
            return True
        within_reach = agreed and choice is None and round_.fits  # it only waits for the minimum, which has an end
        if policy == "cancel" and not within_reach:
            raise NotConverged(
                f"the switchover was not possible for {format_seconds(self._parameters.switchover_timeout / 1000)}"
                f" (switchover-timeout): {'' if agreed else 'the destination has not agreed to it; '}"
                f"{_figures(round_)}",
                hint=f"the guest runs on here; {self._advice()}",
            )
        if overdue and not within_reach and not self._waits_said:
            self._waits_said = True
            _log.warning("switchover-timeout has passed, and the migration goes on: %s", _figures(round_))
        return False

    def release(self) -> None:
        """Let the guest have all of its time again. Twice is fine."""
        if self._throttle is not None:
            self._throttle.release()

    def _overdue(self) -> bool:
        timeout = self._parameters.switchover_timeout
        assert self._bulk_ended is not None, "a decision without a round"
        return bool(timeout) and self._ended - self._bulk_ended >= timeout / 1000

    def _tell_of_stall(self, round_: Round) -> None:
        self._statistics.stalled = self._watch.stalled
        if self._watch.stalled:
            self._statistics.stalls += 1
            _log.warning("the migration does not converge: %s; %s", _figures(round_), self._advice())
            self._tell(Stalled(round=round_))
        else:
            _log.info("the migration converges again: %s", _figures(round_))
            self._tell(Converging(round=round_))

    def _tell_of_decision(self, round_: Round, *, chosen: bool) -> None:
        if chosen:
            self._statistics.decision = "a plugin's choice"
        elif round_.fits:
            self._statistics.decision = "within the limit"
        else:
            self._statistics.decision = "forced"
            _log.warning("switchover-timeout has passed, and the guest is stopped: %s", _figures(round_))
            self._tell(SwitchoverForced(round=round_))

    def _advice(self) -> str:
        ways = ["raise downtime-limit"]
        if self._parameters.max_bandwidth:
            ways += ["raise max-bandwidth"]
        if self._throttle is None:
            ways += ["switch auto-converge on (before a migration)"]
        if not self._parameters.switchover_timeout:
            ways += ["set switchover-timeout with switchover-policy"]
        return "what helps: " + ", ".join(ways)


def _figures(round_: Round) -> str:
    """What is known behind a round, for people."""
    expected, fixed = round_.expected_downtime, round_.fixed_downtime
    however_little = (
        f", {format_seconds(fixed)} of it however little is left" if 2 * fixed > round_.downtime_limit else ""
    )
    return (
        f"the guest writes {format_rate(round_.dirty_rate)}, {format_rate(round_.bandwidth)} are sent, to stop it now "
        f"is expected to take {format_seconds(expected) if math.isfinite(expected) else 'for ever'} of "
        f"{format_seconds(round_.downtime_limit)} allowed{however_little}"
    )
