"""The XBZRLE decoder: every rule of the format, all payloads or none, and the obvious decoder as a witness."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.errors import StreamError
from whimbrel_codecs import _xbzrle_decode
from whimbrel_codecs.xbzrle import XbzrleCodec

PAGE = 4096
RNG = np.random.default_rng(11)
CODEC = XbzrleCodec()


def gathered(payloads, gap=b"\xa5" * 11):
    """Payloads as they lie in a window, with something between them: data, starts, ends."""
    starts, ends, data = [], [], b""
    for payload in payloads:
        data += gap
        starts.append(len(data))
        data += payload
        ends.append(len(data))
    return np.frombuffer(data, np.uint8), np.array(starts, np.intp), np.array(ends, np.intp)


def decode(payloads, memory, pages, gap=b"\xa5" * 11):
    CODEC.decode(*gathered(payloads, gap), memory, np.array(pages, np.intp) * PAGE)


def changed(payload, page):
    """One page after one payload; the pages around it must stay."""
    around = np.full(3 * PAGE, 0xEE, np.uint8)
    around[PAGE : 2 * PAGE] = np.frombuffer(page, np.uint8)
    decode([payload], around, [1])
    assert (around[:PAGE] == 0xEE).all()
    assert (around[2 * PAGE :] == 0xEE).all()
    return around[PAGE : 2 * PAGE].tobytes()


def uleb(length, *, long=False):
    return bytes([length]) if length < 128 and not long else bytes([length & 0x7F | 0x80, length >> 7])


def some_bytes(count):
    return RNG.integers(0, 256, count, np.uint8).tobytes()


# --------------------------------------------------------------------------------------------------- what is refused


REFUSED = {
    "one byte alone": ("00", "ends where the number of unchanged bytes is expected"),
    "one byte behind a run": ("00 01 ed 05", "ends where the number of unchanged bytes is expected"),
    "half a length": ("80", "ends where the number of unchanged bytes is expected"),
    "nothing behind the unchanged": ("05 01", "ends where the number of changed bytes is expected"),
    "a long length and nothing": ("85 00", "ends where the number of changed bytes is expected"),
    "a long length and one byte": ("85 00 01", "ends where the number of changed bytes is expected"),
    "unchanged bytes at the end": ("00 01 ed 05 00", "ends where the number of changed bytes is expected"),
    "long unchanged bytes at the end": ("00 01 ed ff 1f", "ends where the number of changed bytes is expected"),
    "an unchanged length of 3 bytes": ("80 80 01 01 ed", "length in an XBZRLE payload is 80 80"),
    "a changed length of 3 bytes": ("00 81 80 00 ed", "length in an XBZRLE payload is 81 80"),
    "ff ff": ("ff ff 00 01 ed", "length in an XBZRLE payload is ff ff"),
    "no unchanged bytes in the second pair": ("00 01 ed 00 01 ed", "a run of 0 unchanged bytes"),
    "none in a long way": ("00 01 ed 80 00 01 ed", "a run of 0 unchanged bytes"),
    "none behind unchanged": ("05 01 ed 00 01 ed", "a run of 0 unchanged bytes"),
    "no changed bytes": ("00 00 00", "a run of 0 changed bytes"),
    "no changed bytes, at the end": ("00 00", "ends where the number of changed bytes is expected"),
    "no changed bytes, something follows": ("05 00 05 01 ed", "a run of 0 changed bytes"),
    "no changed bytes in a long way": ("05 80 00 05 01 ed", "a run of 0 changed bytes"),
    "no changed bytes in the second pair": ("00 01 ed 05 00 01 01 ed", "a run of 0 changed bytes"),
    "fewer bytes than the run has": ("00 03 01 02", "ends after 2 of 3 changed bytes"),
    "the run goes into the next payload": ("00 05 01", "ends after 1 of 5 changed bytes"),
    "most bytes of all": ("00 ff 7f 01", "ends after 1 of 16383 changed bytes"),
    "unchanged out of the page": ("80 20 01 ed", "reaches 4097 bytes into a page of 4096"),
    "unchanged far out of the page": ("ff 7f 01 ed", "reaches 16384 bytes into a page of 4096"),
    "changed out of the page": ("ff 1f 02 ed ed", "reaches 4097 bytes into a page of 4096"),
    "the second pair out of the page": ("ff 0f 01 ed 80 10 01 ed", "reaches 4097 bytes into a page of 4096"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_rule_of_the_format(case, slow_decode):
    payload, words = bytes.fromhex(REFUSED[case][0]), REFUSED[case][1]
    page = some_bytes(PAGE)
    with pytest.raises(StreamError):
        slow_decode(payload, page)
    with pytest.raises(StreamError, match=words):
        changed(payload, page)


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("where", [0, 1, 40, 79])
def test_nothing_has_changed_if_one_of_many_is_malformed(case, where):
    payloads = [b"\x00\x01\xed\x07\x02\xed\xee"] * 80
    payloads[where] = bytes.fromhex(REFUSED[case][0])
    memory = RNG.integers(0, 256, 80 * PAGE, np.uint8)
    before = memory.copy()
    for gap in (b"", b"\0" * 11, b"\x01" * 11):
        with pytest.raises(StreamError, match=REFUSED[case][1]):
            decode(payloads, memory, range(80), gap)
        assert (memory == before).all()


def test_a_page_of_changed_bytes_is_too_long_by_its_lengths():
    """4096 bytes fit into a page, and as a payload they are out of it by one."""
    with pytest.raises(StreamError, match="ends after 4093 of 4096"):
        changed(b"\x00\x80\x20" + bytes(4093), bytes(PAGE))


def test_the_first_that_is_wrong_is_told_of_whatever_the_group(monkeypatch):
    monkeypatch.setattr(_xbzrle_decode, "_GROUP_BYTES", 64)
    payloads = [b"\x00\x01\xed"] * 100
    payloads[70], payloads[90] = b"\x00\x00\x00", b"\x00"
    memory = np.zeros(100 * PAGE, np.uint8)
    with pytest.raises(StreamError, match="a run of 0 changed bytes"):
        decode(payloads, memory, range(100))
    assert not memory.any(), "not even the groups before it"


# ------------------------------------------------------------------------------------------------------ what is taken


TAKEN = {
    "nothing": "",
    "a byte": "00 01 ed",
    "the last byte": "ff 1f 01 ed",
    "not the shortest length": "85 00 02 aa bb",
    "not the shortest lengths": "85 00 82 00 aa bb 81 00 81 00 cc",
    "zero in a long way at first": "80 00 01 ed",
    "two pairs": "00 01 ed 05 02 aa bb",
    "one byte between": "00 01 ed 01 01 ee",
    "up to the end": "fe 1f 02 aa bb",
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_the_format_allows(case, slow_decode):
    payload, page = bytes.fromhex(TAKEN[case]), some_bytes(PAGE)
    assert changed(payload, page) == slow_decode(payload, page)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 127, 128, 129, 4000, 4092, 4093])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_runs_of_any_length(count, at, slow_decode):
    payload, page = uleb(at) + uleb(count) + some_bytes(count), some_bytes(PAGE)
    assert changed(payload, page) == slow_decode(payload, page)


def test_as_many_runs_as_a_page_can_have(slow_decode):
    payload = b"\x00\x01\x99" + b"\x01\x01\x99" * 1364
    page = some_bytes(PAGE)
    assert changed(payload, page) == slow_decode(payload, page)


def test_no_payloads_at_all():
    memory = np.zeros(PAGE, np.uint8)
    decode([], memory, [])
    decode([b"", b"", b""], memory, [0, 0, 0])
    CODEC.decode(np.empty(0, np.uint8), *(np.array([0, 0], np.intp),) * 2, memory, np.array([0, 0], np.intp))
    assert not memory.any()


def test_payloads_may_lie_in_any_order():
    data, starts, ends = gathered([b"\x00\x01\xaa", b"\x01\x01\xbb\x01\x01\xbc", b"\x02\x01\xcc"])
    memory = np.zeros(3 * PAGE, np.uint8)
    order = np.array([2, 0, 1])
    CODEC.decode(data, starts[order], ends[order], memory, np.array([0, 2, 1]) * PAGE)
    expected = np.zeros(3 * PAGE, np.uint8)
    expected[[2, 2 * PAGE, PAGE + 1, PAGE + 3]] = 0xCC, 0xAA, 0xBB, 0xBC
    assert (memory == expected).all()


@pytest.mark.parametrize("count", [1, 2, 1000, 70_000])
@pytest.mark.parametrize("pairs", [1, 2])
def test_many_payloads(count, pairs):
    """More than 16 bits can number, too."""
    at = np.arange(count)
    payload = np.zeros((count, 6), np.uint8)
    payload[:, 0], payload[:, 1], payload[:, 3], payload[:, 4] = 3, 1, 2, 1
    payload[:, 2], payload[:, 5] = at % 251 + 1, at % 241 + 1
    starts = at * 6
    # 70000 pages would be 280 MB: these overlap, and what is changed in them does not.
    offsets = RNG.permutation(count) * 64
    memory = np.zeros(count * 64 + PAGE, np.uint8)
    CODEC.decode(payload.reshape(-1), starts, starts + 3 * pairs, memory, offsets)
    assert (memory[offsets + 3] == payload[:, 2]).all()
    assert (memory[offsets + 6] == (payload[:, 5] if pairs == 2 else 0)).all()
    assert np.count_nonzero(memory) == pairs * count


def test_many_empty_payloads_before_one():
    memory = np.zeros(PAGE, np.uint8)
    ends = np.zeros(70_001, np.intp)
    ends[-1] = 3
    CODEC.decode(np.array([0, 1, 9], np.uint8), np.zeros(70_001, np.intp), ends, memory, np.zeros(70_001, np.intp))
    assert memory[0] == 9


# ---------------------------------------------------------------------------------------------------------- properties


@st.composite
def good_payloads(draw):
    """A payload that follows the rules: lengths short or long, runs short or long."""
    parts, at = [], 0
    for number in range(draw(st.integers(0, 12))):
        same = draw(st.integers(1 if number else 0, 20) | st.integers(1 if number else 0, 2000))
        count = draw(st.integers(1, 20) | st.integers(1, 1500))
        if at + same + count > PAGE:
            break
        body = bytes(draw(st.binary(min_size=1, max_size=3)) * count)[:count]
        parts.append(uleb(same, long=draw(st.booleans())) + uleb(count, long=draw(st.booleans())) + body)
        at += same + count
    return b"".join(parts)


@pytest.mark.slow
@given(st.lists(good_payloads() | st.binary(max_size=12), max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_it_does_what_the_slow_decoder_does(slow_decode, payloads, random):
    memory = RNG.integers(0, 256, 16 * PAGE, np.uint8)
    pages = random.sample(range(16), len(payloads))
    expected, bad = memory.copy(), False
    for number, payload in zip(pages, payloads, strict=True):
        place = slice(number * PAGE, (number + 1) * PAGE)
        try:
            expected[place] = np.frombuffer(slow_decode(payload, memory[place].tobytes()), np.uint8)
        except StreamError:
            bad = True
    before = memory.copy()
    if bad:
        with pytest.raises(StreamError):
            decode(payloads, memory, pages)
        assert (memory == before).all()
    else:
        decode(payloads, memory, pages)
        assert (memory == expected).all()


@given(good_payloads(), st.integers(0, 4095), st.integers(0, 7), st.binary(max_size=4))
@settings(max_examples=300)
def test_damaged_payloads_are_decoded_or_refused_as_the_slow_decoder_does(slow_decode, payload, at, bit, more):
    payload = bytearray(payload + more)
    if payload:
        payload[at % len(payload)] ^= 1 << bit
    page = bytes(PAGE)
    try:
        expected = slow_decode(bytes(payload), page)
    except StreamError:
        with pytest.raises(StreamError):
            changed(bytes(payload), page)
    else:
        assert changed(bytes(payload), page) == expected


@given(st.lists(good_payloads(), min_size=1, max_size=10), st.integers(1, 300), st.integers(1, 50))
@settings(max_examples=60)
def test_it_makes_no_difference_in_how_many_goes_it_is_done(payloads, group, copy):
    memory = RNG.integers(0, 256, 10 * PAGE, np.uint8)
    expected = memory.copy()
    decode(payloads, expected, range(len(payloads)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_xbzrle_decode, "_GROUP_BYTES", group)
        patch.setattr(_xbzrle_decode, "_GROUP_PAYLOADS", 3)
        patch.setattr(_xbzrle_decode, "_COPY", copy)
        decode(payloads, memory, range(len(payloads)))
    assert (memory == expected).all()
