"""`zlib`: pages as zlib streams (RFC 1950).

A page by itself is a complete one, as COMPRESS_PAGE records have it (wire format, section 2.1). A lane is one stream
from its first packet to its last, each of which ends with a sync flush (section 5.4).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

import numpy as np

from whimbrel.abc import ByteArray, Codec, CodecSpec
from whimbrel.errors import StreamError
from whimbrel.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

__all__ = ["ZlibCodec", "ZlibLaneCodec", "whimbrel_codecs"]

LEVEL: Final = 1  # QEMU's default for compress-level and multifd-zlib-level
MOST: Final = 9  # of levels; a QEMU takes a 10 as a setting


@hookimpl
def whimbrel_codecs() -> Sequence[CodecSpec]:
    """Offer `zlib`."""
    return [
        CodecSpec(
            name="zlib",
            summary="pages as zlib streams, for compress and multifd",
            create=ZlibCodec,
            create_for_lane=_for_lane,
        )
    ]


def _for_lane(parameters: Mapping[str, object]) -> Codec:
    level = parameters.get("multifd-zlib-level")
    return ZlibLaneCodec(level if isinstance(level, int) else LEVEL)


class ZlibCodec(Codec):
    """Each batch is a zlib stream of its own, whatever came before; any thread. `level` is 0 (quick) to 9 (small)."""

    def __init__(self, level: int = LEVEL) -> None:
        self._level = level

    def encode(self, pages: ByteArray) -> bytes:
        """Encode `pages` (C-contiguous, any shape) as one complete zlib stream."""
        return zlib.compress(pages.data, self._level)

    def decode(self, data: Buffer, into: ByteArray) -> None:
        """Inflate one complete zlib stream to exactly `into.nbytes` bytes; `into` is C-contiguous.

        Raises StreamError for anything else, be it one byte more in `data` or out of it; `into` has not changed then.
        At most one byte more than `into.nbytes` is ever inflated.
        """
        stream = zlib.decompressobj()
        try:
            # One byte more than wanted: room that stays empty is what lets it read on to the end of the stream.
            pages = stream.decompress(data, into.nbytes + 1)
        except zlib.error as exc:
            raise StreamError(f"a compressed page is no zlib stream: {exc}") from exc
        if len(pages) > into.nbytes:
            raise StreamError(f"a compressed page inflates to more than the {into.nbytes} bytes of a page")
        if not stream.eof:
            raise StreamError(f"a compressed page ends in the middle, after {len(pages)} of {into.nbytes} bytes")
        if len(pages) < into.nbytes:
            raise StreamError(f"a compressed page inflates to {len(pages)} bytes, expected {into.nbytes}")
        if stream.unused_data:
            raise StreamError(f"{len(stream.unused_data)} bytes follow the zlib stream of a compressed page")
        into[...] = np.frombuffer(pages, np.uint8).reshape(into.shape)


class ZlibLaneCodec(Codec):
    """One zlib stream for all batches, in their order; one thread. `level` is 0 (quick) to 9 (small).

    One instance encodes or decodes, not both. After an error it is of no more use.
    """

    def __init__(self, level: int = LEVEL) -> None:
        self._out = zlib.compressobj(min(level, MOST))
        self._in = zlib.decompressobj()

    def encode(self, pages: ByteArray) -> bytes:
        """Encode `pages` (C-contiguous, any shape) as the stream's next part, up to a sync flush."""
        return self._out.compress(pages.data) + self._out.flush(zlib.Z_SYNC_FLUSH)

    def decode(self, data: Buffer, into: ByteArray) -> None:
        """Inflate the stream's next part to exactly `into.nbytes` bytes; `into` is C-contiguous.

        Raises StreamError for anything else, a stream that ends included; `into` has not changed then. At most one byte
        more than `into.nbytes` is ever inflated.
        """
        try:
            # One byte more than wanted: room that stays empty is what lets it read on to the flush.
            pages = self._in.decompress(data, into.nbytes + 1)
        except zlib.error as exc:
            raise StreamError(f"a packet does not go on with its lane's zlib stream: {exc}") from exc
        if len(pages) > into.nbytes:
            raise StreamError(f"a packet inflates to more than the {into.nbytes} bytes of its pages")
        if self._in.eof:
            raise StreamError("the zlib stream of a lane ends, expected one from the first packet to the last")
        if len(pages) < into.nbytes:
            raise StreamError(f"a packet inflates to {len(pages)} bytes, expected {into.nbytes}")
        into[...] = np.frombuffer(pages, np.uint8).reshape(into.shape)
