"""What a device's bytes mean, as values: devices, structs and fields, and the same for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias, Union

import attrs

Value: TypeAlias = Union[int, float, bool, bytes, "DecodedStruct", tuple["Value", ...], None]


@attrs.frozen
class DecodedField:
    """One field: `offset` and `size` are its bytes in the body, all elements of an array included.

    `value` is a number, a bool, bytes where the type is private to the device, a struct, or a tuple of these for an
    array; None is a timer that is not armed. `index` says which element of an array a field of its own is.
    """

    name: str
    type: str
    offset: int
    size: int
    value: Value
    index: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes as hexadecimal digits."""
        index = {} if self.index is None else {"index": self.index}
        return {
            "name": self.name,
            **index,
            "type": self.type,
            "offset": self.offset,
            "size": self.size,
            "value": _plain(self.value),
        }


@attrs.frozen
class DecodedStruct:
    """A struct or a subsection; `name` is that of the description it was saved by."""

    name: str | None
    version: int | None
    fields: tuple[DecodedField, ...]
    subsections: tuple[DecodedStruct, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes as hexadecimal digits."""
        return {"vmsd_name": self.name, "version": self.version, **_parts(self.fields, self.subsections)}


@attrs.frozen
class DecodedDevice:
    """A device: its fields and then the subsections that were sent, which are its whole body.

    `vmsd_name` and `version` are those of its description, None of an old-style device.
    """

    name: str
    instance_id: int
    vmsd_name: str | None
    version: int | None
    fields: tuple[DecodedField, ...]
    subsections: tuple[DecodedStruct, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes as hexadecimal digits."""
        return {
            "name": self.name,
            "instance_id": self.instance_id,
            "vmsd_name": self.vmsd_name,
            "version": self.version,
            **_parts(self.fields, self.subsections),
        }

    def leaves(self) -> Iterator[tuple[str, DecodedField]]:
        """Each field that is no struct, in the order of its bytes, with its path: `a.b[3].c`, `/sub.field`."""
        yield from _leaves("", self)


def _parts(fields: tuple[DecodedField, ...], subsections: tuple[DecodedStruct, ...]) -> dict[str, Any]:
    parts: dict[str, Any] = {"fields": [field.as_dict() for field in fields]}
    if subsections:
        parts["subsections"] = [part.as_dict() for part in subsections]
    return parts


def _plain(value: Value) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, DecodedStruct):
        return value.as_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    return value


def _leaves(path: str, struct: DecodedStruct | DecodedDevice) -> Iterator[tuple[str, DecodedField]]:
    for field in struct.fields:
        name = f"{path}{field.name}" + ("" if field.index is None else f"[{field.index}]")
        if isinstance(field.value, DecodedStruct):
            yield from _leaves(f"{name}.", field.value)
        elif isinstance(field.value, tuple) and any(isinstance(item, DecodedStruct) for item in field.value):
            for number, item in enumerate(field.value):
                assert isinstance(item, DecodedStruct)
                yield from _leaves(f"{name}[{number}].", item)
        else:
            yield name, field
    for part in struct.subsections:
        name = part.name or ""
        yield from _leaves(f"{path}/{name.rpartition('/')[2]}.", part)
