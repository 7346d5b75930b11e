"""`whimbrel set`: changes a parameter or a capability of the machine behind a monitor."""

from __future__ import annotations

import click

from whimbrel.cli._monitor import connected
from whimbrel.cli._options import json_option, parameter, qmp_option, shown
from whimbrel.cli._output import print_json, print_rows
from whimbrel.errors import UnknownNameError


@click.command("set")
@click.argument("name")
@click.argument("value")
@qmp_option
@json_option
def set_value(name: str, value: str, qmp: str, as_json: bool) -> None:
    """Set a parameter or a capability, also while a migration runs.

    VALUE may have a unit (50ms, 1GiB); capabilities are switched on and off, but not while a migration runs.
    """
    from whimbrel.settings import Capabilities, Dialect, Parameters

    name, attribute = name.replace("_", "-"), name.replace("-", "_")
    arguments: dict[str, object]
    if attribute in Capabilities.fields():
        wanted = Capabilities.field(name).metadata["kind"].read(name, value, Dialect.TEXT)
        text = "on" if wanted else "off"
        command, arguments = "migrate-set-capabilities", {"capabilities": [{"capability": name, "state": wanted}]}
    elif attribute in Parameters.fields() or name in Parameters.refused:
        wanted = parameter(name, value)
        text = shown(name, wanted)
        command, arguments = "migrate-set-parameters", {name: wanted}
    else:
        raise UnknownNameError("parameter or capability", name, [*Parameters(), *Capabilities()])
    with connected(qmp) as client:
        client.execute(command, **arguments)
    if as_json:
        print_json({"name": name, "value": wanted})
    else:
        print_rows([(name, text)])
