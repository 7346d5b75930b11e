"""Applying and undoing: values first, hooks inside out, and everything back if anything fails."""

import copy

import numpy as np
import pytest

from whimbrel import vmstate
from whimbrel.errors import IncompatibleError

D = vmstate.VMStateDescription


@pytest.fixture
def calls():
    return []


@pytest.fixture
def description(calls, thing):
    def note(name):
        return lambda obj, version: calls.append((name, version, obj.n if hasattr(obj, "n") else obj.x))

    leaf = D("leaf", 4, fields=[vmstate.uint8("x")], post_load=note("leaf"))
    nested = D("dev/s/t", 6, fields=[vmstate.uint8("t")], post_load=note("nested"))
    part = D("dev/s", 5, fields=[vmstate.uint8("s")], post_load=note("part"), subsections=[nested])
    return D(
        "dev",
        3,
        minimum_version_id=2,
        fields=[
            vmstate.uint8("n"),
            vmstate.uint16("numbers", count="n", maximum=4),
            vmstate.uint16("room", count="n", maximum=4),
            vmstate.buffer("data", count="n", maximum=4),
            vmstate.buffer("raw", count="n", maximum=4),
            vmstate.struct("one", leaf),
            vmstate.struct("grown", leaf, count="n", maximum=4, factory=lambda: thing(x=0)),
            vmstate.struct("there", leaf, count="n", maximum=4),
        ],
        subsections=[part],
        post_load=note("dev"),
    )


def make(thing, n, base):
    return thing(
        n=n,
        numbers=[base] * n,
        room=np.full((2, 2), base, np.uint16),
        data=bytearray([base] * n),
        raw=bytes([base] * n),
        one=thing(x=base),
        grown=[thing(x=base) for _ in range(n)],
        there=[thing(x=base) for _ in range(4)],
        s=base,
        t=base,
    )


def state(obj):
    copied = copy.deepcopy(vars(obj))
    copied["room"] = copied["room"].tolist()
    return copied


@pytest.mark.parametrize(("n", "m"), [(2, 2), (2, 3), (3, 1), (0, 4), (4, 0)])
def test_everything_arrives_and_goes_back(n, m, description, carry, thing):
    source, destination = make(thing, n, 10), make(thing, m, 20)
    before = state(destination)
    identities = {name: id(value) for name, value in vars(destination).items() if name not in ("n", "raw", "s", "t")}
    members = list(destination.grown)
    undo = carry(description, source, destination)
    expected = state(source)
    expected["room"] = [([10] * n + [20] * (4 - n))[:2], ([10] * n + [20] * (4 - n))[2:]]
    expected["there"] = [thing(x=10)] * n + [thing(x=20)] * (4 - n)
    assert state(destination) == expected
    assert {name: id(getattr(destination, name)) for name in identities} == identities
    assert [id(x) for x in destination.grown[:m]] == [id(x) for x in members[:n]]
    assert undo() == ()
    assert state(destination) == before
    assert {name: id(getattr(destination, name)) for name in identities} == identities
    assert [id(x) for x in destination.grown] == [id(x) for x in members]
    destination.n = 77
    assert undo() == ()
    assert destination.n == 77


def test_hooks_run_inside_out_when_all_values_are_there(description, calls, feed, thing):
    source, destination = make(thing, 1, 10), make(thing, 2, 20)
    body, _ = vmstate.save(description, source)
    loaded, _ = feed(vmstate.parse(description, 2, destination), bytes(body) + b"\x7e")
    assert calls == []
    undo = vmstate.apply(loaded, destination)
    assert calls == [("leaf", 4, 10)] * 3 + [("nested", 6, 1), ("part", 5, 1), ("dev", 2, 1)]
    calls.clear()
    undo()
    # What is there again is of our own version.
    assert calls == [("leaf", 4, 20)] * 3 + [("nested", 6, 2), ("part", 5, 2), ("dev", 3, 2)]


@pytest.mark.parametrize("which", ["leaf", "nested", "part", "dev"])
def test_a_post_load_that_raises_puts_everything_back(which, thing, carry):
    derived = []

    def hook(name):
        def post_load(obj, version):
            derived.append((name, obj.x))
            if name == which and obj.x == 10:
                raise ValueError("register 7 is odd")

        return post_load

    leaf = D("leaf", 1, fields=[vmstate.uint8("x")], post_load=hook("leaf"))
    nested = D("dev/s/t", 1, fields=[vmstate.uint8("t")], post_load=hook("nested"))
    part = D("dev/s", 1, fields=[vmstate.uint8("s")], post_load=hook("part"), subsections=[nested])
    dev = D("dev", 1, fields=[vmstate.uint8("x"), vmstate.struct("c", leaf)], subsections=[part], post_load=hook("dev"))
    source, destination = thing(x=10, c=thing(x=10), s=10, t=10), thing(x=20, c=thing(x=20), s=20, t=20)
    before = copy.deepcopy(destination)
    with pytest.raises(
        IncompatibleError, match=r"device 'dev'.*: post_load refused what came: .*register 7"
    ) as refused:
        carry(dev, source, destination)
    assert isinstance(refused.value.__cause__, ValueError)
    assert destination == before
    order = ["leaf", "nested", "part", "dev"]
    called = order[: order.index(which) + 1]
    assert derived == [(name, 10) for name in called] + [(name, 20) for name in called]


