"""Devices at random, described as a QEMU describes its own, and the tails of streams that they make.

Everything is made from the format's text alone: sizes are counted, bytes are drawn, and what they mean is written down
beside them, without a line of whimbrel's. `Device.decoded` is what `DecodedDevice.as_dict` must show.
"""

from __future__ import annotations

import json
import math
import random
import struct

import attrs
from hypothesis import strategies as st

FULL, FOOTER, EOF = b"\x04", b"\x7e", b"\0"
NUMBERS = {
    "int8": ">b", "int16": ">h", "int32": ">i", "int64": ">q",
    "uint8": ">B", "uint16": ">H", "uint32": ">I", "uint64": ">Q",
    "int32 equal": ">i", "uint8 equal": ">B", "uint16 equal": ">H", "int32 le": ">i", "int64 equal": ">q",
    "CPU_Double_U": ">Q", "float32": ">f", "float64": ">d",
}  # fmt: skip
PRIVATE = ["buffer", "unused_buffer", "pci config", "virtio", "msix state", "nullptr", "fpreg"]


def u32(number):
    return struct.pack(">I", number)


def str8(name):
    return bytes([len(name)]) + name.encode()


@attrs.define
class Device:
    """A device section: its head, its body, how it is described, and what the body means."""

    name: str
    instance: int
    version: int
    section_id: int
    described: dict
    body: bytes
    decoded: dict

    @property
    def header(self):
        return u32(self.section_id) + str8(self.name) + u32(self.instance) + u32(self.version)

    @property
    def whole(self):
        return FULL + self.header + self.body

    @property
    def footer(self):
        return FOOTER + u32(self.section_id)


def tail(devices, *, footers=True, behind=EOF):
    """The sections of `devices`, and what stands behind them."""
    return b"".join(each.whole + (each.footer if footers else b"") for each in devices) + behind


def text(devices, **more):
    return json.dumps({**more, "page_size": 4096, "devices": [each.described for each in devices]}).encode()


def ending(devices):
    """EOF and the description."""
    said = text(devices)
    return EOF + b"\x06" + u32(len(said)) + said


# --------------------------------------------------------------------------------------------------- how it is made

names = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=2, max_size=12)


@st.composite
def _fields(draw, depth):
    fields = []
    for number in range(draw(st.integers(0, 4))):
        name = draw(names) if number % 2 else f"f{number}"
        kind = draw(st.sampled_from(["number", "array", "private", "bool", "timer", "bitmap", "null"] + ["nest"] * 3))
        if kind == "number":
            type_ = draw(st.sampled_from(list(NUMBERS)))
            fields.append({"name": name, "type": type_, "size": struct.calcsize(NUMBERS[type_])})
        elif kind == "array":
            type_ = draw(st.sampled_from([*NUMBERS, "bool", "timer", "buffer"]))
            size = {"bool": 1, "timer": 8, "buffer": 5}.get(type_) or struct.calcsize(NUMBERS[type_])
            fields.append({"name": name, "array_len": draw(st.integers(2, 5)), "type": type_, "size": size})
        elif kind == "private":
            fields.append({"name": name, "type": draw(st.sampled_from(PRIVATE)), "size": draw(st.integers(0, 20))})
        elif kind == "bool":
            fields.append({"name": name, "type": "bool", "size": 1})
        elif kind == "timer":
            fields.append({"name": name, "type": "timer", "size": 8})
        elif kind == "bitmap":
            fields.append({"name": name, "type": "bitmap", "size": 8 * draw(st.integers(0, 3))})
        elif kind == "null" or depth == 0:
            fields.append({"name": name, "type": "qtailq", "vmsd_name": "q", "version": 1, "fields": [], "size": 7})
        else:
            fields += draw(_nested(name, depth - 1))
    return fields


@st.composite
def _nested(draw, name, depth):
    """A struct in one of the ways that a description has for them."""
    way = draw(st.sampled_from(["one", "array", "indexed", "tmp", "vstruct", "too little"]))
    inner = draw(_struct(depth, subsections=way not in ("array", "too little")))
    size = _inner_size(inner)
    if way == "one":
        return [{"name": name, "type": "struct", "struct": inner, "size": size}]
    if way == "array" and size:
        length = draw(st.integers(2, 4))
        return [{"name": name, "array_len": length, "type": "struct", "struct": inner, "size": size}]
    if way in ("tmp", "vstruct"):
        return [{"name": name, "type": way, **inner, "size": size}]
    if way == "too little":
        return [{"name": name, "type": "tmp", **inner, "size": size + 3}]
    return [{"name": name, "index": index, "type": "struct", "struct": inner, "size": size} for index in range(2)]


@st.composite
def _struct(draw, depth, *, subsections=True):
    struct_ = {"vmsd_name": draw(names), "version": draw(st.integers(0, 2**32 - 1)), "fields": draw(_fields(depth))}
    if subsections and depth and draw(st.booleans()):
        struct_["subsections"] = draw(st.lists(_struct(depth - 1), max_size=2))
    return struct_


