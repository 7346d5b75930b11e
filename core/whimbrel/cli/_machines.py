"""Builds the machine that APP stands for, with the settings of this run.

APP is `module:factory`, with the current folder on the path, or `path.py:factory`, with the file's folder on it.

How settings reach the machine: a factory that has a parameter `settings` is given them all. One that has none makes its
machine by itself; of what file, environment and command line name, capabilities, parameters and limits are then set on
that machine, over what the program says. Backends and plugins count when a machine is made, so naming one of those is
an error rather than without effect.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from whimbrel.errors import ConfigError, UnknownNameError, WhimbrelError
from whimbrel.migration import Machine
from whimbrel.settings import Settings
from whimbrel.settings.sources import environment_layer, file_layer, override_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

_EXPECTED: Final = "expected MODULE:FACTORY or PATH.py:FACTORY"
_CHANGEABLE: Final = frozenset({"capabilities", "parameters", "limits"})


def build(app: str, config: str | None, overrides: Mapping[str, Mapping[str, object]]) -> Machine:
    """Build the machine. Raises ConfigError for APP and settings, WhimbrelError if the program's own code fails."""
    settings = Settings.load(config, overrides=overrides)
    factory = _factory(app)
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


def _factory(app: str) -> Callable[..., object]:
    target, colon, name = app.rpartition(":")
    if not (colon and target and name):
        raise ConfigError(f"{app!r} is no APP: {_EXPECTED}")
    is_path = target.endswith(".py") or os.sep in target
    module = _module_of_file(app, Path(target)) if is_path else _module(app, target)
    found = getattr(module, name, None)
    if found is None:
        made_here = (known for known, value in vars(module).items() if _is_made_in(module, known, value))
        raise UnknownNameError("factory", app, (f"{target}:{known}" for known in made_here))
    if not callable(found):
        raise ConfigError(f"{app} is a {type(found).__name__}", hint="a factory is a function that returns a machine")
    assert callable(found)
    return found  # type: ignore[no-any-return] # anything callable may be one; what it returns is looked at


def _is_made_in(module: ModuleType, name: str, value: object) -> bool:
    return not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__


def _module(app: str, name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        # Its own absence, or its package's, and not that of something it imports.
        if exc.name is not None and f"{name}.".startswith(f"{exc.name}."):
            hint = f"looked in {Path.cwd()} and among what is installed; for a file write PATH.py:FACTORY"
            raise ConfigError(f"there is no module {exc.name!r} for {app}", hint=hint) from exc
        raise _at_fault(f"importing {name}", exc) from exc
    except Exception as exc:
        raise _at_fault(f"importing {name}", exc) from exc


def _module_of_file(app: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {str(path)!r} for {app}")
    name = f"whimbrel_app_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{str(path)!r} is not a Python file; {_EXPECTED}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as exc:
        raise _at_fault(f"importing {path}", exc) from exc
    return module


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
        raise _at_fault(app, exc) from exc
    if not isinstance(made, Machine):
        raise ConfigError(f"{app} returned {_a(made)}, expected a whimbrel.Machine")
    return made


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _at_fault(what: str, exc: Exception) -> WhimbrelError:
    return WhimbrelError(f"{what} failed: {type(exc).__name__}: {exc}", hint="--debug shows where")


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
