"""whimbrel's events as QMP has them (the wire format, section 10.5); most have no name there and are left out."""

from __future__ import annotations

import time
from typing import Any

from whimbrel.events import Event, GuestStarted, GuestStopped, RoundStarted, StateChanged
from whimbrel.migration import MigrationStatus
from whimbrel.monitor import protocol

__all__ = ["as_qmp", "shutdown"]


def as_qmp(event: Event, *, migration_events: bool) -> dict[str, Any] | None:
    """The QMP event that tells of `event`, or None.

    `migration_events` is the capability `events`, which MIGRATION and MIGRATION_PASS need; a destination's setup is
    told without it, as in QEMU.
    """
    match event:
        case GuestStopped():
            return protocol.event("STOP", event.timestamp)
        case GuestStarted():
            return protocol.event("RESUME", event.timestamp)
        case StateChanged(role=role, new=new):
            if migration_events or (role == "destination" and new == MigrationStatus.SETUP):
                return protocol.event("MIGRATION", event.timestamp, {"status": new})
        case RoundStarted(number=number):
            if migration_events:
                return protocol.event("MIGRATION_PASS", event.timestamp, {"pass": number})
    return None


def shutdown() -> dict[str, Any]:
    """The event of a quit that is being carried out."""
    return protocol.event("SHUTDOWN", time.time(), {"guest": False, "reason": "host-qmp-quit"})