def test_an_interrupt_puts_everything_back_and_goes_on(thing, carry):
    def post_load(obj, version):
        if obj.x == 1:
            raise KeyboardInterrupt

    description = D("d", 1, fields=[vmstate.uint8("x")], post_load=post_load)
    obj = thing(x=5)
    with pytest.raises(KeyboardInterrupt):
        carry(description, thing(x=1), obj)
    assert obj.x == 5


class Picky:
    def __init__(self):
        self.a = 1
        self._b = 2

    @property
    def b(self):
        return self._b

    @b.setter
    def b(self, value):
        if value != 2:
            raise RuntimeError("no")
        self._b = value


def test_a_setter_that_raises_puts_everything_back(thing, carry):
    obj = Picky()
    with pytest.raises(IncompatibleError, match=r"device 'd', field 'b': it could not be set: RuntimeError\('no'\)"):
        carry(D("d", 1, fields=[vmstate.uint8("a"), vmstate.uint8("b")]), thing(a=8, b=9), obj)
    assert (obj.a, obj.b) == (1, 2)


def test_a_bytearray_that_somebody_looks_at_cannot_change_its_length(thing, carry):
    description = D("d", 1, fields=[vmstate.uint8("n"), vmstate.buffer("b", count="n", maximum=9)])
    obj = thing(n=2, b=bytearray(b"xy"))
    view = memoryview(obj.b)
    with pytest.raises(IncompatibleError, match="field 'b': it could not be set: BufferError"):
        carry(description, thing(n=1, b=b"a"), obj)
    assert obj == thing(n=2, b=bytearray(b"xy"))
    carry(description, thing(n=2, b=b"ab"), obj)
    assert bytes(view) == b"ab"


def test_undo_never_raises_and_restores_the_rest(thing, carry):
    def post_load(obj, version):
        if obj.a == 1:
            raise ValueError("as always")

    class Sticky:
        a = 1
        c = 3
        _b = 2

        @property
        def b(self):
            return self._b

        @b.setter
        def b(self, value):
            if value == 2:
                raise RuntimeError("not back")
            self._b = value

    obj = Sticky()
    fields = [vmstate.uint8("a"), vmstate.uint8("b"), vmstate.uint8("c")]
    undo = carry(D("d", 1, fields=fields, post_load=post_load), thing(a=7, b=8, c=9), obj)
    failures = undo()
    assert [type(failure) for failure in failures] == [RuntimeError, ValueError]
    assert (obj.a, obj.b, obj.c) == (1, 8, 3)


def test_failures_while_restoring_are_noted(thing, carry):
    def post_load(obj, version):
        raise ValueError(obj.a)

    obj = thing(a=1)
    with pytest.raises(IncompatibleError) as refused:
        carry(D("d", 1, fields=[vmstate.uint8("a")], post_load=post_load), thing(a=2), obj)
    assert refused.value.__notes__ == ["and while the object was restored: ValueError(1)"]
    assert obj.a == 1


def test_an_object_that_is_part_twice_goes_back_too(thing, carry):
    leaf = D("leaf", 1, fields=[vmstate.uint8("x")])
    description = D("d", 1, fields=[vmstate.struct("a", leaf), vmstate.struct("b", leaf)])
    shared = thing(x=7)
    obj = thing(a=shared, b=shared)
    undo = carry(description, thing(a=thing(x=1), b=thing(x=2)), obj)
    assert shared.x == 2
    assert undo() == ()
    assert shared.x == 7


def test_loaded_values_are_native_and_plain(thing, feed):
    fields = [vmstate.uint32("x", length=2), vmstate.uint8("y"), vmstate.buffer("z", size=1)]
    obj = thing(x=[0, 0], y=0, z=b"0")
    loaded, _ = feed(vmstate.parse(D("d", 1, fields=fields), 1, obj), bytes(8) + b"\x01z\x7e")
    assert loaded.values["x"].dtype == np.dtype("uint32")
    assert loaded.values["x"].dtype.isnative
    assert loaded.values["y"] == 1
    assert loaded.values["z"] == b"z"
    assert type(loaded.values["z"]) is bytes


def test_numpy_to_list_and_back(thing, carry):
    description = D("d", 1, fields=[vmstate.float32("x", length=3), vmstate.bool_("y", length=2)])
    source = thing(x=np.array([1, 2, 3], np.float32), y=np.array([True, False]))
    destination = thing(x=[0.0] * 3, y=[False] * 2)
    carry(description, source, destination)
    assert destination == thing(x=[1.0, 2.0, 3.0], y=[True, False])
    assert type(destination.y[0]) is bool
    back = thing(x=np.zeros(3, np.float32), y=np.zeros(2, bool))
    carry(description, destination, back)
    assert back.x.tolist() == [1.0, 2.0, 3.0]
    assert back.y.tolist() == [True, False]


def test_what_is_loaded_does_not_share_with_the_array(thing, feed):
    description = D("d", 1, fields=[vmstate.uint8("x", length=2)])
    obj = thing(x=np.zeros(2, np.uint8))
    loaded, _ = feed(vmstate.parse(description, 1, obj), b"\x01\x02\x7e")
    vmstate.apply(loaded, obj)
    obj.x[:] = 9
    assert loaded.values["x"].tolist() == [1, 2]
