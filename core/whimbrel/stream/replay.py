"""A channel to read from that begins with bytes which came earlier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel.abc import Channel
from whimbrel.errors import ChannelError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Replay(Channel):
    """Gives `data`, and then what `channel` gives; without one, the end. One thread; `close` closes `channel` too."""

    duplex = False

    def __init__(self, data: Buffer, channel: Channel | None = None, *, peer: str = "") -> None:
        self.peer = channel.peer if channel is not None else peer
        self._data = memoryview(data).cast("B")
        self._channel = channel

    def recv_into(self, buffer: Buffer) -> int:
        """The next bytes, first of `data`; 0 at the end."""
        if not len(self._data):
            return 0 if self._channel is None else self._channel.recv_into(buffer)
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._data))
        view[:count], self._data = self._data[:count], self._data[count:]
        return count

    def send(self, data: Buffer) -> None:  # noqa: ARG002 - refused
        """Refused: this is an end to read from."""
        raise ChannelError("nothing can be sent into what is being read again")

    def end_writing(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """Close what stands behind. Any thread; twice is fine."""
        if self._channel is not None:
            self._channel.close()
