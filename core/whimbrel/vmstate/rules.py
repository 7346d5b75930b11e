"""What a description must be like, checked when it is made, so that a hostile stream finds nothing left open.

Each part was checked when *it* was made; here are the rules about the whole. Apart from the obvious:

* A count is known before its array is read: an earlier field of the same description, present in all the versions
  that have the array, never negative, never an array.
* The longest possible body is at most `MAXIMUM_BODY`, with at most `MAXIMUM_ELEMENTS` structs; structs and
  subsections nest at most `MAXIMUM_NESTING` deep.
* Who a subsection belongs to is decided by its name alone (wire format, section 7.2): each description that ends at
  a place looks whether the name there starts with its own. So none that can end just before a subsection's place may
  have a name that takes it away from its owner, and a struct with subsections has a field before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from whimbrel.errors import ConfigError
from whimbrel.vmstate.fields import (
    MAXIMUM_BODY,
    MAXIMUM_ELEMENTS,
    MAXIMUM_VERSION,
    BufferField,
    Field,
    NumberField,
    StructField,
    is_whole,
)

if TYPE_CHECKING:
    from whimbrel.vmstate.description import VMStateDescription

__all__ = ["MAXIMUM_NESTING", "checked"]

MAXIMUM_NESTING = 16
FIELD_TYPES = (NumberField, BufferField, StructField)
HOOKS = ("needed", "pre_save", "post_load")


def checked(description: VMStateDescription) -> dict[str, Any]:
    """Check the whole of it; returns what follows from its parts: `maximum_size` and what else its fields say."""
    _check_header(description)
    _check_fields(description)
    _check_subsections(description)
    maximum_size = sum(map(_field_size, description.fields))
    maximum_size += sum(subsection_header_size(part) + part.maximum_size for part in description.subsections)
    if maximum_size > MAXIMUM_BODY:
        raise _wrong(
            description,
            f"a body may be as long as {maximum_size} bytes",
            f"at most {MAXIMUM_BODY} are accepted; lower a maximum, or keep the bulk in RAM blocks",
        )
    maximum_elements = sum(map(_struct_elements, description.fields))
    maximum_elements += sum(part.maximum_elements for part in description.subsections)
    if maximum_elements > MAXIMUM_ELEMENTS:
        raise _wrong(
            description,
            f"a body may have {maximum_elements} structs",
            f"at most {MAXIMUM_ELEMENTS} are accepted; lower a maximum, or keep a table as arrays or in RAM blocks",
        )
    depth = max((part.depth + 1 for part in _parts(description)), default=0)
    if depth > MAXIMUM_NESTING:
        raise _wrong(description, f"parts are nested {depth} deep", f"at most {MAXIMUM_NESTING} levels are accepted")
    is_fixed = not description.subsections and all(
        field.count is None and (not isinstance(field, StructField) or field.description.is_fixed)
        for field in description.fields
    )
    return {"maximum_size": maximum_size, "maximum_elements": maximum_elements, "is_fixed": is_fixed, "depth": depth}


def subsection_header_size(description: VMStateDescription) -> int:
    """Bytes before a subsection's fields: marker, name with its length, version."""
    return 1 + 1 + len(description.name) + 4


def _wrong(description: VMStateDescription, what: str, hint: str) -> ConfigError:
    return ConfigError(f"description {description.name!r}: {what}", hint=hint)


def _check_header(description: VMStateDescription) -> None:
    name, version, minimum = description.name, description.version_id, description.minimum_version_id
    if not _is_wire_name(name):
        raise _wrong(description, "it cannot go on the wire", "a name is 1 to 255 printable ASCII characters")
    if not is_whole(version) or not 0 <= version <= MAXIMUM_VERSION:
        raise _wrong(description, f"version_id={version!r}", f"give an int from 0 to {MAXIMUM_VERSION}")
    if not is_whole(minimum) or not 0 <= minimum <= version:
        raise _wrong(description, f"minimum_version_id={minimum!r}", f"give an int from 0 to version_id, {version}")
    for hook in HOOKS:
        value = getattr(description, hook)
        if value is not None and not callable(value):
            raise _wrong(description, f"{hook}={value!r}", "give a callable or leave it out")
    if not isinstance(description.unmigratable, bool):
        raise _wrong(description, f"unmigratable={description.unmigratable!r}", "give True or False")


def _is_wire_name(name: object) -> bool:
    return isinstance(name, str) and 1 <= len(name) <= 255 and name.isascii() and name.isprintable()


