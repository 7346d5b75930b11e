"""A device's body decoded by its description, to the last byte (wire format, sections 7.1 to 7.3).

The description says each field's type and size. Types whose layout is common knowledge become numbers; those that are
private to a device keep their bytes. Nothing is made that the body has no bytes for, whatever the description says.
"""

from __future__ import annotations

import struct as layouts
from typing import Final, NamedTuple

import attrs
import numpy as np

from whimbrel.errors import Place, StreamError
from whimbrel.wire.decoded import DecodedDevice, DecodedField, DecodedStruct, Value
from whimbrel.wire.described import (
    NESTING_MAX,
    Described,
    fields_of,
    index_of,
    instance_of,
    length_of,
    name_of,
    size_of,
    struct_of,
    subsection_head,
    subsections_of,
    type_of,
    version_of,
    vmsd_name_of,
)

__all__ = ["NODES_MAX", "DecodedDevice", "DecodedField", "DecodedStruct", "Value", "decode"]

NODES_MAX: Final = 1 << 20
"""Fields and elements of arrays in one device; numbers beyond it stay bytes, anything else is refused."""

_NOT_ARMED: Final = 2**64 - 1


class _Number(NamedTuple):
    size: int
    layout: layouts.Struct
    array: np.dtype[np.generic]


def _number(code: str) -> _Number:
    layout = layouts.Struct(">" + code)
    return _Number(layout.size, layout, np.dtype(">" + code))


_INTEGERS: Final = {"int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint8": "B", "uint16": "H", "uint32": "I"}
_NUMBERS: Final = {
    # "equal" and "le" say what the receiver compares the number with.
    **{
        name + check: _number(code)
        for name, code in {**_INTEGERS, "uint64": "Q"}.items()
        for check in ("", " equal", " le")
    },
    "bool": _number("?"),
    "timer": _number("Q"),
    "CPU_Double_U": _number("Q"),  # the bits of a double, which may be anything
    "float32": _number("f"),
    "float64": _number("d"),
}

# Structs that are described in the field itself; what they hold may be less than what they are.
_INLINE: Final = frozenset({"tmp", "vstruct"})


def decode(described: Described, body: bytes | bytearray | memoryview) -> DecodedDevice:
    """The values in a device's `body`, as `described` in its stream's description.

    Raises StreamError with the field and the byte where the two do not fit, and if bytes are left. Lists of unknown
    length (`qtailq`, `gtree`), and all that is private to a device, stay bytes.
    """
    name = name_of(described, "a device")
    try:
        decoder = _Decoder(bytes(body), NODES_MAX)
        fields, subsections = decoder.struct(described, len(decoder.body), name, 0)
        if decoder.at != len(decoder.body):
            raise StreamError(
                f"{len(decoder.body) - decoder.at} of {len(decoder.body)} bytes are left behind the last field that is "
                "described"
            )
        return DecodedDevice(
            name,
            instance_of(described, name),
            vmsd_name_of(described, name),
            version_of(described, name),
            fields,
            subsections,
        )
    except StreamError as exc:
        raise exc.at(Place(section=repr(name))) from None


