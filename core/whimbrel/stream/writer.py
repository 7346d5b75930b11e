"""Writes a stream to a channel: small pieces are gathered, large ones go straight through.

A failed channel stays failed: every later write raises the same error, so that whoever notices first need not be
whoever handles it. Its place is where the piece begins that may not have gone whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from whimbrel.abc import Channel, GatheringChannel
from whimbrel.errors import ChannelError, Place

if TYPE_CHECKING:
    from typing_extensions import Buffer

GATHER: Final = 32 * 1024  # what is gathered before it is sent; larger pieces are not copied


class Writer:
    """The writing end of a stream. One thread; `offset` may be read by any."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._send_vectors = channel.send_gathered if isinstance(channel, GatheringChannel) else None
        self._gathered = bytearray()
        self._failure: ChannelError | None = None
        self.offset = 0  # bytes written, gathered ones included

    @property
    def gathers(self) -> bool:
        """Whether the channel can send memory by address."""
        return self._send_vectors is not None

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
            self._try(partial(self._channel.send, view), self.offset)
        else:
            self._gathered += view
        self.offset += len(view)

    def write_gathered(self, vectors: npt.NDArray[np.uint64]) -> None:
        """Write memory by address (`GatheringChannel.send_gathered`); for a channel that `gathers`."""
        assert self._send_vectors is not None, "this channel does not gather"
        size = int(vectors[:, 1].sum())
        self.flush()
        self._try(partial(self._send_vectors, vectors), self.offset)
        self.offset += size

    def flush(self) -> None:
        """Send what is gathered. Raises ChannelError."""
        if self._failure is not None:
            raise self._failure
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._try(partial(self._channel.send, memoryview(gathered)), self.offset - len(gathered))

    def _try(self, send: Callable[[], None], offset: int) -> None:
        try:
            send()
        except ChannelError as exc:
            self._failure = exc.at(Place(offset=offset, peer=self._channel.peer))
            raise
