"""Takes a saved stream apart by the format's text alone, strictly: what is not allowed to be there is `Refused`.

Nothing of whimbrel's is used. How long the devices are is not in a stream without a description, so the analyser is
told; it checks that each ends where it must.
"""

from __future__ import annotations

import json
import struct

import attrs
import numpy as np

PAGE = 4096


class Refused(Exception):
    """No valid stream."""


@attrs.define
class Analysis:
    """What a stream holds. `elements` are the kinds in order, `records` (block, page, is zero) as they came."""

    machine: str | None = None
    capabilities: tuple = ()
    uuid: bytes | None = None
    ram: dict = attrs.field(factory=dict)
    addresses: dict = attrs.field(factory=dict)
    records: list = attrs.field(factory=list)
    devices: list = attrs.field(factory=list)
    elements: list = attrs.field(factory=list)
    commands: list = attrs.field(factory=list)
    footers: bool = False
    text: bytes | None = None


class Analyser:
    """Reads one stream; `lengths` are those of the devices' bodies, in their order."""

    def __init__(self, data, lengths):
        self.data, self.at = bytes(data), 0
        self.lengths = list(lengths)
        self.found = Analysis()
        self.current = None
        self.ids = {}
        self.state = {}

    def run(self):
        found = self.found
        self.expect(b"QEVM\0\0\0\x03", "the header")
        if self.data[self.at] == 7:
            self.at += 1
            self.configuration()
        while (kind := self.number(1)) != 0:
            found.elements.append(kind)
            if kind in (1, 2, 3, 4):
                self.section(kind)
            elif kind == 8:
                self.command()
            else:
                raise Refused(f"element {kind:#x} at {self.at - 1:#x}")
        if self.lengths:
            raise Refused(f"{len(self.lengths)} devices are missing")
        if self.at < len(self.data):
            self.expect(b"\x06", "the description")
            found.text = self.take(self.number(4))
            entries = [(entry["name"], entry["instance_id"]) for entry in json.loads(found.text)["devices"]]
            if entries != [device[:2] for device in found.devices]:
                raise Refused("the description is not that of the devices")
        if self.at != len(self.data):
            raise Refused(f"{len(self.data) - self.at} bytes behind the end")
        return found

    def configuration(self):
        found = self.found
        found.machine = self.take(self.number(4)).decode("ascii")
        while self.data[self.at] == 5:
            self.at += 1
            name = self.name()
            if self.number(4) != 1:
                raise Refused("a subsection of another version")
            if name == "configuration/capabilities":
                found.capabilities = tuple(self.name() for _ in range(self.number(4)))
            elif name == "configuration/uuid":
                found.uuid = self.take(16)
            else:
                raise Refused(f"subsection {name}")

    def section(self, kind):
        number = self.number(4)
        if kind in (1, 4):
            if number in self.ids:
                raise Refused(f"section id {number} comes twice")
            self.ids[number] = (self.name(), self.number(4), self.number(4))
            self.state[number] = "started" if kind == 1 else "full"
        elif self.state.get(number) != "started":
            raise Refused(f"section {number} goes on and was not begun")
        if kind == 3:
            self.state[number] = "ended"
        name, instance, version = self.ids[number]
        if kind == 4:
            self.found.devices.append((name, instance, version, self.take(self.lengths.pop(0))))
        elif (name, instance, version) == ("ram", 0, 4):
            self.ram(kind)
        else:
            raise Refused(f"section {name} in rounds")
        has_footer = self.data[self.at : self.at + 1] == b"\x7e"
        if kind == 1:
            self.found.footers = has_footer
        if has_footer != self.found.footers:
            raise Refused(f"some sections have footers and some have not, at {self.at:#x}")
        if has_footer:
            self.expect(b"\x7e" + struct.pack(">I", number), "a footer")

    def ram(self, kind):
        if kind == 1:
            total = self.number(8)
            if total % PAGE != 0x004:
                raise Refused("no list of blocks")
            left = total - 0x004
            while left:
                name, size = self.name(), self.number(8)
                if name in self.found.ram or size % PAGE or not 0 < size <= left:
                    raise Refused(f"block {name}")
                self.found.ram[name] = np.zeros((size // PAGE, PAGE), np.uint8)
                if "x-ignore-shared" in self.found.capabilities:
                    self.found.addresses[name] = self.number(8)
                left -= size
        while (word := self.number(8)) != 0x10:
            if kind == 1:
                raise Refused("a record in START")
            self.record(word % PAGE, word // PAGE)

    def record(self, flags, page):
        if not flags & 0x020:
            self.current = self.name()
        if flags & ~0x020 not in (0x002, 0x008) or self.current not in self.found.ram:
            raise Refused(f"record {flags:#x} of {self.current!r}")
        pages = self.found.ram[self.current]
        if page >= len(pages):
            raise Refused("a page outside of its block")
        zero = bool(flags & 0x002)
        pages[page] = self.number(1) if zero else np.frombuffer(self.take(PAGE), np.uint8)
        self.found.records.append((self.current, page, zero))

    def command(self):
        number, length = self.number(2), self.number(2)
        self.found.commands.append((number, self.take(length)))

    def name(self):
        name = self.take(self.number(1))
        if not name:
            raise Refused("an empty name")
        return name.decode("ascii")

    def number(self, size):
        return int.from_bytes(self.take(size), "big")

    def expect(self, data, what):
        if self.take(len(data)) != data:
            raise Refused(f"{what} was expected at {self.at - len(data):#x}")

    def take(self, size):
        if self.at + size > len(self.data):
            raise Refused(f"the stream ends at {len(self.data):#x}")
        self.at += size
        return self.data[self.at - size : self.at]


def analyse(data, script):
    """What is in the stream that was saved of the machine which `script` has written."""
    return Analyser(data, [len(device.body) for device in script.devices]).run()
