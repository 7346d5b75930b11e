"""Saving: what is refused, what is called, and that nothing else changes."""

import copy

import numpy as np
import pytest

from whimbrel import vmstate
from whimbrel.errors import ConfigError, MigrationError, ProtocolError

D = vmstate.VMStateDescription
CHILD = D("child", 1, fields=[vmstate.uint8("x", high=3)])
COUNTED = [vmstate.uint8("n"), vmstate.uint8("f", count="n", maximum=3)]


def x(**options):
    return [vmstate.uint8("x", **options)]


REFUSED = {
    "too large": (x(), {"x": 256}, "device 'd', field 'x' cannot be saved: expected 0 to 255, got 256"),
    "negative": (x(), {"x": -1}, "expected 0 to 255, got -1"),
    "below low": (x(low=4), {"x": 3}, "expected at least 4, got 3"),
    "above high": (x(high=4), {"x": 5}, "expected at most 4, got 5"),
    "outside": (x(low=1, high=4), {"x": 5}, "expected 1 to 4, got 5"),
    "a float": (x(), {"x": 1.0}, "expected an int"),
    "a bool": (x(), {"x": True}, "expected an int"),
    "missing": (x(), {}, "has none"),
    "list element too large": (x(length=2), {"x": [1, 256]}, "element 1: expected 0 to 255"),
    "list element of a wrong type": (x(length=2), {"x": [1, None]}, "expected an int"),
    "list element is a bool": (x(length=2), {"x": [1, True]}, "expected an int for a uint8, got bool"),
    "list element is no bool": ([vmstate.bool_("x", length=2)], {"x": [True, 2]}, "expected True or False, got int"),
    "list element out of range": (x(length=2, high=4), {"x": [1, 5]}, "element 1: expected at most 4, got 5"),
    "array element out of range": (x(length=2, low=4), {"x": np.array([4, 3], "u1")}, "element 1: .*at least 4, got 3"),
    "dtype": (x(length=2), {"x": np.array([4, 3], "u2")}, "expected an array of uint8"),
    "NaN within a range": ([vmstate.float64("x", low=0)], {"x": float("nan")}, "at least 0.0, got nan"),
    "NaN among values": ([vmstate.float64("x", low=0, length=2)], {"x": np.array([0, np.nan])}, "element 1"),
    "int that is no float": ([vmstate.float64("x")], {"x": 2**53 + 1}, "a float cannot hold"),
    "int too large for a float": ([vmstate.float64("x")], {"x": 10**400}, "too large for a float64"),
    "float32 list overflow": ([vmstate.float32("x", length=1)], {"x": [1e300]}, "element 0: 1e.300 is too large"),
    "count above the maximum": (COUNTED, {"n": 4, "f": [0] * 4}, "count 'n' is 4, the maximum is 3"),
    "list is not as long as its count": (COUNTED, {"n": 2, "f": [0] * 3}, "expected 2 elements, the list has 3"),
    "bytes longer than the count": (
        [vmstate.uint8("n"), vmstate.buffer("f", count="n", maximum=3)],
        {"n": 1, "f": b"ab"},
        "expected 1 elements, the bytes has 2",
    ),
    "struct list too short": (
        [vmstate.uint8("n"), vmstate.struct("f", CHILD, count="n", maximum=3)],
        {"n": 1, "f": []},
        "at least 1 elements",
    ),
    "struct list with a factory longer than the count": (
        [vmstate.uint8("n"), vmstate.struct("f", CHILD, count="n", maximum=3, factory=object)],
        {"n": 0, "f": [None]},
        "expected 0 elements",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_that_does_not_fit(case, thing):
    fields, values, message = REFUSED[case]
    with pytest.raises(MigrationError, match=message) as refused:
        vmstate.save(D("d", 1, fields=fields), thing(**values))
    assert not isinstance(refused.value, (ConfigError, ProtocolError))
    assert "device 'd', field " in str(refused.value)


def test_the_path_of_a_nested_field(thing):
    inner = D(
        "inner",
        1,
        fields=[vmstate.uint8("k")],
        subsections=[D("inner/s", 1, fields=[vmstate.struct("c", CHILD, length=2)])],
    )
    description = D("d", 1, fields=[vmstate.struct("i", inner)])
    obj = thing(i=thing(k=5, c=[thing(x=1), thing(x=4)]))
    with pytest.raises(MigrationError, match=r"device 'd', subsection 'inner/s', field 'i.c\[1\].x' cannot"):
        vmstate.save(description, obj)


@pytest.mark.parametrize("value", [2, np.uint8(2), np.int64(2)])
def test_integers_of_any_kind(value, thing):
    assert vmstate.save(D("d", 1, fields=x()), thing(x=value))[0] == b"\x02"


def test_list_of_numpy_scalars(thing):
    assert vmstate.save(D("d", 1, fields=x(length=2)), thing(x=[np.int64(1), 2]))[0] == b"\x01\x02"


def test_hooks_are_called_outside_in(thing):
    calls = []

    def note(name):
        return lambda obj: calls.append((name, obj.name))

    sub = D(
        "d/s",
        1,
        fields=[],
        pre_save=note("sub.pre_save"),
        needed=lambda obj: calls.append(("needed", obj.name)) or True,
    )
    child = D("child", 1, fields=[], pre_save=note("child.pre_save"))
    description = D("d", 1, fields=[vmstate.struct("c", child)], subsections=[sub], pre_save=note("pre_save"))
    vmstate.save(description, thing(name="outer", c=thing(name="inner")))
    assert calls == [
        ("pre_save", "outer"),
        ("child.pre_save", "inner"),
        ("needed", "outer"),
        ("sub.pre_save", "outer"),
    ]


def test_pre_save_can_set_the_count(thing):
    def pre_save(obj):
        obj.n = len(obj.f)

    obj = thing(n=0, f=[7, 8])
    assert vmstate.save(D("d", 1, fields=COUNTED, pre_save=pre_save), obj)[0] == b"\x02\x07\x08"


@pytest.mark.parametrize("hook", ["pre_save", "needed"])
def test_a_hook_that_raises(hook, thing):
    part = D("d/s", 1, fields=[], **{hook: lambda obj: 1 / 0})
    with pytest.raises(MigrationError, match=f"device 'd', subsection 'd/s': {hook} raised ZeroDivision") as refused:
        vmstate.save(D("d", 1, fields=[], subsections=[part]), thing())
    assert isinstance(refused.value.__cause__, ZeroDivisionError)


def test_unmigratable(thing):
    with pytest.raises(MigrationError, match="'d' is declared unmigratable"):
        vmstate.save(D("d", 1, fields=[], unmigratable=True), thing())


def test_subsections_that_are_not_needed_are_left_out(thing):
    sub = D("d/s", 1, fields=x(), needed=lambda obj: obj.x != 0)
    description = D("d", 1, fields=[], subsections=[sub])
    assert vmstate.save(description, thing(x=0)) == (b"", {"vmsd_name": "d", "version": 1, "fields": []})
    assert vmstate.save(description, thing(x=9))[0] == b"\x05\x03d/s\0\0\0\x01\x09"


def test_saving_changes_nothing(thing):
    description = D(
        "d",
        1,
        fields=[
            *COUNTED,
            vmstate.float32("g", length=4),
            vmstate.buffer("b", size=2),
            vmstate.struct("c", CHILD),
        ],
    )
    g = np.arange(8, dtype=np.float32)[::2]
    g.flags.writeable = False
    obj = thing(n=2, f=[1, 2], g=g, b=bytearray(b"xy"), c=thing(x=3))
    before = copy.deepcopy(obj)
    body, _ = vmstate.save(description, obj)
    obj.b += b"z"  # nothing holds on to it
    assert (obj.n, obj.f, obj.c) == (before.n, before.f, before.c)
    assert (obj.g == before.g).all()
    assert body[-3:] == b"xy\x03"


def test_what_was_saved_does_not_follow_the_object(thing):
    obj = thing(x=np.array([1, 2], np.uint8))
    body, _ = vmstate.save(D("d", 1, fields=x(length=2)), obj)
    obj.x[:] = 9
    assert body == b"\x01\x02"
