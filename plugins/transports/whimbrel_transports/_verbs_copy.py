"""Copies memory by address, thousands of pieces in a call, without the interpreter's lock or an object for each.

Which way is fastest depends on the pieces (measured, 256 MiB, of one plain copy's speed over the same bytes):

* a few long runs: `memmove` each, 0.65 to 1;
* many pieces that all move by the same distance and lie on one grid, as the dirty pages of a block do: numpy's masked
  copy over the block, with the grid's size as its item. It walks runs in C: 0.9 at every second page, 1 at all of them;
* whatever else: process_vm_writev(2) from this process to itself, the kernel's copy of two vectors, 0.4.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from whimbrel_transports._verbs_memory import AddressArray

__all__ = ["copy_pieces", "memory_at", "merged"]

_LONG: Final = 32 << 10  # bytes a piece, on average, from which a call of its own costs nothing to speak of
_FEW: Final = 8
_FINEST: Final = 512  # bytes; a finer grid makes the mask large and the runs short
_SPARSEST: Final = 256  # places of the grid for each that is copied
_IOV_MAX: Final = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_memmove = _libc.memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = ctypes.c_void_p
_writev = _libc.process_vm_writev
_writev.argtypes = (
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong
)  # fmt: skip
_writev.restype = ctypes.c_ssize_t


def memory_at(address: int, length: int) -> memoryview:
    """The bytes at an address, writable; the caller keeps them mapped while the view is in use."""
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")


def merged(sources: AddressArray, targets: AddressArray, lengths: AddressArray) -> tuple[AddressArray, ...]:
    """The same pieces with neighbours made one where they are neighbours at both ends, and without empty ones."""
    if not lengths.all():
        some = lengths != 0
        sources, targets, lengths = sources[some], targets[some], lengths[some]
    if len(lengths) < 2:
        return sources, targets, lengths
    begins = np.ones(len(lengths), np.bool_)
    np.not_equal(sources[1:], sources[:-1] + lengths[:-1], out=begins[1:])
    begins[1:] |= targets[1:] != targets[:-1] + lengths[:-1]
    firsts = np.flatnonzero(begins)
    if len(firsts) == len(lengths):
        return sources, targets, lengths
    return sources[firsts], targets[firsts], np.add.reduceat(lengths, firsts)


def copy_pieces(sources: AddressArray, targets: AddressArray, lengths: AddressArray) -> None:
    """Copy `lengths[i]` bytes from `sources[i]` to `targets[i]`, as if in order; all of it is mapped.

    Arrays of shape (n,), uint64. Raises OSError where the kernel finds memory that is not there.
    """
    sources, targets, lengths = merged(sources, targets, lengths)
    count = len(lengths)
    if not count:
        return
    if count <= _FEW or int(lengths.sum()) >= count * _LONG:
        for source, target, length in zip(sources.tolist(), targets.tolist(), lengths.tolist(), strict=True):
            _memmove(target, source, length)
    elif not _copy_masked(sources, targets, lengths):
        _copy_vectors(sources, targets, lengths)


def _copy_masked(sources: AddressArray, targets: AddressArray, lengths: AddressArray) -> bool:
    """Copy by a mask over the span of all pieces; False, having done nothing, where they do not suit that."""
    distances = sources - targets
    if (distances != distances[0]).any():
        return False
    first = int(targets.min())
    offsets = targets - np.uint64(first)
    grid = int(np.gcd(np.gcd.reduce(offsets), np.gcd.reduce(lengths)))
    grid &= -grid  # a power of two, for that is what page sizes are; never more than divides them all
    if grid < _FINEST:
        return False
    size = np.uint64(grid)
    starts, counts = (offsets // size).astype(np.intp), (lengths // size).astype(np.intp)
    places = int((starts + counts).max())
    if places > int(counts.sum()) * _SPARSEST:
        return False
    source = int(sources.min())
    if -(places * grid) < source - first < places * grid:
        return False  # the spans may overlap, and numpy would copy all of it first
    mask = np.zeros(places, np.bool_)
    if int(counts.max()) == 1:
        mask[starts] = True
    else:
        steps = np.zeros(places + 1, np.int32)
        np.add.at(steps, starts, 1)
        np.subtract.at(steps, starts + counts, 1)
        np.cumsum(steps[:-1], out=steps[:-1])
        np.greater(steps[:-1], 0, out=mask)
    item = np.dtype(f"V{grid}")
    np.copyto(_items(first, places, item), _items(source, places, item), where=mask)
    return True


def _items(address: int, count: int, item: np.dtype[np.void]) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    # Between the pieces of a span there may be nothing mapped; the mask keeps numpy from looking there.
    return np.frombuffer(memory_at(address, count * item.itemsize), item)


def _copy_vectors(sources: AddressArray, targets: AddressArray, lengths: AddressArray) -> None:
    here, there = (np.stack((column, lengths), axis=1) for column in (sources, targets))
    process = os.getpid()
    at = 0
    while at < len(lengths):
        count = min(_IOV_MAX, len(lengths) - at)
        copied = int(_writev(process, here[at:].ctypes.data, count, there[at:].ctypes.data, count, 0))
        if copied < 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            raise OSError(code, f"copying memory failed: {os.strerror(code)}")
        ends = np.cumsum(here[at : at + count, 1])
        whole = int(np.searchsorted(ends, copied, side="right"))
        if whole < count:
            part = np.uint64(copied - (int(ends[whole - 1]) if whole else 0))
            for vectors in (here, there):
                vectors[at + whole, 0] += part
                vectors[at + whole, 1] -= part
        at += whole
