"""Whatever can be described arrives: generated descriptions, objects and receivers; and bytes nobody sent."""

import contextlib
import itertools
import struct
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whimbrel import vmstate
from whimbrel.errors import ProtocolError

MAKERS = {make.__name__.removesuffix("_"): make for make in (
    vmstate.uint8, vmstate.uint16, vmstate.uint32, vmstate.uint64,
    vmstate.int8, vmstate.int16, vmstate.int32, vmstate.int64,
    vmstate.bool_, vmstate.float32, vmstate.float64,
)}  # fmt: skip
MAXIMUM = 5


@attrs.frozen
class Case:
    """A description, the attributes of a source, and those of a fresh destination (made by calling)."""

    description: vmstate.VMStateDescription
    source: dict
    destination: dict

    def make(self, which):
        return SimpleNamespace(**{name: make() for name, make in getattr(self, which).items()})


def values(kind):
    if kind == "bool":
        return st.booleans()
    if kind.startswith("float"):
        return st.floats(width=int(kind[5:]))
    bits = int(kind.removeprefix("u")[3:])
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "i" else st.integers(0, 2**bits - 1)


def number_store(draw, kind, data, *, counted):
    """Something that holds `data` as a list or as one of many numpy arrays, and makes it afresh when called."""
    style = draw(st.sampled_from(["list", "flat", "big-endian", "strided", "column"]))
    if style == "list":
        return lambda: list(data)
    room = draw(st.integers(MAXIMUM, MAXIMUM + 2)) if counted else len(data)
    dtype = np.dtype(kind).newbyteorder(">" if style == "big-endian" else "=")

    def make():
        array = np.zeros(room * (2 if style == "strided" else 1), dtype)
        array = array[::2] if style == "strided" else array.reshape(-1, 1) if style == "column" else array
        array.flat[: len(data)] = np.array(data, dtype)
        return array

    return make


def buffer_store(draw, data, *, counted):
    style = draw(st.sampled_from(["bytes", "bytearray", "array"]))
    if style == "array":
        size = MAXIMUM if counted else len(data)
        return lambda: np.frombuffer(data.ljust(size, b"\0"), np.uint8).copy()
    return lambda: {"bytes": bytes, "bytearray": bytearray}[style](data)


@st.composite
def cases(draw, name="dev", depth=2):
    names = (f"f{n}" for n in itertools.count())
    fields, source, destination = [], {}, {}

    def add(field, there, here):
        fields.append(field)
        source[field.name], destination[field.name] = there, here

    def size():
        """Either fixed, or counted by a new field."""
        n = draw(st.integers(0, MAXIMUM))
        if draw(st.booleans()):
            return {"length": max(n, 1)}, max(n, 1), max(n, 1), False
        count = draw(st.sampled_from(["uint8", "uint16", "uint32", "uint64"]))
        here = draw(st.integers(0, MAXIMUM))
        number = MAKERS[count](next(names))
        add(number, lambda: n, lambda: here)
        return {"count": number.name, "maximum": MAXIMUM}, n, here, True

    for _ in range(draw(st.integers(0, 4))):
        shape = draw(st.sampled_from(["number", "numbers", "buffer", *(["struct", "structs"] if depth else [])]))
        kind = draw(st.sampled_from(sorted(MAKERS)))
        if shape == "number":
            value, old = draw(values(kind)), draw(values(kind))
            add(MAKERS[kind](next(names)), lambda value=value: value, lambda old=old: old)
        elif shape == "numbers":
            options, n, here, counted = size()
            there = draw(st.lists(values(kind), min_size=n, max_size=n))
            old = draw(st.lists(values(kind), min_size=here, max_size=here))
            add(
                MAKERS[kind](next(names), **options),
                number_store(draw, kind, there, counted=counted),
                number_store(draw, kind, old, counted=counted),
            )
        elif shape == "buffer":
            options, n, here, counted = size()
            if "length" in options:
                options = {"size": n}
            there, old = draw(st.binary(min_size=n, max_size=n)), draw(st.binary(min_size=here, max_size=here))
            add(
                vmstate.buffer(next(names), **options),
                buffer_store(draw, there, counted=counted),
                buffer_store(draw, old, counted=counted),
            )
        else:
            child_name = next(names)
            child = draw(cases(name=f"{name}.{child_name}", depth=depth - 1))
            if shape == "struct":
                add(
                    vmstate.struct(child_name, child.description),
                    lambda child=child: child.make("source"),
                    lambda child=child: child.make("destination"),
                )
            elif child.description.maximum_size:
                options, n, here, _ = size()
                add(
                    vmstate.struct(
                        child_name, child.description, **options, factory=lambda child=child: child.make("destination")
                    ),
                    lambda child=child, n=n: [child.make("source") for _ in range(n)],
                    lambda child=child, here=here: [child.make("destination") for _ in range(here)],
                )
    if depth and name != "dev":
        add(vmstate.uint8(next(names)), lambda: 5, lambda: 0)  # else it could not have subsections
    subsections = []
    for label in draw(st.sampled_from([[], [], ["a"], ["b", "a"]])) if depth else []:
        part = draw(cases(name=f"{name}/{label}", depth=depth - 1))
        # Its fields live on the same object, so that their names must not meet.
        rename = {field.name: f"{label}_{field.name}" for field in part.description.fields}
        flag = draw(st.booleans())
        subsections.append(
            vmstate.VMStateDescription(
                part.description.name,
                part.description.version_id,
                fields=[
                    attrs.evolve(field, name=rename[field.name], count=rename.get(field.count))
                    for field in part.description.fields
                ],
                needed=lambda obj, flag=flag: flag,
            )
        )
        for old_name, new_name in rename.items():
            source[new_name], destination[new_name] = part.source[old_name], part.destination[old_name]
    version = draw(st.integers(0, 3))
    return Case(vmstate.VMStateDescription(name, version, fields=fields, subsections=subsections), source, destination)


