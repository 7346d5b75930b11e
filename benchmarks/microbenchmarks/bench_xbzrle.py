"""XBZRLE, encoded and decoded, by how many of a page's 512 words have changed.

A batch is as large as one of the RAM saver's. All in memory; nothing is sent.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from whimbrel.abc import ByteArray, Outcome
from whimbrel_codecs.xbzrle import XbzrleCodec

PAGES: Final = 512
WORDS: Final = 512
BYTES: Final = PAGES * 4096
Case: TypeAlias = tuple[int, ByteArray, ByteArray]

CHANGED: Final = (1, 8, 64, 256)


@pytest.fixture(params=CHANGED)
def changed(request: pytest.FixtureRequest) -> Case:
    """Pages before and after so many words of each were changed, at random places."""
    generator = np.random.default_rng(3)
    old = generator.integers(0, 1 << 64, (PAGES, WORDS), np.uint64)
    new = old.copy()
    for page in new:
        page[generator.choice(WORDS, request.param, replace=False)] ^= np.uint64(0xFFFF_FFFF_FFFF_FFFF)
    return request.param, old.view(np.uint8), new.view(np.uint8)


def test_encode(benchmark: BenchmarkFixture, changed: Case) -> None:
    words, old, new = changed
    benchmark.extra_info.update(what="encode", words=words, bytes=BYTES)
    encoded = benchmark(XbzrleCodec().encode, old, new)
    assert (encoded.outcomes == Outcome.ENCODED).all() or words == CHANGED[-1]


def test_decode(benchmark: BenchmarkFixture, changed: Case) -> None:
    words, old, new = changed
    codec = XbzrleCodec()
    encoded = codec.encode(old, new)
    which = np.flatnonzero(encoded.outcomes == Outcome.ENCODED)
    memory = old.reshape(-1).copy()
    offsets = which * 4096
    benchmark.extra_info.update(what="decode", words=words, bytes=len(which) * 4096)
    benchmark(codec.decode, encoded.data, encoded.starts[which], encoded.ends[which], memory, offsets)
    assert (memory.reshape(PAGES, 4096)[which] == new[which]).all()
