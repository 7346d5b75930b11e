"""Streams of machines that nobody here has a model of, and beside each the machine itself: the perfect copy.

Everything is written with `struct` from the format's text, without a line of whimbrel's. A :class:`Script` writes one
stream, element by element; whatever it writes into RAM or as a device it also keeps as what a reader must find.
"""

from __future__ import annotations

import json
import struct

import attrs
import numpy as np

PAGE = 4096

EOF, START, PART, END, FULL = b"\0", b"\x01", b"\x02", b"\x03", b"\x04"
COMMAND, FOOTER = b"\x08", b"\x7e"

EOS = struct.pack(">Q", 0x10)
RAM_ID = 2
FIRST_PING, PROOF = 1, 0x77686D62


def u16(number):
    return struct.pack(">H", number)


def u32(number):
    return struct.pack(">I", number)


def u64(number):
    return struct.pack(">Q", number)


def str8(name):
    return bytes([len(name)]) + name.encode("ascii")


def described(text):
    """A description's JSON with its head."""
    return b"\x06" + u32(len(text)) + text


@attrs.frozen
class Shape:
    """What a machine type's stream has around its sections (format, section 1.5)."""

    name: str
    configuration: bool
    footers: bool
    description: bool

    def __str__(self):
        return self.name


TO_2_2 = Shape("up to 2.2", configuration=False, footers=False, description=False)
AT_2_3 = Shape("2.3", configuration=False, footers=False, description=True)
FROM_2_4 = Shape("from 2.4", configuration=True, footers=True, description=True)
SUPPRESSED = Shape("suppress-vmdesc", configuration=True, footers=True, description=False)
SHAPES = (TO_2_2, AT_2_3, FROM_2_4, SUPPRESSED)
FOOTED = (FROM_2_4, SUPPRESSED)


@attrs.define
class Device:
    """A device section; of `described` a reader is told only where there is a description."""

    name: str
    section_id: int
    body: bytes = b""
    instance: int = 0
    version: int = 1
    fields: list | None = None
    subsections: list = attrs.field(factory=list)

    @property
    def described(self):
        fields = self.fields
        if fields is None:
            fields = [{"name": "data", "type": "buffer", "size": len(self.body)}]
        entry = {"name": self.name, "instance_id": self.instance, "vmsd_name": self.name, "version": self.version}
        entry["fields"] = fields
        if self.subsections:
            entry["subsections"] = self.subsections
        return entry

    @property
    def head(self):
        return FULL + u32(self.section_id) + str8(self.name) + u32(self.instance) + u32(self.version)

    @property
    def key(self):
        """What a reader must find of it."""
        return self.name, self.instance, self.version, self.body


