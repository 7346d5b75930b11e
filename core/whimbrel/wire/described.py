"""What a description says of a device, a struct or a field, each word checked when it is used (wire format, 7.3).

A description comes from the peer: any key may be missing or hold anything. These functions are the only ones that
look into it; `path` says in messages whose word was wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from whimbrel.errors import StreamError
from whimbrel.wire.primitives import NAME_MAX, U32, str8
from whimbrel.wire.skeleton import Element

DEVICES_MAX: Final = 4096
NESTING_MAX: Final = 64  # of structs and subsections

_SIZE_MAX: Final = 1 << 40  # enough for any, and no product of two is a number of many digits
_U32_MAX: Final = 2**32 - 1

Described = Mapping[str, Any]


def shown(value: object) -> str:
    """`value` as a message shows it, however long it is."""
    if isinstance(value, (Mapping, list)):
        return "an object" if isinstance(value, Mapping) else "a list"
    if isinstance(value, int) and abs(value) > _SIZE_MAX:
        return "a huge number"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _number(described: Described, key: str, path: str, most: int, default: int | None = None) -> int:
    value = described.get(key, default)
    if type(value) is not int or not 0 <= value <= most:
        raise StreamError(f"{key} of {path} is described as {shown(value)}, expected a number from 0 to {most}")
    return value


def _name(described: Described, key: str, path: str) -> str:
    value = described.get(key)
    if not isinstance(value, str) or not 1 <= len(value) <= NAME_MAX or not (value.isascii() and value.isprintable()):
        raise StreamError(
            f"{key} of {path} is described as {shown(value)}, expected 1 to {NAME_MAX} printable ASCII characters"
        )
    return value


def _objects(described: Described, key: str, path: str) -> Sequence[Described]:
    value = described.get(key, ())
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, Mapping) for item in value):
        raise StreamError(f"{key} of {path} are described as {shown(value)}, expected a list of objects")
    return value


def name_of(described: Described, path: str) -> str:
    """The name of a device or a field."""
    return _name(described, "name", path)


def type_of(field: Described, path: str) -> str:
    """The type of a field; any name may stand there."""
    return _name(field, "type", path)


def instance_of(device: Described, path: str) -> int:
    """A device's instance."""
    return _number(device, "instance_id", path, _U32_MAX)


def vmsd_name_of(described: Described, path: str) -> str | None:
    """The name of the description that a device, struct or subsection was saved by; None of an old-style device."""
    return _name(described, "vmsd_name", path) if "vmsd_name" in described else None


def version_of(described: Described, path: str) -> int | None:
    """The version of that description, if it has one."""
    return _number(described, "version", path, _U32_MAX) if "version" in described else None


def size_of(field: Described, path: str) -> int:
    """Bytes of a field, or of each element if it is an array."""
    return _number(field, "size", path, _SIZE_MAX)


def length_of(field: Described, path: str) -> int | None:
    """How many elements one entry stands for; None if it is no array."""
    return _number(field, "array_len", path, _U32_MAX) if "array_len" in field else None


def index_of(field: Described, path: str) -> int | None:
    """Which element of an array this entry is; None if it is none."""
    return _number(field, "index", path, _U32_MAX) if "index" in field else None


def fields_of(described: Described, path: str) -> Sequence[Described]:
    """The fields of a device, struct or subsection, in order."""
    return _objects(described, "fields", path)


def subsections_of(described: Described, path: str) -> Sequence[Described]:
    """The subsections that were sent with it, in order."""
    return _objects(described, "subsections", path)


def struct_of(field: Described, path: str) -> Described | None:
    """What a struct holds; None if the field is no struct."""
    struct = field.get("struct")
    if struct is not None and not isinstance(struct, Mapping):
        raise StreamError(f"the struct of {path} is described as {shown(struct)}, expected an object")
    return struct


def subsection_head(described: Described, path: str) -> bytes:
    """What stands before the fields of a subsection of `path`: mark, name and version (section 7.2)."""
    name, version = vmsd_name_of(described, path), version_of(described, path)
    if name is None or version is None:
        raise StreamError(f"a subsection of {path} is described without its name or its version")
    return bytes((Element.SUBSECTION,)) + str8(name) + U32.pack(version)
