"""Bodies of devices by their description: what each type means, and what hostile descriptions come to."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import StreamError
from whimbrel.wire import fields
from whimbrel.wire.fields import decode

from . import tails


def device(*described, **more):
    return {"name": "dev", "instance_id": 0, "vmsd_name": "dev", "version": 1, "fields": list(described), **more}


def field(type_, size, **more):
    return {"name": "f", "type": type_, "size": size, **more}


def value_of(described, body):
    (only,) = decode(device(described), bytes.fromhex(body)).fields
    return only.value


GOLDEN = [
    (field("uint8", 1), "fe", 254),
    (field("int8", 1), "fe", -2),
    (field("uint16", 2), "0102", 0x0102),
    (field("int16", 2), "ffff", -1),
    (field("uint32", 4), "80000000", 2**31),
    (field("int32", 4), "80000000", -(2**31)),
    (field("int32 equal", 4), "ffffffff", -1),
    (field("int32 le", 4), "00000007", 7),
    (field("uint8 equal", 1), "ff", 255),
    (field("uint64", 8), "ffffffffffffffff", 2**64 - 1),
    (field("int64", 8), "ffffffffffffffff", -1),
    (field("bool", 1), "00", False),
    (field("bool", 1), "01", True),
    (field("timer", 8), "0000000000000010", 16),
    (field("timer", 8), "ff" * 8, None),
    (field("CPU_Double_U", 8), "7ff8000000000001", 0x7FF8000000000001),
    (field("float64", 8), "4042000000000000", 36.0),
    (field("bitmap", 16), "0000000000000001 8000000000000000", (1, 2**63)),
    (field("bitmap", 0), "", ()),
    (field("buffer", 3), "007e05", b"\0\x7e\5"),
    (field("virtio", 2), "abcd", b"\xab\xcd"),
    (field("nullptr", 1), "30", b"0"),
    (field("qtailq", 4, vmsd_name="q", version=1, fields=[field("uint8", 1)]), "01070000", b"\1\7\0\0"),
    (field("gtree", 5, fields=[]), "0000000000", b"\0" * 5),
    (field("uint16", 2, array_len=3), "000100020003", (1, 2, 3)),
    (field("bool", 1, array_len=2), "0001", (False, True)),
    (field("timer", 8, array_len=2), "ff" * 8 + "00" * 8, (None, 0)),
    (field("buffer", 2, array_len=2), "01020304", (b"\1\2", b"\3\4")),
    (field("uint8", 1, array_len=0), "", ()),
]


@pytest.mark.parametrize(("described", "body", "value"), GOLDEN)
def test_types(described, body, value):
    found = value_of(described, body)
    assert found == value
    assert type(found) is type(value)


def test_struct_with_subsections():
    part = {"vmsd_name": "in/more", "version": 3, "fields": [field("uint8", 1)]}
    inner = {"vmsd_name": "in", "version": 2, "fields": [field("uint16", 2)], "subsections": [part]}
    last = {"vmsd_name": "dev/last", "version": 1, "fields": []}
    size = 2 + 1 + 8 + 4 + 1
    body = (
        bytes.fromhex("0102 05 07") + b"in/more" + bytes.fromhex("00000003 09 05 08") + b"dev/last" + bytes(3) + b"\1"
    )
    found = decode(device(field("struct", size, struct=inner), subsections=[last]), body)
    assert found.as_dict() == {
        "name": "dev",
        "instance_id": 0,
        "vmsd_name": "dev",
        "version": 1,
        "fields": [
            {
                "name": "f",
                "type": "struct",
                "offset": 0,
                "size": 16,
                "value": {
                    "vmsd_name": "in",
                    "version": 2,
                    "fields": [{"name": "f", "type": "uint16", "offset": 0, "size": 2, "value": 0x0102}],
                    "subsections": [
                        {
                            "vmsd_name": "in/more",
                            "version": 3,
                            "fields": [{"name": "f", "type": "uint8", "offset": 15, "size": 1, "value": 9}],
                        }
                    ],
                },
            }
        ],
        "subsections": [{"vmsd_name": "dev/last", "version": 1, "fields": []}],
    }
    assert [(path, leaf.value) for path, leaf in found.leaves()] == [("f.f", 0x0102), ("f./more.f", 9)]


def test_paths():
    inner = {"vmsd_name": "in", "version": 1, "fields": [field("uint8", 1)]}
    one = {**field("struct", 1, struct=inner, array_len=2), "name": "a"}
    two = [{**field("struct", 1, struct=inner, index=index), "name": "b"} for index in range(2)]
    found = decode(device(one, *two), b"\1\2\3\4")
    assert [(path, leaf.value) for path, leaf in found.leaves()] == [
        ("a[0].f", 1),
        ("a[1].f", 2),
        ("b[0].f", 3),
        ("b[1].f", 4),
    ]


def test_old_style():
    described = {
        "name": "slirp",
        "instance_id": 0,
        "size": 3,
        "fields": [{"name": "data", "size": 3, "type": "buffer"}],
    }
    found = decode(described, b"abc")
    assert (found.version, found.vmsd_name, found.fields[0].value) == (None, None, b"abc")


@pytest.mark.parametrize("extra", [-2, -1, 1, 5])
def test_a_field_that_holds_more_or_less_than_it_says_stays_bytes(extra):
    """What a `tmp` or a `vstruct` has inline is read only where it is all of it."""
    inline = {"vmsd_name": "t", "version": 1, "fields": [field("uint16", 2), field("uint8", 1)]}
    body = bytes(range(10))
    found = decode(device(field("tmp", 3 + extra, **inline), field("uint8", 1)), body[: 4 + extra])
    assert found.fields[0].value == body[: 3 + extra]
    assert found.fields[1].value == body[3 + extra]
    assert decode(device(field("tmp", 3, **inline)), b"abc").fields[0].value.fields[1].value == ord("c")


def test_json_has_no_word_for_it():
    found = decode(device(field("float64", 8), field("float32", 4)), bytes.fromhex("7ff8000000000000 ff800000"))
    assert math.isnan(found.fields[0].value)
    assert json.dumps(found.as_dict(), allow_nan=False).count('"nan"') == 1
    assert found.as_dict()["fields"][1]["value"] == "-inf"


# --------------------------------------------------------------------------------------------------------- at random


@given(tails.devices())
def test_random_devices(devices):
    for device in devices:
        found = decode(device.described, device.body).as_dict()
        if "vmsd_name" not in device.described:
            found["version"] = device.decoded["version"]
        assert found == device.decoded
        json.dumps(found, allow_nan=False)


@given(tails.devices(most=1), st.integers(1, 3))
def test_exactly_the_body(devices, extra):
    (only,) = devices
    with pytest.raises(StreamError, match="left behind the last field"):
        decode(only.described, only.body + b"x" * extra)
    for cut in range(len(only.body)):
        with pytest.raises(StreamError):
            decode(only.described, only.body[:cut])


@given(tails.devices(most=1, nasty=False), st.data())
def test_damage(devices, data):
    """Flipped bytes of the body end in an error or in values; so does anything in the description."""
    (only,) = devices
    body = bytearray(only.body)
    for _ in range(3):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    junk = st.recursive(
        st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
        max_leaves=5,
    )
    described = json.loads(json.dumps(only.described))
    for _ in range(data.draw(st.integers(0, 2))):
        objects = list(_objects(described))
        where = data.draw(st.sampled_from(objects))
        where[data.draw(st.sampled_from(KEYS))] = data.draw(junk)
    try:
        found = decode(described, bytes(body))
    except StreamError:
        return
    json.dumps(found.as_dict(), allow_nan=False)
    assert _end(found.as_dict()) <= len(body)


KEYS = ["name", "type", "size", "array_len", "index", "struct", "fields", "subsections", "vmsd_name", "version"]


def _objects(value):
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _objects(item)


def _end(decoded):
    return max([each["offset"] + each["size"] for each in _objects(decoded) if "offset" in each], default=0)


# ----------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize(
    ("described", "says"),
    [
        (field("uint8", 1, array_len=2**32 - 1), "4294967295 bytes at byte 1 of the body, and only 3 are left"),
        (field("buffer", 2**40), "1099511627776 bytes at byte 1 of the body"),
        (field("buffer", 2**40, array_len=2**32 - 1), "only 3 are left"),
        (field("struct", 0, array_len=2**32 - 1, struct={"fields": []}), "4294967295 elements without bytes"),
        (field("buffer", 0, array_len=1000), "1000 elements without bytes"),
        (field("buffer", -1), "size of dev.f is described as -1"),
        (field("buffer", 2**41), "a huge number"),
        (field("buffer", True), "size of dev.f is described as True"),
        (field("buffer", 1.0), "size of dev.f is described as 1.0"),
        (field("buffer", "1"), "size of dev.f is described as '1'"),
        (field("uint8", 1, array_len=-1), "array_len of dev.f is described as -1"),
        (field("uint8", 1, array_len=None), "array_len of dev.f is described as None"),
        (field("uint8", 1, index=2**32), "index of dev.f is described as 4294967296"),
        (field("uint32", 2), "described as 2 bytes long, expected 4"),
        (field("uint32", 1, array_len=3), "described as 1 bytes long, expected 4"),
        (field("bitmap", 3), "expected words of 8"),
        (field("struct", 2, struct={"fields": [field("uint8", 1)]}), "described as 2 bytes long, and its fields"),
        (field("struct", 1, struct={"fields": [field("uint16", 2)]}), "dev.f.f .uint16. has 2 bytes at byte 1"),
        (field("struct", 1, struct=[]), "the struct of dev.f is described as a list"),
        (field("struct", 0, struct={"fields": {}}), "fields of dev.f are described as an object"),
        (field("struct", 0, struct={"fields": [3]}), "fields of dev.f"),
        (field("struct", 3, struct={"fields": [], "subsections": [{"fields": []}]}), "without its name or its version"),
        (
            field(
                "struct", 3, struct={"fields": [], "subsections": [{"vmsd_name": "f/s", "version": 1, "fields": []}]}
            ),
            "subsection 'f/s' of dev.f, version 1, must begin at byte 1 of the body, not 01 02 03",
        ),
        ({"type": "buffer", "size": 1}, "name of a field of dev is described as None"),
        ({**field("buffer", 1), "name": "\x1b[2J"}, "printable ASCII"),
        ({**field("buffer", 1), "name": "\ud800"}, "printable ASCII"),
        ({**field("buffer", 1), "name": "x" * 256}, "1 to 255"),
        ({"name": "f", "size": 1}, "type of dev.f"),
    ],
)
def test_descriptions_that_lie(described, says):
    with pytest.raises(StreamError, match=says) as caught:
        decode(device({"name": "first", "type": "uint8", "size": 1}, described), b"\0\1\2\3")
    assert caught.value.place.section == "'dev'"


def test_nesting_has_an_end():
    described = field("uint8", 1)
    for _ in range(fields.NESTING_MAX):
        described = field("struct", 1, struct={"fields": [described]})
    assert decode(device(described), b"\1").as_dict()
    with pytest.raises(StreamError, match="more than 64 deep"):
        decode(device(field("struct", 1, struct={"fields": [described]})), b"\1")


def test_subsections_nest_to_an_end_too():
    part = {"vmsd_name": "s", "version": 0, "fields": []}
    for _ in range(70):
        part = {"vmsd_name": "s", "version": 0, "fields": [], "subsections": [part]}
    with pytest.raises(StreamError, match="more than 64 deep"):
        decode(device(subsections=[part]), b"\5\1s\0\0\0\0" * 71)


def test_one_struct_described_once_and_meant_a_million_times():
    struct = {"vmsd_name": "s", "version": 0, "fields": [field("uint8", 1)]}
    with pytest.raises(StreamError, match=f"more than {fields.NODES_MAX} fields"):
        decode(device(field("struct", 1, struct=struct, array_len=fields.NODES_MAX)), bytes(fields.NODES_MAX))


def test_a_million_numbers_stay_bytes():
    body = bytes(fields.NODES_MAX + 1)
    assert decode(device(field("uint8", 1, array_len=len(body))), body).fields[0].value == body
    assert len(decode(device(field("uint8", 1, array_len=99)), body[:99]).fields[0].value) == 99


def test_structs_tried_in_vain_within_each_other():
    """A description may be wrong at every level; each level is tried once."""
    described = field("tmp", 40, fields=[field("uint8", 1, array_len=40)])
    for _ in range(30):
        described = field("tmp", 40, fields=[described, field("uint8", 1)])
    assert decode(device(described), bytes(40)).fields[0].value == bytes(40)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer(kind):
    assert decode(device(field("buffer", 2)), kind(b"ab")).fields[0].value == b"ab"
