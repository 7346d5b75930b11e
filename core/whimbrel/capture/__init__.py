"""Machines taken out of streams: captured, looked into, stored and sent on."""

from whimbrel.capture.machine import CapturedDevice, CapturedDevices, CapturedMachine

__all__ = ["CapturedDevice", "CapturedDevices", "CapturedMachine"]
