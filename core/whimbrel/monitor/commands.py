"""The commands of the monitor: what each takes, and what it does to a machine (the wire format, section 10.2).

Rules of this module:

* A handler is called on the thread of the client that asked, with nothing locked. Handlers of different clients run
  side by side; what has to be one step takes the machine's lock.
* It returns what the reply holds. `MonitorError` carries a class and QEMU's text; any other `WhimbrelError` becomes a
  GenericError with its own text, which is QEMU's wherever QEMU has one (section 10.3).
* Nothing has changed where an error is returned.
"""

from __future__ import annotations

import os
from typing import Any, Final

import attrs

from whimbrel.errors import ConfigError, MonitorError, StateError, UnknownNameError, WhimbrelError
from whimbrel.machine import RunState
from whimbrel.migration import IncomingMigration, Machine, MigrationInfo, MigrationStatus, OutgoingMigration
from whimbrel.migration.handover import DestinationOwnership
from whimbrel.migration.uri import resolve
from whimbrel.monitor import descriptors, protocol, tuning
from whimbrel.monitor.addresses import socket_address
from whimbrel.monitor.context import Context, Then
from whimbrel.monitor.schema import (
    ANY,
    BOOLEAN,
    INTEGER,
    NUMBER,
    STRING,
    Argument,
    Command,
    Enum,
    ListOf,
    Struct,
    table,
)
from whimbrel.settings import Capabilities, Parameters

__all__ = ["COMMANDS"]


# ------------------------------------------------------------------------------------------------- migration


def _migrate(context: Context, uri: str, *, blk: bool = False, inc: bool = False, detach: bool = False,
             resume: bool = False) -> dict[str, Any]:  # fmt: skip
    if resume:
        # There is no post-copy, so none can be paused.
        raise MonitorError("Cannot resume if there is no paused migration")
    if (blk or inc) and context.machine.settings.capabilities.block:
        raise MonitorError("Command options are incompatible with current migration capabilities")
    _refuse_programs(context, uri)
    try:
        # In QEMU too a number is none of the names that this takes.
        with context.descriptors.handed_over(uri, numbers=False) as handed:
            context.machine.migrate(handed, block=blk, incremental=inc)
    except ConfigError:
        if reason := _no_protocol(context.machine, uri):
            raise MonitorError(f"Parameter 'uri' expects a valid migration protocol: {reason}") from None
        raise
    return {}


def _migrate_incoming(context: Context, uri: str) -> dict[str, Any]:
    machine = context.machine
    _refuse_programs(context, uri)
    try:
        with context.descriptors.handed_over(uri, numbers=True) as handed:
            machine.incoming(handed)
    except StateError as exc:
        if _prepared(machine) is not None:
            raise MonitorError(
                "a machine that arrived whole waits for a decision here: x-whimbrel-adopt or x-whimbrel-discard"
            ) from None
        if machine.run_state in (RunState.PRELAUNCH, RunState.INMIGRATE):
            raise
        if isinstance(machine.migration, IncomingMigration):
            raise MonitorError("The incoming migration has already been started") from None
        raise MonitorError(f"'-incoming' was not specified on the command line: {exc}") from None
    except ConfigError:
        if reason := _no_protocol(machine, uri):
            raise MonitorError(f"unknown migration protocol: {uri}: {reason}") from None
        raise
    return {}


def _refuse_programs(context: Context, uri: str) -> None:
    """A monitor's client may not have a program run, unless whoever started this process said so."""
    try:
        spec = resolve(uri, context.machine.plugins).spec
    except WhimbrelError:
        return  # the machine says what is the matter with it
    if spec.runs_programs and not context.allow_exec:
        raise MonitorError(
            f"{spec.name}: runs a program on this host, which clients of this monitor may not have done; `whimbrel run "
            "--allow-exec` lets them, and so does MonitorServer(…, allow_exec=True)"
        )


def _no_protocol(machine: Machine, uri: str) -> str:
    """What is wrong with the scheme or the form of `uri`; empty if nothing is, whatever else may be."""
    try:
        resolve(uri, machine.plugins)
    except ConfigError as exc:
        return "" if isinstance(exc, UnknownNameError) and exc.kind != "transport" else str(exc)
    return ""


def _migrate_cancel(context: Context) -> dict[str, Any]:
    context.machine.cancel_migration()
    return {}


