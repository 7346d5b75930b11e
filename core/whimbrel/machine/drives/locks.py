"""The lock on an image: a write lock of an open file description over the whole file (fcntl(2), F_OFD_SETLK).

* It belongs to the descriptor: two machines of one process exclude each other like those of two, and it ends with the
  process however that ends.
* It covers the bytes that a QEMU locks, so that a QEMU and whimbrel exclude each other too.
* On NFS it is the server's, so it excludes other hosts. On a local file system, a block special file above all, it
  excludes nobody on another host.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path

# struct flock: type, whence, start, length (0 is to the end, wherever that is), and a pid that is 0 for these locks.
_FLOCK = struct.Struct("@hhqqi4x")

_REFUSED = {errno.EAGAIN, errno.EACCES}


def try_lock(descriptor: int) -> bool:
    """Lock the file of `descriptor`, which is open for writing; False if somebody else has it. Raises OSError."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as exc:
        if exc.errno in _REFUSED:
            return False
        raise
    return True


def is_locked(descriptor: int) -> bool:
    """Whether somebody else has locked the file, or a part of it. Raises OSError."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def unlock(descriptor: int) -> None:
    """Let go of the lock. Raises OSError."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def holder(descriptor: int) -> str:
    """Who has locked the file of `descriptor`, as far as this host's /proc tells; empty if it does not.

    The kernel names no process for these locks, so the descriptors of all processes are looked at: those of other
    users stay hidden.
    """
    status = os.fstat(descriptor)
    inode = f":{status.st_ino} "
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if _has_locked(process, inode, status.st_dev, status.st_ino):
                name = (process / "comm").read_text().strip()
                return "this process" if int(process.name) == os.getpid() else f"process {process.name} ({name})"
    return ""


def _has_locked(process: Path, inode: str, device: int, number: int) -> bool:
    for info in (process / "fdinfo").iterdir():
        with suppress(OSError):
            if any(line.startswith("lock:") and inode in line for line in info.read_text().splitlines()):
                status = (process / "fd" / info.name).stat()
                if (status.st_dev, status.st_ino) == (device, number):
                    return True
    return False
