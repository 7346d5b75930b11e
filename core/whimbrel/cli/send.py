"""`whimbrel send`: hands a stored machine over to where it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from whimbrel.cli._monitor import exit_status
from whimbrel.cli._options import config_option, json_option, parameter, size
from whimbrel.cli._output import complain, note, print_json, print_rows
from whimbrel.cli._progress import Progress, report
from whimbrel.cli._signals import Signals
from whimbrel.errors import HandoverUndecided, MigrationCancelled, WhimbrelError

if TYPE_CHECKING:
    from whimbrel.migration import OutgoingMigration

POLL: Final = 0.1  # seconds


@click.command()
@click.argument("file")
@click.argument("uri")
@click.option(
    "--max-bandwidth", metavar="RATE", help="The most that is sent per second, such as 1GiB; no limit without."
)
@click.option("--max-ram", metavar="SIZE", help="How much RAM the machine may have; half of the host's by default.")
@click.option(
    "--handover",
    type=click.Choice(["proof", "qemu"]),
    default="proof",
    show_default=True,
    help="When to let go: once the destination has proved that it holds it all, or with the last byte, as QEMU does.",
)
@config_option
@json_option
def send(
    file: str,
    uri: str,
    max_bandwidth: str | None,
    max_ram: str | None,
    handover: str,
    config: str | None,
    as_json: bool,
) -> int:
    """Send the machine stored in FILE to URI, where it goes on.

    The destination is a QEMU with the same devices, started with `-incoming`, or whatever takes its stream. It is done
    when the destination has proved that it holds the whole machine; if it fails before, nothing has moved, and FILE can
    be sent again. FILE is never changed. Ctrl-C cancels.
    """
    from whimbrel.capture import CapturedMachine
    from whimbrel.settings import Settings

    settings = Settings.load(config)
    settings.parameters.set("max-bandwidth", 0 if max_bandwidth is None else parameter("max-bandwidth", max_bandwidth))
    limit = None if max_ram is None else size("--max-ram", max_ram)
    if handover == "qemu":
        note("handing over with QEMU's timing: if the destination refuses the machine at the end, nobody may tell")
    with CapturedMachine.load(file, max_ram=limit, settings=settings) as machine:
        migration = machine.migrate(uri, handover=handover)
        with Signals(lambda _: _cancel(migration)), Progress(quiet=as_json) as progress:
            error = _watch(migration, progress)
        info = migration.info.as_dict()
        expected = progress.expected_downtime
    if as_json:
        print_json(info)
    else:
        print_rows(report({**progress.last, **info, "error-desc": "", "expected-downtime": None}, expected))
    return _conclude(file, uri, info, error)


def _watch(migration: OutgoingMigration, progress: Progress) -> WhimbrelError | None:
    """Show it to its end; returns why it failed."""
    while True:
        try:
            migration.wait(POLL)
        except TimeoutError:
            progress.show(migration.info.as_dict())
            continue
        except WhimbrelError as exc:
            return exc
        return None


def _cancel(migration: OutgoingMigration) -> None:
    if not migration.cancel():
        note("too late to cancel: the machine was let go of")


def _conclude(file: str, uri: str, info: dict[str, Any], error: WhimbrelError | None) -> int:
    if error is None:
        note(f"{file} is a copy from the past now: the machine goes on at {uri}")
        return 0
    if isinstance(error, MigrationCancelled):
        complain(f"cancelled; {file} is as it was")
    elif isinstance(error, HandoverUndecided):
        complain(f"{error.message}; ask the destination: if it does not run and never will, {file} may be sent again")
    else:
        complain(f"{error}; {file} is as it was, and can be sent again")
    return exit_status(info)
