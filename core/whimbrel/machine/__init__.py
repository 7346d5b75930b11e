"""What moves: `BareMachine` with its RAM, devices, drives, guest and run state, and the trackers of what it writes."""

from whimbrel.machine.devices import Device, Devices
from whimbrel.machine.drives import Drive, Drives, RawImage
from whimbrel.machine.guest import IdleGuest, LoopGuest
from whimbrel.machine.machine import BareMachine
from whimbrel.machine.process import GuestMemory, ProcessGuest
from whimbrel.machine.ram import Ram, RamBlock
from whimbrel.machine.runstate import RunState

__all__ = [
    "BareMachine",
    "Device",
    "Devices",
    "Drive",
    "Drives",
    "GuestMemory",
    "IdleGuest",
    "LoopGuest",
    "ProcessGuest",
    "Ram",
    "RamBlock",
    "RawImage",
    "RunState",
]
