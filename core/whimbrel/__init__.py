"""Live migration for Python: moves a running machine from one process to another, and speaks QEMU's stream.

    machine = whimbrel.Machine("heat")
    plate = machine.ram.array("plate", (8192, 8192), "float32")
    machine.guest = whimbrel.LoopGuest(step)
    machine.start()
    machine.migrate("tcp:127.0.0.1:4444").wait()

Everything that is meant for use is named here or lives in `abc`, `errors`, `events`, `hookspecs`, `settings`,
`vmstate`, `monitor` and `testing`. A name is imported when it is first used: a program that only wants to say what is
wrong with its arguments should not wait for numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whimbrel import abc, errors, events, vmstate
    from whimbrel.capture import CapturedMachine
    from whimbrel.errors import MigrationCancelled, MigrationError, MigrationRefused, WhimbrelError
    from whimbrel.hookspecs import hookimpl
    from whimbrel.machine import GuestMemory, IdleGuest, LoopGuest, ProcessGuest, RamBlock, RunState
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

_HOMES = {
    "Capabilities": "settings",
    "CapturedMachine": "capture",
    "GuestMemory": "machine",
    "IdleGuest": "machine",
    "IncomingMigration": "migration",
    "LoopGuest": "machine",
    "Machine": "migration",
    "MigrationCancelled": "errors",
    "MigrationError": "errors",
    "MigrationInfo": "migration",
    "MigrationRefused": "errors",
    "MigrationStatus": "migration",
    "OutgoingMigration": "migration",
    "Parameters": "settings",
    "PluginManager": "plugins",
    "ProcessGuest": "machine",
    "RamBlock": "machine",
    "RunState": "machine",
    "Settings": "settings",
    "TransferInfo": "migration",
    "VMStateDescription": "vmstate",
    "WhimbrelError": "errors",
    "hookimpl": "hookspecs",
}

__all__ = [
    "Capabilities",
    "CapturedMachine",
    "GuestMemory",
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
    "ProcessGuest",
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


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value: object = getattr(import_module(f"whimbrel.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in __all__:
        return import_module(f"whimbrel.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
