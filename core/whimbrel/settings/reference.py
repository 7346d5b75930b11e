"""The reference page of all settings, made from the fields themselves."""

from __future__ import annotations

from typing import Any, Final

import attrs

from whimbrel.settings.loading import Settings
from whimbrel.settings.section import Section
from whimbrel.settings.sources import variable_name

__all__ = ["reference"]

_INTRODUCTION: Final = """\
# Settings

This page is generated from the code.

Settings come from the command line, the environment, a file and the defaults, in this order of precedence. The file is
the one named with `--config`; without that it is `whimbrel.toml` in the current folder, or else the `[tool.whimbrel]`
table of its `pyproject.toml`. Names may be spelled with `-` or `_`. A name that does not exist is an error.

In the environment `{variable}` stands for `max-bandwidth` in `[parameters]`, and so on for
every setting: lists are written `a,b`, tables `a=x,b=y`, true and false `on` and `off`.

Sizes are binary: `64MiB`, `64M` and `67108864` are the same. Times are written `300ms`, `2s` or `1m`.
"""

_HEADS: Final = ("name", "default", "unit", "values", "meaning", "since")


def reference() -> str:
    """The page as Markdown, with one table per section; the same for the same version."""
    page = [_INTRODUCTION.format(variable=variable_name("parameters", "max-bandwidth"))]
    page += [_section(name, section) for name, section in Settings().sections().items()]
    return "\n".join(page)


def _section(name: str, section: Section) -> str:
    about = " ".join((type(section).__doc__ or "").split()).replace("``", "`")
    rows = [_row(field, section.get(field.name)) for field in section.fields().values()]
    columns = [(head, cells) for head, *cells in zip(_HEADS, *rows, strict=True) if any(cells)]
    lines = zip(*[(head, "---", *cells) for head, cells in columns], strict=True)
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"## `[{name}]`\n\n{about}\n\n{table}\n"


def _row(field: attrs.Attribute[Any], default: object) -> list[str]:
    about = field.metadata
    meaning = about["doc"]
    if about["unavailable"]:
        meaning += f". *Not in this version yet: {about['unavailable']}*"
    return [
        f"`{field.name.replace('_', '-')}`",
        f"`{about['kind'].show(default)}`",
        about["unit"],
        about["kind"].expects,
        meaning,
        about["since"],
    ]
