"""When to stop the guest: the core's own rule (`whimbrel_choose_switchover` comes first).

QEMU stops at the first moment the remainder fits the downtime limit, so that even an idle guest pays most of the
limit. Here the limit is a limit and not a goal: the rounds go on while each still leaves markedly less than any before,
and the guest is stopped at about the minimum.

What is left need not fall steadily: it may be noisy, or go up and down like a saw. So a round is compared with the
least that any round has left, never with the one before, which may have been a peak. Waiting for the minimum to come
back has its end too: with every round that is waited for, a little more than the minimum will do.
"""

from __future__ import annotations

from typing import Final

import attrs

from whimbrel.events import Round

SHRINKING: Final = 0.75  # a round that leaves less than this share of the least so far was worth it
NEGLIGIBLE: Final = 0.002  # seconds: a remainder that takes less than this to send is not worth another round
TOLERANCE: Final = 1.25  # how much more than the least is about the least; to its power for every round waited for it


@attrs.define
class Switchover:
    """Decides behind each round of one migration whether to stop the guest. Hears every round, once. One thread."""

    _least: float | None = attrs.field(default=None, init=False)  # bytes that the best round so far has left
    _waited: int = attrs.field(default=0, init=False)  # rounds that were possible, and well above the least

    def due(self, round_: Round, *, whatever_the_limit: bool = False) -> bool:
        """Whether to stop the guest after `round_`; never while that does not fit the limit, unless told so.

        Among rounds that fit, the number of those that are added is bounded: each either leaves a quarter less than any
        before, or widens by a quarter what will do.
        """
        least = self._least if self._least is not None else round_.total
        self._least = min(least, round_.remaining)
        if not (round_.fits or whatever_the_limit):
            return False
        if round_.expected_downtime - round_.fixed_downtime <= NEGLIGIBLE:
            return True
        if round_.remaining < SHRINKING * least:
            return False
        if round_.remaining <= least * TOLERANCE ** (1 + self._waited):
            return True
        self._waited += 1
        return False
