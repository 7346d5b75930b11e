"""Builds the machine that APP stands for, with the settings of this run.

APP is `module:factory`, with the current folder on the path, or `path.py:factory`, with the file's folder on it.

How settings reach the machine: a factory that has a parameter `settings` is given them all. One that has none makes its
machine by itself; of what file, environment and command line name, capabilities, parameters and limits are then set on
that machine, over what the program says. Backends and plugins count when a machine is made, so naming one of those is
an error rather than without effect.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from whimbrel.errors import ConfigError, WhimbrelError
from whimbrel.machine.factories import failed, find_factory
from whimbrel.migration import Machine
from whimbrel.settings import Settings
from whimbrel.settings.sources import environment_layer, file_layer, override_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_CHANGEABLE: Final = frozenset({"capabilities", "parameters", "limits", "security"})


def build(app: str, config: str | None, overrides: Mapping[str, Mapping[str, object]]) -> Machine:
    """Build the machine. Raises ConfigError for APP and settings, WhimbrelError if the program's own code fails."""
    settings = Settings.load(config, overrides=overrides)
    factory = find_factory(app, kind="APP", makes="a machine")
    if _takes_settings(factory):
        return _call(app, factory, settings=settings)
    machine = _call(app, factory)
    try:
        _lay_over(app, machine, settings, _named(config, overrides))
    except BaseException:
        machine.close()
        raise
    return machine


def check_names(machine: Machine) -> None:
    """Look for everything that a machine's settings name, which is else asked for only when it migrates.

    Raises UnknownNameError, DuplicateOffer or BrokenPlugin.
    """
    plugins, chosen = machine.plugins, machine.settings
    if chosen.backends.dirty_tracker != "auto":
        plugins.dirty_tracker(chosen.backends.dirty_tracker)
    plugins.savevm_handlers(machine, chosen.plugins.savevm)  # which looks at the active ones and the notifiers as well


def _takes_settings(factory: Callable[..., object]) -> bool:
    try:
        return "settings" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # something built in, whose parameters nobody knows
        return False


def _call(app: str, factory: Callable[..., object], **arguments: Any) -> Machine:
    try:
        made = factory(**arguments)
    except WhimbrelError:
        raise
    except Exception as exc:
        raise failed(app, exc) from exc
    if not isinstance(made, Machine):
        raise ConfigError(f"{app} returned {_a(made)}, expected a whimbrel.Machine")
    return made


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _named(config: str | None, overrides: Mapping[str, Mapping[str, object]]) -> dict[str, set[str]]:
    """What some source names, by section; all of it exists, for the settings have been loaded from the same."""
    layers = [
        file_layer(None if config is None else Path(config)),
        environment_layer(os.environ),
        override_layer(overrides),
    ]
    named: dict[str, set[str]] = {}
    for layer in layers:
        for section, table in layer.tables.items() if layer else ():
            named.setdefault(section, set()).update(name.replace("_", "-") for name in table)  # type: ignore[attr-defined] # a table, or load would have said so
    return named


def _lay_over(app: str, machine: Machine, settings: Settings, named: Mapping[str, set[str]]) -> None:
    wanted, actual = settings.sections(), machine.settings.sections()
    for section, names in named.items():
        values = {name: wanted[section].get(name) for name in sorted(names)}
        if section in _CHANGEABLE:
            actual[section].update(values)
            continue
        for name, value in values.items():
            if actual[section].get(name) != value:
                raise ConfigError(
                    f"[{section}] {name} counts when a machine is made, and {app} takes no settings",
                    hint="give the factory a parameter `settings` and hand it to whimbrel.Machine",
                )
