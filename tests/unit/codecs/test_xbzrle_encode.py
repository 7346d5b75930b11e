"""The XBZRLE encoders, by pages and by batches: the worked examples in both directions, the limits, the way back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.abc import Outcome
from whimbrel_codecs import _xbzrle_encode
from whimbrel_codecs.xbzrle import NotEncoded, XbzrleCodec, encode_page

PAGE = 4096
OUTCOMES = {NotEncoded.UNCHANGED: Outcome.UNCHANGED, NotEncoded.OVERFLOW: Outcome.OVERFLOW}
RNG = np.random.default_rng(23)


def page_of(fill):
    return np.full(PAGE, fill, np.uint8)


def noise():
    return RNG.integers(0, 256, PAGE, np.uint8)


def with_changes(old, *places):
    """`old` with every byte of (start, count) places changed."""
    new = old.copy()
    for start, count in places:
        new[start : start + count] ^= 0x5A
    return new


def check_batch(olds, news, expected):
    """What the codec makes of a batch is what `encode_page` or an oracle made of its pages."""
    old, new = (np.array(pages, np.uint8).reshape(-1, PAGE) for pages in (olds, news))
    old.flags.writeable = new.flags.writeable = False
    encoded = XbzrleCodec().encode(old, new)
    assert encoded.outcomes.tolist() == [
        OUTCOMES[one] if isinstance(one, NotEncoded) else Outcome.ENCODED for one in expected
    ]
    for number, one in enumerate(expected):
        payload = encoded.data[encoded.starts[number] : encoded.ends[number]].tobytes()
        assert payload == (b"" if isinstance(one, NotEncoded) else one), f"page {number}"


def decoded(payload, old):
    memory = old.copy()
    XbzrleCodec().decode(
        np.frombuffer(payload, np.uint8), np.array([0]), np.array([len(payload)]), memory, np.array([0])
    )
    return memory


def worked_examples():
    """The numbered examples of section 3.6 that have a payload: old page, new page, payload."""
    old = page_of(0x81)
    first, last = old.copy(), old.copy()
    first[0] = last[0xFFF] = 0xED
    yield 1, old, first, bytes.fromhex("00 01 ed")
    yield 2, old, last, bytes.fromhex("ff 1f 01 ed")

    old = page_of(0)
    old[[0x100, 0xF00]], old[[0x101, 0xF01]] = 0xEA, 0x09
    new = old.copy()
    new[[0x100, 0xF00]], new[[0x101, 0xF01]] = 0x9F, 0x0A
    yield 3, old, new, bytes.fromhex("80 02 02 9f 0a fe 1b 02 9f 0a")

    old = page_of(7)
    new = with_changes(old, (0x200, 256))
    yield 4, old, new, bytes.fromhex("80 04 80 02") + new[0x200:0x300].tobytes()

    new = page_of(0)
    new[0x10] = 0x77
    yield 5, page_of(0), new, bytes.fromhex("10 01 77")

    old = noise()
    for name, head, place in (
        ("9 a", "0a 7f", (10, 127)),
        ("9 b", "0a 80 01", (10, 128)),
        ("10 a", "7f 01", (127, 1)),
        ("10 b", "80 01 01", (128, 1)),
        ("12", "03 fd 1f", (3, 4093)),
    ):
        new = with_changes(old, place)
        yield name, old, new, bytes.fromhex(head) + new[place[0] : sum(place)].tobytes()
    new = with_changes(old, (5, 3), (300, 200))
    payload = b"\x05\x03" + new[5:8].tobytes() + bytes.fromhex("a4 02 c8 01") + new[300:500].tobytes()
    yield 11, old, new, payload


EXAMPLES = {str(name): (old, new, payload) for name, old, new, payload in worked_examples()}
SIZES = {"4": 260, "9 a": 129, "9 b": 131, "11": 209, "12": 4096}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_worked_examples_in_both_directions(name, slow_decode):
    old, new, payload = EXAMPLES[name]
    assert encode_page(old, new) == payload
    check_batch([old], [new], [payload])
    assert (decoded(payload, old) == new).all()
    assert slow_decode(payload, old.tobytes()) == new.tobytes()
    assert len(payload) == SIZES.get(name, len(payload))


def test_all_bytes_changed_are_too_many():  # example 6
    old = noise()
    assert encode_page(old, old ^ 0xFF) is NotEncoded.OVERFLOW
    check_batch([old], [old ^ 0xFF], [NotEncoded.OVERFLOW])


def test_every_other_byte_is_too_many():  # example 7
    old = noise()
    new = old.copy()
    new[::2] ^= 1
    assert encode_page(old, new) is NotEncoded.OVERFLOW
    check_batch([old], [new], [NotEncoded.OVERFLOW])


def test_the_same_page_is_not_sent():  # example 8
    old = noise()
    assert encode_page(old, old.copy()) is NotEncoded.UNCHANGED
    check_batch([old], [old], [NotEncoded.UNCHANGED])


@pytest.mark.parametrize(
    ("places", "size"),
    [
        ([(0, 4092)], None),  # 4095 bytes, and given up for the equal bytes that follow
        ([(0, 4091)], 4094),  # with room for one more length, which is not written
        ([(3, 4093)], 4096),  # the most there is: nothing follows
        ([(2, 4093)], None),
        ([(4, 4092)], 4095),
        ([(0, 4093)], None),
        ([(3, 4092)], None),
        ([(2, 4094)], None),
        ([(0, 4096)], None),
        ([(1, 4095)], None),
        ([(0, 4087), (4088, 1)], 4090 + 3),
        ([(0, 4089), (4090, 1)], None),  # 4095 in all, and bytes follow
        ([(0, 4089), (4095, 1)], 4095),  # the same, up to the end
        ([(0, 4090), (4095, 1)], 4096),
        ([(0, 4091), (4095, 1)], None),
    ],
)
def test_the_limit_is_tested_in_the_formats_order(places, size):
    old = noise()
    new = with_changes(old, *places)
    result = encode_page(old, new)
    check_batch([old, old, old], [old, new, old], [NotEncoded.UNCHANGED, result, NotEncoded.UNCHANGED])
    if size is None:
        assert result is NotEncoded.OVERFLOW
    else:
        assert len(result) == size
        assert (decoded(result, old) == new).all()


@pytest.mark.parametrize("at", [0, 1, 126, 127, 128, 129, 255, 256, 4094, 4095])
@pytest.mark.parametrize("count", [1, 2, 126, 127, 128, 129, 2048])
def test_lengths_of_one_and_two_bytes(at, count):
    if at + count > PAGE:
        return
    old = noise()
    new = with_changes(old, (at, count))
    payload = encode_page(old, new)
    check_batch([old], [new], [payload])
    head = (1 if at < 128 else 2) + (1 if count < 128 else 2)
    assert len(payload) == head + count
    assert (decoded(payload, old) == new).all()


def by_the_book(old, new):
    """Section 3.3 word by word, one byte after the other."""
    limit, at, out = PAGE, 0, b""

    def length(value):
        return bytes([value]) if value < 128 else bytes([value & 0x7F | 0x80, value >> 7])

    def run(equal):
        end = at
        while end < PAGE and (old[end] == new[end]) == equal:
            end += 1
        return end - at

    while at < PAGE:
        if len(out) + 2 > limit:
            return NotEncoded.OVERFLOW
        same = run(True)
        if same == PAGE:
            return NotEncoded.UNCHANGED
        if at + same == PAGE:
            return out
        out += length(same)
        at += same
        if len(out) + 2 > limit:
            return NotEncoded.OVERFLOW
        count = run(False)
        out += length(count)
        if len(out) + count > limit:
            return NotEncoded.OVERFLOW
        out += bytes(new[at : at + count])
        at += count
    return out


@st.composite
def changes(draw):
    """An old and a new page, alike in all sorts of ways."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = random.integers(0, 256, PAGE, np.uint8) if draw(st.booleans()) else page_of(draw(st.sampled_from((0, 0xFF))))
    new = old.copy()
    match draw(st.sampled_from(("runs", "scattered", "dense", "shifted", "edges"))):
        case "runs":
            for _ in range(draw(st.integers(0, 30))):
                start, count = draw(st.integers(0, PAGE - 1)), draw(st.integers(1, 200) | st.integers(1, PAGE))
                new[start : start + count] ^= 0x3C
        case "scattered":
            new[random.integers(0, PAGE, draw(st.integers(0, 1500)))] ^= 1
        case "dense":
            new[:: draw(st.integers(1, 5))] ^= 1
        case "shifted":
            new[: draw(st.integers(4080, PAGE))] ^= 0x77
        case "edges":
            new[[0, 127, 128, 4095]] ^= np.array(draw(st.lists(st.integers(0, 1), min_size=4, max_size=4)), np.uint8)
    return old, new


