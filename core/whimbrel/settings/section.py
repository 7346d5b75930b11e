"""What all sections of the settings can do: be read, set and listed by name, in two spellings.

Rules of this module:

* A section is an attrs class whose fields are made by :func:`whimbrel.settings.kinds.setting`. Its attributes are
  spelled with ``_``; people, files and QMP write ``-``; every method that takes a name takes both.
* Nothing invalid is ever stored: the constructor, an assignment and `update` all judge first and store then.
* Any thread may read and set. One value is swapped atomically and readers take no lock, so whoever needs a value
  twice in one decision reads it once. `update` judges all of its values before it stores the first, yet a reader may
  see some of them before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from reprlib import Repr
from typing import Any, ClassVar, Self

import attrs

from whimbrel.errors import ConfigError, UnknownNameError
from whimbrel.settings.kinds import Dialect, Kind

__all__ = ["Rule", "Section", "judged"]

_shorten = Repr()
_shorten.maxstring = _shorten.maxother = 60


@attrs.frozen
class Rule:
    """What the values of several fields must be to each other; `text` is the error if they are not."""

    fields: tuple[str, ...]
    holds: Callable[..., bool]
    text: str


@attrs.define
class Section:
    """A group of settings. Iterating yields the names in their order, spelled with ``-``."""

    noun: ClassVar[str] = "setting"
    """What one of them is called in errors."""
    rules: ClassVar[tuple[Rule, ...]] = ()
    refused: ClassVar[Mapping[str, str]] = {}
    """Names of QEMU's that are known and not there yet at all, each with what whimbrel does instead."""

    def __attrs_post_init__(self) -> None:
        self.update({field.name: getattr(self, field.name) for field in self.fields().values()})

    def __iter__(self) -> Iterator[str]:
        return iter([_spelled(name) for name in self.fields()])

    @classmethod
    def fields(cls) -> Mapping[str, attrs.Attribute[Any]]:
        """The fields by attribute name, in order; a field's metadata holds kind, doc, unit, since and unavailable."""
        return attrs.fields_dict(cls)

    @classmethod
    def field(cls, name: str) -> attrs.Attribute[Any]:
        """The field of either spelling of `name`.

        Raises UnknownNameError, and ConfigError for one of QEMU's that is not there yet.
        """
        found = cls.fields().get(name.replace("-", "_"))
        if found is None:
            if reason := cls.refused.get(_spelled(name)):
                raise _not_yet(cls.noun, name, reason)
            raise UnknownNameError(cls.noun, name, map(_spelled, cls.fields()))
        return found

    @classmethod
    def judge(cls, name: str, value: object, dialect: Dialect = Dialect.NATIVE) -> object:
        """Turn `value` into what would be stored under `name`, without regard to the other settings.

        Raises UnknownNameError and ConfigError. The error's `message` is QEMU's own text where QEMU has one; except
        in QMP its hint says what was expected and what came.
        """
        field = cls.field(name)
        spelled, kind = _spelled(field.name), field.metadata["kind"]
        assert isinstance(kind, Kind)
        try:
            read = kind.read(spelled, value, dialect)
            kind.check(spelled, read)
        except ConfigError as error:
            if not error.hint and dialect is not Dialect.QMP:
                error.hint = f"expected {kind.expects}, not {_shown(value)}"
            raise
        if read and (reason := field.metadata["unavailable"]):
            raise _not_yet(cls.noun, spelled, reason)
        return read

    def get(self, name: str) -> Any:
        """The value of `name`, in either spelling. Raises UnknownNameError."""
        return getattr(self, self.field(name).name)

    def set(self, name: str, value: object, dialect: Dialect = Dialect.NATIVE) -> None:
        """Set one value, as `update` does."""
        self.update({name: value}, dialect)

    def update(self, values: Mapping[str, object], dialect: Dialect = Dialect.NATIVE) -> None:
        """Set several values, all or none.

        Raises UnknownNameError and ConfigError; then nothing has changed. Any thread.
        """
        fit: dict[str, object] = {}
        for name, value in values.items():
            field = self.field(name)
            if field.name in fit:
                raise ConfigError(f"{self.noun} {_spelled(name)!r} is given twice", hint="once with '-', once with '_'")
            fit[field.name] = self.judge(name, value, dialect)
        if rule := self.broken_rule(fit):
            raise ConfigError(rule.text)
        for name, value in fit.items():
            object.__setattr__(self, name, value)

    def broken_rule(self, changes: Mapping[str, object]) -> Rule | None:
        """The first rule that would not hold with `changes` (judged, by attribute name), or None."""
        for rule in self.rules:
            if not rule.holds(*(changes.get(name, getattr(self, name)) for name in rule.fields)):
                return rule
        return None

    def as_dict(self) -> dict[str, Any]:
        """All values by the names that QMP and files use, in order."""
        return {_spelled(name): getattr(self, name) for name in self.fields()}

    def copy(self) -> Self:
        """Make another section with the same values."""
        return attrs.evolve(self)


def judged(section: Section, field: attrs.Attribute[Any], value: object) -> object:
    """Judge an assignment; the `on_setattr` hook of every section."""
    fit = section.judge(field.name, value)
    if rule := section.broken_rule({field.name: fit}):
        raise ConfigError(rule.text)
    return fit


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: object) -> str:
    # An integer of thousands of digits cannot even be written.
    return "a huge number" if isinstance(value, int) and value.bit_length() > 128 else _shorten.repr(value)


def _not_yet(noun: str, name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{noun.capitalize()} '{_spelled(name)}' is not available in this version of whimbrel yet: {reason}"
    )
