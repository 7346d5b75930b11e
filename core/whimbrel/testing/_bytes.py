"""Bytes for the suites of channels: buffers of every kind, memory by address, and how it is sent and received."""

from __future__ import annotations

import array
import mmap
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from whimbrel.abc import ByteArray, Channel

MEBIBYTE: Final = 1 << 20


def receive(channel: Channel, size: int) -> bytes:
    """Receive `size` bytes, or fewer if the stream ends before."""
    data = bytearray()
    while len(data) < size:
        view = memoryview(bytearray(size - len(data)))
        count = channel.recv_into(view)
        assert 0 <= count <= len(view)
        if count == 0:
            break
        data += view[:count]
    return bytes(data)


def receive_all(channel: Channel, sizes: Sequence[int] = (65536,)) -> bytes:
    """Receive until the end, into buffers of `sizes` in turn."""
    data, turn = bytearray(), 0
    while True:
        view = memoryview(bytearray(sizes[turn % len(sizes)]))
        count = channel.recv_into(view)
        assert 0 <= count <= len(view)
        if count == 0:
            return bytes(data)
        data += view[:count]
        turn += 1


def send_in_chunks(channel: Channel, data: bytes, sizes: Sequence[int]) -> None:
    """Send `data` in pieces of `sizes` in turn, and end."""
    sent = turn = 0
    while sent < len(data):
        size = sizes[turn % len(sizes)]
        channel.send(data[sent : sent + size])
        sent, turn = sent + size, turn + 1
    channel.end_writing()


def send_until_it_fails(channel: Channel) -> None:
    """Send for as long as it works: until somebody closes something."""
    chunk = bytes(MEBIBYTE)
    while True:
        channel.send(chunk)


@contextmanager
def buffers_to_send() -> Iterator[list[Any]]:
    """Buffers of every kind: bytes, arrays of any shape, item and byte order, mapped memory."""
    words = np.arange(24, dtype="<u4").reshape(4, 6)
    frozen = words.copy()
    frozen.setflags(write=False)
    with mmap.mmap(-1, 4096) as pages:
        pages[:4] = b"page"
        yield [
            b"bytes",
            bytearray(b"bytearray"),
            memoryview(b"a memoryview")[2:],
            array.array("I", [1, 2, 3]),
            words,
            frozen,
            words[1:3],
            words.astype(">u4"),
            np.zeros(3, [("header", ">u8"), ("page", "u1", 5)]),
            np.float64(1.5),
            pages,
        ]


@contextmanager
def buffers_to_fill() -> Iterator[list[Any]]:
    """Writable buffers of every kind, of eight bytes and more."""
    with mmap.mmap(-1, 4096) as pages:
        yield [
            bytearray(8),
            memoryview(bytearray(16))[4:12],
            array.array("Q", [0]),
            np.zeros((2, 2), ">u2"),
            np.zeros(16, np.uint8)[8:],
            pages,
        ]


def nothings() -> list[Any]:
    """Buffers of no bytes."""
    return [b"", bytearray(), memoryview(b""), np.zeros((0, 4096), np.uint8)]


def memory_to_send() -> tuple[ByteArray, npt.NDArray[np.uint64]]:
    """A mebibyte, and thousands of pieces of odd sizes that are all of it, by address."""
    memory = np.frombuffer(np.random.default_rng(5).bytes(MEBIBYTE), np.uint8)
    cuts = np.unique(np.r_[0, np.random.default_rng(5).integers(0, memory.size, 3000), memory.size])
    return memory, np.stack([memory.ctypes.data + cuts[:-1], np.diff(cuts)], axis=1).astype(np.uint64)


def odd_sizes(dice: random.Random) -> list[int]:
    """Sizes of chunks, around those at which things change."""
    return [dice.choice([1, 2, 7, 1000, 4095, 4096, 4097, 65537]) for _ in range(997)]
