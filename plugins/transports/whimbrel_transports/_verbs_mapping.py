"""A peer's memory as this process has it mapped: entered ahead of the writer, and let go of behind it.

Measured for 1 GiB of a memfd whose pages are all there, of which a plain copy takes 0.09 s: a fault for each page costs
0.5 s, having the kernel enter them all 0.1 s, and unmapping them 0.05 s. So a thread does what can be done beside the
copying. The rules it lives by:

* **Nothing is mapped, and no page entered, of a region that nobody writes**: a peer may tell of more than it has.
* **The writer does not take turns with it**: what is not entered yet, the writer enters; whoever came first, the other
  waits for that one step.
* **One thread enters and unmaps**, so that no page is entered of what is unmapped already. It unmaps in steps, since
  all that asks for memory in this process waits for each.
* **What is no more written stays mapped until the connection ends**, some of it at least: regions end while a guest
  stands still, and unmapping would take a processor from those who start it again.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from typing import Final

from whimbrel.machine import hugepages, libc

__all__ = ["Mapping", "Paging"]

_STEP: Final = 4 << 20  # bytes entered at once, 0.4 ms
_UNMAPPED: Final = 32 << 20  # bytes unmapped at once, 1.5 ms
_MADV_POPULATE_READ: Final = 22
_KEPT: Final = 1024  # mappings that are not written any more
_WAITING, _DONE = b"\1", b"\2"


class Mapping:
    """Part of a file, mapped in whole pages, huge ones where the file has such; other threads run meanwhile.

    Raises OSError where it cannot be mapped.
    """

    def __init__(self, fd: int, offset: int, length: int, *, write: bool) -> None:
        before = offset % mmap.PAGESIZE
        self._size = length + before
        align = hugepages.page_size() if length >= hugepages.page_size() else 0
        self._mapping = libc.SharedMapping(fd, offset - before, self._size, align or mmap.PAGESIZE, write=write)
        self._start: int | None = self._mapping.address
        self.address = self._mapping.address + before
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
        libc.madvise(self._start + step * _STEP, min(_STEP, self._size - step * _STEP), _MADV_POPULATE_READ)
        with self._changed:
            self._steps[step : step + 1] = _DONE
            self._changed.notify_all()

    def close(self) -> None:
        """Unmap it; twice is fine."""
        start, self._start = self._start, None
        if start is not None:
            self._mapping.unmap(_UNMAPPED)


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
                self._changed.wait_for(lambda: self._new or len(self._old) > _KEPT or self._closed)
                # What is not written any more was asked to be entered before, and maybe not looked at yet.
                self._new = deque(mapping for mapping in self._new if mapping not in self._old)
                old = deque[Mapping]()
                while self._old and (self._closed or len(self._old) > _KEPT):
                    old.append(self._old.popleft())
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
