"""Machines taken out of streams: captured, looked into, stored and sent on."""

from whimbrel.capture.machine import CapturedDevice, CapturedDevices, CapturedMachine
from whimbrel.capture.taking import CaptureUndecided
from whimbrel.wire.decoded import DecodedDevice, DecodedField, DecodedStruct
from whimbrel.wire.form import Form

__all__ = [
    "CaptureUndecided",
    "CapturedDevice",
    "CapturedDevices",
    "CapturedMachine",
    "DecodedDevice",
    "DecodedField",
    "DecodedStruct",
    "Form",
]
