"""Page records: golden bytes, runs written and read back through windows of any split, and what is refused."""

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.errors import ProtocolError, StreamError
from whimbrel.wire import ram, ram_records
from whimbrel.wire.ram import Flag

PAGE = 4096
RNG = np.random.default_rng(7)
PATTERN = bytes(range(256)) * 16  # one page


def stage(capacity=64):
    return ram.RecordStage(pages=capacity, zeros=capacity)


def memory_of(*pages):
    return np.frombuffer(b"".join(pages), np.uint8)


def joined(written):
    return b"".join(bytes(part) for part in written)


def pages(*numbers):
    return np.array(numbers, np.intp)


# -------------------------------------------------------------------------------------------------------- golden


def test_flags_are_those_of_the_format():
    assert {flag.name: int(flag) for flag in Flag} == {
        "ZERO": 0x002,
        "MEM_SIZE": 0x004,
        "PAGE": 0x008,
        "EOS": 0x010,
        "CONTINUE": 0x020,
        "XBZRLE": 0x040,
        "HOOK": 0x080,
        "COMPRESS_PAGE": 0x100,
        "MULTIFD_FLUSH": 0x200,
    }
    assert (ram.VERSION_ID, ram.PAGE_SIZE) == (4, 4096)


def test_page_records():
    memory = memory_of(b"\x11" * PAGE, PATTERN, b"\x22" * PAGE, b"\x33" * PAGE)
    named = bytes.fromhex("00 00 00 00 00 00 10 08  06 70 63 2e 72 61 6d") + PATTERN
    continued = bytes.fromhex("00 00 00 00 00 00 10 28") + PATTERN
    second = bytes.fromhex("00 00 00 00 00 00 20 28") + b"\x22" * PAGE
    fourth = bytes.fromhex("00 00 00 00 00 00 30 28") + b"\x33" * PAGE
    staging = stage()
    assert joined(staging.pages(memory, pages(1), "pc.ram")) == named
    assert joined(staging.pages(memory, pages(1), None)) == continued
    assert joined(staging.pages(memory, pages(1, 2, 3), "pc.ram")) == named + second + fourth
    assert joined(staging.pages(memory, pages(1, 3), "pc.ram")) == named + fourth
    assert joined(staging.pages(memory, pages(1, 2), None)) == continued + second


def fetched(head, vectors):
    """What a channel would send for a head and what lies at `vectors`."""
    return head + b"".join(ctypes.string_at(address, length) for address, length in vectors.tolist())


