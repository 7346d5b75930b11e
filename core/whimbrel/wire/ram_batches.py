"""RAM records of all kinds, mixed as they come, as batches: for who counts them (wire format, sections 2 and 3.1).

A run (`ram_records`) is of one kind, and a stream whose kinds change from record to record has a run for each of them.
Here their beginnings are followed one by one, which costs less than a run does; everything else is done on arrays.
Long runs are still found with comparisons of whole arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Final, Self

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import ByteArray, IndexArray, StreamReader
from whimbrel.errors import MigrationError, Place, StreamError
from whimbrel.wire.ram_records import RecordReader, Run, read_run
from whimbrel.wire.ram_words import (
    COMPRESSED_MAX,
    FLAGS_MASK,
    PAGE_SIZE,
    PAGE_STRIDE,
    WORD,
    XBZRLE_ENCODING,
    XBZRLE_MAX,
    ZERO_STRIDE,
    Flag,
)

_LONG: Final = 32  # records of one kind and size, from which on they are better looked for as a run

_HEAD: Final = struct.Struct(">QI")  # a word, and what tells the length of an encoded page
_XBZRLE_HEAD: Final = WORD + 3
_COMPRESS_HEAD: Final = WORD + 4
_MARK: Final = int(Flag.CONTINUE)

# As plain numbers: operations on flags themselves take microseconds.
_CONTINUED: Final = tuple(int(flag) | _MARK for flag in (Flag.PAGE, Flag.ZERO, Flag.XBZRLE, Flag.COMPRESS_PAGE))

# Bytes before a record's payload, by its flags.
_HEADS: Final[npt.NDArray[np.intp]] = np.zeros(FLAGS_MASK + 1, np.intp)
_HEADS[[Flag.PAGE, Flag.ZERO]] = WORD
_HEADS[Flag.XBZRLE] = _XBZRLE_HEAD
_HEADS[Flag.COMPRESS_PAGE] = _COMPRESS_HEAD


@attrs.frozen(eq=False)
class Batch:
    """Records of one block, read from a window, in their order; n may be 0.

    `flags` (n,) are PAGE, ZERO, XBZRLE or COMPRESS_PAGE, `indices` (n,) page numbers. Record i ends at `ends[i]` of
    `data`, which is flat and a view of the window, and its payload (a page, a fill byte, an encoded page) begins at
    `starts[i]`; the first record begins at 0. `block` is the name that the first record has, or None.
    """

    flags: npt.NDArray[np.uint16]
    indices: IndexArray
    starts: IndexArray
    ends: IndexArray
    data: ByteArray = attrs.field(repr=False)
    block: str | None = None

    def __len__(self) -> int:
        return len(self.flags)

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @classmethod
    def of(cls, run: Run, window: memoryview) -> Self:
        """The records of a run that was read from `window`."""
        count = len(run.indices)
        starts, ends = run.starts, run.ends
        if run.flag in (Flag.PAGE, Flag.ZERO):
            stride, payload = (PAGE_STRIDE, PAGE_SIZE) if run.flag is Flag.PAGE else (ZERO_STRIDE, 1)
            ends = run.size - np.arange(count - 1, -1, -1, dtype=np.intp) * stride
            starts = ends - payload
        data = np.frombuffer(window, np.uint8, run.size)
        return cls(np.full(count, int(run.flag), np.uint16), run.indices, starts, ends, data, run.block)

    def first(self, count: int) -> Batch:
        """Its first `count` records."""
        cut = slice(count)
        return Batch(self.flags[cut], self.indices[cut], self.starts[cut], self.ends[cut], self.data, self.block)


def read_mixed(window: memoryview) -> Batch:
    """The records without a name at the head of `window`, whatever kinds they are of.

    Ends before what only `read_run` understands: a name, the end of the body, a record that is not whole or not right;
    and within a long run, which it is better at. Raises nothing.
    """
    unpack, size = _HEAD.unpack_from, len(window)
    page, zero, xbzrle, compressed = _CONTINUED
    edges = [0]
    at = before = alike = 0
    while at <= size - _COMPRESS_HEAD:
        word, more = unpack(window, at)
        flags = word & FLAGS_MASK
        if flags == page:
            at += PAGE_STRIDE
        elif flags == zero:
            at += ZERO_STRIDE
        elif flags == xbzrle:
            length = more >> 8 & 0xFFFF
            if more >> 24 != XBZRLE_ENCODING or length > XBZRLE_MAX:
                break
            at += _XBZRLE_HEAD + length
        elif flags == compressed:
            if not 1 <= more <= COMPRESSED_MAX:
                break
            at += _COMPRESS_HEAD + more
        else:
            break
        if at > size:
            break
        edges.append(at)
        if flags != before:
            before, alike = flags, 0
        alike += 1
        if alike == _LONG and flags in (page, zero):
            break
    return _batch(window, np.array(edges, np.intp))


def _batch(window: memoryview, edges: IndexArray) -> Batch:
    begins, ends = edges[:-1], edges[1:]
    size = int(edges[-1])
    if not size:
        nothing = np.empty(0, np.intp)
        return Batch(np.empty(0, np.uint16), nothing, nothing, nothing, np.empty(0, np.uint8))
    words = np.ndarray((size - WORD + 1,), ">u8", buffer=window, strides=(1,))[begins].astype(np.uint64)
    flags = (words & np.uint64(FLAGS_MASK ^ _MARK)).astype(np.uint16)
    indices = (words >> np.uint64(12)).astype(np.intp)
    return Batch(flags, indices, begins + _HEADS[flags], ends, np.frombuffer(window, np.uint8, size))


class BatchReader:
    """Reads the RAM bodies of one stream, in their order, as `RecordReader` does. One thread."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._records = RecordReader(sizes)
        self._pages = {name: size // PAGE_SIZE for name, size in sizes.items()}
        self.need = WORD
        """How many bytes the record at the reader's head has at least."""

    def body(self, reader: StreamReader, limit: int) -> Iterator[tuple[str, Batch]]:
        """Read one body of at most `limit` records, behind its block list if it has one, up to and including EOS.

        Yields each batch and the name of its block; arrays and errors are as in `RecordReader.body`, and all records
        before one that is wrong are yielded before the error.
        """
        self.need, left, mixed = WORD, limit, False
        while True:
            try:
                window = reader.window(0 if mixed else self.need)
                batch = read_mixed(window) if mixed else self._one_run(window)
                if batch is None:
                    continue
                if not len(batch):
                    if not mixed:
                        break
                    mixed = False
                    continue
                if left == 0:
                    raise StreamError(f"the body has more page records than the {limit} that may come in it")
                good = self._good(batch, left)
                batch = batch if good == len(batch) else batch.first(good)
                name = self._records.follow(batch.block, batch.indices)
            except MigrationError as exc:
                raise exc.at(Place(block=self._records.block)) from exc.__cause__
            left -= len(batch)
            yield name, batch
            reader.advance(batch.size)
            mixed, self.need = not mixed and len(batch) < _LONG, WORD
        reader.advance(WORD)

    def _one_run(self, window: memoryview) -> Batch | None:
        """The run at the head of `window`; None if it takes more bytes."""
        run = read_run(window)
        if isinstance(run, int):
            self.need = run
            return None
        return Batch.of(run, window)

    def _good(self, batch: Batch, most: int) -> int:
        """How many records come before one that is out of bounds or one too many, and at least one."""
        name = self._records.block if batch.block is None else batch.block
        pages = self._pages.get(name) if name is not None else None
        count = min(len(batch), most)
        if pages is not None:
            (outside,) = (batch.indices[:count] >= pages).nonzero()
            count = int(outside[0]) if len(outside) else count
        return max(count, 1)
