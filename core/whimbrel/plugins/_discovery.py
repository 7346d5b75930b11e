"""Finds the entry points of the group "whimbrel" without importing any of them.

A distribution that is on the path twice counts once, as the copy that would be imported. Metadata that cannot be
read is one broken plugin and never stops the others.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, distributions
from typing import Final

import attrs

from whimbrel.hookspecs import PROJECT

__all__ = ["Found", "find"]

_SEPARATORS: Final = re.compile(r"[-_.]+")  # all the same in the name of a distribution
_UNNAMED: Final = "a distribution without a name"


@attrs.frozen
class Found:
    """An entry point, or the reason why there is none to be had."""

    name: str
    distribution: str
    version: str
    entry: EntryPoint | None
    reason: str = ""


def find() -> list[Found]:
    """Every plugin that is installed, sorted by name, then distribution."""
    candidates: dict[str, tuple[str, Distribution]] = {}
    for candidate in filter(_mentions_us, distributions()):
        name = _name(candidate)
        candidates.setdefault(_SEPARATORS.sub("-", name).lower(), (name, candidate))
    plugins: list[Found] = []
    for name, candidate in candidates.values():
        try:
            # Of two copies on the path the first is the one that is imported, whichever of them mentions us.
            plugins += _entries(name, distribution(name))
        except PackageNotFoundError:
            plugins += _entries(name, candidate)
    # Ours first, so that no stranger can take the name of a bundled plugin.
    return sorted(plugins, key=lambda found: (found.name, found.distribution != PROJECT, found.distribution))


def _entries(name: str, source: Distribution) -> list[Found]:
    try:
        version = source.version or "?"
    except Exception:  # noqa: BLE001 - whatever a folder of strangers' files may hold
        version = "?"
    try:
        return [Found(entry.name, name, version, entry) for entry in source.entry_points if entry.group == PROJECT]
    except Exception as error:  # noqa: BLE001 - as above
        return [Found(name, name, version, None, f"its entry_points.txt cannot be read: {error!r}")]


def _mentions_us(candidate: Distribution) -> bool:
    # A look at the text first: parsing the metadata of everything that is installed costs tens of milliseconds.
    try:
        return f"[{PROJECT}]" in (candidate.read_text("entry_points.txt") or "")
    except Exception:  # noqa: BLE001 - as above
        return False


def _name(candidate: Distribution) -> str:
    try:
        return candidate.metadata["Name"] or _UNNAMED
    except Exception:  # noqa: BLE001 - as above
        return _UNNAMED
