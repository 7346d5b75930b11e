"""Declared device state in QEMU's vmstate layout: describe an object once; save, parse and apply it anywhere.

::

    from whimbrel import vmstate

    clock = vmstate.VMStateDescription("clock", 1, fields=[vmstate.uint64("step"), vmstate.float64("t")])
    body, entry = vmstate.save(clock, source)
    loaded = ...  # drive vmstate.parse(clock, 1, destination), a generator that asks for bytes
    undo = vmstate.apply(loaded, destination)

Bytes in, values out: nothing here knows a socket, a thread or a clock (wire format, section 7).
"""

from whimbrel.vmstate.applying import Undo, apply
from whimbrel.vmstate.description import VMStateDescription
from whimbrel.vmstate.fields import (
    MAXIMUM_BODY,
    MAXIMUM_ELEMENTS,
    BufferField,
    Field,
    NumberField,
    StructField,
    bool_,
    buffer,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    struct,
    uint8,
    uint16,
    uint32,
    uint64,
)
from whimbrel.vmstate.linting import lint
from whimbrel.vmstate.loading import CHUNK, Loaded, parse
from whimbrel.vmstate.objects import check_object
from whimbrel.vmstate.rules import MAXIMUM_NESTING
from whimbrel.vmstate.saving import save

__all__ = [
    "CHUNK",
    "MAXIMUM_BODY",
    "MAXIMUM_ELEMENTS",
    "MAXIMUM_NESTING",
    "BufferField",
    "Field",
    "Loaded",
    "NumberField",
    "StructField",
    "Undo",
    "VMStateDescription",
    "apply",
    "bool_",
    "buffer",
    "check_object",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "lint",
    "parse",
    "save",
    "struct",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]
