"""The file beside an image that says that the image is not whole: a load into it has begun and has not ended.

It is there, on the disk itself, before the first byte of the image changes, and goes when everything is flushed. A
crash of any kind leaves it. Whoever knows better removes it by hand.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

SUFFIX: Final = ".whimbrel-incomplete"

_TEXT: Final = """\
A migration was loaded into {name} and has not ended: the image is not whole, and whimbrel does not use it.
Load it again. If you know that it is whole all the same, remove this file.
"""


class Marker:
    """The marker of one image.

    It lies beside the file itself, whichever link leads there. A block special file has its own beside the path it was
    opened by: what is in /dev is gone with the next start of the system.
    """

    def __init__(self, image: Path, mode: int) -> None:
        self._image = image if stat.S_ISBLK(mode) else image.resolve()
        self.path = self._image.with_name(self._image.name + SUFFIX)

    def is_there(self) -> bool:
        """Whether the image is marked. Raises OSError if that cannot be told."""
        return os.path.lexists(self.path)

    def put(self) -> None:
        """Mark the image, durably. Raises OSError; an image that was not marked is not marked then."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            self._sync_folder()  # whoever made it may have died before
            return
        try:
            os.write(descriptor, _TEXT.format(name=self._image.name).encode())
            os.fsync(descriptor)
            self._sync_folder()
        except OSError:
            with suppress(OSError):
                self.path.unlink()
            raise
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Take the mark away, durably. Raises OSError; where it is not there, nothing happens."""
        self.path.unlink(missing_ok=True)
        self._sync_folder()

    def _sync_folder(self) -> None:
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
