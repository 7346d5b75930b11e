"""`whimbrel migrate`: moves the machine behind a monitor, and shows it."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from whimbrel.cli._monitor import ENDS, connected, exit_status, info_of
from whimbrel.cli._options import capability_name, capability_option, json_option, parameter, qmp_option
from whimbrel.cli._output import complain, note, print_json, print_rows
from whimbrel.cli._progress import Progress, report
from whimbrel.errors import ConfigError, GuestError, HandoverUndecided, MigrationCancelled, MonitorError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from whimbrel.cli._monitor import Info
    from whimbrel.monitor import MonitorClient

POLL: Final = 0.1  # seconds
LONG: Final = 1.0  # seconds without an answer, before that is said


@click.command()
@click.argument("uri")
@qmp_option
@click.option("--downtime-limit", metavar="TIME", help="How long the guest may stand still, such as 50ms.")
@click.option("--max-bandwidth", metavar="RATE", help="The most that is sent per second, such as 1GiB; 0 for no limit.")
@capability_option
@click.option("--block", is_flag=True, help="Send the machine's drives along, whole.")
@click.option("--incremental", is_flag=True, help="Send of its drives what their topmost images hold.")
@click.option("--detach", is_flag=True, help="Start it and return at once.")
@json_option
def migrate(
    uri: str,
    qmp: str,
    downtime_limit: str | None,
    max_bandwidth: str | None,
    capabilities: tuple[str, ...],
    block: bool,
    incremental: bool,
    detach: bool,
    as_json: bool,
) -> int:
    """Move a machine to URI while it runs.

    URI is where the destination listens: tcp:HOST:PORT, unix:PATH or another transport's. Ctrl-C cancels the migration,
    and the machine goes on where it is; once the machine has been let go of, it ends the watching alone, with status 3.
    The options stay set for later migrations.
    """
    if ":" not in uri:
        raise ConfigError(f"{uri!r} is no migration URI", hint="expected SCHEME:ADDRESS, such as tcp:127.0.0.1:4444")
    given = {"downtime-limit": downtime_limit, "max-bandwidth": max_bandwidth}
    parameters = {name: parameter(name, text) for name, text in given.items() if text is not None}
    switched_on = [capability_name(name) for name in capabilities]
    drives = {name: True for name, wanted in {"blk": block, "inc": incremental}.items() if wanted}
    with connected(qmp) as client:
        _prepare(client, parameters, switched_on)
        # From before the command is sent: a Ctrl-C that comes while it is carried out has to cancel as well.
        with _interruptions() as interrupted:
            client.execute("migrate", uri=uri, **drives)
            if detach and not interrupted():
                note(f"started; `whimbrel status --qmp {qmp}` tells how it stands")
                return 0
            with Progress(quiet=as_json) as progress:
                info = _watch(client, progress, interrupted)
    if as_json:
        print_json(info)
    else:
        told_below = {"error-desc": ""}
        print_rows(report({**progress.last, **info, **told_below}, progress.expected_downtime))
    return _conclude(info)


def _prepare(client: MonitorClient, parameters: dict[str, Any], switched_on: list[str]) -> None:
    # The machine would refuse a second migration too, but only after these settings had changed the first.
    if (running := info_of(client))["status"] not in ENDS and running.get("role") != "destination":
        raise StateError(
            f"a migration of this machine is {running['status']} already", hint="wait for its end or cancel it"
        )
    if switched_on:
        wanted = [{"capability": name, "state": True} for name in switched_on]
        client.execute("migrate-set-capabilities", capabilities=wanted)
    if parameters:
        client.execute("migrate-set-parameters", **parameters)


def _watch(client: MonitorClient, progress: Progress, interrupted: Callable[[], bool]) -> Info:
    """Show it to its end, and cancel it on Ctrl-C, or when the guest has failed and there is nothing left to move.

    Once the machine has been let go of there is nothing to cancel: Ctrl-C then ends the watching alone.
    """
    info: Info = {"status": "setup"}
    cancelled = False
    unanswered = _Unanswered()
    while True:
        try:
            if (interrupted() or info.get("failure")) and not cancelled:
                cancelled = True
                client.execute("migrate_cancel")
            info = info_of(client)
            unanswered.show(info)
            if interrupted() and unanswered:
                return info
        except MonitorError as exc:
            if failure := info.get("failure"):
                raise GuestError(failure) from exc
            exc.hint = f"the migration was {info['status']} then; ask the destination how it ended"
            raise
        progress.show(info)
        if info["status"] in ENDS:
            return info
        time.sleep(POLL)


class _Unanswered:
    """Whether the destination has owed the word that the machine runs there for long; says so when that begins."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._said = False

    def show(self, info: Info) -> None:
        """Take note of how it stands now."""
        if info["status"] in ENDS or info.get("ownership") != "released":
            return
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since >= LONG and not self._said:
            self._said = True
            note("the machine was let go of, and the destination does not answer: it is asked again until it does; "
                 "Ctrl-C ends the watching, not the asking")  # fmt: skip

    def __bool__(self) -> bool:
        return self._said


def _conclude(info: Info) -> int:
    """Say what the end means for the machine; returns the exit status."""
    if info["status"] != "completed" and info.get("failure"):
        complain(info["failure"])
        return GuestError.exit_code
    match info["status"]:
        case "completed":
            return 0
        case "failed":
            complain(info.get("error-desc") or "the migration failed")
            return exit_status(info)
        case status if status not in ENDS:
            complain(
                "the machine was let go of, and the destination has not said that it runs; it goes on being asked: "
                "`whimbrel status` tells how that ends"
            )
            return HandoverUndecided.exit_code
        case _:
            complain("the migration was cancelled; the machine goes on where it is")
            return MigrationCancelled.exit_code


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C rather than raise, for a question to the monitor must not be cut off; yields whether it came."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
