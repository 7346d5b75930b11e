"""`zstd`: the pages of a lane as one Zstandard stream (RFC 8878), flushed behind each packet.

Wire format, section 5.4. Frames may end between packets: there are sources that make one of each.
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Final, cast

import numpy as np
import zstandard

from whimbrel.abc import ByteArray, Codec, CodecSpec
from whimbrel.errors import StreamError
from whimbrel.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

__all__ = ["ZstdLaneCodec", "whimbrel_codecs"]

LEVEL: Final = 1  # QEMU's default for multifd-zstd-level
MOST: Final = 20  # of levels; a QEMU takes no more
WINDOW: Final = 8 << 20  # bytes that a peer may make us remember, for each lane, unless a limit says otherwise
WINDOW_LOG: Final = 23  # of what we make a peer remember, whatever the level
_AT_ONCE: Final = 1 << 20  # bytes that are read at once, which is more than a packet has


@hookimpl
def whimbrel_codecs() -> Sequence[CodecSpec]:
    """Offer `zstd`."""
    return [
        CodecSpec(
            name="zstd",
            summary="pages as a Zstandard stream, for multifd",
            create=ZstdLaneCodec,
            create_for_lane=_for_lane,
        )
    ]


def _for_lane(parameters: Mapping[str, object]) -> Codec:
    level, window = parameters.get("multifd-zstd-level"), parameters.get("zstd-window")
    return ZstdLaneCodec(level if isinstance(level, int) else LEVEL, window if isinstance(window, int) else WINDOW)


class ZstdLaneCodec(Codec):
    """One Zstandard stream for all batches, in their order; one thread. `level` is 1 (quick) to 20 (small), 0 for 3.

    A stream that wants more than `window` bytes of what came before is refused. One instance encodes or decodes, not
    both. After an error it is of no more use.
    """

    def __init__(self, level: int = LEVEL, window: int = WINDOW) -> None:
        compressor = zstandard.ZstdCompressor(compression_params=_parameters(min(level, MOST)))
        self._window = window
        self._out = compressor.compressobj()
        self._room: ByteArray = np.empty(0, np.uint8)
        self._packet = _Packet()
        # A reader makes no more than it is asked for, whatever a frame says of its size.
        self._in = zstandard.ZstdDecompressor(max_window_size=window).stream_reader(
            cast("IO[bytes]", self._packet), read_size=_AT_ONCE, read_across_frames=True
        )

    def encode(self, pages: ByteArray) -> bytes:
        """Encode `pages` (C-contiguous, any shape) as the stream's next part, up to a flush."""
        flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK
        encoded: bytes = self._out.compress(pages.reshape(-1).data) + self._out.flush(flush)
        return encoded

    def decode(self, data: Buffer, into: ByteArray) -> None:
        """Decode the stream's next part to exactly `into.nbytes` bytes; `into` is C-contiguous.

        Raises StreamError for anything else; `into` has not changed then. At most one byte more than `into.nbytes` is
        ever made.
        """
        # One byte more than wanted: room that stays empty is what shows that nothing is held back.
        if len(self._room) <= into.nbytes:
            self._room = np.empty(into.nbytes + 1, np.uint8)
        room = self._room[: into.nbytes + 1]
        self._packet.data = bytes(data)
        have = 0
        try:
            while have < len(room):
                have += self._in.readinto1(room[have:])
        except _Dry:
            pass
        except zstandard.ZstdError as exc:
            large = "too much memory" in str(exc)
            raise StreamError(
                f"a packet does not go on with its lane's Zstandard stream: {exc}",
                hint=f"[limits] zstd-window says how much it may want: {self._window} bytes" if large else "",
            ) from exc
        if have > into.nbytes:
            raise StreamError(f"a packet decodes to more than the {into.nbytes} bytes of its pages")
        if have < into.nbytes:
            raise StreamError(f"a packet decodes to {have} bytes, expected {into.nbytes}")
        into[...] = room[:have].reshape(into.shape)


def _parameters(level: int) -> zstandard.ZstdCompressionParameters:
    """Those of a level, with a window that a destination takes by default."""
    usual = zstandard.ZstdCompressionParameters.from_level(level)
    return zstandard.ZstdCompressionParameters.from_level(
        level, window_log=min(usual.window_log, WINDOW_LOG), write_checksum=False, write_content_size=False
    )


class _Dry(Exception):
    """All of a packet has been read: there is no more yet, which is not the end."""


class _Packet:
    """What the reader reads from: one packet after the other."""

    def __init__(self) -> None:
        self.data = b""

    def read(self, size: int) -> bytes:
        if not self.data:
            raise _Dry
        data, self.data = self.data[:size], self.data[size:]
        return data
