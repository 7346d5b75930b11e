"""check_object: an object that does not fit is found out when it is added."""

import numpy as np
import pytest

from whimbrel import vmstate
from whimbrel.errors import ConfigError

D = vmstate.VMStateDescription
LEAF = D("leaf", 1, fields=[vmstate.uint8("x", high=3)])


class Fixed:
    x = property(lambda self: 1)
    y = property(lambda self: [1])
    z = property(lambda self: 1 / 0)


def of(field):
    return D("d", 1, fields=[vmstate.uint8("n"), field])


def a(thing, value):
    return thing(n=0, a=value)


BAD = {
    "no attribute": (vmstate.uint8("b"), 1, "'b'.*has none"),
    "int is a float": (vmstate.uint8("a"), 1.0, "expected an int for a uint8, got float 1.0"),
    "int is a bool": (vmstate.uint8("a"), True, "got bool True"),
    "int is None": (vmstate.uint8("a"), None, "got NoneType None"),
    "int is an array": (vmstate.uint8("a"), np.zeros(1, np.uint8), "got a ndarray"),
    "bool is an int": (vmstate.bool_("a"), 1, "expected True or False"),
    "float is a string": (vmstate.float64("a"), "1", "expected a float"),
    "float is a bool": (vmstate.float64("a"), True, "expected a float"),
    "list too short": (vmstate.uint8("a", length=3), [1, 2], "expected 3 elements, the list has 2"),
    "list too long": (vmstate.uint8("a", length=1), [1, 2], "expected 1 elements"),
    "a tuple": (vmstate.uint8("a", length=2), (1, 2), "expected a list or a numpy array"),
    "bytes for numbers": (vmstate.uint8("a", length=2), b"ab", "declare a buffer"),
    "dtype": (vmstate.uint8("a", length=2), np.zeros(2, np.int8), "expected an array of uint8, got one of int8"),
    "size": (vmstate.uint8("a", length=2), np.zeros((2, 2), np.uint8), "of 2 values"),
    "room": (vmstate.uint8("a", count="n", maximum=5), np.zeros(4, np.uint8), "room for 5"),
    "read-only": (vmstate.uint8("a", length=2), np.frombuffer(b"ab", np.uint8), "read-only"),
    "buffer size": (vmstate.buffer("a", size=4), bytes(3), "expected 4 elements"),
    "buffer array size": (vmstate.buffer("a", size=4), np.zeros(3, np.uint8), "of 4 values"),
    "buffer array room": (vmstate.buffer("a", count="n", maximum=4), np.zeros(3, np.uint8), "room for 4"),
    "buffer dtype": (vmstate.buffer("a", size=4), np.zeros(4, np.int8), "expected an array of uint8"),
    "buffer is a list": (vmstate.buffer("a", size=1), [1], "expected bytes"),
    "buffer is a string": (vmstate.buffer("a", size=1), "x", "expected bytes"),
    "struct is None": (vmstate.struct("a", LEAF), None, "expected an object"),
    "structs in a dict": (vmstate.struct("a", LEAF, length=1), {}, "expected a list of objects"),
    "structs in a tuple to grow": (vmstate.struct("a", LEAF, length=1, factory=object), (), "expected a list"),
    "structs too few": (vmstate.struct("a", LEAF, length=1), [], "expected 1 elements"),
    "an element": (vmstate.struct("a", LEAF, length=1), [5], r"field 'a\[0\].x': expected an attribute"),
    "factory raises": (vmstate.struct("a", LEAF, count="n", maximum=1, factory=lambda: 1 / 0), [], "ZeroDivision"),
    "factory misfits": (vmstate.struct("a", LEAF, count="n", maximum=1, factory=object), [], r"'a\[0\].x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_misfits(case, thing):
    field, value, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as refused:
        vmstate.check_object(of(field), a(thing, value))
    assert "device 'd', field" in str(refused.value)


GOOD = {
    "int": (vmstate.uint8("a"), 1),
    "a value out of range is judged later": (vmstate.uint8("a", low=5), 300),
    "numpy scalar": (vmstate.uint8("a"), np.uint64(1)),
    "float": (vmstate.float64("a"), 1),
    "numpy float": (vmstate.float64("a"), np.float32(1)),
    "numpy bool": (vmstate.bool_("a"), np.True_),
    "counted list": (vmstate.uint8("a", count="n", maximum=5), [1, 2]),
    "counted array with room to spare": (vmstate.uint8("a", count="n", maximum=5), np.zeros((2, 3), np.uint8)),
    "big-endian": (vmstate.uint32("a", length=2), np.zeros(2, ">u4")),
    "counted bytes": (vmstate.buffer("a", count="n", maximum=5), b""),
    "few structs": (vmstate.struct("a", LEAF, count="n", maximum=5), ()),
}


@pytest.mark.parametrize("case", GOOD)
def test_fits(case, thing):
    field, value = GOOD[case]
    vmstate.check_object(of(field), a(thing, value))


def test_subsections_are_looked_at(thing):
    extra = D("d/extra", 1, fields=[vmstate.uint8("z")], needed=lambda obj: False)
    description = D("d", 1, fields=[], subsections=[extra])
    with pytest.raises(ConfigError, match="device 'd', subsection 'd/extra', field 'z'"):
        vmstate.check_object(description, thing())
    vmstate.check_object(description, thing(z=1))


def test_a_property_needs_a_setter():
    with pytest.raises(ConfigError, match="'x': it is a property without a setter"):
        vmstate.check_object(D("d", 1, fields=[vmstate.uint8("x")]), Fixed())
    vmstate.check_object(D("d", 1, fields=[vmstate.uint8("y", length=1)]), Fixed())


def test_a_property_that_raises():
    with pytest.raises(ConfigError, match="'z': reading the attribute 'z' raised ZeroDivisionError"):
        vmstate.check_object(D("d", 1, fields=[vmstate.uint8("z")]), Fixed())


def test_only_a_subsection_can_be_left_out(thing):
    with pytest.raises(ConfigError, match="only a subsection can be left out"):
        vmstate.check_object(D("d", 1, fields=[], needed=lambda obj: True), thing())
