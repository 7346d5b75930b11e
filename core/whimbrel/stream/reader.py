"""Reads a stream from a channel into one buffer and runs parsers on it.

The buffer has a fixed size; what is asked for beyond it (a device's large array, bounded by its own description) gets
a buffer of its own for that one request. Nothing is ever allocated because a peer said so: sizes are the parsers',
and they have checked them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from whimbrel.abc import Channel, Parser, Peek
from whimbrel.errors import ChannelLost, MigrationError, Place

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

CAPACITY: Final = 1 << 20  # fits the second-level cache of most machines, and 255 page records
LITTLE: Final = 512
"""Bytes received at once behind what went past the buffer: the next of its kind is mostly near, and is not copied."""


class Reader:
    """The reading end of a stream. One thread. `offset` is that of the first byte it reads."""

    def __init__(self, channel: Channel, *, capacity: int = CAPACITY, offset: int = 0) -> None:
        self._channel = channel
        self._buffer = memoryview(bytearray(capacity))
        self._start = 0  # the first byte not consumed
        self._end = 0  # behind the last byte received
        self._base = offset  # the stream's offset of the buffer's first byte
        self._ahead = capacity  # what the next fill asks for, if it is not more that is needed

    @property
    def offset(self) -> int:
        """Bytes of the stream consumed so far."""
        return self._base + self._start

    def parse(self, parser: Parser[T]) -> T:
        """Run `parser` on the stream and return its value.

        Raises ChannelLost at an early end, with the offset of that end, and what the parser raises, with the offset
        where its last request began.
        """
        at = self.offset
        try:
            request = next(parser)
            while True:
                at = self.offset
                if isinstance(request, Peek):
                    request = parser.send(self.window(request.size)[: request.size])
                else:
                    request = parser.send(self._take(request))
        except StopIteration as done:
            value: T = done.value
            return value
        except MigrationError as exc:
            raise exc.at(Place(offset=at)) from exc.__cause__

    def window(self, minimum: int) -> memoryview:
        """At least `minimum` bytes ahead and all that are buffered; valid until the next call. Consumes nothing.

        Raises ChannelLost at an early end, and ValueError for more than the buffer's capacity.
        """
        if self._end - self._start < minimum:
            self._fill(minimum)
        return self._buffer[self._start : self._end]

    def ended(self) -> bool:
        """Wait for one more byte, consuming nothing; whether the peer hung up in order instead. Raises ChannelLost."""
        if self._end == self._start:
            self._base += self._start
            self._start = self._end = 0
            self._end = self._channel.recv_into(self._buffer)
        return self._end == self._start

    def advance(self, count: int) -> None:
        """Consume `count` bytes of the last window. Raises ValueError for more than there are."""
        if not 0 <= count <= self._end - self._start:
            raise ValueError(f"{count} bytes cannot be consumed of a window of {self._end - self._start}")
        self._start += count

    def read_into(self, buffer: Buffer) -> None:
        """Consume as many bytes as `buffer` (writable, C-contiguous) has, into it. Raises ChannelLost at an early end.

        What was not received yet goes there straight.
        """
        view = memoryview(buffer).cast("B")
        have = min(len(view), self._end - self._start)
        view[:have] = self._buffer[self._start : self._start + have]
        self._start += have
        while have < len(view):
            count = self._receive(view[have:], len(view) - have)
            have += count
            self._base += count
            self._ahead = LITTLE

    def _take(self, size: int) -> memoryview:
        if size > len(self._buffer):
            return self._take_large(size)
        data = self.window(size)[:size]
        self._start += size
        return data

    def _take_large(self, size: int) -> memoryview:
        data = memoryview(bytearray(size))
        have = self._end - self._start
        data[:have] = self._buffer[self._start : self._end]
        self._base += self._end
        self._start = self._end = 0
        while have < size:
            count = self._receive(data[have:], size - have)
            have += count
            self._base += count
        return data

    def _fill(self, minimum: int) -> None:
        if minimum > len(self._buffer):
            raise ValueError(f"a window of {minimum} bytes was asked for, and the buffer has {len(self._buffer)}")
        if self._start:
            left = self._end - self._start
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._base += self._start
            self._start, self._end = 0, left
        while self._end < minimum:
            room = max(self._end + self._ahead, minimum)
            self._end += self._receive(self._buffer[self._end : room], minimum - self._end)
        self._ahead = len(self._buffer)

    def _receive(self, into: memoryview, missing: int) -> int:
        count = self._channel.recv_into(into)
        if count == 0:
            raise ChannelLost(
                f"the stream ended where at least {missing} more bytes were expected",
                hint="the peer has hung up: its own error says why",
                place=Place(offset=self._base + self._end, peer=self._channel.peer),
            )
        return count
