"""Records of mixed kinds in batches: the same ones as in runs, in their order, up to the one that is wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.errors import ChannelLost, MigrationError, StreamError
from whimbrel.stream import Reader, Replay
from whimbrel.wire.ram import EOS_RECORD, Flag, RecordReader
from whimbrel.wire.ram_batches import BatchReader, read_mixed

PAGE = 4096
SIZES = {"a": 64 * PAGE, "b": 2 * PAGE}
WHOLE, ZERO, CHANGE, SQUEEZED = Flag.PAGE, Flag.ZERO, Flag.XBZRLE, Flag.COMPRESS_PAGE


def payload(kind, seed):
    match kind:
        case Flag.PAGE:
            return bytes([seed % 256]) * PAGE
        case Flag.ZERO:
            return bytes([seed % 256])
        case Flag.XBZRLE:
            return bytes([seed % 256]) * (seed % 300)
    return bytes([seed % 256]) * (1 + seed % 300)


def record(kind, page, seed=0, name=None):
    word = page * PAGE | kind | (Flag.CONTINUE if name is None else 0)
    data = payload(kind, seed)
    head = {Flag.XBZRLE: b"\1" + len(data).to_bytes(2, "big"), Flag.COMPRESS_PAGE: len(data).to_bytes(4, "big")}
    named = b"" if name is None else bytes([len(name)]) + name.encode()
    return word.to_bytes(8, "big") + named + head.get(kind, b"") + data


def reader_of(data, capacity=1 << 20):
    return Reader(Replay(bytes(data), peer="test"), capacity=capacity)


class Crumbs(Replay):
    """Gives a few bytes at a time."""

    def __init__(self, data, size):
        super().__init__(data, peer="test")
        self._size = size

    def recv_into(self, buffer):
        return super().recv_into(memoryview(buffer)[: self._size])


def by_batches(reader, limit=10_000):
    """The records as (block, flag, page, payload), and the error at the end or None."""
    records, found = BatchReader(SIZES), []
    try:
        for name, batch in records.body(reader, limit):
            assert len(batch) == len(batch.indices) == len(batch.starts) == len(batch.ends) > 0
            assert batch.size == batch.ends[-1] <= len(batch.data)
            for flag, index, start, end in zip(batch.flags, batch.indices, batch.starts, batch.ends, strict=True):
                found.append((name, int(flag), int(index), batch.data[start:end].tobytes()))
    except MigrationError as exc:
        return found, exc
    return found, None


def by_runs(reader, limit=10_000):
    """The same by the reader of runs, without those of a run that is refused."""
    found = []
    try:
        for name, run in RecordReader(SIZES).body(reader, limit):
            for number, index in enumerate(run.indices):
                if run.flag in (Flag.PAGE, Flag.ZERO):
                    data = np.atleast_1d(run.payload[number]).tobytes()
                else:
                    data = run.data[run.starts[number] : run.ends[number]].tobytes()
                found.append((name, int(run.flag), int(index), data))
    except MigrationError as exc:
        return found, exc
    return found, None


KINDS = st.sampled_from([WHOLE, ZERO, CHANGE, SQUEEZED])
MIXTURES = st.lists(
    st.tuples(
        KINDS,
        st.integers(0, 1),
        st.integers(0, 2**20),
        st.sampled_from([None, None, None, None, "a", "b"]),
        st.sampled_from([1, 1, 1, 2, 40]),
    ),
    max_size=40,
)


def body_of(mixture):
    data = bytearray(record(ZERO, 0, name="a"))
    for kind, page, seed, name, times in mixture:
        for number in range(times):
            data += record(kind, page, seed + number, name if number == 0 else None)
    return bytes(data)


@given(MIXTURES, st.sampled_from([5000, 1 << 20]))
def test_the_same_records_as_in_runs(mixture, capacity):
    data = body_of(mixture) + EOS_RECORD
    ours, theirs = reader_of(data + b"\x7e", capacity), reader_of(data + b"\x7e", capacity)
    assert by_batches(ours) == by_runs(theirs)
    assert ours.offset == len(data)
    assert bytes(ours.window(1)[:1]) == b"\x7e"


@given(MIXTURES, st.integers(1, 5000))
def test_in_pieces(mixture, size):
    data = body_of(mixture) + EOS_RECORD
    reader = Reader(Crumbs(data, size))
    assert by_batches(reader) == by_batches(reader_of(data))
    assert reader.offset == len(data)


@given(MIXTURES, st.data())
def test_cut_anywhere(mixture, data):
    whole = body_of(mixture) + EOS_RECORD
    cut = data.draw(st.integers(0, len(whole) - 1))
    found, error = by_batches(reader_of(whole[:cut]))
    assert isinstance(error, ChannelLost)
    assert error.place.offset == cut
    assert found == by_batches(reader_of(whole))[0][: len(found)]
    # Nothing that came whole is missing.
    assert len(found) == len(by_runs(reader_of(whole[:cut]))[0])


WRONG = [
    record(ZERO, 64),
    record(WHOLE, 2**52 - 1),
    record(CHANGE, 64, 7),
    record(SQUEEZED, 64, 7),
    record(ZERO, 0, name="c"),
    record(WHOLE, 2, name="b"),
    (0x021).to_bytes(8, "big"),
    (0x2A).to_bytes(8, "big"),
    (0x200).to_bytes(8, "big"),
    (0x60).to_bytes(8, "big") + b"\2\0\0",
    (0x60).to_bytes(8, "big") + b"\1\x10\1",
    (0x120).to_bytes(8, "big") + bytes(4),
    (0x120).to_bytes(8, "big") + (4111).to_bytes(4, "big"),
    (0x08).to_bytes(8, "big") + b"\0",
    (0x08).to_bytes(8, "big") + b"\1\xff" + bytes(PAGE),
]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
@settings(max_examples=15)
@given(MIXTURES, st.sampled_from([5000, 1 << 20]))
def test_all_before_the_one_that_is_wrong(wrong, mixture, capacity):
    before = body_of(mixture) + record(ZERO, 1, name="a")
    data = before + wrong + bytes(2 * PAGE)
    ours, theirs = reader_of(data, capacity), reader_of(data, capacity)
    found, error = by_batches(ours)
    assert isinstance(error, StreamError)
    assert found == by_batches(reader_of(before + EOS_RECORD))[0]
    assert ours.offset == len(before), "it stands at the one that is wrong"
    told = by_runs(theirs)[1]
    assert error.message == told.message
    assert error.place.block == told.place.block


@given(MIXTURES, st.integers(0, 60))
def test_the_limit_of_records(mixture, limit):
    data = body_of(mixture) + EOS_RECORD
    everything, _ = by_batches(reader_of(data))
    found, error = by_batches(reader_of(data), limit)
    assert found == everything[:limit]
    if len(everything) > limit:
        assert f"more page records than the {limit} that may come" in error.message
    else:
        assert error is None


def test_the_block_goes_on_over_bodies():
    records = BatchReader(SIZES)
    reader = reader_of(record(ZERO, 0, name="b") + EOS_RECORD + EOS_RECORD + record(ZERO, 1) + EOS_RECORD)
    names = [[name for name, _ in records.body(reader, 5)] for _ in range(3)]
    assert names == [["b"], [], ["b"]]
    with pytest.raises(StreamError, match="none was named yet"):
        list(BatchReader(SIZES).body(reader_of(record(ZERO, 0) + EOS_RECORD), 5))


@pytest.mark.parametrize("kind", [WHOLE, ZERO, CHANGE, SQUEEZED])
def test_how_much_a_record_needs(kind):
    """What is missing of the record at the head is known when the stream ends, as far as its length is."""
    whole = record(kind, 1, 200)
    for cut in range(len(whole)):
        data = record(ZERO, 0, name="a") + whole[:cut]
        reader, records = reader_of(data), BatchReader(SIZES)
        with pytest.raises(ChannelLost):
            list(records.body(reader, 5))
        assert cut < records.need <= len(whole)
        if cut >= 12 or (kind is WHOLE and cut >= 8):
            assert records.need == len(whole)


def test_a_long_run_is_left_to_who_is_better_at_it():
    data = b"".join(record(kind, 1, 1) for kind in [ZERO, WHOLE, ZERO, CHANGE] + [ZERO] * 500) + EOS_RECORD
    assert len(read_mixed(memoryview(data))) == 4 + 32
    encoded = b"".join(record(CHANGE, 1, 1) for _ in range(500)) + EOS_RECORD
    assert len(read_mixed(memoryview(encoded))) == 500, "those are nowhere followed faster"
    batches = [len(batch) for _, batch in BatchReader(SIZES).body(reader_of(record(ZERO, 0, name="a") + data), 999)]
    assert batches == [1, 36, 468]


@pytest.mark.parametrize("data", [b"", EOS_RECORD, record(ZERO, 0, name="a"), record(ZERO, 0)[:-1], b"\xff" * 50])
def test_nothing_to_read(data):
    batch = read_mixed(memoryview(data))
    assert (len(batch), batch.size) == (0, 0)