def _migrate_continue(context: Context, state: str) -> dict[str, Any]:
    migration = context.machine.migration
    outgoing = migration if isinstance(migration, OutgoingMigration) else None
    now = MigrationStatus.NONE if outgoing is None else outgoing.status
    if outgoing is None or state != now:
        raise MonitorError(f"Migration not in expected state: {now}")
    outgoing.proceed()
    return {}


def _migrate_pause(context: Context) -> dict[str, Any]:
    raise MonitorError("migrate-pause is currently only supported during postcopy-active state")


def _migrate_recover(context: Context, uri: str) -> dict[str, Any]:
    raise MonitorError("Migrate recover can only be run when postcopy is paused.")


def _migrate_start_postcopy(context: Context) -> dict[str, Any]:
    raise MonitorError("Enable postcopy with migrate_set_capability before the start of migration")


def _info(machine: Machine) -> MigrationInfo:
    migration = machine.migration
    info = MigrationInfo(status=MigrationStatus.NONE) if migration is None else migration.info
    return attrs.evolve(info, blocked_reasons=machine.blockers.reasons())


def _listening(machine: Machine) -> dict[str, Any]:
    """Where a machine is waited for, as long as one is."""
    migration = machine.migration
    if not isinstance(migration, IncomingMigration) or migration.status.finished:
        return {}
    address = socket_address(migration.uri)
    return {} if address is None else {"socket-address": [address]}


def _query_migrate(context: Context) -> dict[str, Any]:
    info = _info(context.machine)
    if info.status is MigrationStatus.SETUP and isinstance(context.machine.migration, IncomingMigration):
        # A QEMU tells of setup in its event, and no status before somebody has connected.
        info = attrs.evolve(info, status=MigrationStatus.NONE)
    answer = {**_listening(context.machine), **info.as_qmp()}
    if "ram" in answer and info.downtime is None:
        # There while a machine is sent, whatever is known: a QEMU tells the limit until it has measured.
        answer.setdefault("expected-downtime", context.machine.settings.parameters.downtime_limit)
    return answer


# ------------------------------------------------------------------------------------------------ the machine


def _query_status(context: Context) -> dict[str, Any]:
    state = context.machine.run_state
    return {"running": state is RunState.RUNNING, "singlestep": False, "status": state}


def _stop(context: Context) -> dict[str, Any]:
    if context.machine.run_state is RunState.INMIGRATE:
        raise MonitorError(
            "Guest is waiting for an incoming migration: it does not run, and goes on as it did at the source"
        )
    # One that has not begun stays so, as in QEMU: it may still become a destination.
    if context.machine.run_state is not RunState.PRELAUNCH:
        context.machine.stop()
    return {}


def _cont(context: Context) -> dict[str, Any]:
    machine = context.machine
    with machine.lock:
        if machine.run_state is RunState.INMIGRATE:
            if _prepared(machine) is not None:
                raise MonitorError(
                    "a machine that arrived whole waits for a decision here: x-whimbrel-adopt if the source does not "
                    "run and never will, x-whimbrel-discard if the source has the machine"
                )
            raise MonitorError(
                "Guest is waiting for an incoming migration: it goes on as it did at the source once it is here"
            )
        if machine.run_state is RunState.POSTMIGRATE:
            raise MonitorError(
                "the machine was handed over and never runs here again by itself; if you know that no other copy "
                "runs or ever will, x-whimbrel-reclaim and then cont"
            )
        machine.start()
    return {}


def _prepared(machine: Machine) -> IncomingMigration | None:
    """The arrival that holds a whole machine and has no order to start it, if there is one."""
    migration = machine.migration
    if not isinstance(migration, IncomingMigration):
        return None
    return migration if migration.ownership is DestinationOwnership.PREPARED else None


def _to_decide(machine: Machine) -> IncomingMigration:
    # Without the machine's lock: a decision may wait for the arrival's thread, which takes it.
    prepared = _prepared(machine)
    if prepared is None:
        raise MonitorError("no machine that has arrived here waits for a decision")
    return prepared


def _reclaim(context: Context) -> dict[str, Any]:
    context.machine.reclaim()
    return {}


def _adopt(context: Context) -> dict[str, Any]:
    _to_decide(context.machine).adopt()
    return {}


def _discard(context: Context) -> dict[str, Any]:
    _to_decide(context.machine).discard()
    return {}


def _quit(context: Context) -> Then:
    if context.quit is None:
        raise MonitorError("the program around this machine does not end at a monitor's word")
    return Then({}, context.quit)


