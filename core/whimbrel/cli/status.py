"""`whimbrel status`: how a machine and its migration stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from whimbrel.cli._monitor import connected, info_of
from whimbrel.cli._options import json_option, qmp_option, shown
from whimbrel.cli._output import print_json, print_rows
from whimbrel.cli._progress import report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whimbrel.cli._monitor import Info


@click.command()
@qmp_option
@json_option
def status(qmp: str, as_json: bool) -> None:
    """Show how a machine and its migration stand."""
    from whimbrel.settings import Parameters

    with connected(qmp) as client:
        info = info_of(client)
        capabilities = client.execute("query-migrate-capabilities")
        parameters = client.execute("query-migrate-parameters")
    defaults = Parameters().as_dict()
    changed = {name: value for name, value in parameters.items() if defaults.get(name, value) != value}
    switched_on = [one["capability"] for one in capabilities if one["state"]]
    if as_json:
        print_json({**info, "capabilities": switched_on, "changed-parameters": changed})
    else:
        print_rows(_rows(info, switched_on, changed))


def _rows(info: Info, switched_on: list[str], changed: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "machine", info.get("name", "")
    yield "run state", info.get("run-state", "")
    yield "owner", info.get("owner", "")
    yield "journal", info.get("journal", "")
    yield "failure", info.get("failure", "")
    yield "cannot migrate", "; ".join(info.get("blocked-reasons", ()))
    yield from report(info)
    yield {"source": "to", "destination": "by"}.get(info.get("role", ""), "URI"), info.get("uri", "")
    yield "muted notifiers", "; ".join(info.get("failed-notifiers", ()))
    yield "capabilities", ", ".join(switched_on)
    for name, value in changed.items():
        yield name, shown(name, value)
