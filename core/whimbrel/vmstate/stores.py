"""How values live on objects, and whether they fit a field: the one place that knows lists, bytes and numpy arrays.

Nothing here knows a stream. What does not fit raises :class:`UnfitError`, a value out of its declared range
:class:`OutOfRangeError`; each caller turns them into an error of its own, with the device and the field in front.
"""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.vmstate.fields import BufferField, NumberField, StructField
from whimbrel.vmstate.kinds import Kind

__all__ = [
    "AnyArray",
    "OutOfRangeError",
    "Spot",
    "UnfitError",
    "buffer_bytes",
    "check_buffer_store",
    "check_number_store",
    "check_range",
    "check_scalar_range",
    "check_struct_store",
    "elements",
    "first",
    "number_bytes",
    "own",
    "put_first",
    "scalar",
]

AnyArray: TypeAlias = npt.NDArray[Any]


class UnfitError(Exception):
    """The object does not fit its description."""


class OutOfRangeError(UnfitError):
    """A value is outside of what the description allows."""


@attrs.frozen
class Spot:
    """Where in a device we are, for messages."""

    device: str
    path: str = ""
    subsection: str = ""

    def inside(self, name: str, index: int | None = None) -> Spot:
        """The spot of a struct's fields."""
        number = "" if index is None else f"[{index}]"
        return Spot(self.device, f"{self.path}{name}{number}.", self.subsection)

    def within(self, subsection: str) -> Spot:
        """The spot of a subsection's fields."""
        return Spot(self.device, self.path, subsection)

    def part(self) -> str:
        """This part of the device, in words."""
        words = [f"device {self.device!r}"]
        if self.path:
            words.append(f"struct {self.path.removesuffix('.')!r}")
        if self.subsection:
            words.append(f"subsection {self.subsection!r}")
        return ", ".join(words)

    def field(self, name: str) -> str:
        """One field of this part, in words."""
        words = [f"device {self.device!r}", f"field {self.path + name!r}"]
        if self.subsection:
            words.insert(1, f"subsection {self.subsection!r}")
        return ", ".join(words)


def own(obj: object, name: str) -> Any:
    """The object's value. Raises UnfitError if there is none."""
    try:
        return getattr(obj, name)
    except AttributeError:
        raise UnfitError(f"expected an attribute {name!r}, the {type(obj).__name__} has none") from None
    except Exception as error:
        raise UnfitError(f"reading the attribute {name!r} raised {error!r}") from error


# ----------------------------------------------------------------------------------------------------- numbers


def scalar(kind: Kind, value: object) -> int | float | bool:
    """The value as a plain Python one. Raises UnfitError for a wrong type, OutOfRangeError for what is too large."""
    if kind.low is not None and kind.high is not None:
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            if kind.low <= int(value) <= kind.high:
                return int(value)
            raise OutOfRangeError(f"expected {kind.low} to {kind.high}, got {value}")
        raise UnfitError(f"expected an int for a {kind.name}, got {_brief(value)}")
    if kind.plain is bool:
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        raise UnfitError(f"expected True or False, got {_brief(value)}")
    return _float(kind, value)


def _float(kind: Kind, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (float, int, np.floating, np.integer)):
        raise UnfitError(f"expected a float for a {kind.name}, got {_brief(value)}")
    try:
        number = float(value)
        kind.pack(number)
    except OverflowError:
        raise OutOfRangeError(f"{value!r} is too large for a {kind.name}") from None
    if isinstance(value, (int, np.integer)) and int(number) != value:
        raise OutOfRangeError(f"{value!r} is an int that a float cannot hold")
    return number


def check_scalar_range(field: NumberField, value: float) -> None:
    """Check one value against the field's range; a NaN is outside of any. Raises OutOfRangeError."""
    if (field.low is not None and not value >= field.low) or (field.high is not None and not value <= field.high):
        raise OutOfRangeError(f"expected {_range(field)}, got {value}")


def check_range(field: NumberField, values: AnyArray) -> None:
    """Check each value against the field's range; a NaN is outside of any. Raises OutOfRangeError for the first."""
    if field.low is None and field.high is None:
        return
    good = np.ones(values.shape, dtype=bool)
    with np.errstate(invalid="ignore"):
        if field.low is not None:
            good &= values >= field.low
        if field.high is not None:
            good &= values <= field.high
    if not good.all():
        at = int(np.argmin(good))
        raise OutOfRangeError(f"element {at}: expected {_range(field)}, got {values[at]}")


def number_bytes(field: NumberField, value: object, n: int) -> bytes | memoryview:
    """The wire bytes of the first `n` values, checked; maybe a view of `value` itself."""
    kind = field.kind
    if not field.is_array:
        packed = kind.pack(scalar(kind, value))
        check_scalar_range(field, kind.unpack(packed))
        return packed
    check_number_store(field, value)
    data: bytes | memoryview
    if isinstance(value, np.ndarray):
        data = _array_bytes(kind, first(value, n))
    else:
        data = _list_bytes(kind, _exactly(value, n))
    check_range(field, np.frombuffer(data, kind.wire))
    return data


