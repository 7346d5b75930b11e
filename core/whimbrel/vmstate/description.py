"""`VMStateDescription`: the declared state of one object, QEMU's vmstate (wire format, section 7).

A body is the fields in their order, then the subsections that are needed. There is no length and no name for a field,
so the description *is* the format: it is checked as a whole when it is made, and is frozen afterwards.

How to change one without breaking old streams, best first: add a subsection with a `needed` test; add a field with
`since` and raise `version_id`; raise `minimum_version_id` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs

from whimbrel.errors import ConfigError
from whimbrel.vmstate.fields import Field
from whimbrel.vmstate.rules import checked

__all__ = ["VMStateDescription"]


def _fields(value: Iterable[Field]) -> tuple[Field, ...]:
    return tuple(_listed(value))


def _descriptions(value: Iterable[VMStateDescription]) -> tuple[VMStateDescription, ...]:
    return tuple(_listed(value))


def _listed(value: Iterable[Any]) -> Iterable[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ConfigError(f"expected a list in a description, got {value!r}", hint="give a list of them")
    return value


@attrs.frozen(eq=False)
class VMStateDescription:
    """Declares what of an object is transferred, in which order and in which version; checked when it is made.

    `name` is 1 to 255 printable ASCII characters; a subsection's is its parent's name, a "/" and more. Streams of
    versions `minimum_version_id` (by default `version_id`) to `version_id` are accepted. `needed(obj)`, for
    subsections only, decides at the sender whether it is sent. `pre_save(obj)` is called at the sender before its
    fields are read, and is the only thing that may change the object then. `post_load(obj, version_id)` is called at
    the receiver when all values of all parts are in place, inner parts first; whatever it raises refuses the
    migration. `unmigratable=True` makes the device block migration. Raises ConfigError, which says what to change.
    Source: the wire format, section 7.
    """

    name: str
    version_id: int
    minimum_version_id: int = attrs.field(
        kw_only=True, default=attrs.Factory(lambda self: self.version_id, takes_self=True)
    )
    fields: tuple[Field, ...] = attrs.field(kw_only=True, converter=_fields)
    subsections: tuple[VMStateDescription, ...] = attrs.field(kw_only=True, default=(), converter=_descriptions)
    needed: Callable[[Any], bool] | None = attrs.field(kw_only=True, default=None)
    pre_save: Callable[[Any], object] | None = attrs.field(kw_only=True, default=None)
    post_load: Callable[[Any, int], object] | None = attrs.field(kw_only=True, default=None)
    unmigratable: bool = attrs.field(kw_only=True, default=False)

    maximum_size: int = attrs.field(init=False, repr=False, default=0)
    """Bytes of the longest body that fits, with every subsection."""
    maximum_elements: int = attrs.field(init=False, repr=False, default=0)
    """Structs in the fullest body that fits."""
    is_fixed: bool = attrs.field(init=False, repr=False, default=False)
    """Whether every body is of the same length and the same shape."""
    depth: int = attrs.field(init=False, repr=False, default=0)
    """Levels of structs and subsections below this one."""

    def __attrs_post_init__(self) -> None:
        for name, value in checked(self).items():
            object.__setattr__(self, name, value)
