"""`whimbrel receive`: takes a whole machine out of a stream and stores it in a file."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, Final

import attrs
import click

from whimbrel.cli._meter import Meter
from whimbrel.cli._options import config_option, json_option, size
from whimbrel.cli._output import note, print_json, print_rows
from whimbrel.cli._signals import Signals
from whimbrel.units import format_rate, format_seconds, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whimbrel.capture.receiving import Receipt, Reception
    from whimbrel.errors import MigrationError

POLL: Final = 0.1  # seconds


@click.command()
@click.argument("uri")
@click.argument("file")
@click.option("--max-ram", metavar="SIZE", help="How much RAM the machine may have; half of the host's by default.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@config_option
@json_option
def receive(uri: str, file: str, max_ram: str | None, force: bool, config: str | None, as_json: bool) -> int:
    """Take a running machine out of a QEMU, or any stream, and store it in FILE.

    URI is where to wait for it: tcp:HOST:PORT, unix:PATH, exec:COMMAND and so on; give the same to the source's
    `migrate`. FILE is a stream again, with each page once: `whimbrel inspect`, `whimbrel send` and a QEMU's `-incoming`
    read it. With the capability return-path on, the source lets go of its machine only when FILE is safe on the disk.
    Ctrl-C gives up, and such a source goes on.
    """
    from whimbrel.capture.receiving import Reception
    from whimbrel.settings import Settings

    reception = Reception(
        uri,
        file,
        max_ram=None if max_ram is None else size("--max-ram", max_ram),
        replace=force,
        elsewhere=_elsewhere,
        settings=Settings.load(config),
    )
    note(f"waiting for a machine at {reception.uri}")
    receipt = _watch(reception, quiet=as_json)
    if as_json:
        print_json(attrs.asdict(receipt))
    else:
        print_rows(_rows(receipt))
        if receipt.guessed:
            note("its devices were told apart without description and footers: `whimbrel inspect` shows what was found")
    return 0


def _watch(reception: Reception, *, quiet: bool) -> Receipt:
    done: list[Receipt | BaseException] = []

    def work() -> None:
        try:
            done.append(reception.run())
        except BaseException as exc:  # noqa: BLE001 - raised on the main thread
            done.append(exc)

    thread = threading.Thread(target=work, name="whimbrel-receive", daemon=True)
    with Signals(lambda _: reception.cancel()), Meter(quiet=quiet) as meter:
        thread.start()
        while thread.is_alive():
            thread.join(POLL)
            if reception.received:
                meter.show("storing" if reception.storing else "received", reception.received)
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


def _elsewhere(exc: MigrationError) -> str | None:
    """Where else to store a machine whose only copy is in this process."""
    note(f"whimbrel: {exc}")
    note("the source has let go of its machine: it is in the memory of this process and nowhere else")
    if sys.stdin.isatty() and sys.stderr.isatty():
        path: str = click.prompt("another path to store it at", err=True)
        return path
    path = os.path.join(tempfile.gettempdir(), f"whimbrel-{os.getpid()}.stream")  # noqa: PTH118 - a path as text
    if os.path.lexists(path):
        return None
    note(f"trying {path}")
    return path


def _rows(receipt: Receipt) -> Iterator[tuple[str, str]]:
    yield "machine", receipt.machine
    yield "memory", f"{format_size(receipt.ram)} in {receipt.blocks} blocks"
    yield "devices", str(receipt.devices)
    taken = receipt.seconds - receipt.storing_seconds
    yield "received", f"{format_size(receipt.received)} in {format_seconds(taken)}, {_rate(receipt.received, taken)}"
    yield "stored", f"{format_size(receipt.stored)} in {receipt.file}, {format_seconds(receipt.storing_seconds)}"
    yield "source", "was told that it is safe" if receipt.told else "did not listen (return-path is off there)"


def _rate(count: int, seconds: float) -> str:
    return format_rate(count / max(seconds, 1e-9))
