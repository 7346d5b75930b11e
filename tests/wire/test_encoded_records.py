"""Records that say how long they are (XBZRLE, COMPRESS_PAGE): golden bytes, runs, windows, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.errors import ProtocolError, StreamError
from whimbrel.wire import ram, ram_records
from whimbrel.wire.ram import EOS_RECORD, Flag

PAGE = 4096
HEADS = {
    Flag.XBZRLE: lambda size: b"\x01" + size.to_bytes(2, "big"),
    Flag.COMPRESS_PAGE: lambda size: size.to_bytes(4, "big"),
}
KINDS = sorted(HEADS)
MOST = {Flag.XBZRLE: 4096, Flag.COMPRESS_PAGE: 4110}
LEAST = {Flag.XBZRLE: 0, Flag.COMPRESS_PAGE: 1}


def record(kind, page, payload, name=None):
    word = page * PAGE | kind | (Flag.CONTINUE if name is None else 0)
    named = b"" if name is None else bytes([len(name)]) + name
    return word.to_bytes(8, "big") + named + HEADS[kind](len(payload)) + payload


def payloads(run):
    return [run.data[start:end].tobytes() for start, end in zip(run.starts, run.ends, strict=True)]


def read(data):
    return ram.read_run(memoryview(data))


# -------------------------------------------------------------------------------------------------------- golden


def test_the_worked_example():
    data = bytes.fromhex("00 00 00 00 00 10 00 60  01  00 03  00 01 ed")
    run = read(data)
    assert (run.flag, run.size, run.block, run.indices.tolist()) == (Flag.XBZRLE, 14, None, [0x100])
    assert payloads(run) == [bytes.fromhex("00 01 ed")]


def test_a_named_change():
    data = bytes.fromhex("00 00 00 00 00 00 20 40  06 70 63 2e 72 61 6d  01  00 04  ff 1f 01 ed")
    for more in (b"", record(Flag.XBZRLE, 3, b"abc")):
        run = read(data + more)
        assert (run.flag, run.size, run.block, run.indices.tolist()) == (Flag.XBZRLE, len(data), "pc.ram", [2])
        assert payloads(run) == [bytes.fromhex("ff 1f 01 ed")]


def test_compressed_pages():
    named = bytes.fromhex("00 00 00 00 00 00 51 00  01 61  00 00 00 03") + b"one"
    run = read(named)
    assert (run.flag, run.size, run.block, run.indices.tolist()) == (Flag.COMPRESS_PAGE, len(named), "a", [5])
    assert payloads(run) == [b"one"]
    continued = bytes.fromhex("00 00 00 00 00 00 91 20  00 00 00 05") + b"three"
    run = read(continued)
    assert (run.flag, run.size, run.block, run.indices.tolist()) == (Flag.COMPRESS_PAGE, len(continued), None, [9])
    assert payloads(run) == [b"three"]


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_at_their_limits(kind):
    for size in (LEAST[kind], MOST[kind]):
        for name in (None, b"a", b"n" * 255):
            data = record(kind, 7, (bytes(range(256)) * 17)[:size], name)
            run = read(data + EOS_RECORD)
            assert (run.flag, run.size, len(run.indices)) == (kind, len(data), 1)
            assert payloads(run) == [(bytes(range(256)) * 17)[:size]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_offset_is_told_exactly(kind):
    for name in (None, b"a"):
        assert read(record(kind, 2**52 - 1, b"x", name)).indices.tolist() == [2**52 - 1]


# ---------------------------------------------------------------------------------------------------------- runs


ENDS = {
    "eos": EOS_RECORD,
    "zero": bytes.fromhex("00 00 00 00 00 00 50 22  00"),
    "page": bytes.fromhex("00 00 00 00 00 00 50 28") + bytes(PAGE),
    "other": b"\xff" * 5000,
    "nothing": b"",
    "part of a word": b"\0\0\0",
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_up_to_the_next_kind(kind, end):
    contents = [b"one", b"x" * 300, b"twelve", b"z", b"x" * 4000]
    data = b"".join(record(kind, page, content) for page, content in zip((9, 2, 2, 40, 3), contents, strict=True))
    run = read(data + ENDS[end])
    assert (run.flag, run.size, run.block, run.indices.tolist()) == (kind, len(data), None, [9, 2, 2, 40, 3])
    assert payloads(run) == contents
    assert len(run.data) == len(data), "no more of the window than its own"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_where_a_name_or_the_other_kind_comes(kind):
    (other,) = set(KINDS) - {kind}
    for end in (record(kind, 5, b"abc", b"b"), record(other, 5, b"abc")):
        data = record(kind, 3, b"one") + record(kind, 4, b"two")
        run = read(data + end)
        assert (run.size, run.indices.tolist()) == (len(data), [3, 4])
        run = read(end)
        assert (run.size, run.indices.tolist()) == (len(end), [5])


@pytest.mark.parametrize("kind", KINDS)
def test_a_last_record_that_is_not_whole_is_left_for_the_next_call(kind):
    whole = record(kind, 1, b"first") + record(kind, 2, b"second")
    last = record(kind, 3, b"the third")
    for cut in range(len(last)):
        run = read(whole + last[:cut])
        assert (run.size, payloads(run)) == (len(whole), [b"first", b"second"])
    assert payloads(read(whole + last)) == [b"first", b"second", b"the third"]


def test_empty_changes_are_a_run_too():
    run = read(record(Flag.XBZRLE, 1, b"") * 5)
    assert (run.size, len(run.indices), payloads(run)) == (55, 5, [b""] * 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_takes_so_many_records_and_no_more(kind):
    most = ram_records._ENCODED_MOST
    one = record(kind, 1, b"x")
    run = read(one * (most + 3))
    assert (len(run.indices), run.size) == (most, most * len(one))
    assert len(read(one * 3).indices) == 3


# --------------------------------------------------------------------------------------------------- what is refused


WRONG = {
    "encoding 0": (Flag.XBZRLE, b"\x00\x00\x01", "encoding 0x00, expected 0x01"),
    "encoding 2": (Flag.XBZRLE, b"\x02\x00\x01", "encoding 0x02, expected 0x01"),
    "encoding ff": (Flag.XBZRLE, b"\xff\x00\x01", "encoding 0xff, expected 0x01"),
    "xbzrle too long": (Flag.XBZRLE, b"\x01\x10\x01", "XBZRLE is 4097 bytes long, expected 0 to 4096"),
    "xbzrle longest": (Flag.XBZRLE, b"\x01\xff\xff", "XBZRLE is 65535 bytes long, expected 0 to 4096"),
    "compressed to nothing": (Flag.COMPRESS_PAGE, b"\0\0\0\0", "COMPRESS_PAGE is 0 bytes long, expected 1 to 4110"),
    "compressed too long": (
        Flag.COMPRESS_PAGE,
        b"\0\0\x10\x0f",
        "COMPRESS_PAGE is 4111 bytes long, expected 1 to 4110",
    ),
    "compressed 2 GiB": (Flag.COMPRESS_PAGE, b"\x80\0\0\0", "COMPRESS_PAGE is 2147483648 bytes long"),
    "compressed longest": (Flag.COMPRESS_PAGE, b"\xff" * 4, "COMPRESS_PAGE is 4294967295 bytes long"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", [b"", b"\x01a"])
def test_heads_that_are_refused_as_soon_as_they_are_here(case, name):
    kind, head, words = WRONG[case]
    word = (PAGE | kind | (0 if name else Flag.CONTINUE)).to_bytes(8, "big")
    for more in (b"", bytes(70_000)):
        with pytest.raises(StreamError, match=words):
            read(word + name + head + more)


@pytest.mark.parametrize("case", WRONG)
def test_what_is_before_a_wrong_head_is_read_and_the_next_call_refuses(case):
    kind, head, words = WRONG[case]
    good = record(kind, 1, b"first") + record(kind, 2, b"second")
    wrong = (PAGE | kind | Flag.CONTINUE).to_bytes(8, "big") + head
    for more in (b"", bytes(70_000), record(kind, 3, b"third") * 1000):
        data = good + wrong + more
        run = read(data)
        assert (run.size, payloads(run)) == (len(good), [b"first", b"second"])
        with pytest.raises(StreamError, match=words):
            read(data[run.size :])


# --------------------------------------------------------------------------------------------------- any stream


@st.composite
def records(draw):
    """Records one by one: (kind, name or None, page, payload)."""
    found, named = [], False
    for _ in range(draw(st.integers(0, 25))):
        kind = draw(st.sampled_from((*KINDS, *KINDS, Flag.PAGE, Flag.ZERO, Flag.EOS)))
        name = None if named and draw(st.integers(0, 4)) else draw(st.sampled_from((b"a", b"pc.ram", b"n" * 255)))
        page = draw(st.integers(0, 40) | st.integers(0, 2**52 - 1))
        match kind:
            case Flag.EOS:
                found.append((kind, None, None, b""))
                continue
            case Flag.PAGE:
                payload = bytes([draw(st.integers(0, 255))]) * PAGE
            case Flag.ZERO:
                payload = bytes([draw(st.integers(0, 255))])
            case _:
                size = draw(st.integers(LEAST[kind], 12) | st.integers(LEAST[kind], MOST[kind]))
                payload = (bytes(draw(st.binary(min_size=1, max_size=8))) * size)[:size]
        named = True
        found.append((kind, name, page, payload))
    return found


def written(found):
    parts = []
    for kind, name, page, payload in found:
        if kind is Flag.EOS:
            parts.append(EOS_RECORD)
        elif kind in HEADS:
            parts.append(record(kind, page, payload, name))
        else:
            word = page * PAGE | kind | (Flag.CONTINUE if name is None else 0)
            parts.append(word.to_bytes(8, "big") + (b"" if name is None else bytes([len(name)]) + name) + payload)
    return b"".join(parts)


def unrolled(run):
    """The records of a run, one by one."""
    if run.flag is Flag.EOS:
        return [(Flag.EOS, None, None, b"")]
    contents = payloads(run) if run.flag in HEADS else [row.tobytes() for row in run.payload]
    names = [None if run.block is None else run.block.encode()] + [None] * (len(run.indices) - 1)
    return [(run.flag, *one) for one in zip(names, run.indices.tolist(), contents, strict=True)]


@given(records(), st.lists(st.integers(1, 9000), max_size=60))
@settings(max_examples=150)
def test_what_is_written_is_read_through_windows_of_any_split(found, splits):
    data, seen, start, available = written(found), [], 0, 0
    while start < len(data):
        run = ram.read_run(memoryview(data)[start:available])
        if isinstance(run, int):
            assert run > available - start, "it asks for what it has"
            assert start + run <= len(data), "it asks for more than one record"
            grown = splits.pop(0) if splits else run
            available = min(len(data), max(start + run, available + grown))
            continue
        seen += unrolled(run)
        start += run.size
    assert seen == found


@given(records(), st.data())
@settings(max_examples=150)
def test_damaged_records_are_read_or_refused_and_nothing_else(found, data):
    stream = bytearray(written(found[:6]))
    for _ in range(data.draw(st.integers(1, 3))):
        if stream:
            at = data.draw(st.integers(0, len(stream) - 1) | st.integers(0, min(16, len(stream) - 1)))
            stream[at] ^= 1 << data.draw(st.integers(0, 7))
    start = 0
    while start < len(stream):
        try:
            run = ram.read_run(memoryview(stream)[start:])
        except ProtocolError:
            return
        if isinstance(run, int):
            assert run > len(stream) - start
            return
        assert (run.indices >= 0).all()
        assert (run.starts <= run.ends).all()
        assert (run.ends <= run.size).all()
        start += run.size