@pytest.mark.parametrize("numbers", [(1,), (1, 2, 3), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("block", [None, "pc.ram", "n" * 255])
def test_page_records_by_address_are_the_same_bytes(numbers, block):
    memory = memory_of(b"\x11" * PAGE, PATTERN, b"\x22" * PAGE, b"\x33" * PAGE)
    staging = stage(4)
    expected = joined(staging.pages(memory, pages(*numbers), block))
    head, vectors = staging.gathered(memory, pages(*numbers), block)
    assert fetched(head, vectors) == expected
    assert vectors.flags.c_contiguous
    assert vectors[-1].tolist() == [memory.ctypes.data + numbers[-1] * PAGE, PAGE], "the memory itself, no copy"


def test_zero_records():
    named = bytes.fromhex("00 00 00 00 00 00 50 02  06 70 63 2e 72 61 6d  00")
    continued = bytes.fromhex("00 00 00 00 00 00 50 22  00")
    high = bytes.fromhex("00 00 00 01 00 00 00 22  00")  # page 0x100000, at 4 GiB
    highest = bytes.fromhex("00 7f ff ff ff ff f0 22  00")
    staging = stage()
    assert joined(staging.zeros(pages(5), "pc.ram")) == named
    assert joined(staging.zeros(pages(5), None)) == continued
    assert joined(staging.zeros(pages(5, 0x100000, 0x7FFFFFFFFFF), "pc.ram")) == named + high + highest


def test_a_stage_is_used_again_and_again():
    memory = memory_of(b"\x01" * PAGE, b"\x02" * PAGE, b"\x03" * PAGE)
    staging = stage(3)
    first = joined(staging.pages(memory, pages(0, 1, 2), "a"))
    joined(staging.pages(memory, pages(2), "another name"))
    joined(staging.zeros(pages(0, 1, 2), "b"))
    assert joined(staging.zeros(pages(0), None)) == bytes.fromhex("00 00 00 00 00 00 00 22 00")
    assert joined(staging.pages(memory, pages(0, 1, 2), "a")) == first


def test_what_is_staged_is_a_copy():
    memory = np.zeros(2 * PAGE, np.uint8)
    head, rest = stage().pages(memory, pages(0, 1), "a")
    memory[:] = 0xFF
    assert not any((head + bytes(rest))[10 : 10 + PAGE])


# ------------------------------------------------------------------------------------------------------- reading


def test_a_named_page():
    data = bytes.fromhex("00 00 00 00 00 00 10 08  06 70 63 2e 72 61 6d") + PATTERN
    for more in (b"", bytes.fromhex("00 00 00 00 00 00 20 28") + PATTERN):
        run = ram.read_run(memoryview(data + more))
        assert (run.flag, run.size, run.block, run.indices.tolist()) == (Flag.PAGE, len(data), "pc.ram", [1])
        assert run.payload.tobytes() == PATTERN
        assert run.payload.shape == (1, PAGE)


def test_a_named_zero():
    data = bytes.fromhex("00 00 00 00 00 00 50 02  01 61  07")
    run = ram.read_run(memoryview(data))
    assert (run.flag, run.size, run.block, run.indices.tolist()) == (Flag.ZERO, len(data), "a", [5])
    assert run.payload.tolist() == [7]


def test_continued_pages_up_to_the_next_kind():
    page = bytes.fromhex("00 00 00 00 00 00 20 28") + PATTERN
    for end in (ram.EOS_RECORD, bytes.fromhex("00 00 00 00 00 00 50 22  00"), b"\xff" * 5000, b""):
        run = ram.read_run(memoryview(page * 3 + end))
        assert (run.flag, run.size, run.block, run.indices.tolist()) == (Flag.PAGE, 3 * len(page), None, [2, 2, 2])
        assert run.payload.shape == (3, PAGE)
        assert run.payload.tobytes() == PATTERN * 3


def test_continued_zeros_up_to_the_next_kind():
    for end in (ram.EOS_RECORD, bytes.fromhex("00 00 00 00 00 00 50 28") + PATTERN, b"\xff" * 90, b""):
        zeros = b"".join(bytes.fromhex(f"00 00 00 00 00 00 {n}0 22  0{n}") for n in (9, 3, 4))
        run = ram.read_run(memoryview(zeros + end))
        assert (run.flag, run.size, run.block, run.indices.tolist()) == (Flag.ZERO, len(zeros), None, [9, 3, 4])
        assert run.payload.tolist() == [9, 3, 4]


def test_the_end_of_a_body():
    run = ram.read_run(memoryview(ram.EOS_RECORD + b"\x7e"))
    assert (run.flag, run.size, run.block, len(run.indices)) == (Flag.EOS, 8, None, 0)


def test_the_largest_offset_is_told_exactly():
    run = ram.read_run(memoryview(bytes.fromhex("ff ff ff ff ff ff f0 22  00")))
    assert run.indices.tolist() == [2**52 - 1]
    run = ram.read_run(memoryview(bytes.fromhex("ff ff ff ff ff ff f0 02  01 61  00")))
    assert run.indices.tolist() == [2**52 - 1]


RECORDS = {
    "eos": ram.EOS_RECORD,
    "page": bytes.fromhex("00 00 00 00 00 00 10 28") + PATTERN,
    "zero": bytes.fromhex("00 00 00 00 00 00 10 22 00"),
    "named page": bytes.fromhex("00 00 00 00 00 00 10 08  06 70 63 2e 72 61 6d") + PATTERN,
    "named zero": bytes.fromhex("00 00 00 00 00 00 10 02  06 70 63 2e 72 61 6d  00"),
    "longest": bytes.fromhex("00 00 00 00 00 00 10 08  ff") + b"n" * 255 + PATTERN,
    "xbzrle": bytes.fromhex("00 00 00 00 00 10 00 60  01  00 03  00 01 ed"),
    "empty xbzrle": bytes.fromhex("00 00 00 00 00 10 00 60  01  00 00"),
    "named xbzrle": bytes.fromhex("00 00 00 00 00 10 00 40  06 70 63 2e 72 61 6d  01  00 03  00 01 ed"),
    "longest xbzrle": bytes.fromhex("00 00 00 00 00 10 00 40  ff") + b"n" * 255 + b"\x01\x10\x00" + PATTERN,
    "compressed": bytes.fromhex("00 00 00 00 00 00 11 20  00 00 00 09") + b"any bytes",
    "named compressed": bytes.fromhex("00 00 00 00 00 00 11 00  01 61  00 00 00 01  78"),
    "longest compressed": bytes.fromhex("00 00 00 00 00 00 11 00  ff") + b"n" * 255 + b"\0\0\x10\x0e" + bytes(4110),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_window_that_is_too_small_says_how_large_it_must_be(case):
    record = RECORDS[case]
    for size in range(len(record)):
        needed = ram.read_run(memoryview(record[:size]))
        assert isinstance(needed, int)
        assert size < needed <= len(record), "more than there is, and no more than one record has"
    assert ram.read_run(memoryview(record)).size == len(record)


# --------------------------------------------------------------------------------------------------- what is refused


KINDS = {1 << bit for bit in range(12) if 1 << bit != Flag.CONTINUE}
NOT_HERE = {Flag.HOOK: "only an RDMA transport", Flag.MULTIFD_FLUSH: "several lanes (multifd)"}
ENCODED = (Flag.XBZRLE, Flag.COMPRESS_PAGE)


@pytest.mark.parametrize("with_continue", [0, Flag.CONTINUE])
@pytest.mark.parametrize("kind", sorted(KINDS | {0}))
@pytest.mark.parametrize("offset", [0, PAGE])
def test_each_flag_alone(kind, with_continue, offset):
    word = offset | kind | with_continue
    window = memoryview(word.to_bytes(8, "big") + b"\x01a" + bytes(2 * PAGE))
    if kind in ENCODED:
        head = b"\x01\0\x01" if kind == Flag.XBZRLE else b"\0\0\0\x01"
        window = memoryview(word.to_bytes(8, "big") + (b"" if with_continue else b"\x01a") + head + bytes(PAGE))
    if kind in (Flag.PAGE, Flag.ZERO, *ENCODED):
        run = ram.read_run(window)
        assert (run.flag, run.block) == (kind, None if with_continue else "a")
    elif word == Flag.EOS:
        assert ram.read_run(window).flag is Flag.EOS
    else:
        with pytest.raises(StreamError) as caught:
            ram.read_run(window)
        assert f"word {word:#x}" in str(caught.value)
        if kind in NOT_HERE:
            assert f"a {Flag(kind).name} record" in str(caught.value)
            assert NOT_HERE[kind] in str(caught.value)
            assert "switch the capability off" in str(caught.value)
        else:
            assert "mean nothing" in str(caught.value)


@pytest.mark.parametrize("with_continue", [0, Flag.CONTINUE])
def test_every_combination_of_two_flags_is_refused(with_continue):
    for one in KINDS:
        for other in KINDS - {one}:
            word = PAGE | one | other | with_continue
            with pytest.raises(StreamError, match="mean nothing"):
                ram.read_run(memoryview(word.to_bytes(8, "big") + bytes(2 * PAGE)))


def test_a_bad_word_is_refused_as_soon_as_it_is_here():
    with pytest.raises(StreamError, match=r"0x5001.*mean nothing"):
        ram.read_run(memoryview(bytes.fromhex("00 00 00 00 00 00 50 01")))


@pytest.mark.parametrize("flag", [Flag.PAGE, Flag.ZERO, *ENCODED])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (b"", "is empty"),
        (b"\xc3\xa4", "printable ASCII"),
        (b"a\0", "printable ASCII"),
        (b"\x7f", "printable ASCII"),
        (b"\n" * 255, "printable ASCII"),
    ],
)
def test_names_that_are_refused(flag, name, words):
    record = int(flag).to_bytes(8, "big") + bytes([len(name)]) + name + PATTERN
    with pytest.raises(StreamError, match=words):
        ram.read_run(memoryview(record))


# ------------------------------------------------------------------------------------------------------- round trip


@st.composite
def streams(draw):
    """Runs as a source writes them: (kind, block or None to continue, page numbers)."""
    runs, current = [], None
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from((Flag.PAGE, Flag.ZERO, Flag.EOS)))
        if kind is Flag.EOS:
            runs.append((kind, None, []))
            continue
        block = draw(st.sampled_from(("a", "pc.ram", "n" * 255)))
        numbers = draw(st.lists(st.integers(0, 40) | st.integers(0, 2**51), min_size=1, max_size=9, unique=True))
        if kind is Flag.PAGE:
            numbers = [number % 41 for number in numbers]
        name = None if current == block and draw(st.booleans()) else block
        runs.append((kind, name, sorted(set(numbers))))
        current = block
    return runs


