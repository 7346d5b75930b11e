"""The commands for capabilities and parameters, among them the four that QEMU removed in 6.0."""

from __future__ import annotations

import sys
from typing import Any, Final

from whimbrel.errors import ConfigError, MonitorError
from whimbrel.migration import Machine, MigrationStatus, OutgoingMigration
from whimbrel.migration.lanes.method import check_method
from whimbrel.monitor.context import Context
from whimbrel.settings import Dialect

LONGEST_DOWNTIME: Final = 2000  # seconds
PAGE_SIZE: Final = 4096


def set_capabilities(context: Context, capabilities: list[dict[str, Any]]) -> dict[str, Any]:
    """migrate-set-capabilities: all or none, and none while a migration runs."""
    wanted = {one["capability"]: one["state"] for one in capabilities}
    # The lock keeps a migration from beginning in between: its capabilities are those of its start.
    with context.machine.lock:
        if _under_way(context.machine):
            raise MonitorError("There's a migration process in progress")
        context.machine.settings.capabilities.update(wanted, Dialect.QMP)
    return {}


def _under_way(machine: Machine) -> bool:
    migration = machine.migration
    if migration is None or migration.status.finished:
        return False
    # A destination that nobody has connected to may still be told what to expect.
    return isinstance(migration, OutgoingMigration) or migration.status is not MigrationStatus.SETUP


def query_capabilities(context: Context) -> list[dict[str, Any]]:
    """query-migrate-capabilities: all, in QEMU's order."""
    capabilities = context.machine.settings.capabilities.as_dict()
    return [{"state": state, "capability": name} for name, state in capabilities.items()]


def set_parameters(context: Context, **parameters: Any) -> dict[str, Any]:
    """migrate-set-parameters: all or none, at any time."""
    _check_method(context.machine, parameters.get("multifd_compression"))
    context.machine.settings.parameters.update(parameters, Dialect.QMP)
    return {}


def _check_method(machine: Machine, name: object) -> None:
    """Refuse a method that no plugin offers in QEMU's words, which are those of a type; what is no name comes later."""
    if isinstance(name, str):
        try:
            check_method(name, machine.plugins)
        except ConfigError as exc:
            raise MonitorError(exc.message) from exc


def query_parameters(context: Context) -> dict[str, Any]:
    """query-migrate-parameters: all."""
    return context.machine.settings.parameters.as_dict()


def set_speed(context: Context, value: int) -> dict[str, Any]:
    """migrate_set_speed: `value` in bytes per second; what is negative counts as 0, as in QEMU."""
    return set_parameters(context, max_bandwidth=max(value, 0))


def set_downtime(context: Context, value: float) -> dict[str, Any]:
    """migrate_set_downtime: `value` in seconds."""
    if not 0 <= value <= LONGEST_DOWNTIME:
        raise MonitorError(
            f"Parameter 'downtime_limit' expects an integer in the range of 0 to {LONGEST_DOWNTIME} seconds"
        )
    return set_parameters(context, downtime_limit=int(value * 1000))


def set_cache_size(context: Context, value: int) -> dict[str, Any]:
    """migrate-set-cache-size: `value` in bytes, rounded down to a power of two. Takes effect while a migration runs.

    Unlike the parameter, it is judged by the machine: the texts are those of the QEMUs that had this command.
    """
    if not 0 <= value <= sys.maxsize:
        raise MonitorError("Parameter 'cache size' expects exceeding address space")
    if value > context.machine.ram.total:
        raise MonitorError("Parameter 'cache size' expects exceeding guest ram size")
    if value < PAGE_SIZE:
        raise MonitorError("Parameter 'cache size' expects smaller than page size")
    return set_parameters(context, xbzrle_cache_size=1 << (value.bit_length() - 1))


def query_cache_size(context: Context) -> int:
    """query-migrate-cache-size: in bytes."""
    return context.machine.settings.parameters.xbzrle_cache_size
