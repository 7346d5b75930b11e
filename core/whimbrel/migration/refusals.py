"""What speaks against a migration before anything is touched: blockers, what cannot work, what plugins object to."""

from __future__ import annotations

from whimbrel.abc import MigrationPlan
from whimbrel.errors import MigrationRefused
from whimbrel.machine import BareMachine
from whimbrel.machine.drives import Leaving
from whimbrel.migration.lanes import connecting
from whimbrel.migration.savevm import Registry
from whimbrel.migration.uri import Destination
from whimbrel.plugins import PluginManager


def refuse_if_impossible(machine: BareMachine, plugins: PluginManager, destination: Destination,
                         registry: Registry) -> None:  # fmt: skip
    """Raise MigrationRefused with everything that speaks against a migration; nothing has been touched."""
    problems = list(machine.blockers.reasons())
    if not destination.duplex:
        problems += destination.missed_way_back(machine.settings.capabilities)
    problems += connecting.problems_of(machine, destination, plugins)
    problems += _unsent_drives(machine, registry)
    problems += registry.problems()
    problems += plugins.check_migration(plan_of(machine, destination, registry))
    if problems:
        raise MigrationRefused("; ".join(problems))


def _unsent_drives(machine: BareMachine, registry: Registry) -> list[str]:
    """Drives that were to go along, and that no handler sends."""
    left_behind = machine.drives.leaving is not Leaving.NOTHING and machine.drives.writable
    if left_behind and all(handler.statistics_key != "disk" for _, handler in registry.iterable):
        return ["the drives are to go along, and there is no savevm handler for them: [plugins] savevm lacks 'block'"]
    return []


def plan_of(machine: BareMachine, destination: Destination, registry: Registry) -> MigrationPlan:
    """What is about to be done, for the checks."""
    settings = machine.settings
    return MigrationPlan(
        uri=destination.uri,
        scheme=destination.spec.name,
        duplex=destination.duplex,
        machine=machine.name,
        capabilities=frozenset(name for name, on in settings.capabilities.as_dict().items() if on),
        parameters=settings.parameters.as_dict(),
        ram={block.name: block.size for block in machine.ram},
        sections=registry.names(),
        codecs=_codecs_of(machine),
    )


def _codecs_of(machine: BareMachine) -> tuple[str, ...]:
    capabilities, compression = machine.settings.capabilities, machine.settings.parameters.multifd_compression
    if capabilities.multifd:  # by whose lanes all pages go
        return () if compression == "none" else (compression,)
    return ("xbzrle",) if capabilities.xbzrle else ()