def _x_info(context: Context) -> dict[str, Any]:
    machine, migration = context.machine, context.machine.migration
    role = "" if migration is None else "source" if isinstance(migration, OutgoingMigration) else "destination"
    info = _info(machine)
    return {
        **_listening(machine),
        **info.as_dict(),
        "status": info.status,
        "role": role,
        "uri": "" if migration is None else migration.uri,
        "name": machine.name,
        "run-state": machine.run_state,
        "owner": machine.owner,
        "epoch": machine.epoch,
        "journal": "" if machine.journal.path is None else str(machine.journal.path),
        "failure": "" if machine.failure is None else str(machine.failure),
        "tracker": info.tracker,
        "pid": os.getpid(),
    }


def _query_commands(context: Context) -> list[dict[str, Any]]:
    return [{"name": name} for name in COMMANDS]


def _query_version(context: Context) -> dict[str, Any]:
    return protocol.version()


def _query_name(context: Context) -> dict[str, Any]:
    return {"name": context.machine.name}


def _query_block(context: Context) -> list[dict[str, Any]]:
    return []


def _capabilities(context: Context, enable: list[str] | None = None) -> dict[str, Any]:
    # A session takes it itself before any other command, and never calls this.
    raise MonitorError(
        "Capabilities negotiation is already complete, command ignored", error_class=protocol.COMMAND_NOT_FOUND
    )


_URI: Final = Argument("uri", STRING)
_FDNAME: Final = Argument("fdname", STRING)
_FLAGS: Final = [Argument(name, BOOLEAN, optional=True) for name in ("blk", "inc", "detach", "resume")]
_MIGRATION_STATUS: Final = Enum(
    "MigrationStatus",
    (
        *("none", "setup", "cancelling", "cancelled", "active", "postcopy-active", "postcopy-paused"),
        *("postcopy-recover", "completed", "failed", "colo", "pre-switchover", "device", "wait-unplug"),
    ),
)
_CAPABILITY: Final = Struct(
    "object", (Argument("capability", Enum("MigrationCapability", tuple(Capabilities()))), Argument("state", BOOLEAN))
)
_PARAMETERS: Final = [Argument(name, ANY, optional=True) for name in (*Parameters(), *Parameters.refused)]

COMMANDS: Final = table(
    [
        Command(
            "qmp_capabilities",
            _capabilities,
            [Argument("enable", ListOf(Enum("QMPCapability", ("oob",))), optional=True)],
        ),
        Command("migrate", _migrate, [_URI, *_FLAGS]),
        Command("migrate-incoming", _migrate_incoming, [_URI]),
        Command("migrate_cancel", _migrate_cancel),
        Command("migrate-continue", _migrate_continue, [Argument("state", _MIGRATION_STATUS)]),
        Command("migrate-pause", _migrate_pause),
        Command("migrate-recover", _migrate_recover, [_URI]),
        Command("migrate-start-postcopy", _migrate_start_postcopy),
        Command("migrate-set-capabilities", tuning.set_capabilities, [Argument("capabilities", ListOf(_CAPABILITY))]),
        Command("query-migrate-capabilities", tuning.query_capabilities),
        Command("migrate-set-parameters", tuning.set_parameters, _PARAMETERS),
        Command("query-migrate-parameters", tuning.query_parameters),
        Command("query-migrate", _query_migrate),
        Command("migrate_set_speed", tuning.set_speed, [Argument("value", INTEGER)]),
        Command("migrate_set_downtime", tuning.set_downtime, [Argument("value", NUMBER)]),
        Command("migrate-set-cache-size", tuning.set_cache_size, [Argument("value", INTEGER)]),
        Command("query-migrate-cache-size", tuning.query_cache_size),
        Command("getfd", descriptors.getfd, [_FDNAME]),
        Command("closefd", descriptors.closefd, [_FDNAME]),
        Command("query-status", _query_status),
        Command("stop", _stop),
        Command("cont", _cont),
        Command("quit", _quit),
        Command("query-version", _query_version),
        Command("query-commands", _query_commands),
        Command("query-name", _query_name),
        Command("query-block", _query_block),
        Command("x-whimbrel-reclaim", _reclaim),
        Command("x-whimbrel-adopt", _adopt),
        Command("x-whimbrel-discard", _discard),
        Command("x-whimbrel-info", _x_info),
    ]
)
"""Every command, by name."""
