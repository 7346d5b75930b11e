"""The bytes between the bodies: golden, never to change, each written by hand from the wire format."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.abc import SectionKind
from whimbrel.wire import skeleton
from whimbrel.wire.skeleton import Configuration, Element, SectionHeader

HEADER = bytes.fromhex("51 45 56 4d  00 00 00 03")

NAME_ONLY = "07  00 00 00 04  68 65 61 74"  # "heat"
UUID = (
    "05  12  63 6f 6e 66 69 67 75 72 61 74 69 6f 6e 2f 75 75 69 64  00 00 00 01"
    "00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff"
)
CAPABILITIES = (
    "05  1a  63 6f 6e 66 69 67 75 72 61 74 69 6f 6e 2f 63 61 70 61 62 69 6c 69 74 69 65 73  00 00 00 01"
    "00 00 00 02  0f 78 2d 69 67 6e 6f 72 65 2d 73 68 61 72 65 64  0a 6d 61 70 70 65 64 2d 72 61 6d"
)
PAGE_BITS = (
    "05  1e  63 6f 6e 66 69 67 75 72 61 74 69 6f 6e 2f 74 61 72 67 65 74 2d 70 61 67 65 2d 62 69 74 73  00 00 00 01"
)
THE_UUID = bytes(range(0, 256, 17))
THE_CAPABILITIES = ("x-ignore-shared", "mapped-ram")

CONFIGURATIONS = {
    "name": (NAME_ONLY, Configuration("heat")),
    "uuid": (NAME_ONLY + UUID, Configuration("heat", uuid=THE_UUID)),
    "capabilities": (NAME_ONLY + CAPABILITIES, Configuration("heat", THE_CAPABILITIES)),
    "both": (NAME_ONLY + CAPABILITIES + UUID, Configuration("heat", THE_CAPABILITIES, THE_UUID)),
    "q35": (
        "07  00 00 00 0a  70 63 2d 71 33 35 2d 37 2e 32",
        Configuration("pc-q35-7.2"),
    ),
}

HEADS = {
    "start": (
        SectionKind.START,
        "01 00 00 00 02  03 72 61 6d  00 00 00 00  00 00 00 04",
        SectionHeader(2, "ram", 0, 4),
    ),
    "part": (SectionKind.PART, "02 00 00 00 02", 2),
    "end": (SectionKind.END, "03 00 00 00 02", 2),
    "full": (
        SectionKind.FULL,
        "04 00 00 01 00  05 74 69 6d 65 72  00 00 00 07  00 00 00 02",
        SectionHeader(256, "timer", 7, 2),
    ),
    "id 0": (SectionKind.FULL, "04 00 00 00 00  01 61  00 00 00 00  00 00 00 01", SectionHeader(0, "a", 0, 1)),
    "all ones": (
        SectionKind.START,
        "01 ff ff ff ff  01 61  ff ff ff ff  ff ff ff ff",
        SectionHeader(2**32 - 1, "a", 2**32 - 1, 2**32 - 1),
    ),
}


def test_header(three_ways):
    assert skeleton.HEADER == HEADER
    three_ways(skeleton.parse_header, HEADER, None)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("51 45 56 4e 00 00 00 03", "0x5145564e, expected 0x5145564d"),
        ("4d 56 45 51 03 00 00 00", "not a migration stream"),
        ("47 45 54 20 2f 20 48 54", "not a migration stream"),
        ("51 45 56 4d 00 00 00 02", "version is 2, expected 3"),
        ("51 45 56 4d 00 00 00 04", "version is 4, expected 3"),
        ("51 45 56 4d 03 00 00 00", "version is 50331648, expected 3"),
    ],
)
def test_any_other_header_is_refused(refused, data, words):
    assert words in refused(skeleton.parse_header, bytes.fromhex(data))


def test_the_magic_alone_is_enough_to_refuse(refused):
    assert "QEVM" in refused(skeleton.parse_header, b"SSH-")


def test_element_bytes():
    assert {element.name: int(element) for element in Element} == {
        "EOF": 0x00,
        "SECTION_START": 0x01,
        "SECTION_PART": 0x02,
        "SECTION_END": 0x03,
        "SECTION_FULL": 0x04,
        "SUBSECTION": 0x05,
        "VMDESCRIPTION": 0x06,
        "CONFIGURATION": 0x07,
        "COMMAND": 0x08,
        "SECTION_FOOTER": 0x7E,
    }


@pytest.mark.parametrize("byte", range(256))
def test_what_may_begin_an_element(three_ways, refused, byte):
    data = bytes([byte])
    if byte in (0, 1, 2, 3, 4, 8):
        three_ways(skeleton.parse_element, data, Element(byte))
    else:
        assert f"{byte:#04x}" in refused(skeleton.parse_element, data)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configuration(three_ways, case):
    data, value = bytes.fromhex(CONFIGURATIONS[case][0]), CONFIGURATIONS[case][1]
    assert skeleton.configuration(value) == data
    for follower in (b"\x01", b"\x08", b"\x00", b"\x04"):
        three_ways(lambda: parse_configuration_element(), data, value, peeked=follower)


def parse_configuration_element():
    assert (yield 1)[0] == 7
    return (yield from skeleton.parse_configuration())


def test_configuration_with_the_page_size_that_there_is(three_ways):
    data = bytes.fromhex(NAME_ONLY + PAGE_BITS + "00 00 00 0c" + UUID)
    three_ways(parse_configuration_element, data, Configuration("heat", uuid=THE_UUID), peeked=b"\x01")


@pytest.mark.parametrize("length", [1, 255])
def test_the_longest_and_the_shortest_machine_name(three_ways, length):
    data = b"\x07" + length.to_bytes(4, "big") + b"m" * length
    assert skeleton.configuration(Configuration("m" * length)) == data
    three_ways(parse_configuration_element, data, Configuration("m" * length), peeked=b"\x08")


def subsection(name, body="", version="00 00 00 01"):
    name = b"configuration/" + name
    return (b"\x05" + bytes([len(name)]) + name).hex() + version + body


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("07 00 00 00 00", "0 bytes long, expected 1 to 255"),
        ("07 00 00 01 00" + "61" * 256, "256 bytes long"),
        ("07 ff ff ff ff", "4294967295 bytes long"),
        ("07 00 00 00 02 61 00", "printable ASCII"),
        ("07 00 00 00 02 c3 a4", "printable ASCII"),
        (NAME_ONLY + UUID + UUID, "'configuration/uuid' twice"),
        (NAME_ONLY + CAPABILITIES + CAPABILITIES, "'configuration/capabilities' twice"),
        (NAME_ONLY + subsection(b"uuid", "00" * 16, "00 00 00 02"), "version 2, expected 1"),
        (NAME_ONLY + subsection(b"uuid", "00" * 16, "00 00 00 00"), "version 0, expected 1"),
        (NAME_ONLY + subsection(b"colour"), "unknown configuration subsection 'configuration/colour'"),
        (NAME_ONLY + "05 00", "the name of a configuration subsection is empty"),
        (NAME_ONLY + subsection(b"capabilities", "00 00 00 41"), "lists 65 capabilities, at most 64"),
        (NAME_ONLY + subsection(b"capabilities", "ff ff ff ff"), "lists 4294967295 capabilities"),
        (NAME_ONLY + subsection(b"capabilities", "00 00 00 01 00"), "the name of a capability is empty"),
        (NAME_ONLY + PAGE_BITS + "00 00 00 0d", "13 bits, expected 12"),
        (NAME_ONLY + PAGE_BITS + "ff ff ff ff", "4294967295 bits"),
    ],
)
def test_configurations_that_are_refused(refused, data, words):
    assert words in refused(parse_configuration_element, bytes.fromhex(data) + b"\x01")


@pytest.mark.parametrize("count", [0, 1, 64])
def test_as_many_capabilities_as_may_be(three_ways, count):
    data = bytes.fromhex(NAME_ONLY + subsection(b"capabilities", count.to_bytes(4, "big").hex())) + b"\x01c" * count
    three_ways(parse_configuration_element, data, Configuration("heat", ("c",) * count), peeked=b"\x01")


@pytest.mark.parametrize("case", HEADS)
def test_section_heads(three_ways, case):
    kind, data, value = HEADS[case]
    data = bytes.fromhex(data)
    header = value if isinstance(value, SectionHeader) else SectionHeader(value, "ram", 0, 4)
    assert skeleton.section_header(kind, header) == data
    assert skeleton.KIND_OF_ELEMENT[Element(data[0])] is kind
    three_ways(lambda: skeleton.parse_section_header(kind), data[1:], value)


@pytest.mark.parametrize("kind", [SectionKind.START, SectionKind.FULL])
def test_a_section_without_a_name_is_refused(refused, kind):
    message = refused(lambda: skeleton.parse_section_header(kind), bytes.fromhex("00 00 00 02  00"))
    assert "the name of a section is empty" in message


@pytest.mark.parametrize(
    ("number", "data"), [(0, "7e 00 00 00 00"), (2, "7e 00 00 00 02"), (2**32 - 1, "7e ff ff ff ff")]
)
def test_footer(three_ways, number, data):
    assert skeleton.section_footer(number) == bytes.fromhex(data)
    three_ways(lambda: skeleton.parse_section_footer(number), bytes.fromhex(data), None)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("7e 00 00 00 03", "the footer is of section 3, expected 2"),
        ("7e 02 00 00 00", "the footer is of section 33554432, expected 2"),
        ("02 00 00 00 02", "but 0x02 does"),
        ("00", "but 0x00 does"),
        ("ff", "longer or shorter than its reader believes"),
    ],
)
def test_footers_that_are_refused(refused, data, words):
    assert words in refused(lambda: skeleton.parse_section_footer(2), bytes.fromhex(data))


GOOD = {
    **{f"configuration {name}": (parse_configuration_element, data) for name, (data, _) in CONFIGURATIONS.items()},
    "header": (skeleton.parse_header, HEADER.hex()),
    "start": (lambda: skeleton.parse_section_header(SectionKind.START), HEADS["start"][1][2:]),
    "full": (lambda: skeleton.parse_section_header(SectionKind.FULL), HEADS["full"][1][2:]),
    "part": (lambda: skeleton.parse_section_header(SectionKind.PART), HEADS["part"][1][2:]),
    "footer": (lambda: skeleton.parse_section_footer(2), "7e 00 00 00 02"),
}


@pytest.mark.parametrize("case", GOOD)
def test_damaged_bytes_give_a_value_or_a_protocol_error_and_nothing_else(outcome, mutated, case):
    make, data = GOOD[case]
    first = 1 if case.startswith("configuration") else 0  # its type byte is not the parser's business
    data = bytes.fromhex(data)

    @given(st.data())
    def check(draw):
        outcome(make, data[:first] + draw.draw(mutated(data[first:])) + b"\x01")

    check()
