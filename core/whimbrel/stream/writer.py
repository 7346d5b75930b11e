"""Writes a stream to a channel: small pieces are gathered, large ones go straight through.

A failed channel stays failed: every later write raises the same error, so that whoever notices first need not be
whoever handles it. Its place is where the piece begins that may not have gone whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from whimbrel.abc import Channel
from whimbrel.errors import ChannelError, Place

if TYPE_CHECKING:
    from typing_extensions import Buffer

GATHER: Final = 32 * 1024  # what is gathered before it is sent; larger pieces are not copied


class Writer:
    """The writing end of a stream. One thread; `offset` may be read by any."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._gathered = bytearray()
        self._failure: ChannelError | None = None
        self.offset = 0  # bytes written, gathered ones included

    def write(self, data: Buffer) -> None:
        """Write `data` (any C-contiguous buffer); it may be overwritten on return. Raises ChannelError."""
        if self._failure is not None:
            raise self._failure
        view = memoryview(data)
        if not view.nbytes:
            return  # and some shapes of nothing cannot be cast
        view = view.cast("B")
        if len(self._gathered) + len(view) > GATHER:
            self.flush()
        if len(view) > GATHER:
            self._send(view, self.offset)
        else:
            self._gathered += view
        self.offset += len(view)

    def flush(self) -> None:
        """Send what is gathered. Raises ChannelError."""
        if self._failure is not None:
            raise self._failure
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._send(memoryview(gathered), self.offset - len(gathered))

    def _send(self, data: memoryview, offset: int) -> None:
        try:
            self._channel.send(data)
        except ChannelError as exc:
            self._failure = exc.at(Place(offset=offset, peer=self._channel.peer))
            raise
