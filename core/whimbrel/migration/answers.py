"""What a destination says to its source, over a channel with a way back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

from whimbrel.abc import Channel
from whimbrel.errors import ChannelError
from whimbrel.migration.deadline import Deadline
from whimbrel.wire.return_path import Message, Shut, encode

LINGER: Final = 2.0  # seconds a refused source is listened to, so that it hears why before the connection goes


def answerer(channel: Channel) -> Callable[[Message], None]:
    """What sends messages on the return path; raises ChannelError as `Channel.send` does."""
    return lambda message: channel.send(encode(message))


def refuse(channel: Channel) -> None:
    """Say SHUT 1 and listen on for a moment, so that the word is not lost in a reset. Raises nothing of the channel."""
    if not channel.duplex:
        return
    sink = memoryview(bytearray(1 << 16))
    with suppress(ChannelError), Deadline(LINGER, channel):
        channel.send(encode(Shut(1)))
        channel.end_writing()
        while channel.recv_into(sink):
            pass
