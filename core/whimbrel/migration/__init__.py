"""The engine: moves a machine's handlers through rounds, and its ownership through the two-phase switch.

It knows handlers and channels by their contracts and none of them by name.
"""

from whimbrel.migration.incoming import IncomingMigration
from whimbrel.migration.machine import Machine
from whimbrel.migration.outgoing import OutgoingMigration
from whimbrel.migration.statistics import MigrationInfo, TransferInfo
from whimbrel.migration.status import MigrationStatus
from whimbrel.migration.vmstate_handler import VMStateHandler

__all__ = [
    "IncomingMigration",
    "Machine",
    "MigrationInfo",
    "MigrationStatus",
    "OutgoingMigration",
    "TransferInfo",
    "VMStateHandler",
]
