"""Parsing: a body becomes checked values, and the object is not touched (wire format, sections 7.1 and 7.2).

The rules, each of which was once a hole in somebody's loader:

* Sizes come from our description and from the receiver's own object. A count is compared with its maximum before
  anything is multiplied, asked for or made.
* Nobody is asked for more than `CHUNK` bytes at once, and nothing is made of a size whose bytes have not come.
* A subsection is looked for one byte at a time, and only as long as what is there can still be one of ours: where a
  body ends the peer may be waiting for us, and a byte more than needed would be waited for in vain.
* What comes out is plain values. The elements of a list that has to grow are made here, one after each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from whimbrel.abc import Parser, Peek
from whimbrel.errors import ConfigError, IncompatibleError, StreamError
from whimbrel.vmstate.fields import BufferField, Field, NumberField, StructField
from whimbrel.vmstate.objects import check_part
from whimbrel.vmstate.saving import SUBSECTION
from whimbrel.vmstate.stores import (
    OutOfRangeError,
    Spot,
    UnfitError,
    buffer_bytes,
    check_buffer_store,
    check_number_store,
    check_range,
    check_scalar_range,
    check_struct_store,
    elements,
    number_bytes,
    own,
)

if TYPE_CHECKING:
    from whimbrel.vmstate.description import VMStateDescription

__all__ = ["CHUNK", "Loaded", "parse"]

CHUNK = 65536  # bytes asked for at once, so that any reader's buffer can hold them


@attrs.frozen(eq=False)
class Loaded:
    """One part's values as they came, checked and complete: what :func:`~whimbrel.vmstate.apply` puts in place.

    `values` maps a field's name to an int, float, bool, flat numpy array or bytes, a struct's to a `Loaded` and an
    array of structs' to a tuple of them. Fields younger than `version_id` are missing. `elements` holds the objects
    those structs belong to.
    """

    description: VMStateDescription
    version_id: int
    values: Mapping[str, Any]
    elements: Mapping[str, tuple[Any, ...]]
    subsections: tuple[Loaded, ...]


def parse(description: VMStateDescription, version_id: int, obj: object) -> Parser[Loaded]:
    """Parse the body of a section of version `version_id`, for `obj`, which is looked at but not changed.

    A generator (see `whimbrel.abc.Parser`) that asks for at most `CHUNK` bytes at once, 16 MiB in all, and returns
    the checked values. It looks one byte past the body, where a subsection could be. Raises StreamError for what
    nobody could have sent (a bool of 2, a count above its maximum, a value out of range) and IncompatibleError for
    what does not fit this side (a version, an unknown subsection, `equal`, a list too short), both naming the device
    and the field. Source: the wire format, sections 7.1 and 7.2.
    """
    if description.unmigratable:
        raise IncompatibleError(
            f"device {description.name!r} is declared unmigratable here", hint="use the same program on both sides"
        )
    return (yield from _part(description, version_id, obj, Spot(description.name)))


def _part(description: VMStateDescription, version_id: int, obj: object, spot: Spot) -> Parser[Loaded]:
    if not description.minimum_version_id <= version_id <= description.version_id:
        raise IncompatibleError(
            f"{spot.part()}: expected version {description.minimum_version_id} to {description.version_id}, "
            f"got {version_id}",
            hint="use the same release of the program on both sides",
        )
    values: dict[str, Any] = {}
    members: dict[str, tuple[Any, ...]] = {}
    for field in description.fields:
        if field.since > version_id:
            continue
        try:
            n = _elements_of(field, values)
            if isinstance(field, NumberField):
                values[field.name] = yield from _number(field, obj, n)
            elif isinstance(field, BufferField):
                values[field.name] = yield from _buffer(field, obj, n)
            else:
                values[field.name], members[field.name] = yield from _structs(field, obj, n, spot)
        except OutOfRangeError as error:
            raise StreamError(f"{spot.field(field.name)}: {error}") from None
        except UnfitError as error:
            raise IncompatibleError(
                f"{spot.field(field.name)}: {error}", hint="use the same configuration on both sides"
            ) from error.__cause__
    subsections = yield from _subsections(description, obj, spot)
    return Loaded(description, version_id, values, members, subsections)


def _elements_of(field: Field, values: dict[str, Any]) -> int:
    if field.count is None:
        return field.capacity
    n: int = values[field.count]
    if n > field.capacity:
        raise OutOfRangeError(f"expected a count {field.count!r} of at most {field.capacity}, got {n}")
    return n


def _take(size: int) -> Parser[bytearray]:
    data = bytearray()
    while len(data) < size:
        data += yield min(CHUNK, size - len(data))
    return data


def _number(field: NumberField, obj: object, n: int) -> Parser[Any]:
    kind = field.kind
    value: Any
    if field.is_array:
        check_number_store(field, own(obj, field.name), writable=True)
        data: bytes | bytearray = yield from _take(n * kind.size)
        if kind.plain is bool:
            _check_bools(int(np.frombuffer(data, np.uint8).max(initial=0)))
        value = np.frombuffer(data, kind.wire).astype(kind.dtype)
        check_range(field, value)
    else:
        data = bytes((yield kind.size))
        if kind.plain is bool:
            _check_bools(data[0])
        value = kind.unpack(data)
        check_scalar_range(field, value)
    if field.equal:
        _check_equal(field, obj, data, n, value)
    return value


def _check_bools(largest: int) -> None:
    if largest > 1:
        raise OutOfRangeError(f"expected 0 or 1 for a bool, got {largest}")


def _buffer(field: BufferField, obj: object, n: int) -> Parser[bytes]:
    check_buffer_store(field, own(obj, field.name), writable=True)
    data = yield from _take(n)
    if field.equal:
        _check_equal(field, obj, data, n)
    return bytes(data)


def _check_equal(
    field: NumberField | BufferField, obj: object, data: bytes | bytearray, n: int, got: object = None
) -> None:
    value = own(obj, field.name)
    try:
        here = number_bytes(field, value, n) if isinstance(field, NumberField) else buffer_bytes(field, value, n)
    except UnfitError as error:
        raise UnfitError(f"expected the value that is here already, but that is not sound: {error}") from None
    if here != data:
        if field.is_array:
            raise UnfitError("expected the values that are here already, got others")
        raise UnfitError(f"expected {value}, the value that is here already, got {got}")


def _structs(field: StructField, obj: object, n: int, spot: Spot) -> Parser[tuple[Any, tuple[Any, ...]]]:
    child = field.description
    value = own(obj, field.name)
    if not field.is_array:
        loaded = yield from _part(child, child.version_id, value, spot.inside(field.name))
        return loaded, (value,)
    check_struct_store(field, value)
    there = value if field.factory is not None else elements(field, value, n)
    members: list[Any] = []
    parts: list[Loaded] = []
    for index in range(n):
        inner = spot.inside(field.name, index)
        members.append(there[index] if index < len(there) else _made(field, inner))
        parts.append((yield from _part(child, child.version_id, members[index], inner)))
    return tuple(parts), tuple(members)


def _made(field: StructField, spot: Spot) -> object:
    assert field.factory is not None
    try:
        element: object = field.factory()
        check_part(field.description, element, spot)
    except ConfigError as error:
        raise UnfitError(f"its factory made something else: {error}") from error
    except Exception as error:
        raise UnfitError(f"its factory raised {error!r}") from error
    return element


def _subsections(description: VMStateDescription, obj: object, spot: Spot) -> Parser[tuple[Loaded, ...]]:
    known = {part.name: part for part in description.subsections}
    found: dict[str, Loaded] = {}
    prefix = (description.name + "/").encode("ascii")
    while (size := (yield from _subsection_ahead(prefix))) is not None:
        header = bytes((yield 2 + size + 4))
        name, version = header[2:-4].decode("ascii", "backslashreplace"), int.from_bytes(header[-4:], "big")
        part = known.get(name)
        if part is None:
            raise IncompatibleError(
                f"{spot.part()}: the stream has a subsection {name!r}, which is not known here",
                hint=f"known are: {', '.join(known) or 'none'}; use the same release of the program on both sides",
            )
        if name in found:
            raise StreamError(f"{spot.part()}: subsection {name!r} came twice")
        found[name] = yield from _part(part, version, obj, spot.within(name))
    return tuple(found.values())


def _subsection_ahead(prefix: bytes) -> Parser[int | None]:
    """The length of the name of the subsection that comes now, or None if what comes is not ours."""
    ahead = yield Peek(1)
    if ahead[0] != SUBSECTION:
        return None
    ahead = yield Peek(2)
    size = ahead[1]
    if size < len(prefix):
        return None
    for at, expected in enumerate(prefix):
        ahead = yield Peek(2 + at + 1)
        if ahead[2 + at] != expected:
            return None
    return size
