"""The bytes of every type, both ways; simple/primitive and simple/array are QEMU's own vectors."""

import math

import numpy as np
import pytest

from whimbrel import vmstate
from whimbrel.errors import MigrationError, StreamError

SCALARS = [
    (vmstate.bool_, True, "01"),
    (vmstate.bool_, False, "00"),
    (vmstate.uint8, 130, "82"),
    (vmstate.uint16, 512, "0200"),
    (vmstate.uint32, 70000, "00011170"),
    (vmstate.uint64, 12121212, "0000000000b8f47c"),
    (vmstate.int8, 65, "41"),
    (vmstate.int8, -65, "bf"),
    (vmstate.int16, 512, "0200"),
    (vmstate.int16, -512, "fe00"),
    (vmstate.int32, 70000, "00011170"),
    (vmstate.int32, -70000, "fffeee90"),
    (vmstate.int64, 12121212, "0000000000b8f47c"),
    (vmstate.int64, -12121212, "ffffffffff470b84"),
    (vmstate.uint8, 255, "ff"),
    (vmstate.uint64, 2**64 - 1, "ff" * 8),
    (vmstate.int64, -(2**63), "80" + "00" * 7),
    (vmstate.float32, 1.5, "3fc00000"),
    (vmstate.float32, -math.inf, "ff800000"),
    (vmstate.float64, 1.5, "3ff8000000000000"),
    (vmstate.float64, -0.0, "8000000000000000"),
    (vmstate.float64, math.nan, "7ff8000000000000"),
]
ARRAYS = [
    (vmstate.uint16, [0x42, 0x43, 0x44], "004200430044"),
    (vmstate.bool_, [True, False, True], "010001"),
    (vmstate.int8, [-1, 0, 1], "ff0001"),
    (vmstate.uint32, [1, 2, 2**32 - 1], "0000000100000002ffffffff"),
    (vmstate.int64, [-1, 1, -2], "ff" * 8 + "00" * 7 + "01" + "ff" * 7 + "fe"),
    (vmstate.float32, [0.0, 1.5, -2.0], "000000003fc00000c0000000"),
    (vmstate.float64, [0.0, 1.5, math.inf], "00" * 8 + "3ff8000000000000" + "7ff0000000000000"),
]


class Subclass(np.ndarray):
    pass


def same(a, b):
    return type(a) is type(b) and (a == b or (a != a and b != b)) and math.copysign(1, a) == math.copysign(1, b)


@pytest.mark.parametrize(("make", "value", "wire"), SCALARS)
def test_scalar(make, value, wire, three_ways, thing):
    description = vmstate.VMStateDescription("d", 1, fields=[make("x")])
    body, _ = vmstate.save(description, thing(x=value))
    assert body.hex() == wire
    obj = thing(x=type(value)(1))
    vmstate.apply(three_ways(description, 1, obj, body), obj)
    assert same(obj.x, value)


@pytest.mark.parametrize(("make", "values", "wire"), ARRAYS)
def test_array_as_list(make, values, wire, three_ways, thing):
    description = vmstate.VMStateDescription("d", 1, fields=[make("x", length=3)])
    body, _ = vmstate.save(description, thing(x=values))
    assert body.hex() == wire
    obj = thing(x=[type(values[0])(0)] * 3)
    there = obj.x
    vmstate.apply(three_ways(description, 1, obj, body), obj)
    assert obj.x is there
    assert obj.x == values
    assert {type(value) for value in obj.x} == {type(values[0])}


@pytest.mark.parametrize("order", ["=", ">", "<"])
@pytest.mark.parametrize(("make", "values", "wire"), ARRAYS)
def test_array_in_numpy(make, values, wire, order, three_ways, thing):
    field = make("x", length=3)
    dtype = field.kind.dtype.newbyteorder(order)
    description = vmstate.VMStateDescription("d", 1, fields=[field])
    body, _ = vmstate.save(description, thing(x=np.array(values, dtype)))
    assert body.hex() == wire
    there = np.zeros((3, 1), dtype)
    obj = thing(x=there)
    vmstate.apply(three_ways(description, 1, obj, body), obj)
    assert obj.x is there
    assert there.reshape(-1).tolist() == values


@pytest.mark.parametrize("store", [bytes, bytearray, lambda data: np.frombuffer(data, np.uint8).copy()])
def test_buffer(store, three_ways, thing):
    description = vmstate.VMStateDescription("d", 1, fields=[vmstate.buffer("x", size=4)])
    body, _ = vmstate.save(description, thing(x=store(b"\x05abc")))
    assert body == b"\x05abc"
    obj = thing(x=store(bytes(4)))
    there = obj.x
    vmstate.apply(three_ways(description, 1, obj, body), obj)
    assert type(obj.x) is type(there)
    assert bytes(obj.x) == b"\x05abc"
    assert bytes(obj.x) == b"\x05abc" or obj.x is there


