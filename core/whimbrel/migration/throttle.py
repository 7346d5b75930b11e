"""Auto-converge: the rule by which a guest that writes faster than the link carries is slowed down (QEMU's).

A round counts against the guest if it wrote more than `throttle-trigger-threshold` per cent of what the round sent. Two
such rounds, one behind the other or not, throttle it: by `cpu-throttle-initial` per cent at first, then by
`cpu-throttle-increment` more each time, up to `max-cpu-throttle`. With `cpu-throttle-tailslow` a step is no larger than
it takes to bring what is left of the guest's speed down to where its writing would just be at the threshold.

Not counted are the first round, which goes through memory that was never written, and rounds whose remainder fits the
limit: a guest that can be stopped as it is need not be slowed down. A QEMU counts in periods of a second at least; here
a round is the measure, as everywhere, and one that does not fit a limit of hundreds of milliseconds takes as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs

from whimbrel.events import Round
from whimbrel.settings import Parameters

AGAINST: Final = 2  # rounds that must count against the guest before each step


@attrs.define
class AutoConverge:
    """Throttles the guest of one migration through `apply(percent)`. Parameters are read anew for each step.

    On the migration thread; raises what `apply` raises.
    """

    _parameters: Parameters
    _apply: Callable[[int], object]
    percent: int = attrs.field(default=0, init=False)
    """How much of its time the guest is kept from running; any thread may read it."""
    _against: int = attrs.field(default=0, init=False)

    def heard(self, round_: Round) -> None:
        """Judge a round, and throttle the guest if it is time to."""
        sent, written = round_.sent_bytes, round_.dirty_rate * round_.seconds
        allowed = sent * self._parameters.throttle_trigger_threshold / 100
        if round_.number == 1 or round_.fits or written <= allowed:
            return
        self._against += 1
        if self._against >= AGAINST:
            self._against = 0
            self._throttle_to(self._next(allowed / written))

    def release(self) -> None:
        """Let the guest have all of its time again. Twice is fine."""
        self._throttle_to(0)

    def _next(self, share: float) -> int:
        """The next percentage; `share` is what may be written, as a share of what was."""
        parameters = self._parameters
        if not self.percent:
            return parameters.cpu_throttle_initial
        step = float(parameters.cpu_throttle_increment)
        if parameters.cpu_throttle_tailslow:
            step = min(step, (100 - self.percent) * (1 - share))
        # A step of less than one per cent would be none for ever.
        return min(self.percent + max(1, int(step)), parameters.max_cpu_throttle)

    def _throttle_to(self, percent: int) -> None:
        if percent != self.percent:
            self.percent = percent  # first: what raises may have throttled all the same, and must be released
            self._apply(percent)
