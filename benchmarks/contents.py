"""What is in the memory that is moved: made by the same rules for a QEMU and for whimbrel, page by page the same.

A piece is made once and repeated with a number added to its words, so that no two pages are alike and filling takes as
long as writing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.work import MIB, RunFailed

PIECE: Final = 16 * MIB
VOCABULARY: Final = 256  # words of 8 bytes that compressible pages are made of

Words = npt.NDArray[np.uint64]


def fill(memory: npt.NDArray[np.uint8], content: str) -> None:
    """Give `memory`, flat and zero so far, its content; see `work.Work.content`."""
    if content == "none":
        return
    if content == "touched":
        memory[:] = 0
        return
    for offset, piece in pieces(len(memory), content):
        memory[offset : offset + len(piece)] = piece


def pieces(size: int, content: str) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """`size` bytes of random pages, or of compressible ones, in pieces, each with its offset; valid until the next."""
    piece = _piece(content)
    room = np.empty_like(piece)
    for number, offset in enumerate(range(0, size, PIECE)):
        np.add(piece, np.uint64(number), out=room)
        yield offset, room.view(np.uint8)[: size - offset]


@cache
def _piece(content: str) -> Words:
    generator = np.random.default_rng(7)
    count = PIECE // 8
    if content == "random":
        return generator.integers(0, 1 << 64, count, np.uint64)
    if content == "words":
        vocabulary = generator.integers(0, 1 << 64, VOCABULARY, np.uint64)
        return vocabulary[generator.integers(0, VOCABULARY, count)]
    raise RunFailed(f"there is no content {content!r}")
