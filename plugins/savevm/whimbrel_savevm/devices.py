"""The `devices` plugin: every device of a machine as one FULL section, through its declared description."""

from __future__ import annotations

from collections.abc import Sequence

from whimbrel.abc import SaveVMHandler, SaveVMSpec
from whimbrel.hookspecs import hookimpl
from whimbrel.machine import BareMachine
from whimbrel.migration import VMStateHandler


@hookimpl
def whimbrel_savevm_handlers(machine: BareMachine) -> Sequence[SaveVMSpec]:
    """Offer a handler for each device of `machine`."""

    def create() -> list[SaveVMHandler]:
        return [
            VMStateHandler(device.name, device.obj, device.description, instance_id=device.instance_id)
            for device in machine.devices
        ]

    return [SaveVMSpec(name="devices", summary="declared devices, one section each", create=create)]