class Script:
    """One stream as it is written, in `data`. `blocks` are names and numbers of pages.

    `ram` and `devices` are the perfect copy. `marks` says where each element begins: (offset, what).
    """

    def __init__(self, shape, blocks, *, machine="bench-1", capabilities=(), uuid=None, addresses=None, ram_id=RAM_ID):
        self.shape, self.machine, self.capabilities = shape, machine, capabilities
        self.uuid = uuid if shape.configuration else None
        self.ram = {name: np.zeros((pages, PAGE), np.uint8) for name, pages in blocks.items()}
        self.addresses = addresses
        self.devices = []
        self.data = bytearray()
        self.marks = []
        self.ram_id = ram_id
        self.current = None  # the block that a record may continue
        self.came = set()  # blocks of which a page came
        self.said = None  # a description that is not the one it should be

    # ------------------------------------------------------------------------------------------ elements

    def mark(self, what):
        self.marks.append((len(self.data), what))

    def at(self, what):
        """Where the first element of that name begins."""
        return next(offset for offset, mark in self.marks if mark == what)

    def header(self):
        self.mark("header")
        self.data += b"QEVM" + u32(3)
        if self.shape.configuration:
            self.mark("configuration")
            self.data += b"\x07" + u32(len(self.machine)) + self.machine.encode()
            if self.capabilities:
                self.data += b"\x05" + str8("configuration/capabilities") + u32(1)
                self.data += u32(len(self.capabilities)) + b"".join(map(str8, self.capabilities))
            if self.uuid is not None:
                self.data += b"\x05" + str8("configuration/uuid") + u32(1) + self.uuid
        return self

    def open_return_path(self):
        self.mark("command")
        self.data += COMMAND + u16(1) + u16(0)
        return self

    def ping(self, value=FIRST_PING):
        self.mark("command")
        self.data += COMMAND + u16(2) + u16(4) + u32(value)
        return self

    def start(self):
        self.mark("START")
        self.data += START + u32(self.ram_id) + str8("ram") + u32(0) + u32(4)
        self.data += u64(sum(map(len, self.ram.values())) * PAGE | 0x004)
        for name, pages in self.ram.items():
            self.data += str8(name) + u64(len(pages) * PAGE)
            if self.addresses is not None:
                self.data += u64(self.addresses[name])
        self.data += EOS
        return self._footer(self.ram_id)

    def part(self, *records):
        """Each record is (block, page, bytes of a page or the fill byte of a ZERO record[, name it again])."""
        self.mark("PART")
        return self._records(PART, records)

    def end(self, *records):
        self.mark("END")
        return self._records(END, records)

    def full(self, *devices):
        for device in devices:
            self.mark("FULL")
            self.data += device.head + device.body
            self._footer(device.section_id)
            self.devices.append(device)
        return self

    def eof(self):
        self.mark("EOF")
        self.data += EOF
        return self

    def description(self):
        if self.shape.description:
            self.mark("description")
            self.data += described(self.text)
        return self

    def finish(self):
        """The end of the stream and its description, once; returns the stream."""
        if "EOF" not in dict(map(reversed, self.marks)):
            self.eof().description()
        return bytes(self.data)

    @property
    def text(self):
        """The description."""
        if self.said is not None:
            return self.said
        devices = [device.described for device in self.devices]
        return json.dumps({"configuration": {}, "page_size": PAGE, "devices": devices}).encode()

    def shared(self):
        """Blocks that the destination has already, with x-ignore-shared: none of their pages comes."""
        return set(self.ram) - self.came if self.addresses is not None else set()

    # ----------------------------------------------------------------------------------------- internals

    def _records(self, kind, records):
        self.data += kind + u32(self.ram_id)
        for block, page, content, *again in records:
            whole = isinstance(content, bytes)
            flags = 0x008 if whole else 0x002
            name = b""
            if block == self.current and not again:
                flags |= 0x020
            else:
                name = str8(block)
            self.current = block
            self.came.add(block)
            self.data += u64(page * PAGE | flags) + name + (content if whole else bytes([content]))
            self.ram[block][page] = np.frombuffer(content, np.uint8) if whole else content
        self.data += EOS
        return self._footer(self.ram_id)

    def _footer(self, section_id):
        if self.shape.footers:
            self.data += FOOTER + u32(section_id)
        return self


# --------------------------------------------------------------------------------------------------------- streams


def page(seed):
    """A page of bytes that are not zero."""
    return np.random.default_rng(seed).integers(1, 256, PAGE, np.uint8).tobytes()


def small(shape, **more):
    """A machine of three pages and three devices: as few bytes as have everything in them that the shape has."""
    script = Script(shape, {"a": 2, "b": 1}, **more).header()
    script.start()
    script.part(("a", 0, page(1)), ("a", 1, 0), ("b", 0, 0))
    script.end(("a", 1, 9))
    script.full(
        Device("timer", 4, b"\x01\x02\x03\x04"), Device("twin", 5, b"one"), Device("twin", 6, b"other", version=3)
    )
    return script


