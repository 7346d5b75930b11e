"""A reader and a writer that let somebody hear every byte that goes through them, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from whimbrel.abc import Parser, Peek, StreamReader, StreamWriter

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Tap = Callable[[Buffer], object]

T = TypeVar("T")


class TappedWriter:
    """Writes to `out`, and tells `tap` what it wrote. One thread; raises as `out` does."""

    gathers = False

    def __init__(self, out: StreamWriter, tap: Tap) -> None:
        self._out, self._tap = out, tap

    @property
    def offset(self) -> int:
        """Bytes written to the stream so far."""
        return self._out.offset

    def write(self, data: Buffer) -> None:
        """Write `data`."""
        self._out.write(data)
        self._tap(data)

    def write_gathered(self, vectors: npt.NDArray[np.uint64]) -> None:  # noqa: ARG002 - it is refused
        """Refused: memory that others write to cannot be told."""
        raise AssertionError("a tapped writer does not gather")


class TappedReader:
    """Reads from `reader`, and tells `tap` what was consumed. One thread; raises as `reader` does."""

    def __init__(self, reader: StreamReader, tap: Tap) -> None:
        self._reader, self._tap = reader, tap
        self._window = memoryview(b"")

    @property
    def offset(self) -> int:
        """Bytes of the stream consumed so far."""
        return self._reader.offset

    def parse(self, parser: Parser[T]) -> T:
        """Run `parser` on the stream."""
        return self._reader.parse(self._tapped(parser))

    def window(self, minimum: int) -> memoryview:
        """At least `minimum` bytes ahead; consumes nothing."""
        self._window = self._reader.window(minimum)
        return self._window

    def advance(self, count: int) -> None:
        """Consume `count` bytes of the last window."""
        self._tap(self._window[:count])
        self._window = self._window[count:]
        self._reader.advance(count)

    def read_into(self, buffer: Buffer) -> None:
        """Consume as many bytes as `buffer` has, into it."""
        self._reader.read_into(buffer)
        self._tap(buffer)

    def _tapped(self, parser: Parser[T]) -> Parser[T]:
        try:
            request = next(parser)
            while True:
                data = yield request
                if not isinstance(request, Peek):
                    self._tap(data)
                request = parser.send(data)
        except StopIteration as done:
            value: T = done.value
            return value
