"""Subsections on load: who owns one is said by its name, and nothing is waited for in vain."""

import pytest

from whimbrel import vmstate
from whimbrel.abc import Peek
from whimbrel.errors import IncompatibleError, StreamError

D = vmstate.VMStateDescription
INNER = D("dev/a/inner", 1, fields=[vmstate.uint8("z")])
A = D("dev/a", 2, minimum_version_id=1, fields=[vmstate.uint8("x"), vmstate.uint8("w", since=2)], subsections=[INNER])
B = D("dev/b", 1, fields=[vmstate.uint8("y")])
DEV = D("dev", 1, fields=[vmstate.uint8("v")], subsections=[A, B])


def sub(name, body, version=1):
    return b"\x05" + bytes([len(name)]) + name.encode("latin1") + version.to_bytes(4, "big") + body


def make(thing):
    return thing(v=0, x=0, w=0, y=0, z=0)


BODIES = {
    "none": (b"\x01", {"v": 1}),
    "one": (b"\x01" + sub("dev/b", b"\x02"), {"v": 1, "y": 2}),
    "both": (b"\x01" + sub("dev/a", b"\x03\x04", 2) + sub("dev/b", b"\x02"), {"v": 1, "x": 3, "w": 4, "y": 2}),
    "any order": (b"\x01" + sub("dev/b", b"\x02") + sub("dev/a", b"\x03"), {"v": 1, "x": 3, "y": 2}),
    "nested": (b"\x01" + sub("dev/a", b"\x03" + sub("dev/a/inner", b"\x05")), {"v": 1, "x": 3, "z": 5}),
    "nested, then its sibling": (
        b"\x05" + sub("dev/a", b"\x05\x05" + sub("dev/a/inner", b"\x05"), 2) + sub("dev/b", b"\x05"),
        {"v": 5, "x": 5, "w": 5, "z": 5, "y": 5},
    ),
}


@pytest.mark.parametrize("case", BODIES)
def test_found(case, three_ways, thing):
    body, values = BODIES[case]
    obj = make(thing)
    vmstate.apply(three_ways(DEV, 1, obj, body), obj)
    assert vars(obj) == {**vars(make(thing)), **values}


