"""Records of changed pages: golden bytes, the reader that is there already, and payloads that lie anyhow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.wire import ram
from whimbrel.wire.ram_changes import change_records


def written(pages, payloads, block, *, gap=b"", order=None):
    """The records as they go out; the payloads lie in `order` in the data, with something between them."""
    data, starts, ends = b"", np.zeros(len(pages), np.intp), np.zeros(len(pages), np.intp)
    for number in range(len(pages)) if order is None else order:
        data += gap
        starts[number] = len(data)
        data += payloads[number]
        ends[number] = len(data)
    head, rest = change_records(np.array(pages, np.intp), np.frombuffer(data, np.uint8), starts, ends, block)
    return head + bytes(rest)


def test_golden_bytes():
    assert written([0x100], [b"\0\1\xed"], None).hex(" ") == "00 00 00 00 00 10 00 60 01 00 03 00 01 ed"
    assert written([0x100, 0x102], [b"\0\1\xed", b"\5\2\1\2"], "pc.ram").hex(" ") == (
        "00 00 00 00 00 10 00 40 06 70 63 2e 72 61 6d 01 00 03 00 01 ed 00 00 00 00 00 10 20 60 01 00 04 05 02 01 02"
    )


def test_the_longest_payload():
    payload = bytes.fromhex("03 fd 1f") + b"\x55" * 4093
    assert written([1 << 40], [payload], None) == bytes.fromhex("00 10 00 00 00 00 00 60 01 10 00") + payload


@given(
    st.lists(st.binary(max_size=40) | st.binary(min_size=250, max_size=600), min_size=1, max_size=20),
    st.binary(max_size=3),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_they_are_read_as_what_they_were_made_of(payloads, gap, random, named):
    pages = sorted(random.sample(range(1 << 20), len(payloads)))
    order = random.sample(range(len(payloads)), len(payloads))
    block = "pc.ram" if named else None
    stream = written(pages, payloads, block, gap=gap, order=order)
    assert stream == written(pages, payloads, block), "how they lie makes no difference"
    found, at = [], 0
    while at < len(stream):
        run = ram.read_run(stream[at:])
        assert not isinstance(run, int), "more is asked for than there is"
        assert run.flag is ram.Flag.XBZRLE
        assert run.block == (block if at == 0 else None)
        for page, start, end in zip(run.indices.tolist(), run.starts.tolist(), run.ends.tolist(), strict=True):
            found.append((page, bytes(run.data[start:end])))
        at += run.size
    assert found == list(zip(pages, payloads, strict=True))


@pytest.mark.parametrize("count", [1, 3000])
def test_many(count):
    stream = written(list(range(count)), [bytes([0, 1, page % 256]) for page in range(count)], None)
    assert len(stream) == 14 * count
    assert stream[-14:-4] == ((count - 1) << 12 | 0x60).to_bytes(8, "big") + b"\1\0"
