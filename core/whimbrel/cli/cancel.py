"""`whimbrel cancel`: ends a migration, and the machine goes on."""

from __future__ import annotations

import time
from typing import Final

import click

from whimbrel.cli._monitor import ENDS, connected, info_of
from whimbrel.cli._options import json_option, qmp_option
from whimbrel.cli._output import note, print_json
from whimbrel.errors import StateError

POLL: Final = 0.05  # seconds
PATIENCE: Final = 10.0  # seconds


@click.command()
@qmp_option
@json_option
def cancel(qmp: str, as_json: bool) -> int:
    """Cancel the migration that runs; the machine goes on where it is.

    Status 1 if there was none, or if it was too late.
    """
    with connected(qmp) as client:
        info = info_of(client)
        if info["status"] in ENDS:
            raise StateError(f"no migration runs: the last one's status is {info['status']}")
        client.execute("migrate_cancel")
        until = time.monotonic() + PATIENCE
        while (info := info_of(client))["status"] not in ENDS and time.monotonic() < until:
            time.sleep(POLL)
    if info["status"] != "cancelled":
        raise StateError(f"it was too late to cancel: the migration is {info['status']}")
    if as_json:
        print_json(info)
    else:
        note("cancelled; the machine goes on where it is")
    return 0
