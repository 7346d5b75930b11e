"""What a stream amounts to, reckoned at both ends and compared before the destination says that it holds everything.

Over the whole migration: how many bytes of the main stream there were, and what every iterable handler tallied: that
every page of every block has come. Over the devices: a SHA-256 of the bodies of their sections. What pages hold is not
reckoned, since the guest writes them while they go; that they arrive as they went is the link's part.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from whimbrel.errors import StreamError
from whimbrel.migration.savevm import Registry
from whimbrel.wire.commands import Digest
from whimbrel.wire.primitives import U32, U64, str8

if TYPE_CHECKING:
    from typing_extensions import Buffer


class StreamDigest:
    """One side's reckoning; one thread. `devices` hears every byte of the bodies of devices, in their order."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._devices = hashlib.sha256()

    def devices(self, data: Buffer) -> None:
        """Some more bytes of a device's body have gone, or come."""
        self._devices.update(data)

    def of_what_was_sent(self, size: int) -> Digest:
        """The digest, with `size` bytes of the stream before it."""
        pages = 0
        whole = hashlib.sha256(self._devices.digest())
        for _, handler in sorted(self._registry.iterable, key=lambda item: (item[1].idstr, item[1].instance_id)):
            for name, count in sorted(handler.tally().items()):
                pages += count
                whole.update(str8(handler.idstr) + U32.pack(handler.instance_id))
                whole.update(str8(name) + U64.pack(count))
        return Digest(pages, size, whole.digest())

    def compare(self, theirs: Digest, size: int) -> None:
        """Raise StreamError unless what has come, with `size` bytes before it, is what was sent."""
        ours = self.of_what_was_sent(size)
        if theirs.size != ours.size:
            raise StreamError(f"the source has sent {theirs.size} bytes, {ours.size} have come")
        if theirs.pages != ours.pages:
            raise StreamError(f"the source has sent {theirs.pages} pages and chunks of drives, {ours.pages} have come")
        if theirs.sha256 != ours.sha256:
            raise StreamError(
                "what has come is not what was sent: the digests differ",
                hint="the link, a plugin or a handler has changed it on the way; the source goes on",
            )