def _check_fields(description: VMStateDescription) -> None:
    before: dict[str, Field] = {}
    for field in description.fields:
        if type(field) not in FIELD_TYPES:
            raise _wrong(
                description, f"{field!r} is not a field", "use the functions of whimbrel.vmstate: uint32, struct, …"
            )
        if field.name in before:
            raise _wrong(description, f"two fields are called {field.name!r}", "declare each attribute once")
        if field.since > description.version_id:
            raise _wrong(
                description,
                f"field {field.name!r} is there since version {field.since}",
                f"version_id is {description.version_id}: raise it",
            )
        if field.count is not None:
            _check_count(description, field, field.count, before)
        if isinstance(field, StructField):
            _check_struct(description, field)
        before[field.name] = field


def _check_count(description: VMStateDescription, field: Field, name: str, before: dict[str, Field]) -> None:
    count = before.get(name)
    if count is None:
        known = any(other.name == name for other in description.fields)
        problem = "comes later" if known else "is no field of this description"
        hint = f"declare it before {field.name!r}"
    elif not isinstance(count, NumberField) or not count.kind.is_integer or count.is_array:
        problem, hint = "is not a single integer", "count with a uint8, uint16, uint32 or uint64"
    elif count.kind.low != 0 and (count.low is None or count.low < 0):
        problem, hint = "can be negative", "make it unsigned, or give it low=0"
    elif count.since > field.since:
        problem, hint = f"is there since version {count.since} only", f"give {field.name!r} the same since"
    else:
        return
    raise _wrong(description, f"the count {name!r} of field {field.name!r} {problem}", hint)


def _check_struct(description: VMStateDescription, field: StructField) -> None:
    child = field.description
    if not isinstance(child, type(description)):
        raise _wrong(description, f"field {field.name!r} is described by {child!r}", "give a VMStateDescription")
    _check_part(description, child)
    if child.needed is not None:
        raise _wrong(
            description,
            f"field {field.name!r} is a struct with a needed test",
            "only a subsection can be left out: make it one, or remove needed",
        )
    if child.subsections and all(map(_can_be_empty, child.fields)):
        raise _wrong(
            description,
            f"field {field.name!r} is a struct that may begin with a subsection, and so be taken for its neighbour's",
            f"give {child.name!r} a field",
        )
    if field.is_array and child.maximum_size == 0:
        raise _wrong(description, f"field {field.name!r} is an array of structs of no bytes", "give the struct a field")


def _check_part(description: VMStateDescription, part: VMStateDescription) -> None:
    if part.unmigratable:
        raise _wrong(
            description, f"its part {part.name!r} is unmigratable", "mark the outermost description, which blocks"
        )


def _check_subsections(description: VMStateDescription) -> None:
    prefix = description.name + "/"
    names: set[str] = set()
    for part in description.subsections:
        if not isinstance(part, type(description)):
            raise _wrong(description, f"{part!r} is not a subsection", "give a VMStateDescription")
        _check_part(description, part)
        if not part.name.startswith(prefix) or part.name == prefix:
            raise _wrong(description, f"its subsection {part.name!r} has a foreign name", f"start it with {prefix!r}")
        if part.name in names:
            raise _wrong(description, f"two subsections are called {part.name!r}", "a name is what tells them apart")
        names.add(part.name)
    for part in description.subsections:
        enders = set(_last_of_fields(description))
        for sibling in description.subsections:
            if sibling is not part:
                enders.update(_enders(sibling))
        thief = next((name for name in sorted(enders) if part.name.startswith(name + "/")), None)
        if thief is not None:
            raise _wrong(
                description,
                f"subsection {part.name!r} would be taken for one of {thief!r}, which can end just before it",
                "rename one of the two",
            )


def _enders(description: VMStateDescription) -> Iterator[str]:
    """The names of all descriptions that can end where a body of `description` ends."""
    yield description.name
    yield from _last_of_fields(description)
    for part in description.subsections:
        yield from _enders(part)


def _last_of_fields(description: VMStateDescription) -> Iterator[str]:
    """The names of those that can end where the fields end: the last field's, and before one that can be absent."""
    for field in reversed(description.fields):
        if isinstance(field, StructField):
            yield from _enders(field.description)
        if field.since <= description.minimum_version_id and not _can_be_empty(field):
            return


def _can_be_empty(field: Field) -> bool:
    if field.count is not None:
        return True
    return isinstance(field, StructField) and all(map(_can_be_empty, field.description.fields))


def _parts(description: VMStateDescription) -> Iterator[VMStateDescription]:
    yield from description.subsections
    for field in description.fields:
        if isinstance(field, StructField):
            yield field.description


def _struct_elements(field: Field) -> int:
    return field.capacity * (1 + field.description.maximum_elements) if isinstance(field, StructField) else 0


def _field_size(field: Field) -> int:
    if isinstance(field, NumberField):
        return field.capacity * field.kind.size
    if isinstance(field, BufferField):
        return field.capacity
    return field.capacity * field.description.maximum_size
