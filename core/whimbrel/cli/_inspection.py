"""Shows people what was found in a stream: an overview, or devices in full."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

import click

from whimbrel.cli._output import print_rows, print_table
from whimbrel.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whimbrel.capture.findings import BlockReport, DeviceReport, DriveReport, Inspection, SectionReport
    from whimbrel.wire.fields import DecodedDevice, DecodedField, DecodedStruct, Value

BYTES: Final = 32  # of a value, that are shown
ITEMS: Final = 16  # of an array

_ROWS: Final = 8  # up to which numbers of passes have one each

_WHERE_ANY: Final = frozenset({"XBZRLE", "compressed", "never"})  # columns that are shown if there is something in them

_WORDS: Final = {
    "pages": "whole pages",
    "zero": "zero records",
    "xbzrle": "XBZRLE",
    "compressed": "compressed pages",
    "chunks": "chunks of drives",
    "record_heads": "heads of records",
    "section_heads": "heads of sections",
    "block_list": "the list of RAM blocks",
    "devices": "devices",
    "description": "the description",
    "commands": "commands",
    "header": "header and configuration",
    "behind": "behind the end",
    "unread": "not understood",
}


# ------------------------------------------------------------------------------------------------------- overview


def print_overview(found: Inspection) -> None:
    """Print what there is to know at a glance."""
    print_rows(_head(found))
    if found.blocks:
        click.echo()
        _print_blocks(found)
    if found.drives:
        click.echo()
        print_table(["drive", "size", "chunks", "zero", "distinct", "passes", "bytes"], map(_drive, found.drives))
    if len(found.times) > 1:
        click.echo()
        print_table(["came", "pages"], _passes(found))
    if found.sections:
        click.echo()
        devices = iter(found.devices)
        rows = [_section(found, section, devices) for section in found.sections]
        print_table(["section", "kind", "instance", "version", "bytes", "decoded"], rows)
    click.echo()
    print_table(["where the bytes went", "bytes", "share"], _breakdown(found))


def _head(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "machine", found.machine or "not named"
    yield "uuid", str(found.uuid or "")
    yield "capabilities", ", ".join(found.capabilities)
    yield "stream", f"{format_size(found.size)}, {_form(found)}"
    yield "sent", f"to {'somebody' if found.return_path else 'nobody'} who listens"
    if found.blocks:
        yield "memory", f"{format_size(found.ram)} in {len(found.blocks)} blocks"
    if found.passes:
        yield "passes", f"at least {found.passes}"
    yield "devices", _devices(found)
    if found.behind:
        yield "behind", f"{found.behind} bytes came behind the end"
    if found.cut is not None:
        place = [
            found.cut.section and f"in section {found.cut.section}",
            found.cut.block and f"block {found.cut.block!r}",
        ]
        yield "cut", ", ".join(filter(None, [f"at byte {found.cut.offset}", *place, f"expected {found.cut.expected}"]))


def _form(found: Inspection) -> str:
    parts = {
        "a configuration": found.configuration,
        "footers": found.footers,
        f"a description of {format_size(found.description or 0)}": found.description is not None,
    }
    named = ", ".join(part for part, there in parts.items() if there)
    return f"with {named}" if named else "without configuration, footers and description"


def _devices(found: Inspection) -> str:
    count = str(len(found.devices))
    decoded = sum(device.decoded is not None for device in found.devices)
    if not found.devices:
        return count
    if found.description is None:
        guessed = "told apart by a guess, " if found.guessed else ""
        return f"{count}, {guessed}not decoded: the stream does not describe them"
    return f"{count}, {'all' if decoded == len(found.devices) else decoded} decoded to the last byte"


def _print_blocks(found: Inspection) -> None:
    heads = ["RAM block", "size", "zero", "normal", "distinct", "XBZRLE", "compressed", "never", "records", "bytes"]
    rows = [_block(block) for block in found.blocks]
    shown = [
        column
        for column, head in enumerate(heads)
        if head not in _WHERE_ANY or any(row[column] not in ("", "0") for row in rows)
    ]
    print_table([heads[column] for column in shown], [[row[column] for column in shown] for row in rows])
    if not found.tracked:
        from whimbrel.capture.inspection import TRACKED_MAX

        click.echo(f"the pages of more than {format_size(TRACKED_MAX)} of RAM are not told apart")


def _block(block: BlockReport) -> list[str]:
    last = block.last
    pages: list[int | None] = [None] * 6
    if last is not None:
        pages = [last.zero, last.normal, block.distinct, last.xbzrle, last.compressed, block.pages - last.total]
    shown = ["" if count is None else str(count) for count in pages]
    return [block.name, format_size(block.size), *shown, str(block.records.total), format_size(block.bytes)]


def _drive(drive: DriveReport) -> list[str]:
    counts = drive.chunks, drive.zero, drive.distinct, drive.passes
    return [drive.name, format_size(drive.size), *map(str, counts), format_size(drive.bytes)]


def _passes(found: Inspection) -> Iterator[tuple[str, str]]:
    """How many pages came how often: each number by itself while there are few, else between powers of two."""
    times = list(found.times)
    few = len(times) <= _ROWS
    for _, group in groupby(times, key=lambda pair: pair[0] if few else (pair[0] - 1).bit_length() if pair[0] else -1):
        members = list(group)
        first, last = members[0][0], members[-1][0]
        often = _often(first) if first == last else f"{first} to {last} times"
        yield often, str(sum(pages for _, pages in members))


def _often(times: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(times, f"{times} times")


def _section(found: Inspection, section: SectionReport, devices: Iterator[DeviceReport]) -> list[str]:
    kind, gist = section.kind.name, ""
    if section.count > 1:
        kind = f"{kind} x {section.count}"
    if kind == "FULL":
        gist = _gist(found, next(devices))
    numbers = section.instance_id, section.version_id, section.size
    return [section.name, kind, *map(str, numbers), gist]


def _gist(found: Inspection, device: DeviceReport) -> str:
    if device.decoded is None:
        return device.problem if found.description is not None else ""
    fields, subsections = sum(1 for _ in device.decoded.leaves()), len(device.decoded.subsections)
    gist = f"{fields} {'field' if fields == 1 else 'fields'}"
    return gist + (f", {subsections} {'subsection' if subsections == 1 else 'subsections'}" if subsections else "")


def _breakdown(found: Inspection) -> Iterator[tuple[str, str, str]]:
    spent, total = found.breakdown, found.breakdown.total
    counts = {words: getattr(spent, name) for name, words in _WORDS.items()}
    for words, count in sorted(counts.items(), key=lambda item: -item[1]):
        if count:
            yield words, str(count), f"{100 * count / total:.1f} %"
    yield "all", str(total), ""


# -------------------------------------------------------------------------------------------------------- devices


def print_device(device: DeviceReport) -> None:
    """Print a device in full: every field and subsection, nested, with its type, its first byte and its value."""
    numbers = f"instance {device.instance_id}, version {device.version_id}, {device.size} bytes"
    click.echo(f"{device.name}: {numbers}")
    if device.decoded is None:
        click.echo(f"not decoded: {device.problem}")
        print_rows([("bytes", shown_value(device.body))])
    else:
        print_table(["field", "type", "byte", "value"], _parts(device.decoded, ""))


def _parts(struct: DecodedDevice | DecodedStruct, indent: str) -> Iterator[tuple[str, str, str, str]]:
    for field in struct.fields:
        yield from _field(field, indent)
    for part in struct.subsections:
        yield f"{indent}{part.name}", "subsection", "", _version(part)
        yield from _parts(part, indent + "  ")


def _field(field: DecodedField, indent: str) -> Iterator[tuple[str, str, str, str]]:
    from whimbrel.wire.fields import DecodedStruct

    name = f"{indent}{field.name}" + ("" if field.index is None else f"[{field.index}]")
    value = field.value
    if isinstance(value, DecodedStruct):
        yield name, field.type, str(field.offset), _version(value)
        yield from _parts(value, indent + "  ")
    elif isinstance(value, tuple) and any(isinstance(item, DecodedStruct) for item in value):
        for number, item in enumerate(value):
            assert isinstance(item, DecodedStruct)
            offset = field.offset + number * (field.size // len(value))
            yield f"{name}[{number}]", field.type, str(offset), _version(item)
            yield from _parts(item, indent + "  ")
    else:
        length = f"[{len(value)}]" if isinstance(value, tuple) else ""
        yield name, field.type + length, str(field.offset), shown_value(value)


def _version(struct: DecodedStruct) -> str:
    return "" if struct.name is None else f"{struct.name}, version {struct.version}"


def shown_value(value: Value) -> str:
    """A field's value: bytes as hexadecimal digits, large numbers too; of long ones the beginning."""
    if value is None:
        return "not armed"
    if isinstance(value, bytes):
        return value[:BYTES].hex() + _and_more(len(value) - BYTES, "bytes")
    if isinstance(value, tuple):
        return " ".join(map(shown_value, value[:ITEMS])) + _and_more(len(value) - ITEMS, "elements")
    return hex(value) if type(value) is int and value > 0xFFFF else str(value)


def _and_more(count: int, what: str) -> str:
    return f" … and {count} more {what}" if count > 0 else ""