MEMORY = RNG.integers(0, 256, 41 * PAGE, np.uint8)


def write_stream(runs):
    staging, parts = stage(9), []
    for kind, name, numbers in runs:
        match kind:
            case Flag.PAGE:
                parts.append(joined(staging.pages(MEMORY, pages(*numbers), name)))
            case Flag.ZERO:
                parts.append(joined(staging.zeros(pages(*numbers), name)))
            case Flag.EOS:
                parts.append(ram.EOS_RECORD)
    return b"".join(parts)


def records_of(runs):
    """The records one by one, each with its own block: (kind, block, page number)."""
    records, current = [], None
    for kind, name, numbers in runs:
        current = name or current
        records += [(kind, current, number) for number in numbers] or [(kind, None, None)]
    return records


def read_stream(data, splits):
    """Read through a window that grows at `splits` and is asked to grow when it does not do; yields the records."""
    available, start, splits = 0, 0, list(splits)
    current = None
    while start < len(data):
        run = ram.read_run(memoryview(data)[start:available])
        if isinstance(run, int):
            assert run > available - start, "it asks for what it has"
            assert start + run <= len(data), "it asks for more than one record"
            grown = splits.pop(0) if splits else run
            available = min(len(data), max(start + run, available + grown))
            continue
        current = run.block or current
        assert run.size > 0
        if run.flag is Flag.EOS:
            yield Flag.EOS, None, None
        for number, payload in zip(run.indices.tolist(), run.payload, strict=True):
            if run.flag is Flag.PAGE:
                assert (payload == MEMORY[number * PAGE : (number + 1) * PAGE]).all()
            else:
                assert payload == 0
            yield run.flag, current, number
        start += run.size
    assert start == len(data)


