"""Parsing: versions, limits, ranges, equality, and that the object is never touched."""

import copy

import numpy as np
import pytest

from whimbrel import vmstate
from whimbrel.errors import IncompatibleError, StreamError

D = vmstate.VMStateDescription
VERSIONED = D(
    "test/versioned",
    2,
    minimum_version_id=1,
    fields=[
        vmstate.uint32("a"),
        vmstate.uint32("b", since=2),
        vmstate.uint32("c"),
        vmstate.uint64("d"),
        vmstate.uint32("e", since=2),
        vmstate.uint64("f", since=2),
    ],
)


def test_version_1(three_ways, thing):
    obj = thing(a=0, b=200, c=0, d=0, e=500, f=600)
    body = bytes.fromhex("0000000a 0000001e 0000000000000028")
    vmstate.apply(three_ways(VERSIONED, 1, obj, body), obj)
    assert obj == thing(a=10, b=200, c=30, d=40, e=500, f=600)


def test_version_2(three_ways, thing):
    obj = thing(a=0, b=200, c=0, d=0, e=500, f=600)
    body = bytes.fromhex("0000000a 00000014 0000001e 0000000000000028 00000032 000000000000003c")
    vmstate.apply(three_ways(VERSIONED, 2, obj, body), obj)
    assert obj == thing(a=10, b=20, c=30, d=40, e=50, f=60)
    assert vmstate.save(VERSIONED, obj)[0] == body


@pytest.mark.parametrize("version", [0, 3, 2**32 - 1])
def test_versions_out_of_range(version, feed, thing):
    with pytest.raises(IncompatibleError, match=f"'test/versioned': expected version 1 to 2, got {version}"):
        feed(vmstate.parse(VERSIONED, version, thing()), b"")


def test_the_minimum_is_the_version_unless_said(feed, thing):
    with pytest.raises(IncompatibleError, match="expected version 3 to 3, got 2"):
        feed(vmstate.parse(D("d", 3, fields=[]), 2, thing()), b"")


def test_a_struct_has_its_own_version_whatever_the_section_says(three_ways, thing):
    child = D("child", 9, fields=[vmstate.uint8("x", since=9)])
    description = D("d", 2, minimum_version_id=1, fields=[vmstate.struct("c", child)])
    obj = thing(c=thing(x=0))
    assert three_ways(description, 1, obj, b"\x07").values["c"].values == {"x": 7}


def test_unmigratable(feed, thing):
    with pytest.raises(IncompatibleError, match="'d' is declared unmigratable here"):
        feed(vmstate.parse(D("d", 1, fields=[], unmigratable=True), 1, thing()), b"")


def leaf(thing):
    return lambda: thing(x=0)


COUNTED = {
    "list": (lambda thing: vmstate.uint16("a", count="n", maximum=5), lambda thing: [], 2),
    "array": (lambda thing: vmstate.uint16("a", count="n", maximum=5), lambda thing: np.zeros(5, "u2"), 2),
    "bytes": (lambda thing: vmstate.buffer("a", count="n", maximum=5), lambda thing: b"", 1),
    "bytearray": (lambda thing: vmstate.buffer("a", count="n", maximum=5), lambda thing: bytearray(), 1),
    "structs": (
        lambda thing: vmstate.struct(
            "a", D("leaf", 1, fields=[vmstate.uint8("x")]), count="n", maximum=5, factory=leaf(thing)
        ),
        lambda thing: [],
        1,
    ),
}


@pytest.mark.parametrize("count", [vmstate.uint32, vmstate.uint64])
@pytest.mark.parametrize("case", COUNTED)
def test_counts_at_and_above_their_maximum(case, count, three_ways, feed, thing):
    field, store, size = COUNTED[case]
    number = count("n")
    description = D("d", 1, fields=[number, field(thing)])
    width = number.kind.size
    for n in (0, 1, 5):
        loaded = three_ways(description, 1, thing(n=0, a=store(thing)), n.to_bytes(width, "big") + bytes(n * size))
        assert loaded.values["n"] == len(loaded.values["a"]) == n
    for n in (6, 2**31, 2**32 - 1, 2 ** (8 * width) - 1):
        with pytest.raises(StreamError, match=f"field 'a': expected a count 'n' of at most 5, got {n}"):
            # Not one byte of the array is asked for.
            feed(vmstate.parse(description, 1, thing(n=0, a=store(thing))), n.to_bytes(width, "big"))