def _array_bytes(kind: Kind, values: AnyArray) -> memoryview:
    if kind.plain is bool:
        values = values.view(np.uint8) != 0  # a bool made from foreign bytes may hold more than 0 and 1
    return np.ascontiguousarray(values, dtype=kind.wire).view(np.uint8).data


def _list_bytes(kind: Kind, values: list[Any]) -> bytes:
    if not set(map(type, values)) <= {kind.plain}:
        values = [scalar(kind, value) for value in values]
    try:
        return struct.pack(f">{len(values)}{kind.code}", *values)
    except (struct.error, OverflowError):
        for at, value in enumerate(values):
            try:
                scalar(kind, value)
            except UnfitError as error:
                raise type(error)(f"element {at}: {error}") from None
        raise


def check_number_store(field: NumberField, value: object, *, writable: bool = False) -> None:
    """Check what holds an array of numbers, but not its values. Raises UnfitError."""
    if isinstance(value, np.ndarray):
        if value.dtype.newbyteorder("=") != field.kind.dtype:
            raise UnfitError(f"expected an array of {field.kind.name}, got one of {value.dtype}")
        _check_room(field, value, writable=writable)
    elif not isinstance(value, list):
        hint = "; for raw bytes declare a buffer" if isinstance(value, (bytes, bytearray)) else ""
        raise UnfitError(f"expected a list or a numpy array, got {_brief(value)}{hint}")
    elif field.length is not None:
        _exactly(value, field.length)


# ----------------------------------------------------------------------------------------------------- buffers


def buffer_bytes(field: BufferField, value: object, n: int) -> bytes | bytearray | memoryview:
    """The first `n` bytes. Raises UnfitError."""
    check_buffer_store(field, value)
    if isinstance(value, np.ndarray):
        return first(value, n).data
    data: bytes | bytearray = _exactly(value, n)
    return data


def check_buffer_store(field: BufferField, value: object, *, writable: bool = False) -> None:
    """Check what holds a buffer. Raises UnfitError."""
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8:
            raise UnfitError(f"expected an array of uint8, got one of {value.dtype}")
        _check_room(field, value, writable=writable)
    elif not isinstance(value, (bytes, bytearray)):
        raise UnfitError(f"expected bytes, a bytearray or a uint8 array, got {_brief(value)}")
    elif field.length is not None:
        _exactly(value, field.length)


# ------------------------------------------------------------------------------------------------ numpy and lists


def first(array: AnyArray, n: int) -> AnyArray:
    """The first `n` values in C order, flat: a view if they lie in one piece, else a copy."""
    return np.asarray(array).reshape(-1)[:n]


def put_first(array: AnyArray, values: AnyArray) -> None:
    """Store `values` as the first values of `array`, in place, whatever its shape and strides."""
    array = np.asarray(array)
    if array.flags.c_contiguous:
        array.reshape(-1)[: len(values)] = values
    else:
        array.flat[: len(values)] = values


def elements(field: StructField, value: object, n: int) -> list[Any] | tuple[Any, ...]:
    """The elements of an array of structs as saved. Raises UnfitError if there are not `n`."""
    check_struct_store(field, value)
    members: list[Any] | tuple[Any, ...] = value  # type: ignore[assignment]
    if field.factory is not None or field.length is not None:
        _exactly(members, n)
        return members
    if len(members) < n:
        raise UnfitError(f"expected at least {n} elements, the list has {len(members)}; add some, or give a factory")
    return members[:n]


def check_struct_store(field: StructField, value: object) -> None:
    """Check what holds an array of structs, but not how many there are. Raises UnfitError."""
    if not isinstance(value, (list, tuple)) or (field.factory is not None and not isinstance(value, list)):
        raise UnfitError(f"expected a list of objects, got {_brief(value)}")


def _check_room(field: NumberField | BufferField, array: AnyArray, *, writable: bool) -> None:
    if field.length is not None and array.size != field.length:
        raise UnfitError(f"expected an array of {field.length} values, its shape {array.shape} has {array.size}")
    if array.size < field.capacity:
        raise UnfitError(f"expected room for {field.capacity} values, its shape {array.shape} has {array.size}")
    if writable and not array.flags.writeable:
        raise UnfitError("expected an array that can be written to, got a read-only one; give a copy")


def _exactly(value: Any, n: int) -> Any:
    if len(value) != n:
        raise UnfitError(f"expected {n} elements, the {type(value).__name__} has {len(value)}")
    return value


def _range(field: NumberField) -> str:
    if field.low is None:
        return f"at most {field.high}"
    return f"at least {field.low}" if field.high is None else f"{field.low} to {field.high}"


def _brief(value: object) -> str:
    text = repr(value) if isinstance(value, (int, float, str, type(None))) else ""
    kind = type(value).__name__
    return f"{kind} {text[:40]}" if text else f"a {kind}"
