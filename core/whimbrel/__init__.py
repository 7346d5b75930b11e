"""Live migration for Python: moves a running machine from one process to another, and speaks QEMU's stream.

    machine = whimbrel.Machine("heat")
    plate = machine.ram.array("plate", (8192, 8192), "float32")
    machine.guest = whimbrel.LoopGuest(step)
    machine.start()
    machine.migrate("tcp:127.0.0.1:4444").wait()

Everything that is meant for use is named here or lives in `abc`, `errors`, `events`, `hookspecs`, `settings`,
`vmstate`, `monitor` and `testing`. Nothing is defined in this file.
"""

from whimbrel import abc, errors, events, vmstate
from whimbrel.errors import MigrationCancelled, MigrationError, MigrationRefused, WhimbrelError
from whimbrel.hookspecs import hookimpl
from whimbrel.machine import IdleGuest, LoopGuest, RamBlock, RunState
from whimbrel.migration import (
    IncomingMigration,
    Machine,
    MigrationInfo,
    MigrationStatus,
    OutgoingMigration,
    TransferInfo,
)
from whimbrel.plugins import PluginManager
from whimbrel.settings import Capabilities, Parameters, Settings
from whimbrel.vmstate import VMStateDescription

__all__ = [
    "Capabilities",
    "IdleGuest",
    "IncomingMigration",
    "LoopGuest",
    "Machine",
    "MigrationCancelled",
    "MigrationError",
    "MigrationInfo",
    "MigrationRefused",
    "MigrationStatus",
    "OutgoingMigration",
    "Parameters",
    "PluginManager",
    "RamBlock",
    "RunState",
    "Settings",
    "TransferInfo",
    "VMStateDescription",
    "WhimbrelError",
    "abc",
    "errors",
    "events",
    "hookimpl",
    "vmstate",
]
