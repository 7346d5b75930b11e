"""`whimbrel send`: hands a stored machine over to where it goes on."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from whimbrel.cli._background import POLL, Interruption, watched
from whimbrel.cli._meter import Meter
from whimbrel.cli._monitor import exit_status
from whimbrel.cli._options import (
    capability_option,
    config_option,
    drive_option,
    images,
    json_option,
    overrides,
    parameter,
    plaintext_option,
    set_option,
    size,
)
from whimbrel.cli._output import complain, note
from whimbrel.cli._progress import Progress, report
from whimbrel.cli._result import print_failure, print_result
from whimbrel.errors import (
    ChannelLost,
    ConfigError,
    HandoverUndecided,
    MigrationCancelled,
    StateError,
    WhimbrelError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whimbrel.capture import CapturedMachine
    from whimbrel.capture.taking import Capture
    from whimbrel.migration import OutgoingMigration
    from whimbrel.migration.uri import Destination


@click.command()
@click.argument("file")
@click.argument("uri")
@drive_option("Send IMAGE along, as the drive NAME; may be repeated.")
@click.option("--force", is_flag=True, help="Send drives of a size that a QEMU 7.2 does not take.")
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
@capability_option
@set_option
@plaintext_option
@json_option
def send(
    file: str,
    uri: str,
    drives: tuple[str, ...],
    force: bool,
    max_bandwidth: str | None,
    max_ram: str | None,
    handover: str,
    config: str | None,
    capabilities: tuple[str, ...],
    assignments: tuple[str, ...],
    as_json: bool,
) -> int:
    """Send the machine stored in FILE to URI, where it goes on.

    The destination is a QEMU with the same devices, started with `-incoming`, or whatever takes its stream. It is done
    when the destination has proved that it holds the whole machine; if it fails before, nothing has moved, and FILE can
    be sent again. FILE is never changed. Ctrl-C cancels.

    With --drive its drives go along: as `receive` has stored them, to a destination that has drives of the same names,
    at least as large (a QEMU up to 9.0; NAME is the id of -drive there). Each IMAGE is locked meanwhile. `--set
    block-incremental=on` sends only what is allocated of them, `--capability zero-blocks` zeros as a mark.

    Where the destination cannot answer (exec:, file:) there is no proof: look whether it goes on there.
    """
    from whimbrel.capture.files import open_stream
    from whimbrel.capture.images import leaving
    from whimbrel.capture.taking import Capture
    from whimbrel.migration.machine import manager_for
    from whimbrel.migration.uri import resolve
    from whimbrel.settings import Settings

    settings = Settings.load(config, overrides=overrides(capabilities, assignments))
    settings.parameters.set("max-bandwidth", 0 if max_bandwidth is None else parameter("max-bandwidth", max_bandwidth))
    limit = None if max_ram is None else size("--max-ram", max_ram)
    wanted = images(drives)
    plugins = manager_for(settings)
    _check_apart(resolve(uri, plugins), file)  # before FILE is loaded, which may take long
    if handover == "qemu":
        note("handing over with QEMU's timing: if the destination refuses the machine at the end, nobody may tell")
    with Interruption() as interruption, ExitStack() as stack:
        channel = stack.enter_context(closing(open_stream(file, settings, plugins)))
        total = stack.enter_context(_alone(file))
        sent = stack.enter_context(leaving(wanted, any_size=force))
        capture = Capture(channel, settings=settings, plugins=plugins, max_ram=limit)
        interruption.ends(capture.cancel)
        try:
            machine = stack.enter_context(_load(capture, total, quiet=as_json))
        except MigrationCancelled as exc:
            text = f"cancelled; {file} is as it was"
            return print_failure(exc, text, interruption.status(exc.exit_code), as_json=as_json)
        for name, image in sent.items():
            machine.drives.add(name, image)
        allocated = settings.parameters.block_incremental
        with Progress(quiet=as_json) as progress:
            migration = machine.migrate(
                uri, block=bool(sent) and not allocated, incremental=bool(sent) and allocated, handover=handover
            )
            interruption.ends(lambda: _cancel(migration))
            error = _watch(migration, progress)
            info = migration.info.as_dict()
            expected = progress.expected_downtime
        text = _meaning(file, uri, info, error)
        if error is not None:
            info["error-desc"] = text
        rows = report({**progress.last, **info, "error-desc": "", "expected-downtime": None}, expected)
        print_result(rows, info, as_json=as_json)
        if error is None:
            note(text)
            return 0
        complain(text)
        if isinstance(error, MigrationCancelled):
            return interruption.status(error.exit_code)
        return error.exit_code if isinstance(error, ConfigError) else exit_status(info)


def _check_apart(destination: Destination, file: str) -> None:
    """Raise ConfigError for a destination that is the file itself."""
    path = destination.address.partition(",offset=")[0]
    if destination.spec.name == "file" and os.path.realpath(path) == os.path.realpath(file):
        raise ConfigError(f"{destination.uri!r} is the file itself, which is never changed", hint="name another one")


def _load(capture: Capture, total: int | None, *, quiet: bool) -> CapturedMachine:
    """The machine out of a file of so many bytes."""
    with Meter(quiet=quiet) as meter:
        try:
            return watched(capture.run, lambda: meter.show("loaded", capture.received, total))
        except ChannelLost as exc:
            exc.hint = "the file is cut, or not whole yet"
            raise


@contextmanager
def _alone(file: str) -> Iterator[int | None]:
    """Keep others from sending the same file meanwhile, for only one may be the machine; yields the file's size.

    As good as locks are: where there are none it does nothing. Raises StateError while another sends it.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # it has an offset behind it, or is gone again
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"{file!r} is being sent by another process", hint="wait for its end: the machine may go on there"
            ) from None
        except OSError:
            pass
        yield os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


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


def _meaning(file: str, uri: str, info: dict[str, Any], error: WhimbrelError | None) -> str:
    """What the end means for the file."""
    if error is None and info["ownership"] == "done":
        return f"{file} is a copy from the past now: the machine goes on at {uri}"
    if error is None:
        return (
            f"all of it went to {uri}, which cannot tell whether it arrived: "
            f"once the machine goes on from there, {file} is a copy from the past"
        )
    if isinstance(error, MigrationCancelled):
        return f"cancelled; {file} is as it was"
    if isinstance(error, HandoverUndecided):
        return f"{error.message}; ask the destination: if it does not run and never will, {file} may be sent again"
    return f"{error}; {file} is as it was, and can be sent again"