def _size(field):
    return field["size"] * field.get("array_len", 1)


def _part_size(part):
    return 6 + len(part["vmsd_name"]) + _inner_size(part)


def _inner_size(struct_):
    return sum(map(_size, struct_["fields"])) + sum(map(_part_size, struct_.get("subsections", ())))


class _Filler:
    """Draws a body's bytes and writes down what they mean."""

    def __init__(self, chance, nasty):
        self.chance, self.nasty = chance, nasty
        self.body = b""

    def struct(self, described):
        meant = {"vmsd_name": described.get("vmsd_name"), "version": described.get("version")}
        meant["fields"] = [self.field(field) for field in described["fields"]]
        if described.get("subsections"):
            meant["subsections"] = [self.part(part) for part in described["subsections"]]
        return meant

    def part(self, described):
        self.body += b"\x05" + str8(described["vmsd_name"]) + u32(described["version"])
        return self.struct(described)

    def field(self, field):
        begin = len(self.body)
        values = [self.value(field) for _ in range(field.get("array_len", 1))]
        assert len(self.body) - begin == _size(field)
        index = {"index": field["index"]} if "index" in field else {}
        known = {"name": field["name"], "type": field["type"], "offset": begin, "size": _size(field)}
        return {**known, **index, "value": values if "array_len" in field else values[0]}

    def value(self, field):
        type_, size = field["type"], field["size"]
        if "struct" in field:
            return self.struct(field["struct"])
        if type_ in ("tmp", "vstruct") and size == _inner_size(field):
            return self.struct(field)
        data = self.bytes(size)
        if type_ == "bool":
            data = bytes([data[0] & 1])
        if type_ == "timer" and self.chance.random() < 0.5:
            data = b"\xff" * 8
        self.body += data
        if type_ in NUMBERS:
            (value,) = struct.unpack(NUMBERS[type_], data)
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value
        if type_ == "bool":
            return data == b"\1"
        if type_ == "timer":
            return None if data == b"\xff" * 8 else int.from_bytes(data, "big")
        if type_ == "bitmap":
            return [int.from_bytes(data[at : at + 8], "big") for at in range(0, size, 8)]
        return data.hex()

    def bytes(self, size):
        """Bytes of any kind, and now and then those that look like the end of a section, or of the stream."""
        data = b""
        while len(data) < size:
            piece = self.chance.choice([self.chance.randbytes(4), b"\0", b"\x04\0\0", b"\x05", *self.nasty])
            data += piece if len(data) + len(piece) <= size else b"\xff"
        return data


def lookalikes(section_id):
    """What begins like the end of a section and cannot be one, as its last byte shows."""
    footer = FOOTER + u32(section_id)
    return [
        footer + b"\xff",
        footer + b"\x04" + u32(section_id) + b"\x01a" + u32(0) + u32(1),  # an id that there was
        footer + b"\x04" + u32(99999) + b"\x03a\xffb",  # no name
        footer + b"\x04" + u32(99999) + b"\0\0",
        footer + b"\x01" + u32(99999) + b"\x02a\n",
        footer + b"\x02" + u32(77777),  # no such section goes on
        footer + b"\x08\0\x02\0\x05",
        footer + b"\x08\0\x0c",
        footer + b"\0\x06" + u32(1000) + b"{}",
        footer + b"\0\x05",
        footer + b"\x7e",
    ]


@st.composite
def devices(draw, *, most=4, depth=2, nasty=True):
    """Some devices of one stream; the pair of name and instance may come twice, the id does not."""
    made = []
    chance = random.Random(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, most))
    for section_id in draw(st.lists(st.integers(0, 300), min_size=count, max_size=count, unique=True)):
        filler = _Filler(chance, lookalikes(section_id) if nasty else [])
        name, instance, version = draw(names), draw(st.integers(0, 3)), draw(st.integers(0, 2**31 - 1))
        said = {"name": name, "instance_id": instance}
        if draw(st.integers(0, 4)):
            shape = draw(_struct(depth))
            shape["version"] = version
        else:
            length = draw(st.integers(0, 40))
            shape = {"size": length, "fields": [{"name": "data", "size": length, "type": "buffer"}]}
        meant = filler.struct(shape)
        made.append(Device(name, instance, version, section_id, said | shape, filler.body, said | meant))
    return made


def plain_device(name, section_id, body=b"", *, instance=0, version=1, fields=None, **more):
    """A device of which only the bytes matter."""
    if fields is None:
        fields = [{"name": "data", "type": "buffer", "size": len(body)}]
    described = {"name": name, "instance_id": instance, "vmsd_name": name, "version": version, "fields": fields, **more}
    return Device(name, instance, version, section_id, described, body, {})
