"""A linter of descriptions: each number that a peer may set says which values are good.

A description without a range is legal, for every value of the field's type may be good. Which of them are is for the
device's author to know, and the day a value becomes an index is too late to ask: so a program's own tests lint its
descriptions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from whimbrel.vmstate.fields import NumberField, StructField

if TYPE_CHECKING:
    from whimbrel.vmstate.description import VMStateDescription

__all__ = ["lint"]


def lint(description: VMStateDescription) -> tuple[str, ...]:
    """One sentence for each number without a declared range, in structs and subsections too; empty if all have one.

    A range is `low` and `high`, which may be all that the type can hold, or `equal`. A bool needs none, nor does what
    has bytes alone: sizes are declared in any case.
    """
    return tuple(_undeclared(description, description.name))


def _undeclared(description: VMStateDescription, path: str) -> Iterator[str]:
    for field in description.fields:
        name = f"{path}.{field.name}"
        if isinstance(field, StructField):
            yield from _undeclared(field.description, name)
        elif isinstance(field, NumberField) and not field.equal and field.kind.plain is not bool:
            missing = [bound for bound in ("low", "high") if getattr(field, bound) is None]
            if missing:
                bounds = " and no ".join(missing)
                yield f"{name} ({field.kind.name}) declares no {bounds}: any value a peer sends is taken"
    for part in description.subsections:
        yield from _undeclared(part, part.name)
