"""The settings as a whole, and how the layers of their sources are put together.

Every layer is judged on its own, so a file that is wrong stays wrong even where the command line says otherwise; then
the uppermost value of each setting wins, and rules between settings are judged on what has won.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import attrs

from whimbrel.errors import ConfigError, UnknownNameError
from whimbrel.settings.capabilities import Capabilities
from whimbrel.settings.local import Backends, Limits, PluginChoices
from whimbrel.settings.parameters import Parameters
from whimbrel.settings.section import Section
from whimbrel.settings.security import Security
from whimbrel.settings.sources import Layer, environment_layer, file_layer, override_layer

__all__ = ["Settings"]


@attrs.frozen(kw_only=True)
class Settings:
    """Everything that can be set, in six sections. The sections stay, their values change."""

    capabilities: Capabilities = attrs.field(factory=Capabilities, validator=attrs.validators.instance_of(Capabilities))
    parameters: Parameters = attrs.field(factory=Parameters, validator=attrs.validators.instance_of(Parameters))
    backends: Backends = attrs.field(factory=Backends, validator=attrs.validators.instance_of(Backends))
    plugins: PluginChoices = attrs.field(factory=PluginChoices, validator=attrs.validators.instance_of(PluginChoices))
    limits: Limits = attrs.field(factory=Limits, validator=attrs.validators.instance_of(Limits))
    security: Security = attrs.field(factory=Security, validator=attrs.validators.instance_of(Security))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] | None = None,
        overrides: Mapping[str, Mapping[str, object]] | None = None,
    ) -> Self:
        """Load the settings: `overrides` (the command line) before `environ` before the file before the defaults.

        The file is `path`; without one, whimbrel.toml in the current folder, else the [tool.whimbrel] of its
        pyproject.toml, else none. `environ` (the process's own by default) says ``WHIMBREL_PARAMETERS__MAX_BANDWIDTH``
        for ``max-bandwidth`` in ``[parameters]``, with lists and tables written ``a,b`` and ``a=x,b=y``; names without
        ``__`` are left alone. Raises ConfigError, and UnknownNameError for a section or key that does not exist; both
        say where it stands.
        """
        settings = cls()
        layers = [
            file_layer(None if path is None else Path(path)),
            environment_layer(os.environ if environ is None else environ),
            override_layer(overrides or {}),
        ]
        won: dict[str, dict[str, tuple[object, str]]] = {}
        for layer in layers:
            for section, field, value, where in settings._judged(layer) if layer else ():
                won.setdefault(section, {})[field] = value, where
        for section, winners in won.items():
            settings._adopt(section, winners)
        return settings

    def sections(self) -> dict[str, Section]:
        """The sections by the names that files use, in order."""
        return {field.name: getattr(self, field.name) for field in attrs.fields(type(self))}

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """All values by section and name, in order, as files spell them."""
        return {name: section.as_dict() for name, section in self.sections().items()}

    def copy(self) -> Self:
        """Make other settings with the same values; a change of one does not show in the other."""
        return type(self)(
            capabilities=self.capabilities.copy(),
            parameters=self.parameters.copy(),
            backends=self.backends.copy(),
            plugins=self.plugins.copy(),
            limits=self.limits.copy(),
            security=self.security.copy(),
        )

    def handover_seconds(self) -> float:
        """How long the source waits for the destination's proof, as `handover-timeout` and `downtime-limit` say now."""
        return self.limits.handover_timeout or max(2.0, 4 * self.parameters.downtime_limit / 1000)

    def _judged(self, layer: Layer) -> Iterator[tuple[str, str, object, str]]:
        sections = self.sections()
        for name, table in layer.tables.items():
            if name not in sections:
                _raise_at(layer.where(name, ""), UnknownNameError("section", name, sections))
            if not isinstance(table, Mapping):
                raise ConfigError(f"{layer.where(name, '')}: expected a table of settings, not {type(table).__name__}")
            seen: set[str] = set()
            for key, value in table.items():
                where = layer.where(name, key)
                try:
                    field = sections[name].field(key).name
                    fit = sections[name].judge(key, value, layer.dialect)
                except ConfigError as error:
                    _raise_at(where, error)
                if field in seen:
                    raise ConfigError(f"{where}: given twice", hint="once with '-', once with '_'")
                seen.add(field)
                yield name, field, fit, where

    def _adopt(self, name: str, winners: Mapping[str, tuple[object, str]]) -> None:
        section = self.sections()[name]
        values = {field: value for field, (value, _) in winners.items()}
        if rule := section.broken_rule(values):
            places = " and ".join(where for field, (_, where) in winners.items() if field in rule.fields)
            raise ConfigError(f"{places}: {rule.text}")
        section.update(values)


def _raise_at(where: str, error: ConfigError) -> NoReturn:
    error.message = f"{where}: {error.message}"
    raise error
