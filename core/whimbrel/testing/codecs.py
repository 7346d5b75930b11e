"""The conformance suite for codecs that lanes use (`multifd-compression`).

::

    class TestMine(LaneCodecConformance):
        def make(self):
            return MyCodec()

One codec encodes what another of its kind decodes, batch after batch, as the two ends of a lane do. What is decoded is
whatever a peer sends: the suite sends cut batches, tails, batches of another size, and thousands of damaged ones. The
decoder may give the pages or raise StreamError; it never writes beside them, never makes more of them, and never asks
for much more memory than they need.
"""

from __future__ import annotations

import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from whimbrel.errors import StreamError
from whimbrel.wire.multifd import PAGES_MAX, PAYLOAD_MAX
from whimbrel.wire.ram import PAGE_SIZE

if TYPE_CHECKING:
    from whimbrel.abc import ByteArray, Codec

__all__ = ["LaneCodecConformance", "batches", "check_batch", "decode_guarded"]

_GUARD: Final = 0xA5
_MUTATIONS: Final = 100


def batches(seed: int = 0, *, most: int = PAGES_MAX) -> Iterator[ByteArray]:
    """Batches of pages, each of shape (n, page size): of one page and of up to `most`, easy and hard."""
    dice = np.random.default_rng(seed)
    words = np.frombuffer((b"All work and no play makes Jack a dull boy. " * 100)[:PAGE_SIZE], np.uint8)
    for count in sorted({1, 2, 17, most}):
        yield np.zeros((count, PAGE_SIZE), np.uint8)
        yield dice.integers(0, 256, (count, PAGE_SIZE), np.uint8)
        yield np.tile(words, (count, 1))
        yield dice.integers(0, 3, (count, PAGE_SIZE), np.uint8)
        yield np.arange(count * PAGE_SIZE, dtype=np.uint32).astype(np.uint8).reshape(count, PAGE_SIZE)


def decode_guarded(codec: Codec, data: bytes, count: int) -> ByteArray:
    """What `codec` makes of `data` as `count` pages. Raises what it raises, and AssertionError if it writes beside."""
    room = np.full((count + 2, PAGE_SIZE), _GUARD, np.uint8)
    try:
        codec.decode(memoryview(data), room[1:-1])
    finally:
        assert (room[0] == _GUARD).all(), "it has written before the pages"
        assert (room[-1] == _GUARD).all(), "it has written behind the pages"
    return room[1:-1]


def check_batch(encoder: Codec, decoder: Codec, pages: ByteArray) -> bytes:
    """Take `pages` through both; returns the payload, which a packet has room for."""
    before = pages.copy()
    data = encoder.encode(pages)
    assert isinstance(data, bytes), f"encode returned a {type(data).__name__}, expected bytes"
    assert (pages == before).all(), "encode has changed the pages"
    assert len(data) <= PAYLOAD_MAX, f"{len(data)} bytes of {len(pages)} pages, and a packet has {PAYLOAD_MAX}"
    _same(decode_guarded(decoder, data, len(pages)), pages)
    return data


def _same(came: ByteArray, expected: ByteArray) -> None:
    (wrong,) = np.nonzero(came.reshape(-1) != expected.reshape(-1))
    assert not len(wrong), f"{len(wrong)} bytes are wrong, the first at {wrong[0]:#x}"


class LaneCodecConformance(ABC):
    """Inherit it, say how to make yours, and run pytest.

    `most_memory` is how many bytes a decoder may take of Python's memory for one batch, whatever comes.
    """

    most_memory: ClassVar[int] = 16 << 20

    @abstractmethod
    def make(self) -> Codec:
        """Make one end of a lane; called for each anew."""

    def test_batches_come_back_in_their_order(self) -> None:
        """Each batch may lean on all that came before it on this lane."""
        encoder, decoder = self.make(), self.make()
        for seed in range(2):
            for pages in batches(seed):
                check_batch(encoder, decoder, pages)

    def test_a_lane_knows_nothing_of_another(self) -> None:
        """Two lanes run side by side, each with its own two ends."""
        first, second = (self.make(), self.make()), (self.make(), self.make())
        for one, other in zip(batches(1), batches(2), strict=True):
            check_batch(*first, one)
            check_batch(*second, other)

    def test_any_buffer_will_do(self) -> None:
        """What arrives stands in a buffer that is used again for the next batch."""
        encoder, decoder = self.make(), self.make()
        buffer = bytearray(PAYLOAD_MAX)
        for pages in batches():
            data = encoder.encode(pages)
            buffer[: len(data)] = data
            into = np.empty_like(pages)
            decoder.decode(memoryview(buffer)[: len(data)], into)
            buffer[:] = bytes(len(buffer))
            _same(into, pages)

    def test_of_another_size(self) -> None:
        """A page more or less than was sent is refused, and nothing is made of what is too much."""
        for pages in batches(most=17):
            for count in {len(pages) - 1, len(pages) + 1} - {0}:
                self._refused(self.make().encode(pages), count)

    def test_cut(self) -> None:
        """A batch that lacks its end is refused, wherever it was cut."""
        for pages in batches(most=17):
            data = self.make().encode(pages)
            for cut in {0, 1, len(data) // 2}:
                self._refused(data[:cut], len(pages))

    def test_two_batches_as_one(self) -> None:
        """What follows the pages is refused, though it decodes."""
        for pages in batches(most=17):
            encoder = self.make()
            self._refused(encoder.encode(pages) + encoder.encode(pages), len(pages))

    def test_damaged(self) -> None:
        """Whatever bits are turned: pages or StreamError, no other error, and no byte beside the pages."""
        dice = np.random.default_rng(3)
        for pages in batches(most=17):
            data = np.frombuffer(self.make().encode(pages), np.uint8)
            for _ in range(_MUTATIONS // len(pages) + 1):
                damaged = data.copy()
                at = dice.integers(0, len(data), dice.integers(1, 9))
                damaged[at] ^= dice.integers(1, 256, len(at), np.uint8)
                self._try(damaged.tobytes(), len(pages))

    def test_noise(self) -> None:
        """Bytes that no codec has made."""
        dice = np.random.default_rng(4)
        for size in (0, 1, 7, 100, 5000):
            for _ in range(20):
                self._try(dice.bytes(size), 2)

    def test_memory_is_bounded(self) -> None:
        """However a batch is made, decoding it takes no more than `most_memory`."""
        encoder = self.make()
        huge = b"".join(encoder.encode(np.zeros((PAGES_MAX, PAGE_SIZE), np.uint8)) for _ in range(200))
        decoder = self.make()
        tracemalloc.start()
        try:
            into = np.empty((1, PAGE_SIZE), np.uint8)
            try:
                decoder.decode(huge[:PAYLOAD_MAX], into)
            except StreamError:
                pass
            else:
                raise AssertionError("200 batches were taken for one page")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= self.most_memory, f"{peak} bytes were taken to refuse a batch of one page"

    def _refused(self, data: bytes, count: int) -> None:
        try:
            decode_guarded(self.make(), data, count)
        except StreamError:
            return
        raise AssertionError(f"{len(data)} bytes were taken for {count} pages, which they are not")

    def _try(self, data: bytes, count: int) -> None:
        try:
            decode_guarded(self.make(), data, count)
        except StreamError:
            return
