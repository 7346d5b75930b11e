"""Sends of a page that the other side has what has changed in it (`xbzrle`; wire format, sections 3.4 and 3.5).

From the second pass on each page is asked for in a cache of what was sent. If it is there, its change is sent, or it
goes whole if that is shorter, or, if nothing has changed, not at all. If it is not, it goes whole and the cache keeps
what went, if there is room.

The rule of the cache: what it holds of a page is what the other side has of it. The guest goes on writing, so a page
is copied before anything else is done with it, and what is compared, kept and sent is that copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs
import numpy as np

from whimbrel.abc import BoolArray, ByteArray, DeltaCodec, Encoded, IndexArray, Outcome, Progress, StreamWriter
from whimbrel.machine import RamBlock
from whimbrel.settings import Parameters
from whimbrel.wire import ram as wire
from whimbrel.wire.ram_changes import change_records
from whimbrel_savevm._page_cache import PageCache
from whimbrel_savevm._ram_sending import PageSender, PlainSender

FIRST: Final = 2  # the pass from which on the other side has all pages
AT_ONCE: Final = 512  # pages compared at once: they and what they were stay in the cache
PERIOD: Final = 1.0  # seconds, at least, for which a rate is worked out


class DeltaSender(PageSender):
    """Sends changes of pages, room for `zeros` zero pages at once.

    `blocks` are all blocks of RAM in their order, `parameters` those of the machine: a new `xbzrle-cache-size` counts
    from the next batch on, with an empty cache. Raises MigrationError if there is no memory for one.
    """

    def __init__(
        self,
        progress: Progress,
        codec: DeltaCodec,
        blocks: Sequence[RamBlock],
        parameters: Parameters,
        *,
        zeros: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plain = PlainSender(progress, zeros=zeros)
        self._codec, self._parameters = codec, parameters
        self._bases: dict[str, int] = {}  # of a block's first page among all pages
        self._total = 0
        for block in blocks:
            self._bases[block.name] = self._total
            self._total += block.pages
        self._copies = np.empty((AT_ONCE, wire.PAGE_SIZE), np.uint8)
        self._cache: PageCache | None = None
        self._pass, self._last = 0, False
        self._counters = Counters(clock)

    def begin_pass(self, number: int) -> None:
        """Pages that come from here on may have changed since they were sent."""
        self._pass = number
        self._counters.pass_begins()

    def begin_last(self) -> None:
        """No page comes again, so nothing is kept any more."""
        self._last = True

    def zeros(self, out: StreamWriter, block: RamBlock, indices: IndexArray) -> None:
        """Write ZERO records; the cache must not keep what such a page was."""
        self._counters.handled += len(indices)
        cache = self._its_cache()
        if cache is not None and not self._last:
            visit = cache.visit(indices + self._bases[block.name], self._pass, insert=True)
            cache.copies[visit.slots[visit.held | visit.taken]] = 0
        self._plain.zeros(out, block, indices)

    def pages(self, out: StreamWriter, block: RamBlock, memory: ByteArray, indices: IndexArray) -> None:
        """Write XBZRLE records of pages that are known, PAGE records of all others."""
        self._counters.handled += len(indices)
        cache = self._its_cache()
        if cache is None:
            self._plain.pages(out, block, memory, indices)
            return
        visit = cache.visit(indices + self._bases[block.name], self._pass, insert=not self._last)
        held, taken = np.flatnonzero(visit.held), visit.taken
        self._counters.cache_miss += len(indices) - len(held)
        for first in range(0, len(held), AT_ONCE):
            some = held[first : first + AT_ONCE]
            self._send_changes(out, block, memory, indices[some], cache, visit.slots[some])
        if taken.any():
            slots, new = visit.slots[taken], indices[taken]
            cache.copies[slots] = memory.reshape(-1, wire.PAGE_SIZE)[new]
            self._plain.pages(out, block, cache.copies.reshape(-1), new, at=slots)
        rest = indices[~(visit.held | taken)]
        if len(rest):
            self._plain.pages(out, block, memory, rest)

    def statistics(self) -> Mapping[str, Mapping[str, object]]:
        """The counters of the cache, as `query-migrate` shows them (section 3.5)."""
        return {"xbzrle-cache": {"cache-size": self._parameters.xbzrle_cache_size, **self._counters.as_dict()}}

    def finish(self) -> None:
        """Give the cache's memory back."""
        self._cache = None

    # ------------------------------------------------------------------------------------------- inside

    def _its_cache(self) -> PageCache | None:
        if self._pass < FIRST:
            return None
        size = self._parameters.xbzrle_cache_size
        if self._cache is None or self._cache.size != size:
            self._cache = None  # or there would be room for both for a moment
            self._cache = PageCache(size, self._total)
        return self._cache

    def _send_changes(
        self,
        out: StreamWriter,
        block: RamBlock,
        memory: ByteArray,
        indices: IndexArray,
        cache: PageCache,
        slots: IndexArray,
    ) -> None:
        """Send pages of which the cache holds what they were."""
        new = self._copies[: len(indices)]
        memory.reshape(-1, wire.PAGE_SIZE).take(indices, axis=0, out=new, mode="clip")
        run = wire.consecutive(slots)
        encoded = self._codec.encode(cache.copies[slots if run is None else run], new)
        changed = encoded.outcomes != Outcome.UNCHANGED
        if not self._last:
            _replace(cache.copies, slots, run, new, changed)
        self._write_changes(out, block, indices, encoded)
        overflow = np.flatnonzero(encoded.outcomes == Outcome.OVERFLOW)
        if len(overflow):
            self._plain.pages(out, block, new.reshape(-1), indices[overflow], at=overflow)
        self._counters.pages += len(indices)
        self._counters.overflow += len(overflow)
        self._counters.bytes += len(overflow) * wire.PAGE_SIZE

    def _write_changes(self, out: StreamWriter, block: RamBlock, indices: IndexArray, encoded: Encoded) -> None:
        some = encoded.outcomes == Outcome.ENCODED
        if not some.any():
            return
        head, rest = change_records(
            indices[some], encoded.data, encoded.starts[some], encoded.ends[some], self._plain.name_for(block)
        )
        if head:
            out.write(head)
        out.write(rest)
        # As QEMU counts, the words are none of it, and a block's name is.
        self._counters.bytes += len(head) + len(rest) - wire.WORD * int(np.count_nonzero(some))


