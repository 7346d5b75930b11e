"""A machine that was taken out of a stream: its RAM in blocks, its devices as bytes.

It has no model of its devices, so it cannot run here; it can be looked into, stored and sent on. Its stream has the
form it came in, its devices in their order, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import Any, Self
from uuid import UUID

import attrs

from whimbrel.abc import Channel, Listener, SaveVMHandler, SectionKind, StreamReader, StreamWriter
from whimbrel.errors import MigrationRefused, StateError, StreamError, UnknownNameError
from whimbrel.machine import RunState
from whimbrel.migration import IncomingMigration, Machine
from whimbrel.migration.globalstate import RunStateCarrier
from whimbrel.migration.savevm import Registry
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.wire import fields
from whimbrel.wire.fields import DecodedDevice
from whimbrel.wire.form import Form
from whimbrel.wire.skeleton import SectionHeader
from whimbrel.wire.tail import DeviceSection

UNNAMED = "captured"  # a machine whose stream does not name it


@attrs.frozen(eq=False)
class CapturedDevice:
    """One device section: `body` is what the device's own code understands, `described` its entry in the description.

    `described` is None where the stream has no description.
    """

    header: SectionHeader
    body: bytes = attrs.field(repr=lambda body: f"<{len(body)} bytes>")
    described: Mapping[str, Any] | None = attrs.field(default=None, repr=False)

    @classmethod
    def of(cls, section: DeviceSection) -> Self:
        """The device of a section."""
        return cls(section.header, bytes(section.body), section.described)

    @property
    def name(self) -> str:
        """Its idstr."""
        return self.header.idstr

    def decode(self) -> DecodedDevice:
        """Its fields, by the description. Raises StreamError if there is none, or if it does not fit the bytes."""
        if self.described is None:
            raise StreamError(
                f"the stream has no description of {self.name!r}, so its {len(self.body)} bytes stay bytes"
            )
        return fields.decode(self.described, self.body)


class CapturedDevices(Sequence[CapturedDevice]):
    """The devices in the order of their sections; also by name, where the first of a name is meant."""

    def __init__(self, devices: Sequence[CapturedDevice] = ()) -> None:
        self._devices = tuple(devices)

    def named(self, name: str, instance_id: int | None = None) -> list[CapturedDevice]:
        """All devices of that name (two may have even the same instance id). Raises UnknownNameError for none."""
        found = [
            device
            for device in self._devices
            if device.name == name and instance_id in (None, device.header.instance_id)
        ]
        if not found:
            raise UnknownNameError("device", name, {device.name for device in self._devices})
        return found

    def __getitem__(self, key: Any) -> Any:
        """The device at an index, those of a slice, or the first one of a name."""
        return self.named(key)[0] if isinstance(key, str) else self._devices[key]

    def __iter__(self) -> Iterator[CapturedDevice]:
        return iter(self._devices)

    def __len__(self) -> int:
        return len(self._devices)


class CapturedMachine(Machine):
    """A machine out of a stream; made by `load`. Methods from any thread.

    `ram` is as in any machine, `captured` has its devices, `form()` tells what its stream looks like.
    """

    def __init__(
        self,
        name: str,
        form: Form,
        *,
        settings: Settings | None = None,
        plugins: PluginManager | None = None,
    ) -> None:
        uuid = form.configuration.uuid if form.configuration is not None else None
        super().__init__(name, settings=settings, plugins=plugins, uuid=None if uuid is None else UUID(bytes=uuid))
        self.captured = CapturedDevices()
        self.guessed = False
        """Whether the devices were told apart without a description and footers."""
        self._form = form

    @classmethod
    def load(
        cls,
        source: str | PathLike[str] | Channel | Listener,
        *,
        drives: Mapping[str, str | PathLike[str]] = MappingProxyType({}),
        create: bool = False,
        max_ram: int | None = None,
        settings: Settings | None = None,
        plugins: PluginManager | None = None,
    ) -> CapturedMachine:
        """Take a machine out of a file, or out of a channel, which is closed at the end, or wait for one at a listener.

        At a listener it comes over lanes too, if the capability multifd is on in `settings`.

        `drives` are the images that its drives go into, by the drives' names: they are there, and large enough, or made
        with `create`, as large as what comes. They are `drives` of the machine then, and go along with `block=True`.
        A stream that brings drives is refused without, before the first byte of anything is written.

        `max_ram` is how much RAM it may have, in bytes; half of the host's if None. A source that listens is told once
        everything is here, and lets go then. Raises ConfigError, ConnectError, ProtocolError or ChannelError,
        StateError for an image that is in use; nothing is left then but images that are marked as not whole, and the
        source goes on if it listens.
        """
        from whimbrel.capture.taking import take

        return take(source, drives=drives, create=create, max_ram=max_ram, settings=settings, plugins=plugins)

    def form(self) -> Form:
        """What its stream consists of: as it came."""
        return self._form

    def complete(self, devices: Sequence[DeviceSection], form: Form, *, guessed: bool = False) -> None:
        """Keep the devices, and the form as it is known now."""
        self.captured = CapturedDevices([CapturedDevice.of(section) for section in devices])
        self.guessed = guessed
        self._form = form

    def start(self) -> None:
        """Refused: there is no model of its devices here."""
        raise StateError("a captured machine cannot run here: there is no model of its devices", hint="send it on")

    def incoming(self, uri: str, *, start: bool | None = None) -> IncomingMigration:  # noqa: ARG002 - refused
        """Refused: it has its state already."""
        raise StateError("a captured machine has its state already", hint="take another one with CapturedMachine.load")

    def ram_handler(self, idstr: str) -> SaveVMHandler:
        """The handler that saves and loads its RAM, which a plugin offers. Raises MigrationRefused without one."""
        for handler in self._handlers():
            if handler.idstr == idstr:
                return handler
        raise MigrationRefused(
            f"no plugin offers a savevm handler for {idstr!r}", hint="[plugins] savevm says which are used"
        )

    def _handlers(self) -> list[SaveVMHandler]:
        specs = self.plugins.savevm_handlers(self, self.settings.plugins.savevm)
        return [handler for spec in specs for handler in spec.create()]

    def _leaving(self) -> tuple[Registry, RunStateCarrier]:
        from whimbrel.capture.walk import BLOCK, RAM

        devices = [_DeviceHandler(device, -number) for number, device in enumerate(self.captured)]
        rounds = [handler for handler in self._handlers() if handler.idstr in (RAM, BLOCK)]
        if RAM not in {handler.idstr for handler in rounds}:
            rounds.append(self.ram_handler(RAM))  # which says what is missing
        return Registry([*rounds, *devices]), _AsItCame()


class _AsItCame:
    """The run state is one of the captured devices, or the machine's type does not tell it."""

    def set(self, run_state: RunState) -> None:
        """It stays."""


class _DeviceHandler(SaveVMHandler):
    """Writes a captured device as it came."""

    def __init__(self, device: CapturedDevice, priority: int) -> None:
        self._device = device
        self.idstr, self.instance_id = device.header.idstr, device.header.instance_id
        self.version_id, self.priority = device.header.version_id, priority

    def save(self, out: StreamWriter) -> Mapping[str, Any] | None:
        """Write the bytes; the description goes out whole, as it came."""
        out.write(self._device.body)
        return self._device.described

    def load(self, reader: StreamReader, kind: SectionKind, version_id: int) -> None:  # noqa: ARG002 - refused
        """Never: a captured machine waits for none."""
        raise StreamError("a captured machine has its state already")
