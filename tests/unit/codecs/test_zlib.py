"""The zlib codec: pages come back, and nothing but one whole stream of exactly as many bytes is taken."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import StreamError
from whimbrel.testing.codecs import LaneCodecConformance
from whimbrel_codecs.zlib import ZlibCodec, ZlibLaneCodec, whimbrel_codecs

PAGE = 4096
RNG = np.random.default_rng(5)
PAGES = {
    "zero": np.zeros(PAGE, np.uint8),
    "pattern": np.arange(PAGE, dtype=np.uint8),
    "random": RNG.integers(0, 256, PAGE, np.uint8),
    "text": np.frombuffer((b"All work and no play. " * 200)[:PAGE], np.uint8),
}


def decode(data, size=PAGE):
    into = np.full(size, 0xEE, np.uint8)
    ZlibCodec().decode(data, into)
    return into


def refused(data, words, size=PAGE):
    into = np.full(size, 0xEE, np.uint8)
    with pytest.raises(StreamError, match=words):
        ZlibCodec().decode(data, into)
    assert (into == 0xEE).all(), "something was written before it was refused"


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_page_comes_back(name, level):
    page = PAGES[name]
    data = ZlibCodec(level).encode(page)
    assert (decode(data) == page).all()
    assert zlib.decompress(data) == page.tobytes(), "somebody else reads it too"
    assert len(data) <= 4110 or level == 0


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_somebody_elses(name):
    for level in range(-1, 10):
        for wbits in (9, 12, 15):
            stream = zlib.compressobj(level, wbits=wbits)
            data = stream.compress(PAGES[name].tobytes()) + stream.flush()
            assert (decode(data) == PAGES[name]).all()


def test_several_pages_at_once():
    pages = RNG.integers(0, 4, (5, PAGE), np.uint8)
    codec = ZlibCodec()
    into = np.zeros((5, PAGE), np.uint8)
    codec.decode(codec.encode(pages), into)
    assert (into == pages).all()


def test_it_has_no_state():
    codec = ZlibCodec()
    first = codec.encode(PAGES["text"])
    for page in PAGES.values():
        codec.encode(page)
    assert codec.encode(PAGES["text"]) == first
    with pytest.raises(StreamError):
        codec.decode(b"no stream", np.zeros(PAGE, np.uint8))
    into = np.zeros(PAGE, np.uint8)
    codec.decode(first, into)
    assert (into == PAGES["text"]).all()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_any_buffer_will_do(kind):
    assert (decode(kind(zlib.compress(PAGES["text"].tobytes()))) == PAGES["text"]).all()


def test_a_view_into_memory_is_written_and_nothing_beside_it():
    memory = np.full(3 * PAGE, 0xEE, np.uint8)
    ZlibCodec().decode(zlib.compress(PAGES["random"].tobytes()), memory.reshape(3, PAGE)[1])
    assert (memory[PAGE : 2 * PAGE] == PAGES["random"]).all()
    assert (memory[:PAGE] == 0xEE).all()
    assert (memory[2 * PAGE :] == 0xEE).all()


@pytest.mark.parametrize("size", [0, 1, PAGE - 1])
def test_too_short(size):
    refused(zlib.compress(bytes(size)), f"inflates to {size} bytes, expected 4096")


@pytest.mark.parametrize("size", [PAGE + 1, 2 * PAGE, 64 << 20])
def test_too_long(size):
    refused(zlib.compress(bytes(size)), "inflates to more than the 4096 bytes")


def test_what_follows_the_stream():
    data = zlib.compress(PAGES["text"].tobytes())
    for more in (b"\0", b"x" * 100, data):
        refused(data + more, f"{len(more)} bytes follow")


@pytest.mark.parametrize("name", PAGES)
def test_cut_anywhere(name):
    data = zlib.compress(PAGES[name].tobytes())
    for cut in {*range(12), *range(len(data) - 6, len(data)), *range(0, len(data), 61)}:
        refused(data[:cut], "ends in the middle")


def test_no_stream_at_all():
    refused(b"\xff" * 50, "no zlib stream")
    refused(PAGES["text"].tobytes(), "no zlib stream")


def test_a_wrong_checksum():
    data = bytearray(zlib.compress(PAGES["text"].tobytes()))
    data[-1] ^= 1
    refused(bytes(data), "no zlib stream")


def test_other_containers_and_dictionaries():
    page = PAGES["text"].tobytes()
    raw, gzip = zlib.compressobj(wbits=-15), zlib.compressobj(wbits=31)
    preset = zlib.compressobj(zdict=b"All work and no play. ")
    for stream in (raw, gzip, preset):
        refused(stream.compress(page) + stream.flush(), "no zlib stream")


def test_an_unfinished_stream_that_has_all_the_bytes():
    stream = zlib.compressobj()
    data = stream.compress(PAGES["text"].tobytes()) + stream.flush(zlib.Z_SYNC_FLUSH)
    assert zlib.decompressobj().decompress(data) == PAGES["text"].tobytes()
    refused(data, "ends in the middle, after 4096 of 4096")


@given(st.integers(0, 10_000), st.integers(0, 7), st.sampled_from(sorted(PAGES)))
def test_damaged_streams_are_refused_or_give_the_page(at, bit, name):
    data = bytearray(zlib.compress(PAGES[name].tobytes()))
    data[at % len(data)] ^= 1 << bit
    into = np.full(PAGE, 0xEE, np.uint8)
    try:
        ZlibCodec().decode(data, into)
    except StreamError:
        assert (into == 0xEE).all()
    else:
        assert (into == PAGES[name]).all(), "the checksum lets nothing else through"


# ------------------------------------------------------------------------------------------------------------- lanes


class TestLane(LaneCodecConformance):
    def make(self):
        return ZlibLaneCodec()


def test_a_lane_is_one_stream_with_a_flush_behind_each_packet():
    codec = ZlibLaneCodec()
    parts = [codec.encode(page.reshape(1, PAGE)) for page in PAGES.values()]
    assert all(part.endswith(b"\0\0\xff\xff") for part in parts)
    somebody_elses = zlib.decompressobj()
    for part, page in zip(parts, PAGES.values(), strict=True):
        assert somebody_elses.decompress(part) == page.tobytes()
    assert not somebody_elses.eof


def test_a_lane_whose_stream_ends():
    for data in (zlib.compress(PAGES["text"].tobytes()), zlib.compress(PAGES["text"].tobytes()) + b"more"):
        with pytest.raises(StreamError, match="the zlib stream of a lane ends"):
            ZlibLaneCodec().decode(data, np.zeros(PAGE, np.uint8))


def test_a_lane_takes_its_level_from_the_parameters():
    (spec,) = whimbrel_codecs()
    words = RNG.integers(0, 256, (30, 32), np.uint8)
    pages = words[RNG.integers(0, 30, 4 * PAGE // 32)].reshape(4, PAGE)

    def size(level):
        return len(spec.create_for_lane({"multifd-zlib-level": level}).encode(pages))

    assert size(9) < size(1) < size(0)
    assert size(10) == size(9), "a QEMU takes it as a setting"
    assert len(spec.create_for_lane({}).encode(pages)) == size(1)
