"""When to stop the guest: the core's own rule (`whimbrel_choose_switchover` comes first).

QEMU stops at the first moment the remainder fits the downtime limit, so that even an idle guest pays most of the
limit. Here the rounds go on while each still shrinks the remainder markedly, and the guest is stopped at the minimum.
"""

from __future__ import annotations

from typing import Final

from whimbrel.events import Round

SHRINKING: Final = 0.75  # a round that leaves less than this share of what the one before left was worth it
NEGLIGIBLE: Final = 0.002  # seconds: a remainder that takes less than this to send is not worth another round


def should_switch(round_: Round) -> bool:
    """Whether to stop the guest after `round_`.

    Never while the expected downtime exceeds the limit. The remainder falls by a quarter at least with every round
    that is added, so their number is bounded.
    """
    if round_.expected_downtime > round_.downtime_limit:
        return False
    if round_.expected_downtime <= NEGLIGIBLE:
        return True
    return round_.remaining > SHRINKING * round_.previous_remaining
