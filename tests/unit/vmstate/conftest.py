"""Drivers for parsers, and a reader of bodies that knows nothing but the JSON."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest

from whimbrel import vmstate
from whimbrel.abc import Peek

FOOTER = b"\x7e\0\0\0\x05"


class Hungry(Exception):
    """The parser wants more bytes than there are."""


def run(parser, data):
    """Feed a parser as a reader would; returns its value and how many bytes it took.

    Each view is overwritten after the next request, so that a parser that keeps one is found out.
    """
    taken = 0
    given = bytearray()
    try:
        request = next(parser)
        while True:
            size = request.size if isinstance(request, Peek) else request
            assert 1 <= size <= vmstate.CHUNK
            if taken + size > len(data):
                raise Hungry(taken + size)
            fresh = bytearray(data[taken : taken + size])
            if not isinstance(request, Peek):
                taken += size
            request = parser.send(memoryview(fresh))
            given[:] = b"\xaa" * len(given)
            given = fresh
    except StopIteration as end:
        given[:] = b"\xaa" * len(given)
        return end.value, taken


def plain(loaded):
    """What was loaded, as something that can be compared bit by bit."""
    return (
        loaded.description.name,
        loaded.version_id,
        {name: _plain_value(value) for name, value in loaded.values.items()},
        [plain(part) for part in loaded.subsections],
    )


def _plain_value(value):
    if isinstance(value, vmstate.Loaded):
        return plain(value)
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.tobytes()
    if isinstance(value, float):
        return struct.pack("d", value)
    return type(value), value


def parse_three_ways(description, version_id, obj, body):
    """Parse with the footer that follows in a stream, cut short at each byte, and with other things after it."""
    body = bytes(body)
    whole, taken = run(vmstate.parse(description, version_id, obj), body + FOOTER)
    assert taken == len(body)
    for end in {*range(len(body) + 1)[:40], *range(0, len(body), 61), *range(len(body) + 1)[-40:]}:
        with pytest.raises(Hungry):
            run(vmstate.parse(description, version_id, obj), body[:end])
    for trailing in (b"\x04\0\0\0\x05", b"\x05\x05other/x", b"\x05\xff" + b"\xff" * 300, b"\x00" * 9):
        with_trailing, taken = run(vmstate.parse(description, version_id, obj), body + trailing)
        assert taken == len(body)
        assert plain(with_trailing) == plain(whole)
    return whole


def walk(entry, body):
    """Read a body by its JSON entry alone; returns the values by name. All bytes must be used."""
    values, at = _walk_part(entry, bytes(body), 0)
    assert at == len(body)
    return values


def _walk_part(entry, body, at):
    values = {}
    for field in entry["fields"]:
        for _ in range(field.get("array_len", 1)):
            start = at
            if field["type"] == "struct":
                value, at = _walk_part(field["struct"], body, at)
                assert at - start == field["size"]
            else:
                at += field["size"]
                assert at <= len(body)
                value = _walk_value(field["type"], body[start:at])
            if "array_len" in field or "index" in field:
                assert field.get("index", 0) == len(values.get(field["name"], [])) or "array_len" in field
                values.setdefault(field["name"], []).append(value)
            else:
                assert field["name"] not in values
                values[field["name"]] = value
    for part in entry.get("subsections", []):
        name = part["vmsd_name"].encode()
        header = b"\x05" + bytes([len(name)]) + name + struct.pack(">I", part["version"])
        assert body[at : at + len(header)] == header
        values[part["vmsd_name"]], at = _walk_part(part, body, at + len(header))
    return values, at


def _walk_value(kind, data):
    if kind == "bool":
        return {b"\0": False, b"\1": True}[data]
    if kind in ("float32", "float64"):
        return struct.unpack({4: ">f", 8: ">d"}[len(data)], data)[0]
    if kind == "buffer":
        return data
    return int.from_bytes(data, "big", signed=not kind.startswith("u"))


@pytest.fixture(scope="session")
def feed():
    return run


@pytest.fixture(scope="session")
def hungry():
    return Hungry


@pytest.fixture(scope="session")
def three_ways():
    return parse_three_ways


@pytest.fixture(scope="session")
def plain_loaded():
    return plain


@pytest.fixture(scope="session")
def walk_json():
    return walk


@pytest.fixture(scope="session")
def thing():
    """Makes an object with some attributes."""
    return SimpleNamespace


@pytest.fixture(scope="session")
def carry():
    """Saves one object, loads it into another, and returns what undoes that."""

    def carry(description, source, destination):
        body, _ = vmstate.save(description, source)
        loaded = parse_three_ways(description, description.version_id, destination, body)
        return vmstate.apply(loaded, destination)

    return carry
