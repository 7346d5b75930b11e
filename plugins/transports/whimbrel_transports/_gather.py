"""Sends and receives memory by address, many pieces in one system call, without an object per piece.

The calls are sendmsg(2), recvmsg(2) and writev(2).

Python's own `socket.sendmsg` and `os.writev` want a list of buffers, which costs a Python object for every page and
header word. Here the vector is one numpy array, laid out as the kernel's `struct iovec`, and the call releases the
interpreter's lock.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable

IOV_MAX: Final = 1024  # pieces the kernel takes in one call


class _Message(ctypes.Structure):
    """`struct msghdr` of a 64-bit Linux."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_sendmsg = _libc.sendmsg
_sendmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_sendmsg.restype = ctypes.c_ssize_t
_recvmsg = _libc.recvmsg
_recvmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_recvmsg.restype = ctypes.c_ssize_t
_writev = _libc.writev
_writev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_writev.restype = ctypes.c_ssize_t


def send_gathered(descriptor: int, vectors: npt.NDArray[np.uint64]) -> None:
    """Send the pieces that `vectors` (address and length, shape (n, 2), C order) names, all of them and in order.

    `vectors` is used up: it is changed where the kernel takes a part of a piece. The descriptor is a blocking
    socket. Raises OSError.
    """
    message = _Message()

    def send(vector: int, count: int) -> int:
        message.vectors, message.count = vector, count
        return int(_sendmsg(descriptor, ctypes.addressof(message), socket.MSG_NOSIGNAL))

    _move_all(vectors, send)


def recv_scattered(descriptor: int, vectors: npt.NDArray[np.uint64]) -> bool:
    """Fill the pieces that `vectors` names, as `send_gathered` sends them; False if the stream ends before.

    The descriptor is a blocking socket. Raises OSError.
    """
    message = _Message()

    def receive(vector: int, count: int) -> int:
        message.vectors, message.count = vector, count
        return int(_recvmsg(descriptor, ctypes.addressof(message), socket.MSG_WAITALL))

    return _move_all(vectors, receive)


def write_gathered(
    descriptor: int, vectors: npt.NDArray[np.uint64], before: Callable[[int], None], blocked: Callable[[], None]
) -> None:
    """Write the pieces that `vectors` names, as `send_gathered` sends them, to a pipe or a file.

    `before` is called ahead of each system call, with the bytes that have gone so far; where the descriptor does not
    block and takes no more, `blocked` waits until it does. Raises OSError, and what those two raise.
    """
    done = 0

    def write(vector: int, count: int) -> int:
        nonlocal done
        before(done)
        written = int(_writev(descriptor, vector, count))
        done += max(written, 0)
        return written

    _move_all(vectors, write, blocked)


def _move_all(
    vectors: npt.NDArray[np.uint64], move: Callable[[int, int], int], blocked: Callable[[], None] | None = None
) -> bool:
    """Go through all pieces with `move`; False if it moves nothing, which ends a stream that is received."""
    first, address = 0, vectors.ctypes.data
    while first < len(vectors):
        count = min(IOV_MAX, len(vectors) - first)
        moved = move(address + first * vectors.strides[0], count)
        if moved == 0 and vectors[first : first + count, 1].any():
            return False
        if moved < 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code == errno.EAGAIN and blocked is not None:
                blocked()
                continue
            raise OSError(code, os.strerror(code))
        first += _through(vectors[first : first + count], moved)
    return True


def _through(vectors: npt.NDArray[np.uint64], moved: int) -> int:
    """How many pieces `moved` bytes are; the rest of a piece that was cut is left in its place."""
    if moved == int(vectors[:, 1].sum()):
        return len(vectors)
    ends = np.cumsum(vectors[:, 1])
    whole = int(np.searchsorted(ends, moved, side="right"))
    if whole < len(vectors):
        part = np.uint64(moved - (int(ends[whole - 1]) if whole else 0))
        vectors[whole, 0] += part
        vectors[whole, 1] -= part
    return whole
