"""`MadeImage`: an image that is made for what is loaded into it, since nobody says beforehand how large it is."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from whimbrel.errors import ConfigError
from whimbrel.machine.drives.raw import RawImage

if TYPE_CHECKING:
    from typing_extensions import Buffer

LARGEST: Final = 1 << 44
"""Bytes: what a file may have on the file systems that are in use."""


class MadeImage(RawImage):
    """A new file at `path`, sparse, which ends behind the furthest range that was written or discarded.

    Until `end_load` its `size` is `LARGEST`; from then on it is the file's, and stays. Raises ConfigError if there is
    something at `path`, or nothing can be made there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        except (OSError, ValueError) as exc:
            raise ConfigError(f"cannot make the image {os.fspath(path)!r}: {exc}") from exc
        super().__init__(path)
        self.size = LARGEST
        self.end = 0
        """Where the furthest range so far ends."""

    def write(self, offset: int, data: Buffer) -> None:
        """Write `data`, up to wherever that is."""
        super().write(offset, data)
        self.end = max(self.end, offset + memoryview(data).nbytes)

    def discard(self, offset: int, length: int) -> None:
        """Have the file reach so far, with a hole."""
        super().discard(offset, length)
        self.end = max(self.end, offset + length)

    def end_load(self) -> None:
        """Give the file its size, durably, and remove the marker."""
        os.ftruncate(self._descriptor, self.end)
        os.fsync(self._descriptor)
        self.size = self.end
        super().end_load()

    def remove(self) -> None:
        """Remove the file and its marker, as far as they can be: nobody wants what has come."""
        with suppress(OSError):
            os.unlink(self.place)  # noqa: PTH108 - as text, as it was given
        with suppress(OSError):
            self._marker.remove()
