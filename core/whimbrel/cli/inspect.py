"""`whimbrel inspect`: what is in a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from whimbrel.cli._meter import Meter
from whimbrel.cli._options import config_option, json_option
from whimbrel.cli._output import complain, note, print_json, print_rows, print_table
from whimbrel.errors import UnknownNameError
from whimbrel.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from whimbrel.capture.inspection import BlockReport, DeviceReport, Inspection
    from whimbrel.wire.fields import Value

SHOWN: Final = 60  # characters of a value


@click.command()
@click.argument("file")
@click.option("--devices", "with_devices", is_flag=True, help="List the devices; with --json with all their fields.")
@click.option("--ram", "with_ram", is_flag=True, help="List the RAM blocks, and how their pages came.")
@click.option("--device", "names", metavar="NAME", multiple=True, help="Show the fields of a device; may be repeated.")
@config_option
@json_option
def inspect(
    file: str, with_devices: bool, with_ram: bool, names: Sequence[str], config: str | None, as_json: bool
) -> int:
    """Show what is in the stream stored in FILE: which machine, its RAM, its devices and their fields.

    FILE is a whole stream, from a QEMU (migrate to file: or exec:cat) or from `whimbrel receive`. Of one that is cut or
    damaged everything before that is shown, and the status is 1. Nothing is loaded, so it may be of any size.
    """
    from whimbrel.capture.inspection import inspect as look
    from whimbrel.settings import Settings

    with Meter(quiet=as_json) as meter:
        found = look(file, progress=lambda count: meter.show("read", count), settings=Settings.load(config))
    chosen = _named(found, names)
    if as_json:
        shown = found.as_dict(values=with_devices)
        if names:
            shown["devices"] = [device.as_dict() for device in chosen]
        print_json(shown)
    else:
        _print(found, chosen, with_ram=with_ram, with_devices=with_devices)
    if found.error is not None:
        complain(
            f"{found.error}; what is shown came before that" if found.bodies or found.devices else str(found.error)
        )
        return found.error.exit_code
    return 0


def _named(found: Inspection, names: Sequence[str]) -> list[DeviceReport]:
    """The devices of these names, in the stream's order. Raises UnknownNameError, unless the stream was cut."""
    there = {device.name for device in found.devices}
    for name in names:
        if name not in there and found.error is None:
            raise UnknownNameError("device", name, there)
    return [device for device in found.devices if device.name in names]


def _print(found: Inspection, chosen: Sequence[DeviceReport], *, with_ram: bool, with_devices: bool) -> None:
    print_rows(_summary(found))
    if with_ram:
        click.echo()
        print_table(
            ["RAM block", "size", "pages", "normal", "zero", "xbzrle", "compressed", "again", "never"],
            [_block_row(block) for block in found.blocks],
        )
    if with_devices:
        click.echo()
        print_table(
            ["id", "device", "instance", "version", "bytes", "fields"],
            [_device_row(device) for device in found.devices],
        )
    for device in chosen:
        click.echo()
        if device.decoded is None:
            note(f"{device.name}: {device.size} bytes, not decoded: {device.problem}")
            continue
        heads = [f"{device.name}, instance {device.instance_id}", "type", "byte", "value"]
        rows = [
            (path, field.type, str(field.offset), shown_value(field.value)) for path, field in device.decoded.leaves()
        ]
        print_table(heads, rows)


def _summary(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "machine", found.machine or "not named"
    yield "uuid", str(found.uuid or "")
    yield "capabilities", ", ".join(found.capabilities)
    yield "stream", _stream(found)
    if found.blocks:
        yield "memory", f"{format_size(found.ram)} in {len(found.blocks)} blocks"
        yield "pages", _pages(found)
    yield "devices", _devices(found)
    if found.behind:
        what = "bytes" if found.description is not None else "bytes, and no whole description"
        yield "behind its end", f"{found.behind} {what}"


def _stream(found: Inspection) -> str:
    parts = [
        "a return path" if found.return_path else "",
        "footers" if found.footers else "no footers",
        "no description" if found.description is None else f"a description of {format_size(found.description)}",
    ]
    return f"{format_size(found.size)}, with {', '.join(part for part in parts if part)}"


def _pages(found: Inspection) -> str:
    kinds = {
        "normal": sum(block.normal for block in found.blocks),
        "zero": sum(block.zero for block in found.blocks),
        "xbzrle": sum(block.xbzrle for block in found.blocks),
        "compressed": sum(block.compressed for block in found.blocks),
    }
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "none"
    return f"{counts}; {format_size(found.ram_bytes)} in {found.bodies} sections"


def _devices(found: Inspection) -> str:
    decoded = sum(device.decoded is not None for device in found.devices)
    if not found.devices or found.description is None:
        return f"{len(found.devices)}{', a guess' if found.guessed else ''}"
    return f"{len(found.devices)}, {'all' if decoded == len(found.devices) else decoded} decoded to the last byte"


def _block_row(block: BlockReport) -> tuple[str, ...]:
    again, never = "", ""
    if block.distinct is not None:
        again, never = str(block.records - block.distinct), str(block.pages - block.distinct)
    counts = (block.pages, block.normal, block.zero, block.xbzrle, block.compressed)
    return block.name, format_size(block.size), *map(str, counts), again, never


def _device_row(device: DeviceReport) -> tuple[str, ...]:
    known = f"not decoded: {device.problem}" if device.decoded is None else str(len(list(device.decoded.leaves())))
    numbers = (device.instance_id, device.version_id, device.size)
    return str(device.section_id), device.name, *map(str, numbers), known


def shown_value(value: Value) -> str:
    """A field's value in a few characters: bytes as hexadecimal digits, large numbers too."""
    if value is None:
        return "not armed"
    if isinstance(value, bytes):
        text = value[: SHOWN // 2 + 1].hex()
    elif isinstance(value, tuple):
        text = " ".join(shown_value(item) for item in value[:SHOWN])
    else:
        text = hex(value) if type(value) is int and value > 0xFFFF else str(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