def lookalikes(device_id, *, certain):
    """Bytes of a device that look like the end of it; unless `certain`, only a description tells that they are not.

    What is `certain` shows by its own bytes, sooner or later, that it is none.
    """
    footer = FOOTER + u32(device_id)
    looks = [
        footer + b"\xff",
        footer + FULL + u32(device_id) + str8("a") + u32(0) + u32(1),  # an id that there was
        footer + FULL + u32(90000) + b"\x03a\xffb",  # no name
        footer + PART + u32(77777),  # no such section goes on
        footer + COMMAND + u16(2) + u16(5),
        footer + COMMAND + u16(12),
        footer + b"\0\x06" + u32(1000) + b"{}",
        footer + b"\0\x05",
        FOOTER + u32(device_id + 1) + EOF,  # another's
        EOF + described(b'{"a": 1x}'),
        EOF + described(b'{"page_size": 5}'),
        b'\0\x06\x7f\xff\xff\xff{"devices": []',
        b"QEVM\0\0\0\x03\x07",
    ]
    if not certain:
        looks += [
            footer + FULL + u32(90001) + str8("fake") + u32(0) + u32(1),
            footer + START + u32(90002) + str8("ram") + u32(0) + u32(4),
            footer + COMMAND + u16(2) + u16(4) + u32(PROOF),
            footer + COMMAND + u16(1) + u16(0),
            footer + EOF + described(b'{"page_size": 1, "devices": []}'),
            EOF + described(b'{"page_size": 1, "devices": []}'),
        ]
    return looks


def random_stream(dice, shape, *, return_path=False, early=True, with_end=None):
    """A stream in which everything that may come does now and then; `dice` is a `random.Random`."""
    names = dice.sample(["pc.ram", "x", "/rom@etc/acpi/tables", "0000:00:02.0/vga.vram", "n" * 255, " ", "ram"], 3)
    blocks = {name: dice.choice([1, 2, 3, 9]) for name in names[: dice.randint(1, 3)]}
    capabilities, addresses = (), None
    if shape.configuration and dice.random() < 0.3:
        capabilities = ("x-ignore-shared",)
        addresses = {name: dice.choice([0, 0x100000000, 2**64 - PAGE]) for name in blocks}
    script = Script(
        shape,
        blocks,
        machine=dice.choice(["m", "pc-i440fx-7.2", "q" * 255]),
        capabilities=capabilities,
        uuid=dice.randbytes(16) if shape.configuration and dice.random() < 0.5 else None,
        addresses=addresses,
        ram_id=dice.choice([0, 1, 2, 300]),
    )
    script.header()
    if return_path:
        script.open_return_path().ping()
    ids = iter(dice.sample(range(301, 4000), 40) if dice.random() < 0.5 else range(301, 400))
    early = early and shape.footers

    def devices(most, *, certain=not shape.description):
        return [_device(dice, next(ids), shape, certain=certain) for _ in range(dice.randint(0, most))]

    if early and dice.random() < 0.3:
        script.full(*devices(2, certain=True))
    script.start()
    for _ in range(dice.randint(0, 4)):
        script.part(*_records(dice, script))
        if return_path and dice.random() < 0.3:
            script.ping(dice.randrange(2**32))
        if early and dice.random() < 0.2:
            script.full(*devices(2, certain=True))
    if with_end if with_end is not None else dice.random() < 0.8:
        script.end(*_records(dice, script))
    script.full(*devices(5))
    return script


def _records(dice, script):
    """Records for one body, each page at most once, in any order."""
    pages = [(name, number) for name, block in script.ram.items() for number in range(len(block))]
    if script.addresses is not None and len(script.ram) > 1:
        pages = [(name, number) for name, number in pages if name != next(iter(script.ram))]
    records = []
    for name, number in dice.sample(pages, dice.randint(0, len(pages))):
        content = dice.choice([0, 0, dice.randrange(256), bytes(PAGE), dice.randbytes(PAGE)])
        records.append((name, number, content, *(["again"] if dice.random() < 0.2 else [])))
    return records


def _device(dice, section_id, shape, *, certain):
    name = dice.choice(["timer", "twin", "0000:00:03.0/virtio-net", "cpu_common", "globalstate", "d" * 255])
    body = b""
    if shape.footers or shape.description:
        looks = lookalikes(section_id, certain=certain)
        body = b"".join(dice.choice([dice.randbytes(3), b"\0", *looks]) for _ in range(dice.randint(0, 4)))
    else:
        body = dice.choice([b"", b"\0", bytes(range(100)), b"\xff" * 70])
    return Device(name, section_id, body, instance=dice.choice([0, 0, 0, 1, 7]), version=dice.choice([1, 2, 20061113]))
