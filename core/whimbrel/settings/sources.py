"""Where settings come from: a file, the environment and the command line, each a layer of tables.

This module reads; what the values mean is left to the sections. Its one rule is that an error says where the wrong
thing stands: the file with its section and key, or the name of the variable.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import attrs

from whimbrel.errors import ConfigError
from whimbrel.settings.kinds import Dialect

__all__ = ["Layer", "environment_layer", "file_layer", "override_layer"]

FILE: Final = "whimbrel.toml"
PROJECT_FILE: Final = "pyproject.toml"
PREFIX: Final = "WHIMBREL_"

_POSITION: Final = re.compile(r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|(?P<end>end .*))\)")


@attrs.frozen(kw_only=True)
class Layer:
    """The tables of one source, as found there; `where(section, key)` names the place for an error.

    An empty key means the section as a whole.
    """

    tables: Mapping[str, object]
    dialect: Dialect
    where: Callable[[str, str], str]


def file_layer(path: Path | None) -> Layer | None:
    """Read `path`; or whimbrel.toml, else the [tool.whimbrel] of pyproject.toml, in the current folder; None for none.

    A pyproject.toml in the current folder that does not mention whimbrel is none of ours; one that was asked for must.
    Raises ConfigError with the file's name, and with the line where it is not TOML.
    """
    if path is not None:
        tables = _read(path)
        if path.name == PROJECT_FILE:
            found = _tool_table(path, tables)
            if found is None:
                raise ConfigError(f"{path} has no [tool.whimbrel]")
            return _of_file(path, found, "tool.whimbrel.")
        return _of_file(path, tables, "")
    if (path := Path(FILE)).exists():
        return _of_file(path, _read(path), "")
    if (path := Path(PROJECT_FILE)).exists() and (found := _tool_table(path, _read(path))) is not None:
        return _of_file(path, found, "tool.whimbrel.")
    return None


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """Take `WHIMBREL_SECTION__KEY` from the environment; other names with that prefix are left to others."""
    tables: dict[str, dict[str, object]] = {}
    for variable in sorted(environ):
        section, separator, key = variable.removeprefix(PREFIX).partition("__")
        if variable.startswith(PREFIX) and separator:
            tables.setdefault(section.lower(), {})[key.lower().replace("_", "-")] = environ[variable]
    return Layer(tables=tables, dialect=Dialect.TEXT, where=variable_name)


def override_layer(overrides: Mapping[str, object]) -> Layer:
    """Take what the command line says, already in tables."""
    return Layer(
        tables=overrides,
        dialect=Dialect.TEXT,
        where=lambda section, key: f"command line: {section}" + (f".{key}" if key else ""),
    )


def variable_name(section: str, key: str) -> str:
    """The environment variable of a setting, or the beginning of those of a section."""
    return f"{PREFIX}{section.upper()}__{key.upper().replace('-', '_') or '…'}"


def _of_file(path: Path, tables: Mapping[str, object], prefix: str) -> Layer:
    return Layer(
        tables=tables,
        dialect=Dialect.NATIVE,
        where=lambda section, key: f"{path}: [{prefix}{section}]" + (f" {key}" if key else ""),
    )


def _tool_table(path: Path, tables: Mapping[str, object]) -> Mapping[str, object] | None:
    tool = tables.get("tool", {})
    found = tool.get("whimbrel") if isinstance(tool, Mapping) else None
    if found is None or isinstance(found, Mapping):
        return found
    raise ConfigError(f"{path}: tool.whimbrel is not a table")


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not TOML: byte {error.start} is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_not_toml(path, str(error))) from error
    except (ValueError, RecursionError) as error:  # what tomllib lets through: numbers and nesting without measure
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error


def _not_toml(path: Path, message: str) -> str:
    found = _POSITION.fullmatch(message)
    if found is None:
        return f"{path} is not TOML: {message}"
    place = f"line {found['line']}, column {found['column']}" if found["line"] else found["end"]
    return f"{path}, {place}: {found['what']}"
