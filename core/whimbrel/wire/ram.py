"""The RAM section: its block list and its page records (wire format, section 2).

A record is one 64-bit word, `offset | flags`, the block's name unless CONTINUE is set, and the page. Records are
made and read in *runs*: many records of one kind in one block, as one numpy array. A run is written as all its words
and pages in one staging buffer, and read as strided views of the bytes that are buffered; no Python runs per page.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import ByteArray, IndexArray, Parser
from whimbrel.errors import StreamError
from whimbrel.wire.primitives import U64, checked_name, parse_str8, parse_u64, str8

VERSION_ID: Final = 4
PAGE_SIZE: Final = 4096
WORD: Final = 8
FLAGS_MASK: Final = PAGE_SIZE - 1


class Flag(IntFlag):
    """The low bits of a record's word (section 2.1)."""

    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


EOS_RECORD: Final = U64.pack(Flag.EOS)

PAGE_STRIDE: Final = WORD + PAGE_SIZE
ZERO_STRIDE: Final = WORD + 1
_STRIDES: Final = {Flag.PAGE: PAGE_STRIDE, Flag.ZERO: ZERO_STRIDE}

# A run is first looked for in this many records and then in eight times as many: a stream of single records must
# not cost a look at everything that is buffered for each of them.
_FIRST_LOOK: Final = 256


# ------------------------------------------------------------------------------------------------------ block list


def block_list(blocks: Sequence[tuple[str, int]]) -> bytes:
    """The body of START up to its EOS: every block's name and length in bytes (section 2.2)."""
    total = sum(length for _, length in blocks)
    parts = [U64.pack(total | Flag.MEM_SIZE)]
    parts += [str8(name) + U64.pack(length) for name, length in blocks]
    return b"".join(parts)


def parse_block_list(*, total_limit: int, blocks_limit: int) -> Parser[dict[str, int]]:
    """The block list of START: name to length in bytes, in order. The EOS behind it is not consumed.

    Raises StreamError for names that repeat, lengths that are not whole pages or exceed what is left of the total,
    and for more than `total_limit` bytes or `blocks_limit` blocks.
    """
    word = yield from parse_u64()
    if word & FLAGS_MASK != Flag.MEM_SIZE:
        raise StreamError(f"the RAM section begins with flags {word & FLAGS_MASK:#x}, expected MEM_SIZE (0x4)")
    left = word & ~FLAGS_MASK
    if left > total_limit:
        raise StreamError(f"the source has {left} bytes of RAM, this machine has {total_limit}")
    blocks: dict[str, int] = {}
    while left:
        if len(blocks) >= blocks_limit:
            raise StreamError(f"more than {blocks_limit} RAM blocks")
        name = yield from parse_str8("a RAM block")
        length = yield from parse_u64()
        if name in blocks:
            raise StreamError(f"RAM block {name!r} is listed twice")
        if not 0 < length <= left or length % PAGE_SIZE:
            raise StreamError(
                f"RAM block {name!r} is {length} bytes long, expected whole pages of {PAGE_SIZE}, at most {left} bytes"
            )
        blocks[name] = length
        left -= length
    return blocks


# -------------------------------------------------------------------------------------------------- writing records


def _words(pages: IndexArray, flags: int) -> ByteArray:
    """The words of records for `pages` (numbers), big-endian, shape (n, 8)."""
    words = (pages.astype(np.uint64) << np.uint64(12)) | np.uint64(flags)
    return words.astype(">u8").view(np.uint8).reshape(-1, WORD)


