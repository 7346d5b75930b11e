"""Whether an object fits its description, found out when a device is added instead of when it must move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from whimbrel.errors import ConfigError
from whimbrel.vmstate.fields import BufferField, Field, NumberField, StructField
from whimbrel.vmstate.stores import (
    OutOfRangeError,
    Spot,
    UnfitError,
    check_buffer_store,
    check_number_store,
    check_struct_store,
    elements,
    own,
    scalar,
)

if TYPE_CHECKING:
    from whimbrel.vmstate.description import VMStateDescription

__all__ = ["check_object", "check_part"]

IN_PLACE = (list, bytearray, np.ndarray)  # changed in place, so that no setter is needed


def check_object(description: VMStateDescription, obj: object) -> None:
    """Check that `obj` has what `description` declares: attributes, types, sizes, dtypes, elements of structs.

    Values are not judged against ranges and counts, which may come right in `pre_save`. A struct's `factory` is
    called once and what it makes is checked too. Raises ConfigError naming the device and the field; `obj` is
    unchanged. Source: the wire format, section 7.
    """
    if description.needed is not None:
        raise ConfigError(
            f"device {description.name!r}: it has a needed test, but only a subsection can be left out",
            hint="remove needed, or do not add the device",
        )
    check_part(description, obj, Spot(description.name))


def check_part(description: VMStateDescription, obj: object, spot: Spot) -> None:
    """As `check_object`, for a struct or a subsection at `spot`."""
    for field in description.fields:
        try:
            _check_field(field, obj, spot)
        except UnfitError as error:
            raise ConfigError(
                f"{spot.field(field.name)}: {error}", hint="correct the object or its description"
            ) from None
    for part in description.subsections:
        check_part(part, obj, spot.within(part.name))


def _check_field(field: Field, obj: object, spot: Spot) -> None:
    value = own(obj, field.name)
    if isinstance(field, StructField):
        _check_struct(field, value, spot)
        return
    if isinstance(field, BufferField):
        check_buffer_store(field, value, writable=True)
    elif field.is_array:
        check_number_store(field, value, writable=True)
    else:
        _check_scalar(field, value)
    declared = getattr(type(obj), field.name, None)
    if isinstance(declared, property) and declared.fset is None and not isinstance(value, IN_PLACE):
        raise UnfitError("it is a property without a setter")


def _check_scalar(field: NumberField, value: object) -> None:
    try:
        scalar(field.kind, value)
    except OutOfRangeError:
        return  # judged when it is saved, like any declared range


def _check_struct(field: StructField, value: Any, spot: Spot) -> None:
    if value is None:
        raise UnfitError("expected an object, got None")
    if not field.is_array:
        check_part(field.description, value, spot.inside(field.name))
        return
    check_struct_store(field, value)
    if field.length is not None and field.factory is None:
        elements(field, value, field.length)
    for index, element in enumerate(value):
        check_part(field.description, element, spot.inside(field.name, index))
    if field.factory is not None:
        try:
            element = field.factory()
        except Exception as error:
            raise UnfitError(f"its factory raised {error!r}") from error
        check_part(field.description, element, spot.inside(field.name, len(value)))
