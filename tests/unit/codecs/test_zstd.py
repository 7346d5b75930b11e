"""The zstd codec of lanes: what its suite asks, frames that end, sizes and windows that lie."""

import numpy as np
import pytest
import zstandard

from whimbrel.errors import StreamError
from whimbrel.testing.codecs import LaneCodecConformance, batches, check_batch
from whimbrel_codecs.zstd import WINDOW, ZstdLaneCodec, whimbrel_codecs

PAGE = 4096
TEXT = np.frombuffer((b"All work and no play. " * 200)[:PAGE], np.uint8).reshape(1, PAGE)


class TestLane(LaneCodecConformance):
    def make(self):
        return ZstdLaneCodec()


class TestSmallLane(LaneCodecConformance):
    def make(self):
        return ZstdLaneCodec(3)


@pytest.mark.parametrize("level", [0, 1, 19, 20, 21, 255])
def test_levels(level):
    encoder, decoder = ZstdLaneCodec(level), ZstdLaneCodec()
    for _ in range(3):
        check_batch(encoder, decoder, TEXT)


def test_it_takes_its_level_from_the_parameters():
    (spec,) = whimbrel_codecs()
    text = " ".join(str(number * number) for number in range(30_000)).encode()
    pages = np.frombuffer(text[: len(text) // PAGE * PAGE], np.uint8).reshape(-1, PAGE)

    def size(level):
        return len(spec.create_for_lane({"multifd-zstd-level": level}).encode(pages))

    assert size(19) < size(1)
    assert len(spec.create_for_lane({}).encode(pages)) == size(1)


def test_a_lane_is_one_frame_that_goes_on():
    codec = ZstdLaneCodec()
    parts = [codec.encode(pages) for pages in batches()]
    assert parts[0].startswith(b"\x28\xb5\x2f\xfd")
    assert not any(part.startswith(b"\x28\xb5\x2f\xfd") for part in parts[1:])
    somebody_elses = zstandard.ZstdDecompressor().decompressobj()
    for part, pages in zip(parts, batches(), strict=True):
        assert somebody_elses.decompress(part) == pages.tobytes()


@pytest.mark.parametrize("sized", [False, True])
def test_a_frame_for_each_packet(sized):
    decoder = ZstdLaneCodec()
    for pages in batches():
        data = zstandard.ZstdCompressor(write_content_size=sized).compress(pages.tobytes())
        into = np.empty_like(pages)
        decoder.decode(data, into)
        assert (into == pages).all()


def test_several_frames_in_a_packet():
    data = zstandard.compress(TEXT.tobytes()) * 2
    into = np.empty((2, PAGE), np.uint8)
    ZstdLaneCodec().decode(data, into)
    assert (into == TEXT).all()


def test_a_frame_that_declares_its_size_gets_no_more_room():
    bomb = zstandard.compress(bytes(1 << 30))
    assert len(bomb) < 1 << 20
    with pytest.raises(StreamError, match="more than the 4096 bytes"):
        ZstdLaneCodec().decode(bomb, np.empty((1, PAGE), np.uint8))


def test_a_window_that_is_too_large():
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = stream.compress(TEXT.tobytes()) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    assert WINDOW < 1 << 27
    with pytest.raises(StreamError, match="Frame requires too much memory"):
        ZstdLaneCodec().decode(data, np.empty((1, PAGE), np.uint8))


def test_frames_of_another_kind():
    dictionary = zstandard.ZstdCompressionDict(b"All work and no play. " * 50)
    preset = zstandard.ZstdCompressor(dict_data=dictionary).compress(TEXT.tobytes())
    for data in (preset, b"\x50\x2a\x4d\x18" + (PAGE).to_bytes(4, "little") + bytes(PAGE), b"no frame at all"):
        with pytest.raises(StreamError):
            ZstdLaneCodec().decode(data, np.empty((1, PAGE), np.uint8))
