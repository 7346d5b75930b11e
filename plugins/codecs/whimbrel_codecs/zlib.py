"""`zlib`: pages as complete zlib streams (RFC 1950), as COMPRESS_PAGE records have them (wire format, section 2.1)."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

import numpy as np

from whimbrel.abc import ByteArray, Codec, CodecSpec
from whimbrel.errors import StreamError
from whimbrel.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

__all__ = ["ZlibCodec", "whimbrel_codecs"]

LEVEL: Final = 1  # QEMU's default for compress-level


@hookimpl
def whimbrel_codecs() -> Sequence[CodecSpec]:
    """Offer `zlib`."""
    return [CodecSpec(name="zlib", summary="pages as zlib streams, capability compress", create=ZlibCodec)]


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
