"""The JSON behind the end: golden bytes, its limit, where a reader of files looks for it; found and parsed."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import StreamError
from whimbrel.wire import description
from whimbrel.wire.description import DescriptionFinder, find, parse

from . import tails

LIMIT = 1 << 20


def test_golden(three_ways):
    text = b'{"page_size": 4096, "devices": []}'
    assert description.encode([], page_size=4096) == bytes.fromhex("06  00 00 00 22") + text
    three_ways(lambda: description.parse_and_skip(LIMIT), bytes.fromhex("06  00 00 00 22") + text, 34)


def test_golden_with_a_device():
    field = {"name": "t", "type": "uint32", "size": 4}
    device = {"name": "clock", "instance_id": 0, "vmsd_name": "clock", "version": 1, "fields": [field]}
    text = (
        b'{"page_size": 4096, "devices": [{"name": "clock", "instance_id": 0, "vmsd_name": "clock", "version": 1, '
        b'"fields": [{"name": "t", "type": "uint32", "size": 4}]}]}'
    )
    assert description.encode([device], page_size=4096) == bytes.fromhex("06  00 00 00 a1") + text


def test_it_is_one_line_of_ascii():
    data = description.encode([{"name": "käse\n\0"}], page_size=4096)
    assert data[5:] == b'{"page_size": 4096, "devices": [{"name": "k\\u00e4se\\n\\u0000"}]}'


def named(length):
    """A description whose JSON would be `length` bytes long."""
    rest = len(description.encode([{"name": ""}], page_size=4096)) - 5
    return description.encode([{"name": "x" * (length - rest)}], page_size=4096)


@pytest.mark.parametrize(
    ("length", "sent"),
    [(0x7A, 0x7A), (0x7B, 0x7C), (0x7C, 0x7C), (0x17B, 0x17C), (0x7AFF, 0x7AFF), (0x7B00, 0x7C00), (0x7BAB, 0x7C00)],
)
def test_no_byte_of_the_length_looks_like_the_first_brace(length, sent):
    data = named(length)
    assert data[1:5] == sent.to_bytes(4, "big")
    assert len(data) == 5 + sent
    assert json.loads(data[5:])["devices"][0]["name"].strip("x") == ""
    # How a reader of files finds it: the first brace behind the last NUL.
    stream = b"QEVM\0\0\0\3" + b"{" * 10 + b"\0" + data
    assert stream.find(b"{", stream.rfind(b"\0")) == len(stream) - sent


@given(st.integers(44, 40_000))
def test_it_is_found_from_the_end_whatever_its_length(length):
    data = named(length)
    assert data.find(b"{", data.rfind(b"\0")) == 5


@pytest.mark.parametrize("length", [0, 1, 65535, 65536, 65537, LIMIT - 1, LIMIT])
def test_it_is_passed_over_in_pieces_up_to_the_limit(feeder, length):
    parser = description.parse_and_skip(LIMIT)
    run = feeder(parser).feed(b"\x06" + length.to_bytes(4, "big"))
    fed = 0
    while not run.done:
        assert 1 <= run.missing <= 1 << 16, "it asks for no more than a piece at a time"
        fed += run.missing
        run.feed(b"x" * run.missing)
    assert (run.value, fed) == (length, length)


def test_a_short_one_three_ways(three_ways):
    three_ways(lambda: description.parse_and_skip(5), bytes.fromhex("06 00 00 00 05") + b"hello", 5)


@pytest.mark.parametrize("length", [LIMIT + 1, 2**31, 2**32 - 1])
def test_beyond_the_limit_it_is_refused_before_it_is_read(refused, length):
    message = refused(lambda: description.parse_and_skip(LIMIT), b"\x06" + length.to_bytes(4, "big"))
    assert f"{length} bytes long, at most {LIMIT}" in message
    assert "[limits] description" in message


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x05, 0x07, 0x08, 0x7B, 0x7E, 0xFF])
def test_nothing_else_may_come(refused, byte):
    assert f"{byte:#04x}" in refused(lambda: description.parse_and_skip(LIMIT), bytes([byte]))


@given(st.data())
def test_damaged_bytes(outcome, mutated, data):
    good = description.encode([{"name": "clock", "fields": []}], page_size=4096)
    outcome(lambda: description.parse_and_skip(LIMIT), data.draw(mutated(good)))


# ----------------------------------------------------------------------------------------------------------- parsed


def with_devices(*devices, **more):
    return json.dumps({**more, "page_size": 4096, "devices": list(devices)}).encode()


CLOCK = {"name": "clock", "instance_id": 0, "vmsd_name": "clock", "version": 1, "fields": []}


@given(tails.devices())
def test_parsed(devices):
    found = parse(tails.text(devices))
    assert found.page_size == 4096
    assert list(found.devices) == [each.described for each in devices]
    assert found.text == tails.text(devices)
    # What we say ourselves is understood, padding and all.
    ours = description.encode([each.described for each in devices], page_size=4096)
    assert parse(ours[5:]).devices == found.devices


def test_what_newer_ones_put_first_is_passed_over():
    more = {"vmsd_name": "configuration", "version": 1, "fields": [{"name": "len", "type": "uint32", "size": 4}]}
    assert parse(with_devices(CLOCK, configuration=more)).devices == (CLOCK,)


def test_of_a_key_that_comes_twice_the_last_counts():
    text = with_devices({**CLOCK, "fields": ["?"]}).replace(
        b'["?"]',
        b'[{"name": "q", "type": "qtailq", "version": 1, "fields": [], "version": 2, "fields": [{}], "size": 3}]',
    )
    (field,) = parse(text).devices[0]["fields"]
    assert field == {"name": "q", "type": "qtailq", "version": 2, "fields": [{}], "size": 3}
    twice = b'{"page_size": 1, "devices": 7, "page_size": 4096, "devices": []}'
    assert parse(twice).page_size == 4096


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"{} {}", "no JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "page_size is None"),
        (b'{"page_size": true, "devices": []}', "page_size is True"),
        (b'{"page_size": 0, "devices": []}', "page_size is 0"),
        (b'{"page_size": 1e3, "devices": []}', "page_size is 1000.0"),
        (b'{"page_size": 99999999999999999999, "devices": []}', "page_size is a huge number"),
        (b'{"page_size": ' + b"9" * 5000 + b', "devices": []}', "no JSON"),
        (b'{"page_size": 4096}', "devices are None"),
        (b'{"page_size": 4096, "devices": {}}', "devices are an object"),
        (b'{"page_size": 4096, "devices": [NaN]}', "NaN stands in it"),
        (b'{"page_size": 4096, "devices": [-Infinity]}', "-Infinity stands in it"),
        (b'{"page_size": 4096, "devices": [1]}', "device 0 of the description is 1"),
        (b'{"page_size": 4096,\n"devices": []}', "byte 19 of the description is 0x0a"),
        (b'{"page_size": 4096, "devices": [], "\xc3\xa4": 1}', "byte 36 of the description is 0xc3"),
        (b'{"page_size": 4096, "devices": []}\0', "byte 34 of the description is 0x00"),
        (with_devices({**CLOCK, "name": ""}), "name of device 0 is described as ''"),
        (with_devices({**CLOCK, "name": "a\n"}), "printable ASCII"),
        (with_devices({**CLOCK, "name": "\ud800"}), "printable ASCII"),
        (with_devices(CLOCK, {**CLOCK, "name": "x" * 256}), "name of device 1 is described as"),
        (with_devices({**CLOCK, "instance_id": -1}), "instance_id of device 0 is described as -1"),
        (with_devices({**CLOCK, "instance_id": 2**32}), "instance_id"),
        (with_devices({"name": "a", "fields": []}), "instance_id of device 0 is described as None"),
        (with_devices({**CLOCK, "fields": None}), "device 0 of the description has no list of fields"),
        (with_devices(*[CLOCK] * 4097), "4097 devices, at most 4096"),
    ],
)
def test_what_is_no_description(text, says):
    with pytest.raises(StreamError, match=says) as caught:
        parse(text)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_depth_is_seen_before_anything_recurses():
    def nested(depth):
        return b'{"page_size": 4096, "devices": [], "x": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    assert parse(nested(description.DEPTH_MAX))
    for depth in (description.DEPTH_MAX + 1, 100_000):
        with pytest.raises(StreamError, match=f"nested {depth} deep, at most 64"):
            parse(nested(depth))
    with pytest.raises(StreamError, match="deep"):
        parse(b'{"x": ' * 2_000_000)


def test_brackets_and_commas_in_strings_do_not_count():
    name = "[{" * 100 + '\\"[,' * 100 + "\\"
    assert parse(with_devices(CLOCK, x=name)).devices == (CLOCK,)
    with pytest.raises(StreamError, match=r"deep|no JSON"):
        parse(b'{"x": "' + b"[" * 100)
    with pytest.raises(StreamError, match=r"deep|no JSON"):
        parse(b'{"x": \\"' + b"[" * 100 + b'"}')


def test_values_have_a_number():
    def many(count):
        return b'{"page_size": 4096, "devices": [], "x": [' + b",".join([b"0"] * count) + b"]}"

    assert parse(many(description.NODES_MAX - 6))
    with pytest.raises(StreamError, match="values, at most 1048576"):
        parse(many(description.NODES_MAX))


def test_a_text_has_a_length(monkeypatch):
    monkeypatch.setattr(description, "TEXT_MAX", 100)
    assert parse(with_devices().ljust(100))
    with pytest.raises(StreamError, match="101 bytes long, at most 100"):
        parse(with_devices().ljust(101))


@given(st.data())
def test_damaged_json(mutated, data):
    good = tails.text(data.draw(tails.devices(most=2, depth=1)))
    try:
        found = parse(data.draw(mutated(good)))
    except StreamError as exc:
        message = str(exc)
    else:
        message = "".join(device["name"] for device in found.devices)
    assert message.isprintable()


# ------------------------------------------------------------------------------------------------------------ found


def described(text, *, claims=None):
    """EOF, and the text with its length."""
    return b"\0\x06" + struct.pack(">I", len(text) if claims is None else claims) + text


NOT_IT = [
    described(b'{"page_size": 4096, "devices": 7}'),
    described(b'{"page_size": 4096}', claims=10),
    described(b'{"page_size": 4096, "devices": []}', claims=33),
    described(b'{"', claims=2),
    described(b'{"', claims=0),
    described(b'{"', claims=2**32 - 1),
    described(b'{"', claims=9000),
    b'\0\x06\0\x06\0\0{"',
    b'\0\0\x06\0\0\0\0{"',
    b'\0\x06\0\0\0{"',
    b"\0\x06",
]


@st.composite
def bodies(draw):
    """Bytes of devices with what looks like a description, to various degrees."""
    pieces = st.binary(max_size=5) | st.sampled_from(NOT_IT) | st.sampled_from([b"\0", b'{"', b"\x06", b"}"])
    return b"".join(draw(st.lists(pieces, max_size=8))) + b"\xff"


@given(bodies(), tails.devices(most=2, depth=1), st.integers(1, 30), st.binary(max_size=3))
def test_found_in_pieces_as_whole(body, devices, size, behind):
    """At once when its last byte is there, and not before; whatever stood before it, or comes behind."""
    text = tails.text(devices)
    tail = body + described(text)
    found = find(tail)
    assert (found.eof_offset, found.end, found.text) == (len(body), len(tail), text)
    assert find(tail + behind) == found
    assert find(tail, len(body)) == found
    assert find(tail, len(body) + 1) is None
    finder, growing = DescriptionFinder(), bytearray()
    for at in range(0, len(tail), size):
        assert finder.feed(growing) is None
        growing += tail[at : at + size]
    assert finder.feed(growing) == found
    assert finder.feed(growing, at_end=True) == found


@given(bodies())
def test_no_description(body):
    finder, growing = DescriptionFinder(), bytearray()
    for byte in body:
        assert finder.feed(growing) is None
        growing.append(byte)
    assert finder.feed(growing, at_end=True) is None
    assert finder.waiting is None
    assert find(body) is None


@pytest.mark.parametrize("length", [0x7B, 0x7B22, 0x17B22, 0x227B, 0x67B])
def test_a_length_with_a_brace_in_it(length):
    """A brace behind the last NUL need not be the first of the text."""
    text = with_devices(CLOCK).ljust(length)
    tail = b"\0{" + described(text)
    assert b"{" in tail[3:8]
    assert find(tail).text == text


def test_it_tells_how_much_has_come():
    tail = b"abc" + described(with_devices(CLOCK))
    finder = DescriptionFinder()
    for size in range(len(tail)):
        assert finder.feed(tail[:size]) is None
        assert finder.waiting == (None if size < 11 else (size - 9, len(tail) - 9))
    assert finder.feed(tail[:-1], at_end=True) is None
    assert finder.waiting is None


@pytest.mark.parametrize("more", [0, 1])
def test_the_limit(more):
    text = with_devices(CLOCK)
    assert (find(described(text), limit=len(text) - more) is None) == bool(more)


def test_a_tail_is_not_looked_at_again_and_again(monkeypatch):
    """Bytes that begin like a description time and again, fed one by one: they are parsed never, or once."""
    parsed = []
    monkeypatch.setattr(description, "parse", lambda text: parsed.append(len(text)) or parse(text))
    hostile = described(b'{"x', claims=4000) * 1000
    finder, growing = DescriptionFinder(), bytearray()
    for byte in hostile:
        growing.append(byte)
        assert finder.feed(growing) is None
    assert parsed == []
    growing += b"\0" + described(b'{"x": 1}')
    assert finder.feed(growing) is None
    assert parsed == [8]
    growing += b"\0" * 100
    assert finder.feed(growing) is None
    assert parsed == [8]


def test_the_tail_may_grow_in_place():
    """No view is kept, since a bytearray with views cannot grow."""
    growing = bytearray(b"ab" + described(with_devices(CLOCK)))
    rest = growing[-5:]
    del growing[-5:]
    finder = DescriptionFinder()
    assert finder.feed(growing) is None
    growing += rest
    found = finder.feed(growing)
    growing += b"x" * 100_000
    assert found.description.devices == (CLOCK,)
