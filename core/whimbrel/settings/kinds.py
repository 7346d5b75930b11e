"""Kinds of settings: what a value may be, how it is written, and what is said when it does not fit.

A setting is an attrs field made by :func:`setting`, whose metadata holds its kind, its meaning, its unit and since
when it exists; checks, error texts and the reference page all come from there.

A value passes two steps, in QEMU's order and with QEMU's words (the wire format, section 10.3): :meth:`Kind.read`
judges its type and names the setting as people write it (``downtime-limit``), :meth:`Kind.check` judges its range and
names it as QEMU's sources do (``downtime_limit``).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

import attrs

from whimbrel import units
from whimbrel.errors import ConfigError

__all__ = ["Choice", "Dialect", "Flag", "Kind", "Method", "Number", "StringOrNull", "rate", "setting", "size"]


class Dialect(Enum):
    """Who wrote a value, and so what may be a string."""

    QMP = "a QMP command: plain JSON values, as in QEMU"
    NATIVE = "Python or TOML: native values, and strings with units"
    TEXT = "the environment or a command line: anything may be a string"


class Kind(ABC):
    """What one setting may be. Stateless; any thread."""

    unit: str = ""
    expects: str
    """What people may write, for hints and the reference page."""

    @abstractmethod
    def read(self, name: str, value: object, dialect: Dialect) -> object:
        """Turn `value` into what is stored, judging its type alone. Raises ConfigError."""

    def check(self, name: str, value: object) -> None:  # noqa: ARG002 - for kinds that have a range
        """Judge the range of what `read` returned. Raises ConfigError."""
        return

    def show(self, value: Any) -> str:
        """Write a stored value as in TOML."""
        return str(value)


def setting(kind: Kind, default: Any, doc: str, *, since: str = "whimbrel 0.1", unavailable: str = "") -> Any:
    """Make the attrs field of one setting.

    `since` is the version that had it first, of whimbrel or of QEMU. `unavailable` says what whimbrel does instead as
    yet; with it, every value but an empty or false one is refused. A callable `default` makes a new one each time.
    """
    metadata = {"kind": kind, "doc": doc, "unit": kind.unit, "since": since, "unavailable": unavailable}
    if callable(default):
        return attrs.field(factory=default, metadata=metadata)
    return attrs.field(default=default, metadata=metadata)


_TRUE: Final = frozenset({"on", "true", "yes", "1"})
_FALSE: Final = frozenset({"off", "false", "no", "0"})
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_INTEGER: Final = re.compile(r"-?[0-9]{1,20}", re.ASCII)


class Flag(Kind):
    """True or false."""

    expects = "true or false"

    def read(self, name: str, value: object, dialect: Dialect) -> bool:
        """Accept a bool, and in TEXT on, off, true, false, yes, no, 1 and 0."""
        if isinstance(value, bool):
            return value
        if dialect is Dialect.TEXT and isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
        raise ConfigError(f"Invalid parameter type for '{name}', expected: boolean")

    def show(self, value: Any) -> str:
        """Write it as TOML does."""
        return "true" if value else "false"


@attrs.frozen(kw_only=True)
class Number(Kind):
    """An unsigned integer of `bits` bits, from `low` to `high`.

    A negative one wraps around before it is judged, as in QEMU: -1 is the largest 64-bit number. `range_text` is
    QEMU's for a value that is out of range, `parse` reads a string with a unit, `accepts` judges what a range cannot.
    """

    expects: str
    bits: int = 64
    low: int = 0
    high: int | None = None
    range_text: str = ""
    unit: str = ""
    parse: Callable[[str], int] | None = None
    accepts: Callable[[int], bool] | None = None
    write: Callable[[int], str] | None = None

    def read(self, name: str, value: object, dialect: Dialect) -> int:
        """Accept an integer, and a string with a unit where there are units."""
        if isinstance(value, str) and dialect is not Dialect.QMP:
            value = self._from_text(name, value, dialect)
        if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**64:
            raise ConfigError(f"Parameter '{name}' expects uint64")
        number = value % 2**64
        if number >= 2**self.bits:
            raise ConfigError(f"Parameter '{name}' expects uint{self.bits}_t")
        return number

    def _from_text(self, name: str, text: str, dialect: Dialect) -> int | str:
        if _INTEGER.fullmatch(text) and (dialect is Dialect.TEXT or self.parse is not None):
            return int(text)
        if self.parse is None:
            return text
        try:
            return self.parse(text)
        except ConfigError as error:
            raise ConfigError(f"Parameter '{name}': {error.message}", hint=error.hint) from None

    def check(self, name: str, value: Any) -> None:
        """Refuse what is out of range."""
        fits = value >= self.low and (self.high is None or value <= self.high)
        if not fits or not (self.accepts is None or self.accepts(value)):
            raise ConfigError(f"Parameter '{name.replace('-', '_')}' expects {self.range_text}")

    def show(self, value: Any) -> str:
        """Write it as TOML does, with its unit where that is shorter to read."""
        return self.write(value) if self.write else str(value)


class Choice(Kind):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.expects = "one of " + ", ".join(f'"{word}"' for word in words)

    def read(self, name: str, value: object, dialect: Dialect) -> str:  # noqa: ARG002 - words are words everywhere
        """Accept one of the words."""
        if not isinstance(value, str):
            raise ConfigError(f"Invalid parameter type for '{name}', expected: string")
        if value not in self.words:
            raise ConfigError(f"Parameter '{name}' does not accept value '{value}'")
        return value

    def show(self, value: Any) -> str:
        """Write it as TOML does."""
        return f'"{value}"'


class Method(Choice):
    """One of a few words, or the name of a plugin's offer: whether there is one is for those to judge who know."""

    def __init__(self, *words: str) -> None:
        super().__init__(*words)
        self.expects += ", or the name of a codec that both ends have"

    def read(self, name: str, value: object, dialect: Dialect) -> str:
        """Accept one of the words, and any other name."""
        if isinstance(value, str) and _NAME.fullmatch(value):
            return value
        return super().read(name, value, dialect)


class StringOrNull(Kind):
    """A string; QMP's null is the empty one."""

    expects = "a string"

    def read(self, name: str, value: object, dialect: Dialect) -> str:
        """Accept a string, and in QMP null."""
        if value is None and dialect is Dialect.QMP:
            return ""
        if not isinstance(value, str):
            raise ConfigError(f"Invalid parameter type for '{name}', expected: StrOrNull")
        return value

    def show(self, value: Any) -> str:
        """Write it as TOML does."""
        return f'"{value}"'


def size(expects: str = 'a size such as 67108864 or "64MiB"', **limits: Any) -> Number:
    """Make the kind of a number of bytes."""
    return Number(expects=expects, unit="bytes", parse=units.parse_size, write=_quoted_size, **limits)


def rate(expects: str = 'bytes per second such as 125000000 or "1GiB/s"; 0 for none') -> Number:
    """Make the kind of a number of bytes per second."""
    return Number(expects=expects, unit="bytes/s", parse=units.parse_rate, write=_quoted_size)


def _quoted_size(count: int) -> str:
    text = units.format_size(count, exact=True).replace(" ", "")
    return str(count) if text == f"{count}B" else f'"{text}"'