@attrs.define
class _Decoder:
    body: bytes
    nodes: int  # that may still be made
    at: int = 0

    def struct(
        self, described: Described, end: int, path: str, depth: int
    ) -> tuple[tuple[DecodedField, ...], tuple[DecodedStruct, ...]]:
        """The fields and subsections of what begins at `at` and must not go beyond `end`."""
        if depth > NESTING_MAX:
            raise StreamError(f"{path} is nested more than {NESTING_MAX} deep")
        fields = tuple([self._field(field, end, path, depth) for field in fields_of(described, path)])
        subsections = tuple([self._subsection(part, end, path, depth) for part in subsections_of(described, path)])
        return fields, subsections

    def _subsection(self, described: Described, end: int, path: str, depth: int) -> DecodedStruct:
        head = subsection_head(described, path)
        name, version = f"{vmsd_name_of(described, path)}", version_of(described, path)
        came = self.body[self.at : min(self.at + len(head), end)]
        if came != head:
            raise StreamError(
                f"subsection {name!r} of {path}, version {version}, must begin at byte {self.at} of the body, "
                f"not {came.hex(' ') or 'nothing'}"
            )
        self._count(1, path)
        self.at += len(head)
        return DecodedStruct(name, version, *self.struct(described, end, name, depth + 1))

    def _field(self, field: Described, end: int, parent: str, depth: int) -> DecodedField:
        name = name_of(field, f"a field of {parent}")
        path = f"{parent}.{name}"
        type_, size, length = type_of(field, path), size_of(field, path), length_of(field, path)
        index = index_of(field, path)
        begin, total = self.at, size * (1 if length is None else length)
        if total > end - begin:
            raise StreamError(
                f"{path} ({type_}) has {total} bytes at byte {begin} of the body, and only {end - begin} are left"
            )
        self._count(1, path)
        value: Value
        if length is None:
            value = self._value(field, type_, size, path, depth)
        else:
            value = self._array(field, type_, size, length, path, depth)
        self.at = begin + total
        return DecodedField(name, type_, begin, total, value, index)

    def _array(self, field: Described, type_: str, size: int, length: int, path: str, depth: int) -> Value:
        number = _NUMBERS.get(type_)
        if number and length <= self.nodes:
            _check_size(number, size, type_, path)
            self.nodes -= length
            values = np.frombuffer(self.body, number.array, length, self.at).tolist()
            return tuple(_timer(value) for value in values) if type_ == "timer" else tuple(values)
        if number or not length:
            return self.body[self.at : self.at + size * length]
        if not size:
            raise StreamError(f"{path} ({type_}) is described as {length} elements without bytes")
        self._count(length, path)
        begin = self.at
        values = []
        for element in range(length):
            self.at = begin + element * size
            values.append(self._value(field, type_, size, f"{path}[{element}]", depth))
        return tuple(values)

    def _value(self, field: Described, type_: str, size: int, path: str, depth: int) -> Value:
        """The value of the `size` bytes at `at`, which are there."""
        if number := _NUMBERS.get(type_):
            _check_size(number, size, type_, path)
            value: Value = number.layout.unpack_from(self.body, self.at)[0]
            return _timer(value) if type_ == "timer" else value
        if type_ == "bitmap":
            return self._words(size, path)
        inner = struct_of(field, path)
        if inner is not None:
            return self._struct(inner, size, path, depth)
        if type_ in _INLINE and "fields" in field:
            return self._inline(field, size, path, depth)
        return self.body[self.at : self.at + size]

    def _struct(self, described: Described, size: int, path: str, depth: int) -> DecodedStruct:
        begin = self.at
        fields, subsections = self.struct(described, begin + size, path, depth + 1)
        if self.at != begin + size:
            raise StreamError(
                f"{path} is described as {size} bytes long, and its fields and subsections at byte {begin} of the body "
                f"as {self.at - begin}"
            )
        return DecodedStruct(vmsd_name_of(described, path), version_of(described, path), fields, subsections)

    def _inline(self, field: Described, size: int, path: str, depth: int) -> Value:
        """A struct that is described in the field: its bytes where the fields are not all of them."""
        begin = self.at
        try:
            return self._struct(field, size, path, depth)
        except StreamError:
            if self.nodes < 0:
                raise
            return self.body[begin : begin + size]

    def _words(self, size: int, path: str) -> Value:
        if size % 8:
            raise StreamError(f"{path} (bitmap) has {size} bytes at byte {self.at} of the body, expected words of 8")
        if size // 8 > self.nodes:
            return self.body[self.at : self.at + size]
        self.nodes -= size // 8
        return tuple(np.frombuffer(self.body, ">u8", size // 8, self.at).tolist())

    def _count(self, nodes: int, path: str) -> None:
        self.nodes -= nodes
        if self.nodes < 0:
            raise StreamError(f"up to {path} there are more than {NODES_MAX} fields and elements")


def _check_size(number: _Number, size: int, type_: str, path: str) -> None:
    if size != number.size:
        raise StreamError(f"{path} ({type_}) is described as {size} bytes long, expected {number.size}")


def _timer(value: Value) -> Value:
    """When a timer goes off, in nanoseconds of its clock."""
    return None if value == _NOT_ARMED else value
