"""Applying: checked values go onto the object, and come off again if the migration fails after all.

Two steps, in this order: every value of every part is put in place; then `post_load` hooks are called, inner parts
before outer ones, as QEMU does. Every change is noted *before* it is made, and undone in the opposite order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import numpy as np

from whimbrel.errors import IncompatibleError
from whimbrel.vmstate.fields import Field, StructField
from whimbrel.vmstate.loading import Loaded
from whimbrel.vmstate.stores import Spot, first, put_first

__all__ = ["Undo", "apply"]


@attrs.define(eq=False)
class Undo:
    """Puts an object back as it was before :func:`apply`; calling it a second time does nothing."""

    _changes: list[Callable[[], object]] = attrs.field(factory=list)
    _hooks: list[Callable[[], object]] = attrs.field(factory=list)

    def __call__(self) -> tuple[Exception, ...]:
        """Restore the values, then call the `post_load` hooks again so that what is derived from them follows.

        Never raises: what the object's own setters and hooks raise is returned, and the rest is restored all the same.
        """
        steps = [*reversed(self._changes), *self._hooks]
        self._changes.clear()
        self._hooks.clear()
        failures = []
        for step in steps:
            try:
                step()
            except Exception as error:  # noqa: BLE001
                failures.append(error)
        return tuple(failures)

    def note_change(self, restore: Callable[[], object]) -> None:
        """Remember how to undo what is about to be done."""
        self._changes.append(restore)

    def note_hook(self, again: Callable[[], object]) -> None:
        """Remember to call a hook again once the values are restored."""
        self._hooks.append(again)


def apply(loaded: Loaded, obj: object) -> Undo:
    """Put parsed values onto `obj`, the object they were parsed for, and call its `post_load` hooks; returns the undo.

    numpy arrays, lists and bytearrays stay the objects they are; of an array with room for more only what came is
    changed. Raises IncompatibleError from whatever a setter or a hook raises; the object is
    as before then (see :class:`Undo`). Source: the wire format, section 7.
    """
    undo = Undo()
    spot = Spot(loaded.description.name)
    try:
        _put(loaded, obj, undo, spot)
        _settle(loaded, obj, undo, spot)
    except BaseException as error:
        for failure in undo():
            error.add_note(f"and while the object was restored: {failure!r}")
        raise
    return undo


def _put(loaded: Loaded, obj: object, undo: Undo, spot: Spot) -> None:
    for field in loaded.description.fields:
        if field.name not in loaded.values:
            continue
        try:
            _put_field(field, loaded, obj, undo, spot)
        except IncompatibleError:
            raise
        except Exception as error:
            raise IncompatibleError(f"{spot.field(field.name)}: it could not be set: {error!r}") from error
    for part in loaded.subsections:
        _put(part, obj, undo, spot.within(part.description.name))


def _put_field(field: Field, loaded: Loaded, obj: Any, undo: Undo, spot: Spot) -> None:
    name, value = field.name, loaded.values[field.name]
    here = getattr(obj, name)
    if isinstance(field, StructField):
        _put_structs(field, loaded, here, undo, spot)
    elif isinstance(here, np.ndarray):
        values = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
        undo.note_change(partial(put_first, here, first(here, len(values)).copy()))
        put_first(here, values)
    elif isinstance(here, list):
        undo.note_change(partial(_refill, here, here.copy()))
        here[:] = value.tolist()
    elif isinstance(here, bytearray):
        undo.note_change(partial(_refill, here, bytes(here)))
        here[:] = value
    else:
        undo.note_change(partial(setattr, obj, name, here))
        setattr(obj, name, value)


def _refill(here: Any, values: Any) -> None:
    here[:] = values


def _put_structs(field: StructField, loaded: Loaded, here: Any, undo: Undo, spot: Spot) -> None:
    members = loaded.elements[field.name]
    if field.factory is not None:
        undo.note_change(partial(_refill, here, here.copy()))
        here[:] = members
    for part, element, inner in _inside(field, loaded, spot):
        _put(part, element, undo, inner)


def _inside(field: StructField, loaded: Loaded, spot: Spot) -> list[tuple[Loaded, Any, Spot]]:
    value, members = loaded.values[field.name], loaded.elements[field.name]
    if not field.is_array:
        return [(value, members[0], spot.inside(field.name))]
    return [
        (part, element, spot.inside(field.name, index))
        for index, (part, element) in enumerate(zip(value, members, strict=True))
    ]


def _settle(loaded: Loaded, obj: object, undo: Undo, spot: Spot) -> None:
    for field in loaded.description.fields:
        if isinstance(field, StructField) and field.name in loaded.values:
            for part, element, inner in _inside(field, loaded, spot):
                _settle(part, element, undo, inner)
    for part in loaded.subsections:
        _settle(part, obj, undo, spot.within(part.description.name))
    hook = loaded.description.post_load
    if hook is None:
        return
    undo.note_hook(partial(hook, obj, loaded.description.version_id))
    try:
        hook(obj, loaded.version_id)
    except Exception as error:
        raise IncompatibleError(f"{spot.part()}: post_load refused what came: {error!r}") from error
