"""`whimbrel inspect`: what is in a stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from whimbrel.cli._meter import Meter
from whimbrel.cli._options import config_option, json_option
from whimbrel.cli._output import complain, print_json
from whimbrel.errors import UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.capture.findings import DeviceReport, Inspection


@click.command()
@click.argument("file")
@click.option(
    "--devices", "names", metavar="NAME", multiple=True, help="Show this device alone, in full; may be repeated."
)
@config_option
@json_option
def inspect(file: str, names: Sequence[str], config: str | None, as_json: bool) -> int:
    """Show what is in the stream stored in FILE: which machine, its RAM, its devices, and where the bytes went.

    FILE is a whole stream, from a QEMU (migrate to file: or exec:cat) or from `whimbrel receive`. Of one that is cut or
    damaged everything before that is shown, and the status is 1. Nothing is loaded, so it may be of any size.

    Of each RAM block its pages are counted as they are at the end of the stream: `zero`; `normal`, which came as they
    are, and how many `distinct` contents these have; `XBZRLE`, whose contents cannot be known from the stream alone;
    and those that came `never`. A page that has not changed is not sent again, so there were at least so many passes as
    the page took that came most often.

    With --json everything is one object, and the fields of all devices are in it, with --devices those of the named
    ones. Its `breakdown` adds up to `size`; `cut` says where a stream ends before its time, and what was expected.
    """
    from whimbrel.capture.inspection import inspect as look
    from whimbrel.cli._inspection import print_device, print_overview
    from whimbrel.settings import Settings

    total = _size(file)
    with Meter(quiet=as_json) as meter:
        found = look(file, progress=lambda count: meter.show("read", count, total), settings=Settings.load(config))
    chosen = _named(found, names)
    if as_json:
        shown = found.as_dict()
        if names:
            shown["devices"] = [device.as_dict() for device in chosen]
        print_json(shown)
    elif names:
        for number, device in enumerate(chosen):
            if number:
                click.echo()
            print_device(device)
    else:
        print_overview(found)
    if found.error is not None:
        complain(f"{found.error}; what is shown came before that")
        return found.error.exit_code
    return 0


def _size(file: str) -> int | None:
    """Bytes of the file, if that is what is read."""
    try:
        return Path(file).stat().st_size
    except (OSError, ValueError):
        return None  # what is wrong with it is said when it is opened


def _named(found: Inspection, names: Sequence[str]) -> list[DeviceReport]:
    """The devices of these names, in the stream's order. Raises UnknownNameError, unless the stream was cut."""
    there = {device.name for device in found.devices}
    for name in names:
        if name not in there and found.error is None:
            raise UnknownNameError("device", name, there)
    return [device for device in found.devices if device.name in names]