def test_a_signed_count_is_held_to_its_range(feed, thing):
    description = D("d", 1, fields=[vmstate.int32("n", low=0), vmstate.uint8("a", count="n", maximum=5)])
    with pytest.raises(StreamError, match="field 'n': expected at least 0, got -1"):
        feed(vmstate.parse(description, 1, thing(n=0, a=[])), b"\xff" * 4)


def test_a_list_of_structs_without_factory_must_be_long_enough(three_ways, feed, thing):
    child = D("leaf", 1, fields=[vmstate.uint8("x")])
    description = D("d", 1, fields=[vmstate.uint8("n"), vmstate.struct("a", child, count="n", maximum=5)])
    obj = thing(n=0, a=[thing(x=0), thing(x=0)])
    vmstate.apply(three_ways(description, 1, obj, b"\x01\x09"), obj)
    assert obj == thing(n=1, a=[thing(x=9), thing(x=0)])
    with pytest.raises(IncompatibleError, match="field 'a': expected at least 3 elements, the list has 2"):
        feed(vmstate.parse(description, 1, obj), b"\x03")


def test_a_factory_is_asked_only_for_what_has_come(feed, hungry, thing):
    made = []

    def factory():
        made.append(thing(x=0))
        return made[-1]

    child = D("leaf", 1, fields=[vmstate.uint32("x")])
    description = D(
        "d", 1, fields=[vmstate.uint32("n"), vmstate.struct("a", child, count="n", maximum=60_000, factory=factory)]
    )
    with pytest.raises(hungry):
        feed(vmstate.parse(description, 1, thing(n=0, a=[])), (60_000).to_bytes(4, "big") + bytes(8))
    assert len(made) == 2


@pytest.mark.parametrize(("factory", "message"), [(lambda: 1 / 0, "ZeroDivision"), (object, "made something else")])
def test_a_factory_that_fails(factory, message, feed, thing):
    child = D("leaf", 1, fields=[vmstate.uint8("x")])
    description = D("d", 1, fields=[vmstate.struct("a", child, length=2, factory=factory)])
    with pytest.raises(IncompatibleError, match=message) as refused:
        feed(vmstate.parse(description, 1, thing(a=[])), bytes(4))
    assert refused.value.__cause__ is not None


RANGES = {
    "low": (vmstate.uint8("x", low=2), 0, {"01": False, "02": True, "ff": True}),
    "high": (vmstate.int8("x", high=2), 0, {"80": True, "02": True, "03": False}),
    "all of 64 bits": (vmstate.uint64("x", high=2**64 - 2), 0, {"ff" * 8: False, "ff" * 7 + "fe": True}),
    "list": (vmstate.uint8("x", length=2, low=1, high=2), [1, 1], {"0102": True, "0100": False, "0103": False}),
    "array": (vmstate.uint64("x", length=1, high=2**64 - 2), np.zeros(1, "u8"), {"ff" * 8: False, "00" * 8: True}),
    "float": (vmstate.float32("x", low=0, high=0.1), 0.0, {"3dcccccd": True, "3dccccce": False, "80000000": True}),
    "floats": (vmstate.float32("x", length=1, high=0.1), [0.0], {"3dcccccd": True, "3dccccce": False}),
    "NaN with a range": (vmstate.float32("x", low=0), 0.0, {"7fc00000": False, "ff800000": False}),
    "signalling NaNs": (vmstate.float64("x", length=1, low=0), [0.0], {"7ff0000000000001": False}),
    "NaN without a range": (vmstate.float32("x"), 0.0, {"7fc00000": True, "ff800000": True, "7f800001": True}),
}


@pytest.mark.parametrize("case", RANGES)
def test_ranges(case, three_ways, feed, thing):
    field, value, bodies = RANGES[case]
    description = D("d", 1, fields=[field])
    for body, good in bodies.items():
        if good:
            three_ways(description, 1, thing(x=value), bytes.fromhex(body))
        else:
            with pytest.raises(StreamError, match=r"device 'd', field 'x': .*expected"):
                feed(vmstate.parse(description, 1, thing(x=value)), bytes.fromhex(body) + b"\0")


