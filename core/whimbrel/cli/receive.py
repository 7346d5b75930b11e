"""`whimbrel receive`: takes a whole machine out of a stream and stores it in a file."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import attrs
import click

from whimbrel.cli._background import Interruption, watched
from whimbrel.cli._elsewhere import Elsewhere
from whimbrel.cli._meter import Meter
from whimbrel.cli._options import (
    capability_option,
    config_option,
    drive_option,
    images,
    json_option,
    overrides,
    plaintext_option,
    set_option,
    size,
)
from whimbrel.cli._output import complain, note
from whimbrel.cli._result import print_failure, print_result
from whimbrel.errors import MigrationCancelled, WhimbrelError
from whimbrel.units import format_rate, format_seconds, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whimbrel.capture.receiving import Receipt, Reception


@click.command()
@click.argument("uri")
@click.argument("file")
@drive_option("Store the drive NAME in IMAGE, which is there and large enough; may be repeated.")
@click.option("--create", is_flag=True, help="Make each IMAGE that is not there, as large as what comes.")
@click.option("--max-ram", metavar="SIZE", help="How much RAM the machine may have; half of the host's by default.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@config_option
@capability_option
@set_option
@plaintext_option
@json_option
def receive(
    uri: str,
    file: str,
    drives: tuple[str, ...],
    create: bool,
    max_ram: str | None,
    force: bool,
    config: str | None,
    capabilities: tuple[str, ...],
    assignments: tuple[str, ...],
    as_json: bool,
) -> int:
    """Take a running machine out of a QEMU, or any stream, and store it in FILE.

    URI is where to wait for it: tcp:HOST:PORT, unix:PATH, exec:COMMAND and so on; give the same to the source's
    `migrate`. FILE is a stream again, with each page once: `whimbrel inspect`, `whimbrel send` and a QEMU's `-incoming`
    read it. With the capability return-path on, the source lets go of its machine only when FILE is safe on the disk.
    Ctrl-C gives up, and such a source goes on; so does a whimbrel, when storing takes longer than its [limits]
    handover-timeout.

    A source with the capability multifd on needs `--capability multifd` here too, and by `--set` the same
    multifd-channels and multifd-compression.

    Drives that come along (a QEMU 7.2 with `migrate` and blk or inc) go into their IMAGEs, not into FILE. NAME is the
    source's: for a QEMU the id of -drive. While an IMAGE is written, and after that has failed, a file beside it,
    IMAGE.whimbrel-incomplete, says so.

    Without return-path the source has let go once everything has come, and this process has the only copy. If it cannot
    be written to FILE then, you are asked for another path; where there is no terminal, it goes to the folder for
    temporary files (and the status is 1), or is held until there is room.
    """
    from whimbrel.capture.receiving import Reception
    from whimbrel.settings import Settings

    limit = None if max_ram is None else size("--max-ram", max_ram)
    wanted = images(drives)
    if create and not wanted:
        raise click.UsageError("--create makes the images of --drive NAME=IMAGE, and there is none")
    settings = Settings.load(config, overrides=overrides(capabilities, assignments))
    elsewhere = Elsewhere(file)
    # From before a socket is made: a signal must not leave it behind.
    with Interruption() as interruption:
        reception = Reception(
            uri,
            file,
            drives=wanted,
            create=create,
            max_ram=limit,
            replace=force,
            elsewhere=elsewhere,
            settings=settings,
        )
        interruption.ends(lambda: _cancel(interruption, reception, elsewhere))
        note(f"waiting for a machine at {reception.uri}")
        try:
            receipt = _watch(reception, elsewhere, quiet=as_json)
        except MigrationCancelled as exc:
            return print_failure(exc, str(exc), interruption.status(exc.exit_code), as_json=as_json)
        except WhimbrelError as exc:
            if not elsewhere.given_up:
                raise
            text = f"interrupted; the machine is lost, for it could not be stored: {exc}"
            return print_failure(MigrationCancelled(text), text, interruption.status(exc.exit_code), as_json=as_json)
        finally:
            for image in reception.spoiled:
                note(f"{click.format_filename(image)} is not whole now, and is marked so; receive the drive again")
        return _conclude(file, receipt, elsewhere, as_json=as_json)


def _watch(reception: Reception, elsewhere: Elsewhere, *, quiet: bool) -> Receipt:
    with Meter(quiet=quiet) as meter:
        peer: str | None = None

        def look() -> None:
            nonlocal peer
            if peer is None and reception.peer is not None:
                peer = reception.peer
                note(f"a source has connected: {peer}")
            elsewhere.answer(meter.pause)
            if reception.storing:
                meter.show("stored", *reception.progress)
            elif reception.received:
                meter.show("received", reception.received)

        return watched(reception.run, look)


def _cancel(interruption: Interruption, reception: Reception, elsewhere: Elsewhere) -> None:
    if interruption.number is signal.SIGHUP:
        elsewhere.hang_up()  # which is not to say that the machine may be lost
    elif elsewhere.give_up():
        return
    if not reception.cancel():
        note("too late: everything has come and is being stored; another Ctrl-C may lose the machine")


def _conclude(file: str, receipt: Receipt, elsewhere: Elsewhere, *, as_json: bool) -> int:
    """Say where it is; returns the exit status, which is 1 if that is where nobody has chosen."""
    document: dict[str, Any] = attrs.asdict(receipt)
    problem, text = elsewhere.problem, ""
    if problem is not None and not elsewhere.somebody and receipt.file != os.path.abspath(file):  # noqa: PTH100
        text = f"the machine is in {receipt.file}, for it could not be stored in {file}: {problem}"
        document |= {"error-code": problem.code, "error-desc": text}
    print_result(_rows(receipt), document, as_json=as_json)
    if text:
        complain(text)
        return WhimbrelError.exit_code
    if receipt.guessed:
        note("its devices were told apart without description and footers: `whimbrel inspect` shows what was found")
    return 0


def _rows(receipt: Receipt) -> Iterator[tuple[str, str]]:
    yield "machine", receipt.machine
    yield "memory", f"{format_size(receipt.ram)} in {receipt.blocks} blocks"
    yield "devices", str(receipt.devices)
    for drive in receipt.drives:
        came = "nothing came of it" if not drive.came else f"{format_size(drive.came)} of it came"
        made = ", made" if drive.made else ""
        yield f"drive {drive.name}", f"{format_size(drive.size)} in {click.format_filename(drive.image)}{made}, {came}"
    taken = receipt.seconds - receipt.storing_seconds
    yield "received", f"{format_size(receipt.received)} in {format_seconds(taken)}, {_rate(receipt.received, taken)}"
    file = click.format_filename(receipt.file)
    yield "stored", f"{format_size(receipt.stored)} in {file}, {format_seconds(receipt.storing_seconds)}"
    yield "source", "was told that it is safe" if receipt.told else "did not listen (return-path is off there)"


def _rate(count: int, seconds: float) -> str:
    return format_rate(count / max(seconds, 1e-9))
