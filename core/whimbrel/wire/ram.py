"""The RAM section: its block list and its page records (wire format, section 2).

A record is one 64-bit word, `offset | flags`, the block's name unless CONTINUE is set, and the page. Records are
made and read in *runs*: many records of one kind in one block, as numpy arrays. A run is written as all its words
and pages in one staging buffer (here), and read as views of the bytes that are buffered (`ram_records`); no Python runs
per page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import ByteArray, IndexArray, Parser
from whimbrel.errors import StreamError
from whimbrel.wire.primitives import U64, parse_str8, parse_u64, str8
from whimbrel.wire.ram_records import RecordReader, Run, read_run
from whimbrel.wire.ram_words import (
    EOS_RECORD,
    FLAGS_MASK,
    FLUSH_RECORD,
    HOOK_RECORD,
    PAGE_SIZE,
    PAGE_STRIDE,
    WORD,
    ZERO_STRIDE,
    Flag,
)

__all__ = [
    "EOS_RECORD",
    "FLAGS_MASK",
    "FLUSH_RECORD",
    "HOOK_RECORD",
    "PAGE_SIZE",
    "PAGE_STRIDE",
    "VERSION_ID",
    "WORD",
    "ZERO_STRIDE",
    "Flag",
    "ListedBlock",
    "RecordReader",
    "RecordStage",
    "Run",
    "as_slice",
    "block_list",
    "consecutive",
    "parse_block_list",
    "read_run",
]

VERSION_ID: Final = 4


# ------------------------------------------------------------------------------------------------------ block list


@attrs.frozen
class ListedBlock:
    """A block as START lists it: `size` in bytes; `guest_address` only where x-ignore-shared is on."""

    name: str
    size: int
    guest_address: int | None = None


def block_list(blocks: Sequence[ListedBlock]) -> bytes:
    """The body of START up to its EOS (section 2.2). A reader must know whether the addresses are there."""
    total = sum(block.size for block in blocks)
    parts = [U64.pack(total | Flag.MEM_SIZE)]
    for block in blocks:
        parts += [str8(block.name), U64.pack(block.size)]
        if block.guest_address is not None:
            parts.append(U64.pack(block.guest_address))
    return b"".join(parts)


def parse_block_list(
    *, total_limit: int, blocks_limit: int, guest_addresses: bool = False
) -> Parser[tuple[ListedBlock, ...]]:
    """The block list of START, in order. The EOS behind it is not consumed.

    `guest_addresses` says whether each block has one (capability x-ignore-shared); the stream itself does not tell.
    Raises StreamError for names that repeat, sizes that are not whole pages or exceed what is left of the total, and
    for more than `total_limit` bytes or `blocks_limit` blocks.
    """
    word = yield from parse_u64()
    if word & FLAGS_MASK != Flag.MEM_SIZE:
        raise StreamError(f"the RAM section begins with flags {word & FLAGS_MASK:#x}, expected MEM_SIZE (0x4)")
    left = word & ~FLAGS_MASK
    if left > total_limit:
        raise StreamError(f"the source has {left} bytes of RAM, this machine has {total_limit}")
    blocks: dict[str, ListedBlock] = {}
    while left:
        if len(blocks) >= blocks_limit:
            raise StreamError(f"more than {blocks_limit} RAM blocks")
        name = yield from parse_str8("a RAM block")
        size = yield from parse_u64()
        if name in blocks:
            raise StreamError(f"RAM block {name!r} is listed twice")
        if not 0 < size <= left or size % PAGE_SIZE:
            raise StreamError(
                f"RAM block {name!r} is {size} bytes long, expected whole pages of {PAGE_SIZE}, at most {left} bytes"
            )
        address = (yield from parse_u64()) if guest_addresses else None
        blocks[name] = ListedBlock(name, size, address)
        left -= size
    return tuple(blocks.values())


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

    def pages(
        self, memory: ByteArray, indices: IndexArray, block: str | None, *, at: IndexArray | None = None
    ) -> tuple[bytes, memoryview]:
        """PAGE records for page `indices` (ascending) of `memory` (shape (size,)): a head and the rest.

        Page i is page `at[i]` of `memory` if that is given, and else page `indices[i]`. It is copied once, into the
        stage: what a guest writes meanwhile is either in it or marked dirty.
        """
        run = as_slice(indices) if at is None else consecutive(at)
        stage = self._pages[: len(indices)]
        stage[:, :WORD] = _words(indices, Flag.PAGE | Flag.CONTINUE)
        stage[:, WORD:] = memory.reshape(-1, PAGE_SIZE)[(indices if at is None else at) if run is None else run]
        return self._with_name(stage, int(indices[0]), Flag.PAGE, block)

    def gathered(
        self, memory: ByteArray, indices: IndexArray, block: str | None, *, at: IndexArray | None = None
    ) -> tuple[bytes, npt.NDArray[np.uint64]]:
        """PAGE records like `pages`, but by address (`GatheringChannel`): the pages are not copied here.

        What a guest writes meanwhile is either sent or marked dirty, as with a copy; a page may be sent half written,
        and is sent again then.
        """
        count = len(indices)
        self._heads[:count] = _words(indices, Flag.PAGE | Flag.CONTINUE)
        self._vectors[:count, 0, 0] = self._head_addresses[:count]
        self._vectors[:count, 0, 1] = WORD
        places = (indices if at is None else at).astype(np.uint64)
        self._vectors[:count, 1, 0] = places * np.uint64(PAGE_SIZE) + np.uint64(memory.ctypes.data)
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


def consecutive(indices: IndexArray) -> slice | None:
    """`indices` as a slice if each is the one before plus one; a peer may send them in any order."""
    run = as_slice(indices)
    if run is None or len(indices) == 1:
        return run
    return run if bool((indices[1:] - indices[:-1] == 1).all()) else None