def seen(description, obj, *, subsections=True):
    """The transferred part of an object as Python values, read by a second, simple-minded hand."""
    result = {}
    for field in description.fields:
        value = getattr(obj, field.name)
        n = field.capacity if field.count is None else int(getattr(obj, field.count))
        if isinstance(field, vmstate.StructField):
            members = value[:n] if field.is_array else [value]
            result[field.name] = [seen(field.description, member) for member in members]
        elif isinstance(field, vmstate.BufferField):
            result[field.name] = bytes(value)[:n]
        else:
            numbers = (
                [value]
                if not field.is_array
                else [v.item() for v in value.flat]
                if isinstance(value, np.ndarray)
                else value
            )
            result[field.name] = [bits(field.kind, number) for number in numbers[:n]]
    for part in description.subsections if subsections else ():
        if part.needed(obj):
            result[part.name] = seen(part, obj)
    return result


def bits(kind, number):
    # A signalling NaN may become a quiet one on its way through a Python float.
    if number != number:
        return "nan"
    return struct.pack("f", number) if kind.name == "float32" else (type(number), number, str(number))


COMMON = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@COMMON
@given(case=cases())
def test_round_trip(case, three_ways, walk_json):
    source, destination = case.make("source"), case.make("destination")
    vmstate.check_object(case.description, source)
    vmstate.check_object(case.description, destination)
    body, entry = vmstate.save(case.description, source)
    assert len(body) <= case.description.maximum_size
    walk_json(entry, body)
    before = seen(case.description, destination)
    loaded = three_ways(case.description, case.description.version_id, destination, body)
    assert seen(case.description, destination) == before
    undo = vmstate.apply(loaded, destination)
    assert seen(case.description, destination) == seen(case.description, source)
    assert vmstate.save(case.description, destination)[0] == body
    assert undo() == ()
    assert seen(case.description, destination) == before


@COMMON
@given(case=cases(), data=st.data())
def test_changed_bytes_are_a_value_or_a_protocol_error(case, data, feed, hungry):
    body, _ = vmstate.save(case.description, case.make("source"))
    destination = case.make("destination")
    before = seen(case.description, destination)
    body += b"\x7e\0\0\0\x05"
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from([b"\x05", b"\xff", b"\x00", b"\x80"]))
    try:
        loaded, taken = feed(vmstate.parse(case.description, case.description.version_id, destination), bytes(body))
    except (ProtocolError, hungry):
        assert seen(case.description, destination) == before
        return
    assert taken <= case.description.maximum_size
    undo = vmstate.apply(loaded, destination)
    vmstate.save(case.description, destination)  # what was accepted is sound
    assert undo() == ()
    assert seen(case.description, destination) == before


@COMMON
@given(case=cases(), junk=st.binary(max_size=200))
def test_junk_is_a_value_or_a_protocol_error(case, junk, feed, hungry):
    with contextlib.suppress(ProtocolError, hungry):
        feed(vmstate.parse(case.description, case.description.version_id, case.make("destination")), junk)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_every_kind_has_its_limits_both_ways(kind, carry):
    field = MAKERS[kind]("x", length=2)
    limits = [field.kind.low, field.kind.high] if field.kind.is_integer else [True, False]
    if kind.startswith("float"):
        limits = [float(np.finfo(kind).min), float(np.finfo(kind).max)]
    destination = SimpleNamespace(x=[limits[1], limits[0]])
    carry(vmstate.VMStateDescription("d", 1, fields=[field]), SimpleNamespace(x=limits), destination)
    assert destination.x == limits