REFUSED = {
    "unknown": (sub("dev/c", b"\x02"), IncompatibleError, "'dev'.*'dev/c'.*known are: dev/a, dev/b"),
    "unknown, without a name": (sub("dev/", b""), IncompatibleError, "subsection 'dev/'"),
    "unknown, not ASCII": (sub("dev/\xff\x00", b""), IncompatibleError, "xff"),
    "twice": (sub("dev/b", b"\x02") * 2, StreamError, "subsection 'dev/b' came twice"),
    "too new": (sub("dev/b", b"\x02", 2), IncompatibleError, "subsection 'dev/b': expected version 1 to 1, got 2"),
    "too old": (sub("dev/a", b"\x02", 0), IncompatibleError, "subsection 'dev/a': expected version 1 to 2, got 0"),
    "version of 32 bits": (sub("dev/a", b"\x02", 2**32 - 1), IncompatibleError, "got 4294967295"),
    "nested, unknown": (sub("dev/a", b"\x02" + sub("dev/a/?", b"")), IncompatibleError, "'dev/a/\\?', which is not"),
    "nested, at the wrong place": (sub("dev/a/inner", b"\x02"), IncompatibleError, "'dev/a/inner', which is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, feed, thing):
    body, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        feed(vmstate.parse(DEV, 1, make(thing)), b"\x01" + body + b"\x7e")


def test_a_device_without_subsections_refuses_all_of_its_name(feed, thing):
    with pytest.raises(IncompatibleError, match="known are: none"):
        feed(vmstate.parse(D("d", 1, fields=[]), 1, thing()), sub("d/x", b"") + b"\x7e")


FOREIGN = [
    b"\x04",
    b"\x05\x00",
    b"\x05\x03dev",
    b"\x05\x03abc",
    b"\x05\x04deV/",
    b"\x05\x04dex/",
    sub("devx", b""),
    sub("devx/a", b""),
    sub("de", b""),
    sub("other/a", b""),
]


@pytest.mark.parametrize("after", FOREIGN)
def test_what_is_not_ours_is_left(after, feed, thing):
    loaded, taken = feed(vmstate.parse(DEV, 1, make(thing)), b"\x01" + after)
    assert taken == 1
    assert loaded.subsections == ()


@pytest.mark.parametrize("after", FOREIGN)
def test_not_a_byte_more_than_needed_is_looked_at(after, thing):
    """However little comes, the parser must stop at the first byte that shows the subsection is not ours."""
    ours = b"\x05", bytes(range(4, 256)), b"d", b"e", b"v", b"/"
    needed = next(n for n, byte in enumerate(after) if byte not in ours[n]) + 1
    parser = vmstate.parse(DEV, 1, make(thing))
    assert next(parser) == 1
    request = parser.send(memoryview(b"\x01"))
    looked = 0
    with pytest.raises(StopIteration):
        while True:
            assert isinstance(request, Peek)
            looked = request.size
            assert looked <= needed
            request = parser.send(memoryview(after[:looked]))
    assert looked == needed


CHILD = D("child", 1, fields=[vmstate.uint8("c")], subsections=[D("child/s", 1, fields=[vmstate.uint8("s")])])


def test_data_of_the_parent_after_a_struct_may_look_like_a_marker(three_ways, thing):
    description = D("dev", 1, fields=[vmstate.struct("one", CHILD), vmstate.buffer("data", size=10)])
    for start in (
        b"\x05\x07child!s",
        b"\x05\x05chil",
        b"\x05\xffchilD/",
        b"\x05" * 10,
        b"\x05\x07childs/",
        b"\x05\x05child/",
    ):
        data = start.ljust(10, b"\0")
        obj = thing(one=thing(c=0, s=0), data=bytes(10))
        loaded = three_ways(description, 1, obj, b"\x01" + data)
        assert loaded.values["data"] == data
        assert loaded.values["one"].subsections == ()


def test_struct_then_parent_subsections(three_ways, thing):
    """The struct is last, so its loader sees the parent's subsection first, and leaves it."""
    extra = D("dev/e", 1, fields=[vmstate.uint8("e")])
    description = D("dev", 1, fields=[vmstate.struct("list", CHILD, length=2)], subsections=[extra])
    obj = thing(list=[thing(c=0, s=0), thing(c=0, s=0)], e=0)
    body = b"\x01" + sub("child/s", b"\x05") + b"\x05" + sub("dev/e", b"\x09")
    vmstate.apply(three_ways(description, 1, obj, body), obj)
    assert obj == thing(list=[thing(c=1, s=5), thing(c=5, s=0)], e=9)
    assert vmstate.save(description, thing(list=[thing(c=1, s=5), thing(c=5, s=6)], e=9))[0] == (
        b"\x01" + sub("child/s", b"\x05") + b"\x05" + sub("child/s", b"\x06") + sub("dev/e", b"\x09")
    )


def test_absent_although_needed_here_is_fine(three_ways, thing):
    part = D("d/s", 1, fields=[vmstate.uint8("s")], needed=lambda obj: True)
    obj = thing(s=7)
    vmstate.apply(three_ways(D("d", 1, fields=[], subsections=[part]), 1, obj, b""), obj)
    assert obj.s == 7


def test_present_although_not_needed_here_is_loaded(three_ways, thing):
    part = D("d/s", 1, fields=[vmstate.uint8("s")], needed=lambda obj: False)
    obj = thing(s=7)
    vmstate.apply(three_ways(D("d", 1, fields=[], subsections=[part]), 1, obj, sub("d/s", b"\x08")), obj)
    assert obj.s == 8


def test_sixteen_deep(carry, thing):
    part = None
    for level in range(17, 0, -1):
        name = "/".join("d" * level)
        part = D(name, 1, fields=[vmstate.uint8(f"x{level}")], subsections=[part] if part else [])
    source = thing(**{f"x{level}": level for level in range(1, 18)})
    destination = thing(**{f"x{level}": 0 for level in range(1, 18)})
    carry(part, source, destination)
    assert destination == source


def test_names_of_255_bytes(carry, feed, thing):
    part = D("d/" + "x" * 253, 1, fields=[vmstate.uint8("s")])
    description = D("d", 1, fields=[], subsections=[part])
    destination = thing(s=0)
    carry(description, thing(s=3), destination)
    assert destination.s == 3
    with pytest.raises(IncompatibleError, match="not known here"):
        feed(vmstate.parse(description, 1, destination), sub("d/" + "y" * 253, b"") + b"\x7e")
