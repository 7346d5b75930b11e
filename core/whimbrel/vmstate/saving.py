"""Saving: an object's body, and the entry that describes it in the stream's JSON (wire format, sections 7.1 to 7.3).

The JSON says of each field `name`, `type` and `size`, so that a reader without our description finds its way. Types
are the kinds' names ("uint8" to "int64", "bool", "float32", "float64"), "buffer" and "struct"; QEMU's
analyze-migration.py decodes the integers and bool, walks structs, and prints the rest by its size. `equal` fields are
named like others, because that script has no type for some of them. As in QEMU, an array of one element looks like
one value, an empty one has no entry, and elements are described once (`array_len`) if all look the same, else one by
one (`index`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from whimbrel.errors import MigrationError
from whimbrel.vmstate.fields import BufferField, Field, NumberField, StructField
from whimbrel.vmstate.stores import OutOfRangeError, Spot, UnfitError, buffer_bytes, elements, number_bytes, own

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel.vmstate.description import VMStateDescription

__all__ = ["SUBSECTION", "save"]

SUBSECTION = 0x05

Entry = dict[str, Any]


def save(description: VMStateDescription, obj: object) -> tuple[bytearray, dict[str, Any]]:
    """Save `obj`: returns the body's bytes and its JSON entry (vmsd_name, version, fields, subsections if any).

    The object is changed by nothing but `pre_save` hooks, which are called before the fields of their part are read.
    Raises MigrationError, naming the device and the field, for a value that does not fit, a hook that raised, or an
    unmigratable description. Source: the wire format, sections 7.1 to 7.3.
    """
    if description.unmigratable:
        raise MigrationError(f"device {description.name!r} is declared unmigratable", hint="remove it to migrate")
    saver = _Saver()
    return saver.out, saver.part(description, obj, Spot(description.name))


@attrs.define
class _Saver:
    out: bytearray = attrs.field(factory=bytearray)

    def part(self, description: VMStateDescription, obj: object, spot: Spot) -> Entry:
        if description.pre_save is not None:
            _call("pre_save", description.pre_save, obj, spot)
        counts: dict[str, int] = {}
        fields: list[Entry] = []
        for field in description.fields:
            try:
                fields += self.field(field, obj, counts, spot)
            except UnfitError as error:
                raise MigrationError(f"{spot.field(field.name)} cannot be saved: {error}") from None
        entry: Entry = {"vmsd_name": description.name, "version": description.version_id, "fields": fields}
        subsections = [
            self.subsection(part, obj, spot) for part in description.subsections if _is_needed(part, obj, spot)
        ]
        if subsections:
            entry["subsections"] = subsections
        return entry

    def subsection(self, description: VMStateDescription, obj: object, spot: Spot) -> Entry:
        name = description.name.encode("ascii")
        self.out += bytes([SUBSECTION, len(name)]) + name + description.version_id.to_bytes(4, "big")
        return self.part(description, obj, spot.within(description.name))

    def field(self, field: Field, obj: object, counts: dict[str, int], spot: Spot) -> list[Entry]:
        value = own(obj, field.name)
        n = _elements_of(field, counts)
        if isinstance(field, StructField):
            return self.structs(field, value, n, spot)
        if isinstance(field, BufferField):
            self.out += buffer_bytes(field, value, n)
            return [{"name": field.name, "type": "buffer", "size": n}]
        self.out += number_bytes(field, value, n)
        return self.numbers(field, value, n, counts)

    @staticmethod
    def numbers(field: NumberField, value: Any, n: int, counts: dict[str, int]) -> list[Entry]:
        if not field.is_array and field.kind.is_integer:
            counts[field.name] = int(value)
        length = {"array_len": n} if n > 1 else {}
        return [{"name": field.name, **length, "type": field.kind.name, "size": field.kind.size}] if n else []

    def structs(self, field: StructField, value: Any, n: int, spot: Spot) -> list[Entry]:
        if not field.is_array:
            return [self.struct({"name": field.name}, field, value, spot.inside(field.name))]
        members = elements(field, value, n)
        entries = [
            self.struct({"name": field.name, "index": index}, field, element, spot.inside(field.name, index))
            for index, element in enumerate(members)
        ]
        if n == 1:
            del entries[0]["index"]
        elif n > 1 and field.description.is_fixed:
            del entries[1:]
            entries[0] = {"name": field.name, "array_len": n, **entries[0]}
            del entries[0]["index"]
        return entries

    def struct(self, entry: Entry, field: StructField, element: object, spot: Spot) -> Entry:
        before = len(self.out)
        body = self.part(field.description, element, spot)
        return {**entry, "type": "struct", "struct": body, "size": len(self.out) - before}


def _elements_of(field: Field, counts: dict[str, int]) -> int:
    if field.count is None:
        return field.capacity
    n = counts[field.count]
    if n > field.capacity:
        raise OutOfRangeError(f"its count {field.count!r} is {n}, the maximum is {field.capacity}")
    return n


def _is_needed(part: VMStateDescription, obj: object, spot: Spot) -> bool:
    return part.needed is None or bool(_call("needed", part.needed, obj, spot.within(part.name)))


def _call(name: str, hook: Callable[[Any], object], obj: object, spot: Spot) -> object:
    try:
        return hook(obj)
    except Exception as error:
        raise MigrationError(f"{spot.part()}: {name} raised {error!r}") from error
