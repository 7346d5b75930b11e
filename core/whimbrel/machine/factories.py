"""Finds the factory that a name stands for, as the command line's APP and the workload of a `ProcessGuest` name one.

It is `module:factory`, with the current folder on the path, or `path.py:factory`, with the file's folder on it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Final

from whimbrel.errors import ConfigError, UnknownNameError, WhimbrelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

_EXPECTED: Final = "expected MODULE:FACTORY or PATH.py:FACTORY"


def find_factory(name: str, *, kind: str, makes: str) -> Callable[..., object]:
    """Import what `name` names and return its factory; `kind` and `makes` say in messages what is looked for.

    Raises ConfigError if there is none, and WhimbrelError if the program's own code fails while it is imported.
    """
    target, colon, attribute = name.rpartition(":")
    if not (colon and target and attribute):
        raise ConfigError(f"{name!r} is no {kind}: {_EXPECTED}")
    is_path = target.endswith(".py") or os.sep in target
    module = _module_of_file(name, Path(target)) if is_path else _module(name, target)
    found = getattr(module, attribute, None)
    if found is None:
        made_here = (known for known, value in vars(module).items() if _is_made_in(module, known, value))
        raise UnknownNameError("factory", name, (f"{target}:{known}" for known in made_here))
    if not callable(found):
        raise ConfigError(f"{name} is a {type(found).__name__}", hint=f"a factory is a function that returns {makes}")
    assert callable(found)
    return found  # type: ignore[no-any-return] # anything callable may be one; what it returns is looked at


def name_of(factory: Callable[..., object]) -> str:
    """The name by which another process of the same program finds `factory`, a function of a module.

    Raises ConfigError for what has no such name: a lambda, a method, a function inside of a function.
    """
    module = sys.modules.get(getattr(factory, "__module__", ""))
    name = getattr(factory, "__qualname__", "")
    if module is None or not name or "." in name or getattr(module, name, None) is not factory:
        raise ConfigError(
            f"{factory!r} has no name by which another process could find it",
            hint=f"give a function that a module defines, or its name: {_EXPECTED}",
        )
    # The module of the main script has another name in another process; and one that was loaded from a file by itself
    # is on no path.
    top = module.__name__.partition(".")[0]
    if module.__name__ != "__main__" and PathFinder.find_spec(top) is not None:
        return f"{module.__name__}:{name}"
    file = getattr(module, "__file__", None)
    if file is None:
        raise ConfigError(
            f"{name!r} of module {module.__name__!r} is in no file, where another process could find it",
            hint="put it into a module",
        )
    return f"{Path(file).resolve()}:{name}"


def failed(what: str, exc: Exception) -> WhimbrelError:
    """Say that the program's own code failed; to be raised from `exc`."""
    return WhimbrelError(f"{what} failed: {type(exc).__name__}: {exc}", hint="--debug shows where")


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
        raise failed(f"importing {name}", exc) from exc
    except Exception as exc:
        raise failed(f"importing {name}", exc) from exc


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
        raise failed(f"importing {path}", exc) from exc
    return module
