"""folder: a witness in a folder that both hosts have mounted, such as `folder:/mnt/shared/witness`.

A cell is a file, named by its attempt, that comes to be by link(2): a file is written whole under a name of its own,
made durable, and then linked to the cell's name, which fails if there is one. So a cell is never half written, and of
two that link one fails, on NFS too: there the server decides.

What link(2) returns is not asked for whose the cell is: over NFS the answer to a link that was made may be lost, and
the retry then fails. What the cell holds decides, once the folder is durable.

The folder is not made here: one that is missing is most likely not mounted, and a local folder in its place would let
both sides win. Files are 0600, so both hosts use one user; nothing is ever removed but what a probe or a claim made for
itself.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from stat import S_ISREG
from typing import Final, TypeVar

from whimbrel.abc import Patience
from whimbrel.errors import ConfigError, WitnessError
from whimbrel.hookspecs import hookimpl
from whimbrel.witness import CELL_MAX, MID_SIZE, Witness, WitnessSpec, cell, owner
from whimbrel_witnesses._hand import Hand

__all__ = ["FolderWitness", "whimbrel_witnesses"]

T = TypeVar("T")

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe of that name blocks nobody


@hookimpl
def whimbrel_witnesses() -> Sequence[WitnessSpec]:
    """Offer `folder`."""
    return [WitnessSpec(name="folder", summary="a folder that both hosts have mounted", create=FolderWitness)]


class FolderWitness(Witness):
    """Cells in the folder `path`, which must be absolute and is there already."""

    def __init__(self, path: str) -> None:
        if not path.startswith("/") or "\0" in path:
            raise ConfigError(f"a witness in a folder needs an absolute path, such as folder:/mnt/shared, not {path!r}")
        self._path = path
        self._hand = Hand()

    def probe(self, patience: Patience) -> None:
        """Claim a cell of no attempt's twice, see that the first has it, and remove it."""
        self._do(self._probe, patience, "probed")

    def claim(self, mid: bytes, who: str, patience: Patience) -> str:
        """Link a file of `who` to the cell's name, and see whose is there."""
        data = cell(mid, who)
        return self._do(lambda folder: self._claim(folder, mid, data), patience, f"claimed for {who}")

    def read(self, mid: bytes, patience: Patience) -> str | None:
        """Whose is there."""
        name = _name(mid)
        return self._do(lambda folder: self._owner(folder, mid, name), patience, "read")

    def close(self) -> None:
        """Nothing is held between two calls."""

    # ------------------------------------------------------------------------------- with the folder open

    def _do(self, call: Callable[[int], T], patience: Patience, what: str) -> T:
        def opened() -> T:
            try:
                with _opened(self._path, _FOLDER) as folder:
                    return call(folder)
            except OSError as exc:
                raise WitnessError(
                    f"the witness in the folder {self._path} cannot be {what}: {exc.strerror or exc}",
                    hint="see that it is mounted, and writable for this user",
                ) from exc

        return self._hand.do(opened, patience, f"the witness in the folder {self._path} is {what}")

    def _probe(self, folder: int) -> None:
        mid = secrets.token_bytes(MID_SIZE)
        try:
            for who in ("first", "second"):
                found = self._claim(folder, mid, cell(mid, who))
                if found != "first":
                    raise WitnessError(f"the folder {self._path} lets the second of two writers win: {found} did")
        finally:
            with suppress(FileNotFoundError):
                os.unlink(_name(mid), dir_fd=folder)

    def _claim(self, folder: int, mid: bytes, data: bytes) -> str:
        name = _name(mid)
        new = f".{name}.{secrets.token_hex(8)}"
        failed: OSError | None = None
        try:
            _write(folder, new, data)
            try:
                os.link(new, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except OSError as exc:
                failed = exc  # or not: what is there tells
        finally:
            with suppress(OSError):
                os.unlink(new, dir_fd=folder)
        found = self._owner(folder, mid, name)
        if found is None:
            raise failed or WitnessError(f"the cell that was linked in the folder {self._path} is not there")
        return found

    def _owner(self, folder: int, mid: bytes, name: str) -> str | None:
        try:
            with _opened(name, _READ, folder) as fd:
                if not S_ISREG(os.fstat(fd).st_mode):
                    raise WitnessError(f"the cell {self._path}/{name} is not a regular file")
                data = _read(fd)
        except FileNotFoundError:
            return None
        # Whoever linked it may have died before he had made it durable.
        os.fsync(folder)
        return owner(mid, data, f"the folder {self._path}")


@contextmanager
def _opened(path: str, flags: int, folder: int | None = None) -> Iterator[int]:
    fd = os.open(path, flags, 0o600, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


def _write(folder: int, name: str, data: bytes) -> None:
    with _opened(name, _NEW, folder) as fd:
        if os.write(fd, data) != len(data):
            raise OSError(0, "only a part was written")
        os.fsync(fd)


def _read(fd: int) -> bytes:
    """What a file holds, or a byte more than any cell has."""
    data = b""
    while len(data) <= CELL_MAX and (more := os.read(fd, CELL_MAX + 1 - len(data))):
        data += more
    return data


def _name(mid: bytes) -> str:
    if len(mid) != MID_SIZE:
        raise ValueError(f"the id of an attempt has {MID_SIZE} bytes, and this has {len(mid)}")
    return f"{mid.hex()}.owner"