def test_counted_with_struct_and_subsection(three_ways, thing):
    """One of everything, in the order of the wire format."""
    child = vmstate.VMStateDescription("child", 3, fields=[vmstate.uint8("a"), vmstate.bool_("b")])
    extra = vmstate.VMStateDescription("dev/extra", 7, fields=[vmstate.uint16("z")])
    description = vmstate.VMStateDescription(
        "dev",
        2,
        fields=[
            vmstate.uint16("n", high=8),
            vmstate.uint32("fifo", count="n", maximum=8),
            vmstate.buffer("packet", count="n", maximum=8),
            vmstate.struct("one", child),
            vmstate.struct("some", child, count="n", maximum=8, factory=lambda: thing(a=0, b=False)),
        ],
        subsections=[extra],
    )
    source = thing(
        n=2,
        fifo=[1, 2],
        packet=b"xy",
        one=thing(a=9, b=True),
        some=[thing(a=1, b=False), thing(a=2, b=True)],
        z=0x1234,
    )
    body, _ = vmstate.save(description, source)
    expected = "0002 00000001 00000002 7879 0901 0100 0201 05 09 6465762f6578747261 00000007 1234"
    assert body.hex() == expected.replace(" ", "")
    obj = thing(n=0, fifo=[], packet=b"", one=thing(a=0, b=False), some=[], z=0)
    vmstate.apply(three_ways(description, 2, obj, body), obj)
    assert obj == source


@pytest.mark.parametrize("bits", [0x7FF0000000000001, 0x7FF8000000000123, 0xFFFFFFFFFFFFFFFF])
def test_nan_bits_survive(bits, carry, thing):
    description = vmstate.VMStateDescription("d", 1, fields=[vmstate.float64("x", length=1), vmstate.float64("y")])
    x = np.array([bits], np.uint64).view(np.float64)
    destination = thing(x=np.zeros(1), y=0.0)
    carry(description, thing(x=x, y=math.nan), destination)
    assert destination.x.view(np.uint64)[0] == bits
    assert math.isnan(destination.y)


@pytest.mark.parametrize("layout", ["two dimensions", "fortran", "strided", "reversed", "subclass"])
def test_any_shape_of_numpy_array(layout, carry, thing):
    def place(values):
        if layout == "fortran":
            return np.asfortranarray(values.reshape(3, 4))
        if layout == "strided":
            return np.repeat(values, 2)[::2]
        if layout == "reversed":
            return values[::-1].copy()[::-1]
        if layout == "subclass":
            return values.reshape(3, 4).view(Subclass)
        return values.reshape(3, 4)

    description = vmstate.VMStateDescription("d", 1, fields=[vmstate.int32("x", length=12)])
    values = np.arange(12, dtype=np.int32)
    body, _ = vmstate.save(description, thing(x=place(values)))
    assert body == values.astype(">i4").tobytes()
    destination = thing(x=place(np.full(12, -1, np.int32)))
    there = destination.x
    undo = carry(description, thing(x=values), destination)
    assert destination.x is there
    assert np.asarray(there).reshape(-1).tolist() == list(range(12))
    assert undo() == ()
    assert np.asarray(there).reshape(-1).tolist() == [-1] * 12


@pytest.mark.parametrize("byte", [2, 0x80, 0xFF])
@pytest.mark.parametrize("shape", [{}, {"length": 2}])
def test_bool_is_0_or_1(byte, shape, feed, thing):
    description = vmstate.VMStateDescription("d", 1, fields=[vmstate.bool_("x", **shape)])
    obj = thing(x=[False, False] if shape else False)
    with pytest.raises(StreamError, match=rf"device 'd', field 'x': expected 0 or 1 for a bool, got {byte}"):
        feed(vmstate.parse(description, 1, obj), bytes([byte]) * 3)


def test_bool_array_of_foreign_bytes_is_saved_as_0_and_1(thing):
    description = vmstate.VMStateDescription("d", 1, fields=[vmstate.bool_("x", length=3)])
    body, _ = vmstate.save(description, thing(x=np.frombuffer(b"\x00\x02\xff", np.bool_)))
    assert body == b"\0\1\1"


def test_float32_is_rounded_but_not_overflown(thing):
    description = vmstate.VMStateDescription("d", 1, fields=[vmstate.float32("x")])
    assert vmstate.save(description, thing(x=0.1))[0].hex() == "3dcccccd"
    with pytest.raises(MigrationError, match="too large for a float32"):
        vmstate.save(description, thing(x=1e300))


def test_a_big_array_comes_in_bounded_pieces(carry, thing):
    n = 3 * vmstate.CHUNK // 8 + 5
    description = vmstate.VMStateDescription("d", 1, fields=[vmstate.uint64("x", length=n)])
    values = np.arange(n, dtype=np.uint64) * 0x0102030405
    body, _ = vmstate.save(description, thing(x=values))
    requests = []
    parser = vmstate.parse(description, 1, thing(x=np.zeros(n, np.uint64)))
    request, at = next(parser), 0
    while isinstance(request, int):
        requests.append(request)
        request, at = parser.send(memoryview(body)[at : at + request]), at + request
    assert max(requests) == vmstate.CHUNK
    assert sum(requests) == 8 * n
    with pytest.raises(StopIteration) as end:
        parser.send(memoryview(b"\x7e"))
    assert (end.value.value.values["x"] == values).all()
