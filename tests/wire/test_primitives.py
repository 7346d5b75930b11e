"""Integers and names."""

import pytest

from whimbrel.wire import primitives as p


@pytest.mark.parametrize(
    ("parser", "data", "value"),
    [
        (p.parse_u8, "00", 0),
        (p.parse_u8, "ff", 255),
        (p.parse_u16, "01 02", 0x0102),
        (p.parse_u32, "01 02 03 04", 0x01020304),
        (p.parse_u32, "ff ff ff ff", 2**32 - 1),
        (p.parse_u64, "01 02 03 04 05 06 07 08", 0x0102030405060708),
        (p.parse_u64, "ff ff ff ff ff ff ff ff", 2**64 - 1),
    ],
)
def test_integers_are_big_endian_and_unsigned(three_ways, parser, data, value):
    three_ways(parser, bytes.fromhex(data), value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a", "01 61"),
        ("pc.ram", "06 70 63 2e 72 61 6d"),
        ("x" * 255, "ff" + "78" * 255),
        ("a b~", "04 61 20 62 7e"),
    ],
)
def test_names(three_ways, name, data):
    assert p.str8(name) == bytes.fromhex(data)
    three_ways(lambda: p.parse_str8("it"), bytes.fromhex(data), name)


@pytest.mark.parametrize("name", ["", "x" * 256])
def test_a_name_of_ours_that_does_not_fit_is_our_fault(name):
    with pytest.raises(ValueError, match="1 to 255"):
        p.str8(name)


def test_a_name_of_ours_is_ascii():
    with pytest.raises(UnicodeEncodeError):
        p.str8("käse")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("00", "empty"),
        ("03 61 00 62", "printable ASCII"),
        ("01 0a", "printable ASCII"),
        ("01 7f", "printable ASCII"),
        ("01 80", "printable ASCII"),
        ("02 c3 a4", "printable ASCII"),
    ],
)
def test_names_that_are_refused(refused, data, words):
    message = refused(lambda: p.parse_str8("a gadget"), bytes.fromhex(data))
    assert words in message
    assert "a gadget" in message
