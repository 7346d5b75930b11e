"""What a description refuses to be, one test a refusal."""

import attrs
import pytest

from whimbrel import vmstate
from whimbrel.errors import ConfigError

D = vmstate.VMStateDescription
LEAF = D("leaf", 1, fields=[vmstate.uint8("x")])
EMPTY = D("empty", 1, fields=[])


def wrong_field(make, *args, **kwargs):
    return lambda: make(*args, **kwargs)


FIELDS = {
    "name is no identifier": (wrong_field(vmstate.uint8, "a-b"), "'a-b'.*identifier"),
    "name is empty": (wrong_field(vmstate.uint8, ""), "identifier"),
    "name is no string": (wrong_field(vmstate.uint8, 5), "identifier"),
    "name is not ascii": (wrong_field(vmstate.uint8, "é"), "identifier"),
    "since is negative": (wrong_field(vmstate.uint8, "a", since=-1), "since=-1"),
    "since is a bool": (wrong_field(vmstate.uint8, "a", since=True), "since=True"),
    "length and count": (wrong_field(vmstate.uint8, "a", length=2, count="n", maximum=3), "both length and count"),
    "length 0": (wrong_field(vmstate.uint8, "a", length=0), "length=0"),
    "length too large": (wrong_field(vmstate.uint8, "a", length=vmstate.MAXIMUM_BODY + 1), "length=16777217"),
    "length no int": (wrong_field(vmstate.uint8, "a", length="n"), "length='n'"),
    "maximum without count": (wrong_field(vmstate.uint8, "a", maximum=3), "for a range use high"),
    "count without maximum": (wrong_field(vmstate.uint8, "a", count="n"), "maximum=None"),
    "maximum 0": (wrong_field(vmstate.uint8, "a", count="n", maximum=0), "maximum=0"),
    "count no name": (wrong_field(vmstate.uint8, "a", count=4, maximum=4), "count=4"),
    "low out of the kind": (wrong_field(vmstate.uint8, "a", low=-1), "low=-1.*0 to 255"),
    "high out of the kind": (wrong_field(vmstate.int8, "a", high=128), "high=128.*-128 to 127"),
    "bound of an integer is a float": (wrong_field(vmstate.uint8, "a", high=1.5), "high=1.5"),
    "low above high": (wrong_field(vmstate.uint8, "a", low=3, high=2), "low=3 is above high=2"),
    "range of a bool": (wrong_field(vmstate.bool_, "a", high=1), "no range"),
    "bound is nan": (wrong_field(vmstate.float64, "a", low=float("nan")), "not NaN"),
    "bound of a float is a string": (wrong_field(vmstate.float64, "a", low="0"), "not NaN"),
    "bound too large for the float": (wrong_field(vmstate.float32, "a", high=1e300), "too large for a float32"),
    "buffer of no size": (wrong_field(vmstate.buffer, "a"), "no size"),
    "buffer of size 0": (wrong_field(vmstate.buffer, "a", size=0), "size=0"),
    "buffer with size and count": (wrong_field(vmstate.buffer, "a", size=1, count="n", maximum=2), "both size and"),
    "factory no callable": (wrong_field(vmstate.struct, "a", LEAF, length=2, factory=3), "factory=3"),
    "factory for one": (wrong_field(vmstate.struct, "a", LEAF, factory=object), "single struct"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_is_checked_when_it_is_made(case):
    make, message = FIELDS[case]
    with pytest.raises(ConfigError, match=message) as refused:
        make()
    assert refused.value.hint


def test_unknown_options_are_python_errors():
    with pytest.raises(TypeError, match="lenght"):
        vmstate.uint8("a", lenght=3)


def body(*fields, **kwargs):
    return lambda: D("d", 1, fields=fields, **kwargs)


def deep(levels):
    description = LEAF
    for level in range(levels):
        description = D(f"l{level}", 1, fields=[vmstate.struct("x", description)])
    return description


class Stranger(vmstate.NumberField):
    pass


N8 = vmstate.uint8("n")
DESCRIPTIONS = {
    "no name": (lambda: D("", 1, fields=[]), "1 to 255"),
    "long name": (lambda: D("x" * 256, 1, fields=[]), "1 to 255"),
    "name not ascii": (lambda: D("é", 1, fields=[]), "ASCII"),
    "name not printable": (lambda: D("a\0b", 1, fields=[]), "printable"),
    "name no string": (lambda: D(b"d", 1, fields=[]), "printable"),
    "version negative": (lambda: D("d", -1, fields=[]), "version_id=-1"),
    "version too large": (lambda: D("d", 2**31, fields=[]), "version_id=2147483648"),
    "version no int": (lambda: D("d", "1", fields=[]), "version_id='1'"),
    "minimum above version": (lambda: D("d", 1, minimum_version_id=2, fields=[]), "minimum_version_id=2"),
    "minimum negative": (lambda: D("d", 1, minimum_version_id=-1, fields=[]), "minimum_version_id=-1"),
    "fields no list": (lambda: D("d", 1, fields=5), "expected a list"),
    "fields a string": (lambda: D("d", 1, fields="ab"), "expected a list"),
    "subsections no list": (body(subsections=5), "expected a list"),
    "no field": (body("x"), "'x' is not a field"),
    "a field of a foreign class": (body(Stranger(kind=N8.kind, name="a")), "is not a field"),
    "a name twice": (body(N8, vmstate.bool_("n")), "two fields are called 'n'"),
    "since after the version": (body(vmstate.uint8("a", since=2)), "since version 2.*raise it"),
    "hook no callable": (body(post_load=3), "post_load=3"),
    "pre_save no callable": (body(pre_save="f"), "pre_save='f'"),
    "needed no callable": (body(needed=True), "needed=True"),
    "unmigratable no bool": (body(unmigratable=1), "unmigratable=1"),
    "count unknown": (body(vmstate.uint8("a", count="m", maximum=2)), "'m' of field 'a' is no field"),
    "count later": (body(vmstate.uint8("a", count="n", maximum=2), N8), "'n' of field 'a' comes later"),
    "count itself": (body(vmstate.uint8("a", count="a", maximum=2)), "'a' of field 'a' comes later"),
    "count a bool": (body(vmstate.bool_("n"), vmstate.uint8("a", count="n", maximum=2)), "not a single integer"),
    "count a float": (body(vmstate.float32("n"), vmstate.uint8("a", count="n", maximum=2)), "not a single integer"),
    "count a buffer": (body(vmstate.buffer("n", size=1), vmstate.uint8("a", count="n", maximum=2)), "not a single"),
    "count an array": (body(vmstate.uint8("n", length=1), vmstate.uint8("a", count="n", maximum=2)), "not a single"),
    "count negative": (body(vmstate.int32("n"), vmstate.uint8("a", count="n", maximum=2)), "can be negative"),
    "count low negative": (body(vmstate.int32("n", low=-1), vmstate.uint8("a", count="n", maximum=2)), "negative"),
    "count younger": (
        lambda: D("d", 3, fields=[vmstate.uint8("n", since=3), vmstate.uint8("a", count="n", maximum=2, since=2)]),
        "since version 3 only",
    ),
    "struct of nothing": (body(vmstate.struct("a", None)), "described by None"),
    "struct with needed": (body(vmstate.struct("a", D("c", 1, fields=[], needed=bool))), "only a subsection"),
    "struct unmigratable": (body(vmstate.struct("a", D("c", 1, fields=[], unmigratable=True))), "'c' is unmigratable"),
    "struct that begins with a subsection": (
        body(vmstate.struct("a", D("c", 1, fields=[vmstate.struct("e", EMPTY)], subsections=[D("c/s", 1, fields=[])]))),
        "'a' is a struct that may begin with a subsection",
    ),
    "array of nothing": (body(vmstate.struct("a", EMPTY, length=9)), "structs of no bytes"),
    "too many structs": (
        body(
            vmstate.struct("s", vmstate.VMStateDescription("one", 1, fields=[N8]), length=vmstate.MAXIMUM_ELEMENTS + 1)
        ),
        "may have 65537 structs",
    ),
    "body too long": (body(N8, vmstate.buffer("b", size=vmstate.MAXIMUM_BODY)), "as long as 16777217 bytes"),
    "array too long": (body(vmstate.uint64("b", length=2**21 + 1)), "as long as 16777224 bytes"),
    "nested too long": (
        body(vmstate.struct("a", D("c", 1, fields=[vmstate.uint64("b", length=2**20)]), length=3)),
        "25165824",
    ),
    "nested too deep": (lambda: deep(17), "17 deep"),
    "subsection no description": (body(subsections=[5]), "5 is not a subsection"),
    "subsection of a foreign name": (body(subsections=[D("other/x", 1, fields=[])]), "foreign name.*'d/'"),
    "subsection without a name": (body(subsections=[D("d/", 1, fields=[])]), "foreign name"),
    "subsection twice": (body(subsections=[D("d/a", 1, fields=[]), D("d/a", 2, fields=[])]), "two subsections"),
    "subsection unmigratable": (body(subsections=[D("d/a", 1, fields=[], unmigratable=True)]), "'d/a' is unmigrat"),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_description_is_checked_when_it_is_made(case):
    make, message = DESCRIPTIONS[case]
    with pytest.raises(ConfigError, match=message) as refused:
        make()
    assert refused.value.hint


SUB = D("d/a/b", 1, fields=[vmstate.uint8("z")])
THIEVES = {
    "a sibling": body(subsections=[D("d/a", 1, fields=[]), SUB]),
    "a sibling after it": body(subsections=[SUB, D("d/a", 1, fields=[])]),
    "the last struct": body(vmstate.struct("s", D("d/a", 1, fields=[N8])), subsections=[SUB]),
    "a struct in the last struct": body(
        vmstate.struct("s", D("c", 1, fields=[vmstate.struct("t", D("d/a", 1, fields=[N8]))])), subsections=[SUB]
    ),
    "a struct before an array that may be empty": body(
        N8,
        vmstate.struct("s", D("d/a", 1, fields=[N8])),
        vmstate.uint8("f", count="n", maximum=3),
        subsections=[SUB],
    ),
    "a struct before a young field": lambda: D(
        "d",
        2,
        minimum_version_id=1,
        fields=[vmstate.struct("s", D("d/a", 1, fields=[N8])), vmstate.uint8("f", since=2)],
        subsections=[SUB],
    ),
    "a struct before a struct of nothing": body(
        vmstate.struct("s", D("d/a", 1, fields=[N8])), vmstate.struct("t", EMPTY), subsections=[SUB]
    ),
    "a struct of its own name": body(
        vmstate.struct("s", D("d", 1, fields=[N8])), subsections=[D("d/x", 1, fields=[N8])]
    ),
    "a struct at the end of a subsection of the last struct": body(
        vmstate.struct(
            "s",
            D(
                "c",
                1,
                fields=[N8],
                subsections=[D("c/x", 1, fields=[vmstate.struct("t", D("d/a", 1, fields=[N8]))])],
            ),
        ),
        subsections=[SUB],
    ),
    "a part of a sibling": body(subsections=[D("d/q", 1, fields=[vmstate.struct("s", D("d/a", 1, fields=[N8]))]), SUB]),
}


@pytest.mark.parametrize("case", THIEVES)
def test_a_subsection_cannot_be_taken_for_anothers(case):
    with pytest.raises(ConfigError, match="would be taken for one of 'd"):
        THIEVES[case]()


def test_a_struct_of_that_name_in_the_middle_is_harmless():
    body(vmstate.struct("s", D("d/a", 1, fields=[N8])), vmstate.uint8("f"), subsections=[SUB])()


def test_limits_are_reached():
    assert body(vmstate.buffer("b", size=vmstate.MAXIMUM_BODY))().maximum_size == vmstate.MAXIMUM_BODY
    assert deep(16).depth == vmstate.MAXIMUM_NESTING == 16
    assert D("x" * 255, 2**31 - 1, fields=[]).minimum_version_id == 2**31 - 1
    assert D("d", 0, fields=[]).version_id == 0


def test_maximum_size_counts_everything():
    extra = D("d/xy", 1, fields=[vmstate.uint16("z")])
    description = D(
        "d",
        1,
        fields=[
            vmstate.uint32("n"),
            vmstate.uint16("a", count="n", maximum=5),
            vmstate.buffer("b", count="n", maximum=7),
            vmstate.struct("s", LEAF, length=3),
        ],
        subsections=[extra],
    )
    assert description.maximum_size == 4 + 10 + 7 + 3 + (1 + 1 + 4 + 4 + 2)
    assert not description.is_fixed
    assert LEAF.is_fixed


def test_it_is_frozen_and_takes_keywords():
    description = D(name="clock", version_id=2, minimum_version_id=1, fields=[vmstate.uint64("step")])
    assert description.fields[0].name == "step"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        description.version_id = 3
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        description.fields[0].name = "t"


def test_a_float32_bound_is_rounded_as_values_are():
    assert vmstate.float32("a", high=0.1).high == pytest.approx(0.1)
    assert vmstate.float32("a", high=0.1).high != 0.1
    assert vmstate.float64("a", low=0).low == 0.0
