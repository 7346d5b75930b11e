"""`whimbrel plugins`: what is installed, what it offers, and what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from whimbrel.cli._options import config_option, json_option
from whimbrel.cli._output import print_json, print_table

if TYPE_CHECKING:
    from whimbrel.plugins import PluginRow


@click.command()
@config_option
@json_option
def plugins(config: str | None, as_json: bool) -> None:
    """List the plugins: what they offer, where they are from and how they do.

    A plugin that is offered is used when something names what it offers; an active one is named by settings; a broken
    one says why. Of the providers of verbs the one that rdma: gets is marked.
    """
    from whimbrel.migration.machine import manager_for
    from whimbrel.settings import Settings

    settings = Settings.load(config)
    catalogue = manager_for(settings).catalogue(savevm=settings.plugins.savevm)
    if as_json:
        print_json(catalogue.as_dict())
        return
    heads = ["name", "kind", "offers", "distribution", "version", "state", "reason"]
    rows = [
        (row.name, ", ".join(row.kinds), _offers(row), row.distribution, row.version, row.state, row.reason)
        for row in catalogue
    ]
    if not any(row[-1] for row in rows):
        heads, rows = heads[:-1], [row[:-1] for row in rows]  # type: ignore[misc] # one column less, if it is empty
    print_table(heads, rows)


def _offers(row: PluginRow) -> str:
    return ", ".join(f"{offer} (in use)" if offer in row.in_use else offer for offer in row.offers)
