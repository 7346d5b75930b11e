"""The `globalstate` section: in which run state the source was, so that the destination goes on in it.

Layout as QEMU's (wire format, section 7.5): a length, then 100 bytes with the name, padded with NULs.
"""

from __future__ import annotations

from typing import Final, Protocol

import attrs

from whimbrel import vmstate
from whimbrel.errors import IncompatibleError
from whimbrel.machine import RunState
from whimbrel.migration.vmstate_handler import VMStateHandler

IDSTR: Final = "globalstate"
_SIZE: Final = 100
_LAST: Final = -(1 << 30)  # behind every device

# In which state a machine goes on, by the state it was in when it stopped; any other is refused.
_GOES_ON: Final = {RunState.RUNNING: RunState.RUNNING, RunState.PAUSED: RunState.PAUSED}


@attrs.define
class GlobalState:
    """The section's values: `size` counts the name and its NUL."""

    size: int = 0
    runstate: bytes = bytes(_SIZE)


def _check(state: GlobalState, _version: int) -> None:
    name = state.runstate[: max(0, state.size - 1)]
    if state.runstate[len(name) :].strip(b"\0") or name not in {s.value.encode() for s in _GOES_ON}:
        raise IncompatibleError(
            f"the source was in run state {name!r}, expected one of {', '.join(sorted(_GOES_ON))}",
        )


DESCRIPTION: Final = vmstate.VMStateDescription(
    name=IDSTR,
    version_id=1,
    fields=[vmstate.uint32("size", low=1, high=_SIZE), vmstate.buffer("runstate", size=_SIZE)],
    post_load=_check,
)


class RunStateCarrier(Protocol):
    """What a source tells the run state that it was in when it stopped."""

    def set(self, run_state: RunState) -> None:
        """What to send."""


class GlobalStateHandler(VMStateHandler):
    """Carries the run state from `state` at the source to `run_state` at the destination."""

    def __init__(self) -> None:
        self.state = GlobalState()
        super().__init__(IDSTR, self.state, DESCRIPTION, priority=_LAST)

    def set(self, run_state: RunState) -> None:
        """What to send."""
        name = run_state.value.encode("ascii")
        self.state.size = len(name) + 1
        self.state.runstate = name.ljust(_SIZE, b"\0")

    @property
    def run_state(self) -> RunState:
        """What came, after `commit`."""
        return RunState(self.state.runstate[: self.state.size - 1].decode("ascii"))