class RecordStage:
    """Staging buffers for runs of up to `pages` or `zeros` records; one thread, reused from run to run.

    All methods return what to write, valid until the next call: a head, and the rest as bytes or by address.
    `block` names the block in the first record; None continues the block of the record before.
    """

    def __init__(self, *, pages: int, zeros: int) -> None:
        self._pages = np.empty((pages, PAGE_STRIDE), np.uint8)
        self._zeros = np.zeros((zeros, ZERO_STRIDE), np.uint8)
        self._heads = np.empty((pages, WORD), np.uint8)
        self._head_addresses = self._heads.ctypes.data + np.arange(pages, dtype=np.uint64) * np.uint64(WORD)
        self._vectors = np.empty((pages, 2, 2), np.uint64)  # (address, length) of a word, then of its page

    def pages(self, memory: ByteArray, indices: IndexArray, block: str | None) -> tuple[bytes, memoryview]:
        """PAGE records of `memory` (shape (size,)) at page `indices` (ascending): a head and the rest.

        The pages are copied once, into the stage: what a guest writes meanwhile is either in it or marked dirty.
        """
        run = as_slice(indices)
        stage = self._pages[: len(indices)]
        stage[:, :WORD] = _words(indices, Flag.PAGE | Flag.CONTINUE)
        stage[:, WORD:] = memory.reshape(-1, PAGE_SIZE)[indices if run is None else run]
        return self._with_name(stage, int(indices[0]), Flag.PAGE, block)

    def gathered(
        self, memory: ByteArray, indices: IndexArray, block: str | None
    ) -> tuple[bytes, npt.NDArray[np.uint64]]:
        """PAGE records like `pages`, but by address (`GatheringChannel`): the pages are not copied here.

        What a guest writes meanwhile is either sent or marked dirty, as with a copy; a page may be sent half written,
        and is sent again then.
        """
        count = len(indices)
        self._heads[:count] = _words(indices, Flag.PAGE | Flag.CONTINUE)
        self._vectors[:count, 0, 0] = self._head_addresses[:count]
        self._vectors[:count, 0, 1] = WORD
        self._vectors[:count, 1, 0] = indices.astype(np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(memory.ctypes.data)
        self._vectors[:count, 1, 1] = PAGE_SIZE
        vectors = self._vectors[:count].reshape(-1, 2)
        if block is None:
            return b"", vectors
        return U64.pack(int(indices[0]) * PAGE_SIZE | Flag.PAGE) + str8(block), vectors[1:]

    def zeros(self, indices: IndexArray, block: str | None) -> tuple[bytes, memoryview]:
        """ZERO records for page `indices`: a head and the rest."""
        stage = self._zeros[: len(indices)]
        stage[:, :WORD] = _words(indices, Flag.ZERO | Flag.CONTINUE)
        return self._with_name(stage, int(indices[0]), Flag.ZERO, block)

    @staticmethod
    def _with_name(stage: ByteArray, first: int, flag: Flag, block: str | None) -> tuple[bytes, memoryview]:
        data = stage.reshape(-1).data
        if block is None:
            return b"", data
        # The first record's word makes way for one without CONTINUE, followed by the name; the rest stays in place.
        return U64.pack(first * PAGE_SIZE | flag) + str8(block), data[WORD:]


def as_slice(indices: IndexArray) -> slice | None:
    """`indices` (ascending) as a slice if they are consecutive: slices are copied three times as fast."""
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first == len(indices) - 1 else None


# -------------------------------------------------------------------------------------------------- reading records


@attrs.frozen(eq=False)
class Run:
    """Records of one kind in one block, read from a window.

    `flag` is PAGE, ZERO or EOS; `indices` are page numbers (n,), not yet checked against any block; `payload` is
    (n, 4096) for PAGE and (n,) fill bytes for ZERO, a view of the window; `block` is the name that the run begins
    with, or None where it continues; `size` is how many bytes of the window it takes.
    """

    flag: Flag
    size: int
    block: str | None = None
    indices: IndexArray = attrs.field(factory=lambda: np.empty(0, np.intp))
    payload: ByteArray = attrs.field(factory=lambda: np.empty(0, np.uint8))


def read_run(window: memoryview) -> Run | int:
    """The longest run at the head of `window`, or how many bytes the window must have at least to hold one.

    Raises StreamError for flags that have no meaning, or none here.
    """
    if len(window) < WORD:
        return WORD
    word = int(U64.unpack_from(window)[0])
    flags = word & FLAGS_MASK
    if word == Flag.EOS:
        return Run(Flag.EOS, WORD)
    flag = _record_flag(word)
    if not flags & Flag.CONTINUE:
        return _read_named(window, word, flag)
    stride = _STRIDES[flag]
    available = len(window) // stride
    if available == 0:
        return stride
    count, words = _equal_flags(window, stride, available, flags)
    rows = np.frombuffer(window, np.uint8, count * stride).reshape(count, stride)
    payload = rows[:, WORD:] if flag is Flag.PAGE else rows[:, WORD]
    return Run(flag, count * stride, None, _indices(words[:count]), payload)


def _record_flag(word: int) -> Flag:
    flags = word & FLAGS_MASK
    kind = flags & ~int(Flag.CONTINUE)  # as numbers: the complement of a Flag has none of the bits without a name
    if kind in (Flag.PAGE, Flag.ZERO):
        return Flag(kind)
    if kind in (Flag.XBZRLE, Flag.COMPRESS_PAGE, Flag.HOOK, Flag.MULTIFD_FLUSH):
        raise StreamError(
            f"a {Flag(kind).name} record came (word {word:#x}), and this machine has not switched that on",
            hint="switch the capability off at the source",
        )
    raise StreamError(f"a RAM record has flags {flags:#x} (word {word:#x}), which mean nothing")


def _read_named(window: memoryview, word: int, flag: Flag) -> Run | int:
    if len(window) < WORD + 1:
        return WORD + 1
    length = window[WORD]
    if length == 0:
        raise StreamError("the name of a RAM block is empty, expected 1 to 255 characters")
    head = WORD + 1 + length
    size = head + _STRIDES[flag] - WORD
    if len(window) < size:
        return size
    name = checked_name(bytes(window[WORD + 1 : head]), "a RAM block")
    payload = np.frombuffer(window, np.uint8, size - head, head)
    return Run(
        flag,
        size,
        name,
        _indices(np.array([word], np.uint64)),
        payload.reshape(1, -1) if flag is Flag.PAGE else payload,
    )


def _equal_flags(window: memoryview, stride: int, available: int, flags: int) -> tuple[int, npt.NDArray[np.uint64]]:
    """How many records from the head on have the same flags, and their words (at least that many)."""
    look = min(_FIRST_LOOK, available)
    while True:
        words = np.ndarray((look,), ">u8", buffer=window, strides=(stride,)).astype(np.uint64)
        other = np.flatnonzero((words & np.uint64(FLAGS_MASK)) != flags)
        if len(other):
            return int(other[0]), words
        if look == available:
            return available, words
        look = min(look * 8, available)


def _indices(words: npt.NDArray[np.uint64]) -> IndexArray:
    # 52 bits at most are left, so the page numbers are exact as signed integers.
    return (words >> np.uint64(12)).astype(np.intp)