@given(streams(), st.lists(st.integers(1, 30_000), max_size=60))
@settings(max_examples=150)
def test_whatever_is_written_is_read_through_windows_of_any_split(runs, splits):
    assert list(read_stream(write_stream(runs), splits)) == records_of(runs)


@given(streams())
@settings(max_examples=50)
def test_all_at_once(runs):
    data = write_stream(runs)
    assert list(read_stream(data, [len(data)])) == records_of(runs)


@given(streams(), st.data())
@settings(max_examples=200)
def test_damaged_records_are_read_or_refused_and_nothing_else(runs, data):
    stream = bytearray(write_stream([(kind, name, numbers[:2]) for kind, name, numbers in runs[:4]]))
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
        start += run.size


# ----------------------------------------------------------------------------------------------------------- work


LOOK = ram_records._FIRST_LOOK


class CountingNumpy:
    """numpy, with a count of how many words were looked at."""

    def __init__(self):
        self.rows = 0

    def __getattr__(self, name):
        return getattr(np, name)

    def ndarray(self, shape, *arguments, **options):
        self.rows += shape[0]
        return np.ndarray(shape, *arguments, **options)


def work(monkeypatch, data):
    """How many words are looked at, and how many runs there are, to read `data` in one window."""
    counting = CountingNumpy()
    runs = 0
    with monkeypatch.context() as patch:
        patch.setattr(ram_records, "np", counting)
        view = memoryview(data)
        while len(view):
            view = view[ram.read_run(view).size :]
            runs += 1
    return counting.rows, runs


def test_single_records_in_a_big_window_cost_the_same_each(monkeypatch):
    zero, page = RECORDS["zero"], RECORDS["page"]
    for pairs in (100, 1000):
        rows, runs = work(monkeypatch, (zero + page) * pairs)
        assert runs == 2 * pairs
        assert rows <= LOOK * runs


def test_a_long_run_is_looked_at_little_more_than_twice(monkeypatch):
    for count in (1, LOOK - 1, LOOK, LOOK + 1, 8 * LOOK, 8 * LOOK + 1, 5000, 60_000):
        rows, runs = work(monkeypatch, RECORDS["zero"] * count)
        assert runs == 1
        assert rows <= 2.2 * count + LOOK


def test_runs_just_longer_than_a_look_are_not_looked_at_for_ever(monkeypatch):
    data = (RECORDS["zero"] * (LOOK + 1) + ram.EOS_RECORD) * 500
    rows, runs = work(monkeypatch, data)
    assert runs == 1000
    assert rows <= 500 * (LOOK + 8 * LOOK)
