"""A peer's memory as this process has it mapped: entered ahead of the writer, and let go of behind it.

Measured for 1 GiB of a memfd whose pages are all there, of which a plain copy takes 0.09 s: a fault for each page costs
0.5 s, having the kernel enter them all 0.1 s, and unmapping them 0.05 s. So a thread does what can be done beside the
copying. The rules it lives by:

* **Nothing is mapped, and no page entered, of a region that nobody writes**: a peer may tell of more than it has.
* **The writer does not take turns with it**: what is not entered yet, the writer enters; whoever came first, the other
  waits for that one step.
* **One thread enters and unmaps**, so that no page is entered of what is unmapped already. It unmaps in steps, since
  all that asks for memory in this process waits for each; and it is while a guest stands still that regions end.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import deque
from typing import Final

__all__ = ["Mapping", "Paging"]

_STEP: Final = 4 << 20  # bytes entered at once, 0.4 ms
_UNMAPPED: Final = 32 << 20  # bytes unmapped at once, 1.5 ms
_MADV_POPULATE_READ: Final = 22
_WAITING, _DONE = b"\1", b"\2"

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_munmap.restype = ctypes.c_int
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise.restype = ctypes.c_int


class Mapping:
    """Part of a file, mapped in whole pages; Python's own mmap would keep the interpreter's lock where it takes long.

    Raises OSError where it cannot be mapped.
    """

    def __init__(self, fd: int, offset: int, length: int, *, write: bool) -> None:
        before = offset % mmap.PAGESIZE
        self._size = length + before
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        start = _mmap(None, self._size, protection, mmap.MAP_SHARED, fd, offset - before)
        if start is None or start == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot map a peer's memory: {os.strerror(code)}")
        self._start: int | None = start
        self.address = start + before
        self._steps = bytearray(-(-self._size // _STEP))  # 0, _WAITING while somebody enters it, _DONE
        self._changed = threading.Condition()
        self.entered = False
        """Whether every page is entered."""

    def enter(self, address: int, length: int) -> None:
        """Have the pages of a range entered when this returns. Any thread; not once it is closed."""
        assert self._start is not None, "entered when it was closed"
        if self.entered or not length:
            return
        first, last = (address - self._start) // _STEP, (address + length - 1 - self._start) // _STEP
        for step in range(first, last + 1):
            self._enter_step(step)

    def enter_all(self, over: threading.Event) -> None:
        """Enter one step after another, until all are or it is `over`."""
        for step in range(len(self._steps)):
            if over.is_set():
                return
            self._enter_step(step)
        self.entered = True

    def _enter_step(self, step: int) -> None:
        if self._steps[step] == _DONE[0]:
            return
        with self._changed:
            if self._steps[step]:
                self._changed.wait_for(lambda: self._steps[step] == _DONE[0])
                return
            self._steps[step : step + 1] = _WAITING
        # Where the kernel cannot (it is older than 5.14), a write enters the page, one after another.
        assert self._start is not None
        _madvise(self._start + step * _STEP, min(_STEP, self._size - step * _STEP), _MADV_POPULATE_READ)
        with self._changed:
            self._steps[step : step + 1] = _DONE
            self._changed.notify_all()

    def close(self) -> None:
        """Unmap it; twice is fine."""
        start, self._start = self._start, None
        if start is not None:
            for at in range(0, self._size, _UNMAPPED):
                _munmap(start + at, min(_UNMAPPED, self._size - at))


class Paging:
    """The thread that enters what is written, and unmaps what is not written any more. Any thread may ask."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._new: deque[Mapping] = deque()
        self._old: deque[Mapping] = deque()
        self._urgent = threading.Event()  # something else than entering is to be done
        self._closed = False
        self._thread: threading.Thread | None = None

    def enter(self, mapping: Mapping) -> None:
        """A mapping will be written."""
        with self._changed:
            self._new.append(mapping)
            self._wake()

    def unmap(self, mapping: Mapping) -> None:
        """A mapping is not written any more, by nobody."""
        with self._changed:
            self._old.append(mapping)
            self._urgent.set()
            self._wake()

    def close(self) -> None:
        """Wait until everything that `unmap` was told of is unmapped."""
        with self._changed:
            self._closed = True
            self._urgent.set()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="whimbrel-verbs-paging", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._old or self._closed)
                old, self._old = self._old, deque()
                # What is unmapped now was asked to be entered before, and maybe not looked at yet.
                self._new = deque(mapping for mapping in self._new if mapping not in old)
                if not old and self._closed:
                    return
                new = self._new[0] if self._new and not old else None
                self._urgent.clear()
            for mapping in old:
                mapping.close()
            if new is not None:
                new.enter_all(self._urgent)
                self._finished(new)

    def _finished(self, mapping: Mapping) -> None:
        """Go on with the next mapping, unless this one was broken off for something else."""
        with self._changed:
            if mapping.entered and self._new and self._new[0] is mapping:
                self._new.popleft()
