"""The devices of a machine: objects of the program's, each with a declared description of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs

from whimbrel.errors import ConfigError
from whimbrel.vmstate import VMStateDescription, check_object


@attrs.frozen(eq=False)
class Device:
    """One device: `obj` is the program's, `description` says what of it is state."""

    name: str
    obj: object
    description: VMStateDescription
    instance_id: int = 0


class Devices:
    """The devices of one machine, in the order they were added."""

    def __init__(self, check_may_change: Callable[[], None]) -> None:
        self._check_may_change = check_may_change
        self._devices: dict[tuple[str, int], Device] = {}

    def add(self, name: str, obj: object, description: VMStateDescription, instance_id: int = 0) -> Device:
        """Add a device. Raises ConfigError if the name is taken or `obj` does not fit `description`, StateError while
        the machine migrates; nothing is added then.
        """  # fmt: skip
        self._check_may_change()
        if not (name.isascii() and name.isprintable() and 1 <= len(name) <= 255):
            raise ConfigError(f"a device's name has 1 to 255 printable ASCII characters, got {name!r}")
        key = (name, instance_id)
        if key in self._devices:
            raise ConfigError(
                f"there is already a device {name!r} with instance id {instance_id}", hint="give it another instance_id"
            )
        check_object(description, obj)
        device = Device(name, obj, description, instance_id)
        self._devices[key] = device
        return device

    def __iter__(self) -> Iterator[Device]:
        return iter(list(self._devices.values()))

    def __len__(self) -> int:
        return len(self._devices)

    def __getitem__(self, name: str) -> Device:
        """The device of that name with instance id 0."""
        return self._devices[name, 0]
