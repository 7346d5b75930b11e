"""What holds a stream together: header, configuration, section headers and footers (wire format, section 1)."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import attrs

from whimbrel.abc import Parser, Peek, SectionKind
from whimbrel.errors import StreamError
from whimbrel.wire.primitives import NAME_MAX, U32, checked_name, parse_str8, parse_u8, parse_u32, str8

MAGIC: Final = 0x5145564D  # "QEVM"
LANE_MAGIC: Final = 0x11223344  # what connections of multifd begin with (section 5)
VERSION: Final = 3
HEADER: Final = U32.pack(MAGIC) + U32.pack(VERSION)

CONFIGURATION_CAPABILITIES_MAX: Final = 64


class Element(IntEnum):
    """The byte that begins each element of a stream (section 1.2)."""

    EOF = 0x00
    SECTION_START = 0x01
    SECTION_PART = 0x02
    SECTION_END = 0x03
    SECTION_FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    SECTION_FOOTER = 0x7E


TOP_LEVEL: Final = frozenset({
    Element.EOF,
    Element.SECTION_START,
    Element.SECTION_PART,
    Element.SECTION_END,
    Element.SECTION_FULL,
    Element.COMMAND,
})  # fmt: skip

KIND_OF_ELEMENT: Final = {
    Element.SECTION_START: SectionKind.START,
    Element.SECTION_PART: SectionKind.PART,
    Element.SECTION_END: SectionKind.END,
    Element.SECTION_FULL: SectionKind.FULL,
}
ELEMENT_OF_KIND: Final = {kind: element for element, kind in KIND_OF_ELEMENT.items()}


@attrs.frozen
class Configuration:
    """The configuration section: which machine this is a stream of (section 1.4). `uuid` is 16 bytes or None."""

    machine: str
    capabilities: tuple[str, ...] = ()
    uuid: bytes | None = None


@attrs.frozen
class SectionHeader:
    """The head of a section that names itself (START and FULL)."""

    section_id: int
    idstr: str
    instance_id: int
    version_id: int


def parse_header() -> Parser[None]:
    """The eight bytes at the start of a stream (section 1.1). Raises StreamError for anything else."""
    magic = yield from parse_u32()
    if magic != MAGIC:
        raise StreamError(
            f"the stream begins with {magic:#010x}, expected {MAGIC:#010x} ('QEVM')",
            hint="it is a lane: switch the capability multifd on here too"
            if magic == LANE_MAGIC
            else "this is not a migration stream",
        )
    version = yield from parse_u32()
    if version != VERSION:
        raise StreamError(f"the stream's format version is {version}, expected {VERSION}")


def parse_element() -> Parser[Element]:
    """The type byte of the next top-level element. Raises StreamError for a byte that is not legal there."""
    value = yield from parse_u8()
    if value not in TOP_LEVEL:
        raise StreamError(f"unknown section type {value:#04x}, expected one of 00 01 02 03 04 08")
    return Element(value)


def configuration(config: Configuration) -> bytes:
    """The configuration section with its type byte."""
    name = config.machine.encode("ascii")
    parts = [bytes((Element.CONFIGURATION,)), U32.pack(len(name)), name]
    if config.capabilities:
        parts += [_subsection("configuration/capabilities"), U32.pack(len(config.capabilities))]
        parts += [str8(capability) for capability in config.capabilities]
    if config.uuid is not None:
        parts += [_subsection("configuration/uuid"), config.uuid]
    return b"".join(parts)


def _subsection(name: str) -> bytes:
    return bytes((Element.SUBSECTION,)) + str8(name) + U32.pack(1)


def parse_configuration() -> Parser[Configuration]:
    """The configuration section behind its type byte, with its subsections. Raises StreamError."""
    length = yield from parse_u32()
    if not 1 <= length <= NAME_MAX:
        raise StreamError(f"the machine's name is {length} bytes long, expected 1 to {NAME_MAX}")
    machine = checked_name(bytes((yield length)), "the machine")
    capabilities: tuple[str, ...] = ()
    uuid: bytes | None = None
    seen: set[str] = set()
    while (yield Peek(1))[0] == Element.SUBSECTION:
        yield 1
        name = yield from parse_str8("a configuration subsection")
        version = yield from parse_u32()
        if name in seen:
            raise StreamError(f"the configuration has subsection {name!r} twice")
        seen.add(name)
        if version != 1:
            raise StreamError(f"configuration subsection {name!r} has version {version}, expected 1")
        if name == "configuration/capabilities":
            capabilities = yield from _parse_capabilities()
        elif name == "configuration/uuid":
            uuid = bytes((yield 16))
        elif name == "configuration/target-page-bits":
            bits = yield from parse_u32()
            if bits != 12:
                raise StreamError(f"the source's pages have {bits} bits, expected 12 (4096 bytes)")
        else:
            raise StreamError(f"unknown configuration subsection {name!r}")
    return Configuration(machine, capabilities, uuid)


def _parse_capabilities() -> Parser[tuple[str, ...]]:
    count = yield from parse_u32()
    if count > CONFIGURATION_CAPABILITIES_MAX:
        raise StreamError(f"the configuration lists {count} capabilities, at most {CONFIGURATION_CAPABILITIES_MAX}")
    names: list[str] = []
    for _ in range(count):
        names.append((yield from parse_str8("a capability")))  # noqa: PERF401 - a generator cannot delegate inside
    return tuple(names)


def section_header(kind: SectionKind, header: SectionHeader) -> bytes:
    """The head of a section: with its name for START and FULL, its id alone for PART and END (section 1.3)."""
    head = bytes((ELEMENT_OF_KIND[kind],)) + U32.pack(header.section_id)
    if kind in (SectionKind.PART, SectionKind.END):
        return head
    return head + str8(header.idstr) + U32.pack(header.instance_id) + U32.pack(header.version_id)


def parse_section_header(kind: SectionKind) -> Parser[SectionHeader | int]:
    """What follows the type byte: a SectionHeader for START and FULL, the section id for PART and END."""
    section_id = yield from parse_u32()
    if kind in (SectionKind.PART, SectionKind.END):
        return section_id
    idstr = yield from parse_str8("a section")
    instance_id = yield from parse_u32()
    version_id = yield from parse_u32()
    return SectionHeader(section_id, idstr, instance_id, version_id)


def section_footer(section_id: int) -> bytes:
    """What ends a section: its id again."""
    return bytes((Element.SECTION_FOOTER,)) + U32.pack(section_id)


def parse_section_footer(section_id: int) -> Parser[None]:
    """The footer of section `section_id`. Raises StreamError where anything else stands."""
    mark = yield from parse_u8()
    if mark != Element.SECTION_FOOTER:
        raise StreamError(
            f"a section footer (0x7e) must follow, but {mark:#04x} does",
            hint="the section's body was longer or shorter than its reader believes",
        )
    found = yield from parse_u32()
    if found != section_id:
        raise StreamError(f"the footer is of section {found}, expected {section_id}")