EQUAL = {
    "int": (vmstate.uint16("x", equal=True), 3, "0003", "0004", "expected 3, the value that is here already, got 4"),
    "bool": (vmstate.bool_("x", equal=True), True, "01", "00", "expected True, .* got False"),
    "float": (vmstate.float64("x", equal=True), float("nan"), "7ff8" + "00" * 6, "3ff0" + "00" * 6, "got 1.0"),
    "list": (vmstate.uint8("x", length=2, equal=True), [1, 2], "0102", "0201", "got others"),
    "array": (vmstate.uint16("x", length=1, equal=True), np.array([1], "u2"), "0001", "0100", "got others"),
    "buffer": (vmstate.buffer("x", size=2, equal=True), b"ab", "6162", "6163", "got others"),
}


@pytest.mark.parametrize("case", EQUAL)
def test_equal(case, three_ways, feed, thing):
    field, value, same, other, message = EQUAL[case]
    description = D("d", 1, fields=[field])
    three_ways(description, 1, thing(x=value), bytes.fromhex(same))
    with pytest.raises(IncompatibleError, match="device 'd', field 'x': .*" + message):
        feed(vmstate.parse(description, 1, thing(x=value)), bytes.fromhex(other) + b"\0")


def test_equal_but_what_is_here_is_not_sound(feed, thing):
    description = D("d", 1, fields=[vmstate.uint8("x", equal=True)])
    with pytest.raises(IncompatibleError, match="not sound: expected an int for a uint8, got NoneType"):
        feed(vmstate.parse(description, 1, thing(x=None)), b"\0\0")


def test_equal_of_a_counted_array(three_ways, feed, thing):
    description = D("d", 1, fields=[vmstate.uint8("n"), vmstate.uint8("x", count="n", maximum=3, equal=True)])
    three_ways(description, 1, thing(n=2, x=[1, 2]), b"\x02\x01\x02")
    with pytest.raises(IncompatibleError, match="not sound: expected 1 elements, the list has 2"):
        feed(vmstate.parse(description, 1, thing(n=2, x=[1, 2])), b"\x01\x01\0")


def test_an_object_that_stopped_fitting(feed, thing):
    description = D("d", 1, fields=[vmstate.uint8("x", length=2)])
    for obj in (thing(), thing(x=5), thing(x=[1]), thing(x=np.zeros(2)), thing(x=np.frombuffer(b"ab", "u1"))):
        with pytest.raises(IncompatibleError, match="device 'd', field 'x': expected"):
            feed(vmstate.parse(description, 1, obj), b"\0\0\0")


def test_the_object_is_not_touched(three_ways, thing):
    child = D("leaf", 1, fields=[vmstate.uint8("x")], post_load=lambda obj, version: 1 / 0)
    description = D(
        "d",
        1,
        fields=[
            vmstate.uint8("n"),
            vmstate.uint8("a", count="n", maximum=3),
            vmstate.buffer("b", count="n", maximum=3),
            vmstate.struct("c", child, count="n", maximum=3, factory=leaf(thing)),
        ],
        post_load=lambda obj, version: 1 / 0,
    )
    obj = thing(n=1, a=[9], b=bytearray(b"x"), c=[thing(x=1)])
    before = copy.deepcopy(obj)
    three_ways(description, 1, obj, bytes.fromhex("02 0102 0304 0506"))
    assert obj == before


@pytest.mark.parametrize("n", [1, 2, 3])
def test_messages_name_the_path(n, feed, thing):
    leaf = D("leaf", 1, fields=[vmstate.uint8("x", high=1)])
    child = D("child", 1, fields=[vmstate.struct("leaves", leaf, length=3)])
    obj = thing(c=thing(leaves=[thing(x=0)] * 3))
    body = bytes([0] * (n - 1) + [9] + [0] * 4)
    with pytest.raises(StreamError, match=rf"device 'd', field 'c.leaves\[{n - 1}\].x': expected at most 1, got 9"):
        feed(vmstate.parse(D("d", 1, fields=[vmstate.struct("c", child)]), 1, obj), body)
