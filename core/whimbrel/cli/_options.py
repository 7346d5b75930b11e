"""Options that several commands have, and values with units among them.

Values are judged here, with the settings' own words, before anything is sent anywhere. The settings are imported late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from whimbrel.errors import ConfigError, UnknownNameError
from whimbrel.units import format_rate, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Command = TypeVar("Command", bound=Callable[..., Any])

_PLAINTEXT: Final = "whimbrel.insecure-plaintext"  # in the context of the command


def qmp_option(command: Command) -> Command:
    """Add `--qmp ADDRESS`: the monitor of the machine that is meant."""
    return click.option(
        "--qmp",
        metavar="ADDRESS",
        required=True,
        envvar="WHIMBREL_QMP",
        help="The machine's monitor: unix:PATH or tcp:HOST:PORT. WHIMBREL_QMP in the environment does as well.",
    )(command)


def json_option(command: Command) -> Command:
    """Add `--json`, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def config_option(command: Command) -> Command:
    """Add `--config FILE`."""
    return click.option(
        "--config",
        metavar="FILE",
        help="Read settings from this file, not from the whimbrel.toml or pyproject.toml of the current folder.",
    )(command)


def capability_option(command: Command) -> Command:
    """Add `--capability NAME`, any number of times, as `capabilities`."""
    return click.option(
        "--capability", "capabilities", metavar="NAME", multiple=True, help="Switch a capability on; may be repeated."
    )(command)


def set_option(command: Command) -> Command:
    """Add `--set NAME=VALUE`, any number of times, as `assignments`."""
    return click.option(
        "--set", "assignments", metavar="NAME=VALUE", multiple=True, help="Set a setting; may be repeated."
    )(command)


def plaintext_option(command: Command) -> Command:
    """Add `--insecure-plaintext`, which `overrides` knows of."""
    return click.option(
        "--insecure-plaintext",
        is_flag=True,
        expose_value=False,
        callback=_remember_plaintext,
        help="Let a stream without TLS leave this host, or come from another: whoever is on the way can change it.",
    )(command)


def _remember_plaintext(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta[_PLAINTEXT] = value


def drive_option(text: str) -> Callable[[Command], Command]:
    """Add `--drive NAME=IMAGE`, any number of times, as `drives`; `text` says what becomes of them."""
    return click.option("--drive", "drives", metavar="NAME=IMAGE", multiple=True, help=text)


def images(assignments: Iterable[str]) -> dict[str, str]:
    """The images that were given with `--drive NAME=IMAGE`, by the names of the drives. Raises UsageError."""
    found: dict[str, str] = {}
    for assignment in assignments:
        name, equals, image = assignment.partition("=")
        if not (name and equals and image):
            raise click.UsageError(f"--drive {assignment!r}: expected NAME=IMAGE")
        if name in found:
            raise click.UsageError(f"--drive {assignment!r}: drive {name!r} has an image already, {found[name]!r}")
        found[name] = image
    return found


def parameter(name: str, text: str) -> object:
    """Turn the text given for a parameter into its value. Raises ConfigError."""
    from whimbrel.settings import Dialect, Parameters

    if text.lstrip().startswith("-"):
        # QMP has -1 for the largest number there is; nobody who writes it here means that.
        raise ConfigError(f"{name} cannot be negative: {text!r}", hint="write 0 or more")
    return Parameters.judge(name, text, Dialect.TEXT)


def size(option: str, text: str) -> int:
    """Turn the size given for `option` into bytes. Raises ConfigError."""
    try:
        return parse_size(text)
    except ConfigError as error:
        error.message = f"{option}: {error.message}"
        raise


def shown(name: str, value: Any) -> str:
    """A parameter's value with its unit, for people."""
    from whimbrel.settings import Parameters

    field = Parameters.fields().get(name.replace("-", "_"))
    unit = field.metadata["unit"] if field is not None else ""
    match unit:
        case "bytes/s":
            return format_rate(value)
        case "bytes":
            return format_size(value)
        case _:
            return f"{value} {unit}".rstrip()


def capability_name(name: str) -> str:
    """The name as QEMU spells it. Raises UnknownNameError; whether it works here is for the machine to say."""
    from whimbrel.settings import Capabilities

    return Capabilities.field(name).name.replace("_", "-")


def overrides(capabilities: Iterable[str], assignments: Iterable[str]) -> dict[str, dict[str, object]]:
    """Put `--capability NAME` and `--set NAME=VALUE` into tables by section, to be judged with the other sources.

    NAME is that of any setting, or `section.name`. Raises ConfigError.
    """
    tables: dict[str, dict[str, object]] = {}
    for name in capabilities:
        tables.setdefault("capabilities", {})[capability_name(name)] = "on"
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise click.UsageError(f"--set {assignment!r}: expected NAME=VALUE")
        section, key = _located(name)
        tables.setdefault(section, {})[key] = value
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(_PLAINTEXT):
        tables.setdefault("security", {})["insecure-plaintext"] = True
    return tables


def _located(name: str) -> tuple[str, str]:
    from whimbrel.settings import Settings

    sections = Settings().sections()
    section, dot, key = name.partition(".")
    if dot:
        return section, key
    for title, candidate in sections.items():
        if name.replace("-", "_") in candidate.fields() or name.replace("_", "-") in candidate.refused:
            return title, name
    raise UnknownNameError("setting", name, (known for candidate in sections.values() for known in candidate))
