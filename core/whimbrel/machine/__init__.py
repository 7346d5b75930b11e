"""What moves: `BareMachine` with its RAM, devices, drives, guest and run state, and the trackers of what it writes."""

from whimbrel.machine.devices import Device, Devices
from whimbrel.machine.drives import Drive, Drives, RawImage
from whimbrel.machine.guest import IdleGuest, LoopGuest
from whimbrel.machine.machine import BareMachine
from whimbrel.machine.ram import Ram, RamBlock
from whimbrel.machine.runstate import RunState

__all__ = [
    "BareMachine",
    "Device",
    "Devices",
    "Drive",
    "Drives",
    "IdleGuest",
    "LoopGuest",
    "Ram",
    "RamBlock",
    "RawImage",
    "RunState",
]