@given(changes())
@settings(max_examples=250)
def test_what_was_encoded_decodes_to_the_new_page(slow_decode, change):
    old, new = change
    payload = encode_page(old, new)
    assert payload == by_the_book(old.tolist(), new.tolist())
    if payload is NotEncoded.UNCHANGED:
        assert (old == new).all()
    elif payload is not NotEncoded.OVERFLOW:
        assert 0 < len(payload) <= PAGE
        assert (decoded(payload, old) == new).all()
        assert slow_decode(payload, old.tobytes()) == new.tobytes()


@given(st.lists(changes(), max_size=12), st.integers(1, 5), st.integers(1, 600))
@settings(max_examples=150)
def test_a_batch_is_what_its_pages_are(pages, together, enough):
    """In however many goes it is done."""
    olds, news = [old for old, _ in pages], [new for _, new in pages]
    expected = [by_the_book(old.tolist(), new.tolist()) for old, new in pages]
    check_batch(olds, news, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_xbzrle_encode, "_PAGES", together)
        patch.setattr(_xbzrle_encode, "_ENOUGH", enough)
        check_batch(olds, news, expected)


def test_no_pages_at_all():
    check_batch([], [], [])


def test_a_run_ends_with_its_page():
    old = [page_of(0)] * 3
    new = [with_changes(page_of(0), *places) for places in ([(4090, 6)], [(0, 5), (4095, 1)], [(0, 4093)])]
    check_batch(old, new, [encode_page(*pair) for pair in zip(old, new, strict=True)])