def _replace(copies: ByteArray, slots: IndexArray, run: slice | None, new: ByteArray, changed: BoolArray) -> None:
    """Keep the pages of `new` that have changed in their slots, which are `run` if they are consecutive."""
    if changed.all():
        copies[slots if run is None else run] = new
    else:
        copies[slots[changed]] = new[changed]


@attrs.define
class Counters:
    """What `xbzrle-cache` counts: written on the migration thread, read on any."""

    _clock: Callable[[], float]
    handled: int = 0  # pages of any kind that went through the sender
    cache_miss: int = 0
    pages: int = 0
    overflow: int = 0
    bytes: int = 0
    cache_miss_rate: float = 0.0
    encoding_rate: float = 0.0
    _since: float | None = None
    _before: tuple[int, int, int, int] = (0, 0, 0, 0)

    def pass_begins(self) -> None:
        """Work the rates out anew, if it is time: a rate of a moment says nothing."""
        now = self._clock()
        if self._since is None:
            self._since = now
        if now - self._since < PERIOD:
            return
        counted = (self.handled, self.cache_miss, self.pages, self.bytes)
        handled, misses, pages, sent = (new - old for new, old in zip(counted, self._before, strict=True))
        self._since, self._before = now, counted
        if handled:
            self.cache_miss_rate = misses / handled
            self.encoding_rate = pages * wire.PAGE_SIZE / sent if sent else 0.0

    def as_dict(self) -> dict[str, object]:
        """The members of `xbzrle-cache` but its size."""
        return {
            "bytes": self.bytes,
            "pages": self.pages,
            "cache-miss": self.cache_miss,
            "cache-miss-rate": self.cache_miss_rate,
            "encoding-rate": self.encoding_rate,
            "overflow": self.overflow,
        }
