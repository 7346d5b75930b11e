"""The JSON entry: exactly what QEMU writes, and enough to read a body by it alone."""

import json

import numpy as np
import pytest

from whimbrel import vmstate

D = vmstate.VMStateDescription
PAIR = D("pair", 3, fields=[vmstate.uint8("a"), vmstate.uint16("b", length=2)])


def test_scalars_arrays_and_buffers(thing, walk_json):
    description = D(
        "d",
        2,
        fields=[
            vmstate.uint32("step", equal=True),
            vmstate.bool_("on"),
            vmstate.float64("t"),
            vmstate.float32("f"),
            vmstate.int64("regs", length=3),
            vmstate.int8("single", length=1),
            vmstate.uint8("n"),
            vmstate.uint16("none", count="n", maximum=4),
            vmstate.buffer("mac", size=6),
            vmstate.buffer("empty", count="n", maximum=4),
        ],
    )
    obj = thing(
        step=1, on=True, t=2.5, f=0.5, regs=[-1, 0, 1], single=[-5], n=0, none=[], mac=b"abcdef", empty=bytearray()
    )
    body, entry = vmstate.save(description, obj)
    assert entry == {
        "vmsd_name": "d",
        "version": 2,
        "fields": [
            {"name": "step", "type": "uint32", "size": 4},
            {"name": "on", "type": "bool", "size": 1},
            {"name": "t", "type": "float64", "size": 8},
            {"name": "f", "type": "float32", "size": 4},
            {"name": "regs", "array_len": 3, "type": "int64", "size": 8},
            {"name": "single", "type": "int8", "size": 1},
            {"name": "n", "type": "uint8", "size": 1},
            {"name": "mac", "type": "buffer", "size": 6},
            {"name": "empty", "type": "buffer", "size": 0},
        ],
    }
    assert walk_json(json.loads(json.dumps(entry)), body) == {
        "step": 1,
        "on": True,
        "t": 2.5,
        "f": 0.5,
        "regs": [-1, 0, 1],
        "single": -5,
        "n": 0,
        "mac": b"abcdef",
        "empty": b"",
    }


def pair(thing, a):
    return thing(a=a, b=[a, a + 1])


def test_structs_of_one_shape_are_described_once(thing, walk_json):
    description = D("d", 1, fields=[vmstate.struct("one", PAIR), vmstate.struct("more", PAIR, length=3)])
    body, entry = vmstate.save(description, thing(one=pair(thing, 1), more=[pair(thing, n) for n in (2, 3, 4)]))
    inner = {
        "vmsd_name": "pair",
        "version": 3,
        "fields": [
            {"name": "a", "type": "uint8", "size": 1},
            {"name": "b", "array_len": 2, "type": "uint16", "size": 2},
        ],
    }
    assert entry["fields"] == [
        {"name": "one", "type": "struct", "struct": inner, "size": 5},
        {"name": "more", "array_len": 3, "type": "struct", "struct": inner, "size": 5},
    ]
    assert walk_json(entry, body)["more"][2] == {"a": 4, "b": [4, 5]}


@pytest.mark.parametrize("n", [0, 1, 2])
def test_structs_of_several_shapes_are_described_one_by_one(n, thing, walk_json):
    part = D("leaf/s", 1, fields=[vmstate.uint8("s")], needed=lambda obj: obj.s)
    leaf = D("leaf", 1, fields=[vmstate.uint8("k"), vmstate.uint8("f", count="k", maximum=3)], subsections=[part])
    description = D(
        "d", 1, fields=[vmstate.uint8("n"), vmstate.struct("list", leaf, count="n", maximum=3, factory=thing)]
    )
    leaves = [thing(k=2, f=[1, 2], s=0), thing(k=1, f=[7], s=9)][:n]
    body, entry = vmstate.save(description, thing(n=n, list=leaves))
    entries = entry["fields"][1:]
    assert [field.get("index") for field in entries] == {0: [], 1: [None], 2: [0, 1]}[n]
    assert [field["size"] for field in entries] == [3, 1 + 1 + 1 + 1 + 6 + 4 + 1][:n]
    values = walk_json(entry, body)
    if n == 2:
        assert values["list"] == [{"k": 2, "f": [1, 2]}, {"k": 1, "f": 7, "leaf/s": {"s": 9}}]


def test_counted_structs_of_several_lengths(thing, walk_json):
    leaf = D("leaf", 1, fields=[vmstate.uint8("k"), vmstate.uint16("f", count="k", maximum=3)])
    assert not leaf.is_fixed
    description = D("d", 1, fields=[vmstate.struct("list", leaf, length=3)])
    body, entry = vmstate.save(description, thing(list=[thing(k=n, f=list(range(n))) for n in (2, 0, 3)]))
    assert walk_json(entry, body)["list"] == [{"k": 2, "f": [0, 1]}, {"k": 0}, {"k": 3, "f": [0, 1, 2]}]


def test_subsections_nest(thing, walk_json):
    inner = D("d/a/b", 9, fields=[vmstate.uint8("y")])
    description = D("d", 1, fields=[], subsections=[D("d/a", 7, fields=[vmstate.uint8("x")], subsections=[inner])])
    body, entry = vmstate.save(description, thing(x=1, y=2))
    assert entry["subsections"][0]["subsections"][0]["version"] == 9
    assert walk_json(entry, body) == {"d/a": {"x": 1, "d/a/b": {"y": 2}}}


def test_it_is_plain_json_whatever_the_values_are(thing):
    description = D("d", 1, fields=[vmstate.uint16("n"), vmstate.uint8("f", count="n", maximum=4)])
    _, entry = vmstate.save(description, thing(n=np.uint16(2), f=np.zeros(4, np.uint8)))
    assert json.loads(json.dumps(entry)) == entry
    assert entry["fields"][1]["array_len"] == 2