@pytest.mark.parametrize("period", range(2, 17))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9])
def test_pages_near_the_limit_by_many_short_runs(period, count):
    """Some of them are dropped early, by what they need at least; they and no others must be those that overflow."""
    if count >= period:
        return
    old, pages = page_of(0), []
    for stop in range(0, PAGE + 1, 128):
        new = old.copy()
        new[:stop][np.arange(stop) % period < count] = 0xA5
        pages.append(new)
    expected = [encode_page(old, new) for new in pages]
    check_batch([old] * len(pages), pages, expected)


def test_many_pages_of_all_kinds():
    """More than are compared at once, with more words that differ than are looked into at once."""
    random = np.random.default_rng(5)
    old = random.integers(0, 256, (700, PAGE), np.uint8)
    new = old.copy()
    for number, page in enumerate(new):
        match number % 7:
            case 0:
                page[random.integers(0, PAGE, 1 + number)] ^= 0x11
            case 1:
                page[:] = random.integers(0, 256, PAGE)
            case 2:
                page[number : 3 * number] ^= 0xFF
            case 3:
                page.view(np.uint64)[random.integers(0, 512, number // 2)] += np.uint64(1)
            case 4:
                page[number % 8 :: 8] ^= 0x55
            case 5:
                page[-1 - number :] = 0
    expected = [encode_page(*pair) for pair in zip(old, new, strict=True)]
    assert {one if isinstance(one, NotEncoded) else bytes for one in expected} == {bytes, *NotEncoded}
    check_batch(old, new, expected)
