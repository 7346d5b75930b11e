"""Channels to and from a regular file: one that replaces it when it is whole, and one that reads it.

What is written goes into a temporary file beside the file, of mode 0600. `end_writing` brings it to the disk and puts
it in the file's place in one step, so that there is either what was there before or all of what was sent; `close`
before that leaves what was there. A process that is killed on the way leaves the temporary file (`.whimbrel-…`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from whimbrel.errors import ChannelLost, ConfigError
from whimbrel_transports._one_way import OneWayChannel
from whimbrel_transports._sockets import reason

if TYPE_CHECKING:
    from whimbrel.abc import Patience

__all__ = ["FileReader", "FileWriter", "Place"]

CHUNK: Final = 4 << 20  # bytes of one write or copy, after which a close is noticed
BEHIND: Final = 32 << 20  # bytes after which the system is told to bring them to the disk, without waiting for it
_FULL: Final = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file may not be so large",
}

# ssize and offsets are 64 bits wide; the flag starts the writing of what is dirty, and waits for nothing.
_sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNC_FILE_RANGE_WRITE: Final = 2


class Place:
    """A name in a folder, which is held open: what becomes of the folder's own name does not matter any more."""

    def __init__(self, path: str) -> None:
        self.path = path
        folder, self.name = os.path.split(path)
        self.folder = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def look(self) -> os.stat_result | None:
        """What is there, if anything. Raises ConfigError for what is no regular file, and OSError."""
        try:
            found = os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{self.path!r} is {_kind(found.st_mode)}; expected a regular file", hint=_HINT)
        return found

    def open(self) -> int:
        """Open the file to be read, without following a link. Raises ConfigError and OSError."""
        if self.look() is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        # It may have been replaced since; not to block is for a pipe in its place.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self.name, flags, dir_fd=self.folder)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it was replaced by something else")
        return descriptor

    def make(self) -> tuple[int, str]:
        """Make a file beside it, and its name. Raises OSError."""
        name = f".whimbrel-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self.folder), name

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self.folder)


_HINT: Final = "write exec:sh -c 'cat > …' for anything else"


class FileWriter(OneWayChannel):
    """Writes a new file from `offset` on, behind what the old one has before it. Raises as `Transport.connect` does."""

    def __init__(self, path: str, offset: int, patience: Patience, peer: str) -> None:
        self._place = Place(path)
        try:
            self._place.look()
            descriptor, self._temporary = self._place.make()
        except BaseException:
            self._place.close()
            raise
        super().__init__(descriptor, peer, writes=True)
        self._start, self._told = offset, 0
        try:
            self._keep(offset, patience)
        except BaseException:
            self.close()
            raise

    def _keep(self, size: int, patience: Patience) -> None:
        """Copy the first `size` bytes of the old file; those that it does not have are zeros."""
        if self._place.look() is not None and size:
            old = self._place.open()
            try:
                left = size
                while left:
                    patience.check(f"copying the beginning of {self._place.path!r}")
                    copied = os.sendfile(self._descriptor, old, None, min(left, CHUNK))
                    if not copied:
                        break
                    left -= copied
            finally:
                os.close(old)
        os.ftruncate(self._descriptor, size)
        os.lseek(self._descriptor, size, os.SEEK_SET)

    def _write(self, data: memoryview) -> int:
        return os.write(self._descriptor, data[:CHUNK])

    def _went(self, count: int) -> None:
        super()._went(count)
        if self._done - self._told >= BEHIND:
            # Else all of it would wait in memory for the last moment, in which the machine stands still. Best effort.
            _sync_file_range(
                self._descriptor, self._start + self._told, self._done - self._told, _SYNC_FILE_RANGE_WRITE
            )
            self._told = self._done

    def _finish(self) -> None:
        os.fsync(self._descriptor)
        self._check_open()
        try:
            self._place.look()
        except ConfigError as error:
            raise ChannelLost(f"writing {self.peer} failed at its end: {error.message}") from error
        os.rename(self._temporary, self._place.name, src_dir_fd=self._place.folder, dst_dir_fd=self._place.folder)
        self._temporary = ""
        os.fsync(self._place.folder)

    def _release(self) -> None:
        if self._temporary:
            with suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._place.folder)
        super()._release()
        self._place.close()

    def _reason(self, error: OSError) -> str:
        why = _FULL.get(error.errno or 0)
        said = f"{why} ({reason(error)})" if why else reason(error)
        return f"writing {self.peer} failed after {self._done} bytes: {said}"


class FileReader(OneWayChannel):
    """Reads a file, opened as `descriptor`, which it takes over, from where it stands."""

    def __init__(self, descriptor: int, peer: str) -> None:
        super().__init__(descriptor, peer, writes=False)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def _reason(self, error: OSError) -> str:
        return f"reading {self.peer} failed after {self._done} bytes: {reason(error)}"


def _kind(mode: int) -> str:
    for is_it, name in (
        (stat.S_ISLNK, "a symbolic link, which is not followed"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if is_it(mode):
            return name
    return "a device"
