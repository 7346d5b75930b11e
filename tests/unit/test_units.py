"""Sizes, rates and times: what is read, what is refused, and that what is written can be read again."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import ConfigError
from whimbrel.units import (
    format_rate,
    format_seconds,
    format_size,
    parse_milliseconds,
    parse_rate,
    parse_seconds,
    parse_size,
)

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        (2**64 - 1, 2**64 - 1),
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("64KiB", 65536),
        ("1k", 1024),
        ("128M", 128 * MIB),
        ("64 MiB", 64 * MIB),
        ("  64 MiB ", 64 * MIB),
        ("1gib", GIB),
        ("1Gi", GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("1.1GiB", 1181116006),
        ("2T", 2 << 40),
        ("1PiB", 1 << 50),
        ("1E", 1 << 60),
        ("18446744073709551615", 2**64 - 1),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1", -1, "1KB", "1MB", "1.5", "0.5B", "1.", ".5G", "1e3", "0x10", "1_000", "1 G iB",
     "16E", "1Z", "1GiB/s", "18446744073709551616", 2**64, 10**200, "9" * 5000, "\u0661", "1\nG", True, None, 1.5],
)  # fmt: skip
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match=r"is not a size in bytes; write it such as 4096"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("1GiB", GIB), ("1GiB/s", GIB), ("1 GiB /s", GIB), ("125000000", 125_000_000), (0, 0), ("10/s", 10)],
)
def test_rates(text, rate):
    assert parse_rate(text) == rate


def test_a_number_too_long_to_be_written():
    for parse in (parse_size, parse_rate, parse_seconds, parse_milliseconds):
        with pytest.raises(ConfigError, match="a huge number is not"):
            parse(10**5000)


@pytest.mark.parametrize("text", ["1Gbit/s", "1Gbps", "1GiB/m", "/s", "1/s/s", "-1", None, True])
def test_rates_that_are_none(text):
    with pytest.raises(ConfigError) as refusal:
        parse_rate(text)
    assert refusal.value.message == f"{text!r} is not a rate in bytes per second"
    assert "1GiB/s" in refusal.value.hint


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (0, 0.0),
        (10, 10.0),
        (1.5, 1.5),
        ("1.5", 1.5),
        ("300ms", 0.3),
        ("2s", 2.0),
        ("2 s", 2.0),
        ("1m", 60.0),
        ("1min", 60.0),
        ("1.5h", 5400.0),
        ("250us", 0.00025),
        ("250µs", 0.00025),
    ],
)
def test_seconds(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "milliseconds"), [(300, 300), ("300", 300), ("300ms", 300), ("0.3s", 300), ("2s", 2000), ("1m", 60_000)]
)
def test_milliseconds(text, milliseconds):
    got = parse_milliseconds(text)
    assert got == milliseconds
    assert type(got) is int


@pytest.mark.parametrize("parse", [parse_seconds, parse_milliseconds])
@pytest.mark.parametrize(
    "text",
    ["", "s", "-1s", -1, "1d", "1 s s", "1e3", float("inf"), float("nan"), True, None, "9" * 30, 10**200, "2M B"],
)
def test_times_that_are_none(parse, text):
    with pytest.raises(ConfigError, match=r"is not a time in .*; write it such as"):
        parse(text)


@pytest.mark.parametrize("text", ["0.5ms", 0.5, "1.0004s", "10us"])
def test_milliseconds_are_whole(text):
    with pytest.raises(ConfigError, match="whole milliseconds"):
        parse_milliseconds(text)


@pytest.mark.parametrize(
    ("size", "text", "exact"),
    [
        (0, "0 B", "0 B"),
        (1, "1 B", "1 B"),
        (1023, "1023 B", "1023 B"),
        (1024, "1 KiB", "1 KiB"),
        (1536, "1.5 KiB", "1536 B"),
        (64 * MIB, "64 MiB", "64 MiB"),
        (64 * MIB + 1, "64.0 MiB", "67108865 B"),
        (GIB - 1, "1.0 GiB", "1073741823 B"),
        (1000 * MIB, "1000 MiB", "1000 MiB"),
        (2**64 - 1, "16.0 EiB", "18446744073709551615 B"),
    ],
)
def test_written_sizes(size, text, exact):
    assert format_size(size) == text
    assert format_size(size, exact=True) == exact


@given(st.integers(0, 2**64 - 1))
def test_exact_sizes_come_back(size):
    assert parse_size(format_size(size, exact=True)) == size


@given(st.integers(0, 2**63))
def test_sizes_for_people_come_back_within_rounding(size):
    text = format_size(size)
    assert len(text) <= len("1023.9 MiB")
    assert abs(parse_size(text) - size) <= size / 20
    if "." not in text:
        assert parse_size(text) == size


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_size, parse_rate, parse_seconds, parse_milliseconds):
        with suppress(ConfigError):
            assert parse(text) >= 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.000812, "812 µs"),
        (0.0042, "4.2 ms"),
        (0.3, "300 ms"),
        (0.9996, "1 s"),
        (2.5, "2.5 s"),
        (59.96, "1 min 0 s"),
        (65, "1 min 5 s"),
        (7380, "2 h 3 min"),
    ],
)
def test_written_times(seconds, text):
    assert format_seconds(seconds) == text


def test_written_rates():
    assert format_rate(123_942_731.4) == "118.2 MiB/s"
    assert format_rate(0.0) == "0 B/s"
