"""Reading the records of RAM bodies: runs of one kind as numpy arrays (wire format, sections 2 and 3.1).

PAGE and ZERO records have one size each, so a run of them is found with a few comparisons of whole arrays. XBZRLE and
COMPRESS_PAGE records say how long they are, so their beginnings are followed one by one; everything else about them
is done on arrays too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import ByteArray, IndexArray, StreamReader
from whimbrel.errors import MigrationError, Place, StreamError
from whimbrel.wire.primitives import U64, checked_name
from whimbrel.wire.ram_words import (
    COMPRESSED_MAX,
    FLAGS_MASK,
    FLUSH_RECORD,
    HOOK_RECORD,
    PAGE_SIZE,
    PAGE_STRIDE,
    WORD,
    XBZRLE_ENCODING,
    XBZRLE_MAX,
    ZERO_STRIDE,
    Flag,
)

_STRIDES: Final = {Flag.PAGE: PAGE_STRIDE, Flag.ZERO: ZERO_STRIDE}

# A run is first looked for in this many records and then in eight times as many: a stream of single records must
# not cost a look at everything that is buffered for each of them.
_FIRST_LOOK: Final = 256

# Records of one encoded run: enough to hide what a run costs by itself, few enough that a call does not take long.
_ENCODED_MOST: Final = 1 << 14

_NO_BYTES: Final[ByteArray] = np.empty(0, np.uint8)
_NO_INDICES: Final[IndexArray] = np.empty(0, np.intp)


@attrs.frozen
class _Encoded:
    """A kind of record that says how long it is. Both layouts end in the length of the payload, which follows."""

    flag: Flag
    head: struct.Struct  # between the word, or the name, and the payload
    continued: struct.Struct  # the word and the head; gives the word and the length
    least: int
    most: int


_ENCODED: Final = {
    kind.flag: kind
    for kind in (
        _Encoded(Flag.XBZRLE, struct.Struct(">BH"), struct.Struct(">QxH"), 0, XBZRLE_MAX),
        _Encoded(Flag.COMPRESS_PAGE, struct.Struct(">I"), struct.Struct(">QI"), 1, COMPRESSED_MAX),
    )
}

_KINDS: Final = {int(flag): flag for flag in (*_STRIDES, *_ENCODED)}
_NOT_HERE: Final = {
    int(Flag.HOOK): "a HOOK record came (word {:#x}), which only an RDMA transport uses",
    int(Flag.MULTIFD_FLUSH): "a MULTIFD_FLUSH record came (word {:#x}), which only belongs where pages go over several "
    "lanes (multifd)",
}

# As plain numbers: operations on flags themselves take microseconds, and each run has a few.
_EOS: Final = int(Flag.EOS)
_CONTINUE: Final = int(Flag.CONTINUE)


@attrs.frozen(eq=False)
class Run:
    """Records of one kind in one block, read from a window.

    `flag` is PAGE, ZERO, XBZRLE, COMPRESS_PAGE or EOS; `indices` are page numbers (n,), not yet checked against any
    block; `payload` is (n, 4096) for PAGE and (n,) fill bytes for ZERO; the payload of an encoded record i is
    `data[starts[i] : ends[i]]`, where `data` is flat and `starts` and `ends` have shape (n,). `payload` and `data` are
    views of the window. `block` is the name that the run begins with, or None where it continues; `size` is how many
    bytes of the window it takes.
    """

    flag: Flag
    size: int
    block: str | None = None
    indices: IndexArray = _NO_INDICES
    payload: ByteArray = attrs.field(default=_NO_BYTES, repr=False)
    data: ByteArray = attrs.field(default=_NO_BYTES, repr=False)
    starts: IndexArray = _NO_INDICES
    ends: IndexArray = _NO_INDICES


# ------------------------------------------------------------------------------------------------------------- bodies


class RecordReader:
    """Reads the RAM bodies of one stream, in their order: the current block goes on from body to body. One thread.

    `sizes` are the blocks there are and their bytes; without it any name is taken and no page is out of bounds.
    `flush` is called for each MULTIFD_FLUSH and `hook` for each HOOK, in its place among the records; without them
    there may be none.
    """

    def __init__(
        self,
        sizes: Mapping[str, int] | None = None,
        flush: Callable[[], object] | None = None,
        hook: Callable[[], object] | None = None,
    ) -> None:
        calls = ((FLUSH_RECORD, flush), (HOOK_RECORD, hook))
        self._calls = {word: call for word, call in calls if call is not None}
        self._pages = None if sizes is None else {name: size // PAGE_SIZE for name, size in sizes.items()}
        self.block: str | None = None
        """The block that a record without a name belongs to; None before the first name, and after a wrong one."""

    def body(self, reader: StreamReader, limit: int) -> Iterator[tuple[str, Run]]:
        """Read one body of at most `limit` records, behind its block list if it has one, up to and including EOS.

        Yields each run and the name of its block. The run's arrays are views of the reader's window, valid until the
        next run is asked for; until then nothing may be read from `reader`. Raises StreamError for what `read_run`
        refuses, for a block that is not there, a page outside of its block, and more records than `limit`; its place
        has the block's name.
        """
        need, left = WORD, limit
        while True:
            try:
                window = reader.window(need)
                if self._calls and (call := self._calls.get(bytes(window[:WORD]))) is not None:
                    reader.advance(WORD)
                    call()
                    need = WORD
                    continue
                run = read_run(window)
                if isinstance(run, int):
                    need = run
                    continue
                left -= len(run.indices)
                if left < 0:
                    raise StreamError(f"the body has more page records than the {limit} that may come in it")
                name = None if run.flag is Flag.EOS else self.follow(run.block, run.indices)
            except MigrationError as exc:
                raise exc.at(Place(block=self.block)) from exc.__cause__
            if name is None:
                reader.advance(run.size)
                return
            yield name, run
            reader.advance(run.size)
            need = WORD

    def follow(self, name: str | None, indices: IndexArray) -> str:
        """The block of records that begin with `name`, or continue without; it is the current one from now on.

        Raises StreamError for a block that is not there, and for a page outside of it.
        """
        if name is not None:
            self.block = None
            if self._pages is not None and name not in self._pages:
                raise StreamError(f"a record names RAM block {name!r}, which is not there")
            self.block = name
        if self.block is None:
            raise StreamError("the first record continues a block, but none was named yet")
        if self._pages is not None:
            pages, last = self._pages[self.block], int(indices.max())
            if last >= pages:
                raise StreamError(
                    f"a page at {last * PAGE_SIZE:#x} is outside of block {self.block!r} of "
                    f"{pages * PAGE_SIZE:#x} bytes"
                )
        return self.block


# --------------------------------------------------------------------------------------------------------------- runs


def read_run(window: memoryview) -> Run | int:
    """The longest run at the head of `window`, or how many bytes the window must have at least to hold one.

    A run of encoded records has 16384 of them at most. Raises StreamError for flags that have no meaning, or none
    here, for a name that is none, and for an encoded record whose head is wrong.
    """
    if len(window) < WORD:
        return WORD
    word = int(U64.unpack_from(window)[0])
    flags = word & FLAGS_MASK
    if word == _EOS:
        return Run(Flag.EOS, WORD)
    flag = _record_flag(word)
    if not flags & _CONTINUE:
        return _read_named(window, word, flag)
    if flag in _ENCODED:
        return _read_encoded(window, flags, _ENCODED[flag])
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
    flag = _KINDS.get(flags & ~_CONTINUE)
    if flag is not None:
        return flag
    refused = _NOT_HERE.get(flags & ~_CONTINUE)
    if refused is not None:
        raise StreamError(refused.format(word), hint="switch the capability off at the source")
    raise StreamError(f"a RAM record has flags {flags:#x} (word {word:#x}), which mean nothing")


def _read_named(window: memoryview, word: int, flag: Flag) -> Run | int:
    if len(window) < WORD + 1:
        return WORD + 1
    length = window[WORD]
    if length == 0:
        raise StreamError("the name of a RAM block is empty, expected 1 to 255 characters")
    head = WORD + 1 + length
    if flag in _ENCODED:
        return _read_named_encoded(window, word, head, _ENCODED[flag])
    size = head + _STRIDES[flag] - WORD
    if len(window) < size:
        return size
    payload = np.frombuffer(window, np.uint8, size - head, head)
    return Run(
        flag,
        size,
        checked_name(bytes(window[WORD + 1 : head]), "a RAM block"),
        _indices(np.array([word], np.uint64)),
        payload.reshape(1, -1) if flag is Flag.PAGE else payload,
    )


def _equal_flags(window: memoryview, stride: int, available: int, flags: int) -> tuple[int, npt.NDArray[np.uint64]]:
    """How many records from the head on have the same flags, and their words (at least that many)."""
    look = min(_FIRST_LOOK, available)
    if look > 1 and U64.unpack_from(window, stride)[0] & FLAGS_MASK != flags:
        look = available = 1  # many are single, and this is a tenth of what a look costs
    while True:
        words = np.ndarray((look,), ">u8", buffer=window, strides=(stride,)).astype(np.uint64)
        (other,) = ((words & np.uint64(FLAGS_MASK)) != flags).nonzero()
        if len(other):
            return int(other[0]), words
        if look == available:
            return available, words
        look = min(look * 8, available)


def _indices(words: npt.NDArray[np.uint64]) -> IndexArray:
    # 52 bits at most are left, so the page numbers are exact as signed integers.
    return (words >> np.uint64(12)).view(np.int64).astype(np.intp, copy=False)


# ------------------------------------------------------------------------------------------------------- encoded runs


def _read_named_encoded(window: memoryview, word: int, head: int, kind: _Encoded) -> Run | int:
    start = head + kind.head.size
    if len(window) < start:
        return start
    name = checked_name(bytes(window[WORD + 1 : head]), "a RAM block")
    end = start + _payload_length(window, head, kind)
    if len(window) < end:
        return end
    return Run(
        kind.flag,
        end,
        name,
        _indices(np.array([word], np.uint64)),
        data=np.frombuffer(window, np.uint8, end),
        starts=np.array([start], np.intp),
        ends=np.array([end], np.intp),
    )


def _read_encoded(window: memoryview, flags: int, kind: _Encoded) -> Run | int:
    head = kind.continued.size
    if len(window) < head:
        return head
    size = head + _payload_length(window, WORD, kind)
    if len(window) < size:
        return size
    edges = _follow_lengths(window, flags, kind)
    size = int(edges[-1])
    data = np.frombuffer(window, np.uint8, size)
    begins, ends = edges[:-1], edges[1:]
    if kind.flag is Flag.XBZRLE:
        (other,) = (data[begins + WORD] != XBZRLE_ENCODING).nonzero()
        if len(other):
            # What comes from here on is for the next call, which says what is wrong.
            size = int(begins[other[0]])
            begins, ends, data = begins[: other[0]], ends[: other[0]], data[:size]
    words = np.ndarray((size - WORD + 1,), ">u8", buffer=window, strides=(1,))[begins].astype(np.uint64)
    return Run(kind.flag, size, None, _indices(words), data=data, starts=begins + head, ends=ends)


def _payload_length(window: memoryview, at: int, kind: _Encoded) -> int:
    """How long the payload behind the head at `at` is. Raises StreamError for a head that is wrong."""
    length: int
    *encoding, length = kind.head.unpack_from(window, at)
    if encoding and encoding[0] != XBZRLE_ENCODING:
        raise StreamError(f"an XBZRLE record has encoding {encoding[0]:#04x}, expected {XBZRLE_ENCODING:#04x}")
    if not kind.least <= length <= kind.most:
        raise StreamError(
            f"the payload of a page in {kind.flag.name} is {length} bytes long, expected {kind.least} to {kind.most}"
        )
    return length


def _follow_lengths(window: memoryview, flags: int, kind: _Encoded) -> IndexArray:
    """Where the records begin that have these flags and a length that may be, and where the last of them ends.

    The first record was found to be whole and right.
    """
    unpack, head, least, most = kind.continued.unpack_from, kind.continued.size, kind.least, kind.most
    last = len(window) - head
    edges: list[int] = []
    at = 0
    for _ in range(_ENCODED_MOST):
        if at > last:
            break
        word, length = unpack(window, at)
        if word & FLAGS_MASK != flags or not least <= length <= most:
            break
        edges.append(at)
        at += head + length
    if at <= len(window):
        edges.append(at)  # else the last one is not whole, and is left for the next call
    return np.array(edges, np.intp)
