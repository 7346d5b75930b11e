"""The JSON behind the end: golden bytes, its limit, and where a reader of files looks for it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.wire import description

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
