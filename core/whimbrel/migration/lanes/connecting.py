"""Connects the lanes of an outgoing migration, and says beforehand why that cannot be."""

from __future__ import annotations

from typing import Final

from whimbrel.abc import Channel, Patience
from whimbrel.errors import ConnectError, WhimbrelError
from whimbrel.machine import BareMachine
from whimbrel.migration.lanes.bundle import Bundle
from whimbrel.migration.lanes.method import Method
from whimbrel.migration.security import Connector
from whimbrel.migration.uri import Destination
from whimbrel.plugins import PluginManager
from whimbrel.wire import multifd

BOTH_ENDS: Final = "both ends need capability multifd on and the same multifd-channels"


def uuid_of(machine: BareMachine) -> bytes:
    """What lanes say whose they are."""
    return bytes(multifd.UUID_SIZE) if machine.uuid is None else machine.uuid.bytes


def connect(
    connector: Connector, patience: Patience, *, lanes: int, uuid: bytes, token: bytes, bundle: Bundle
) -> list[Channel]:
    """Connect lanes, which are closed with `bundle`, and have each say what it is, with `token` if there is one.

    The main channel must have said so already: a QEMU 7.2 takes the first that connects for it. Raises ConnectError,
    ChannelError and MigrationCancelled.
    """
    channels = []
    for number in range(lanes):
        try:
            channel = connector.connect(patience)
        except ConnectError as exc:
            exc.message, exc.hint = f"lane {number} of {lanes}: {exc.message}", exc.hint or BOTH_ENDS
            raise
        bundle.add(channel)
        channel.send(multifd.encode_init(multifd.Init(uuid, number, token)))
        channels.append(channel)
    return channels


def problems_of(machine: BareMachine, destination: Destination, plugins: PluginManager) -> list[str]:
    """Why this machine cannot send pages over lanes, if that is switched on; one sentence each."""
    settings = machine.settings
    if not settings.capabilities.multifd:
        return []
    problems = missing_lanes(destination)
    try:
        method = Method.of(settings.parameters, plugins)
    except WhimbrelError as exc:
        return [*problems, str(exc)]
    if method.announced and not destination.duplex:
        problems.append(
            f"multifd-compression {method.name!r} needs a way back, for no QEMU has it and the destination must agree; "
            f"transport {destination.spec.name!r} has none"
        )
    if method.announced and machine.form().configuration is None:
        problems.append(f"multifd-compression {method.name!r} must be named in a configuration section, which this "
                        "machine's streams do not have")  # fmt: skip
    return problems


def missing_lanes(destination: Destination) -> list[str]:
    """Why there can be no lanes at this URI; one sentence each."""
    if destination.spec.several:
        return []
    return [f"capability multifd is on, and transport {destination.spec.name!r} makes one connection only"]
