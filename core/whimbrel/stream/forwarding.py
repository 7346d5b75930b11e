"""A channel that is another channel: the base of those that add something to one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel.abc import Channel

if TYPE_CHECKING:
    from typing_extensions import Buffer


class ForwardingChannel(Channel):
    """Does what the channel `inner` does, on the same threads; has no ability beyond those of every channel."""

    def __init__(self, inner: Channel) -> None:
        self.inner = inner
        self.peer = inner.peer
        self.duplex = inner.duplex

    @property
    def identity(self) -> bytes:
        """Who the peer of the channel inside has proved to be."""
        return self.inner.identity

    def recv_into(self, buffer: Buffer) -> int:
        """Receive from the channel inside."""
        return self.inner.recv_into(buffer)

    def send(self, data: Buffer) -> None:
        """Send to the channel inside."""
        self.inner.send(data)

    def end_writing(self) -> None:
        """End writing inside."""
        self.inner.end_writing()

    def close(self) -> None:
        """Close the channel inside."""
        self.inner.close()
