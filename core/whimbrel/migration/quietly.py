"""The end of a migration is gone through to its end, whatever a plugin does on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable

_log = logging.getLogger("whimbrel")


def quietly(action: Callable[[], object], what: str) -> None:
    """Do `action`, called `what` in the log; what it raises against its contract is logged and goes no further."""
    try:
        action()
    except BaseException:  # noqa: BLE001 - machine and status must come to rest, and the fault is not theirs
        _log.exception("%s broke its contract: it must not raise", what)
