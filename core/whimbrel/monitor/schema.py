"""What a command takes, as data; from it arguments are judged, with QEMU's texts (the wire format, section 10.1).

Members are judged in the order of the table, and what is in no table comes last, as in QEMU. A member of a member is
named with its path (``capabilities[0].state``), except where a word is not in an enumeration: there QEMU has the bare
name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from whimbrel.errors import MonitorError

__all__ = ["ANY", "BOOLEAN", "INTEGER", "NUMBER", "STRING", "Argument", "Command", "Enum", "ListOf", "Struct", "Type"]


class Type(ABC):
    """What a value may be; `label` is what it is called in the reference."""

    label: str

    @abstractmethod
    def read(self, value: object, path: str, name: str | None) -> Any:
        """Return `value` if it fits. Raises MonitorError, which calls it `path`; `name` is the path's last part."""


@attrs.frozen
class _Scalar(Type):
    label: str
    fits: Callable[[object], bool]

    def read(self, value: object, path: str, name: str | None) -> Any:  # noqa: ARG002 - `name` is for enumerations
        if not self.fits(value):
            raise _mistyped(path, self.label)
        return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


STRING: Final = _Scalar("string", lambda value: isinstance(value, str))
BOOLEAN: Final = _Scalar("boolean", lambda value: isinstance(value, bool))
INTEGER: Final = _Scalar("integer", _is_integer)
NUMBER: Final = _Scalar("number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
ANY: Final = _Scalar("any", lambda _: True)
"""Judged by the command itself."""


@attrs.frozen
class Enum(Type):
    """One of a few words."""

    label: str
    words: Sequence[str]

    def read(self, value: object, path: str, name: str | None) -> str:
        """Accept one of the words."""
        if not isinstance(value, str):
            raise _mistyped(path, "string")
        if value not in self.words:
            raise MonitorError(f"Parameter '{name or 'null'}' does not accept value '{value}'")
        return value


@attrs.frozen
class ListOf(Type):
    """Any number of values of one type."""

    item: Type
    label: str = attrs.field(init=False)

    @label.default
    def _label(self) -> str:
        return f"array of {self.item.label}"

    def read(self, value: object, path: str, name: str | None) -> list[Any]:  # noqa: ARG002
        """Accept an array whose items all fit."""
        if not isinstance(value, list):
            raise _mistyped(path, "array")
        return [self.item.read(item, f"{path}[{index}]", None) for index, item in enumerate(value)]


@attrs.frozen
class Argument:
    """A member of a command's arguments, or of an object in them."""

    name: str
    type: Type
    optional: bool = False


@attrs.frozen
class Struct(Type):
    """An object with the members that are named, and no others."""

    label: str
    members: Sequence[Argument]

    def read(self, value: object, path: str, name: str | None) -> dict[str, Any]:  # noqa: ARG002
        """Accept an object whose members all fit; optional ones that were left out are left out."""
        if not isinstance(value, Mapping):
            raise _mistyped(path, "object")
        inside = f"{path}." if path else ""
        fit: dict[str, Any] = {}
        for member in self.members:
            if member.name in value:
                fit[member.name] = member.type.read(value[member.name], inside + member.name, member.name)
            elif not member.optional:
                raise MonitorError(f"Parameter '{inside}{member.name}' is missing")
        for other in value:
            if other not in fit:
                raise MonitorError(f"Parameter '{inside}{other}' is unexpected")
        return fit


@attrs.frozen
class Command:
    """A command: its arguments, and who carries it out: `handler(context, **arguments)`, with ``_`` for ``-``."""

    name: str
    handler: Callable[..., Any]
    arguments: Sequence[Argument] = ()

    def read(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as `handler` takes them. Raises MonitorError for what does not fit."""
        fit = Struct("object", self.arguments).read(arguments, "", None)
        return {name.replace("-", "_"): value for name, value in fit.items()}


def table(commands: Iterable[Command]) -> dict[str, Command]:
    """The commands by name."""
    return {command.name: command for command in commands}


def _mistyped(path: str, expected: str) -> MonitorError:
    return MonitorError(f"Invalid parameter type for '{path}', expected: {expected}")
