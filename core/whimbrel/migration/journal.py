"""A machine's journal: who owned it when, written down before it becomes so.

One file for a machine, which one process at a time holds. A record is a line: the CRC-32 of the rest in hexadecimal,
a space, a JSON object. Records are only ever appended. What a crash leaves half written at the end is cut off when the
journal is opened; a line that is wrong anywhere else is damage, and the journal is refused.

Without a folder the same records are kept in memory, and a crash forgets them.

`note` writes a record, `sync` makes durable what was noted, `append` does both. If the storage fails, what was written
is taken back as far as it can be; a journal that could not even do that takes no more records.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

import attrs

from whimbrel.errors import JournalError

ID_SIZE: Final = 16
REMEMBERED: Final = 256  # attempts whose last record is kept when a journal is written anew
COMPACT: Final = 1 << 20  # bytes from which on a journal is written anew as it is opened
LONGEST: Final = 1 << 16  # bytes of a line; a longer one is damage


@attrs.frozen(kw_only=True)
class Record:
    """One thing that happened: in which attempt, to which side of it, and why.

    `mid` is the attempt's id in hexadecimal, empty for what belongs to none; `role` is "source", "destination" or
    "machine"; `ownership` what the side may do from then on; `peer` the URI of the destination;
    `deal` how it hands over.
    """

    mid: str
    role: str
    ownership: str
    epoch: int
    why: str = ""
    peer: str = ""
    deal: str = ""
    at: float = attrs.field(factory=time.time)  # seconds since 1970; for people, nothing follows from it


def new_mid() -> bytes:
    """The id of a new attempt; nobody can guess it."""
    return secrets.token_bytes(ID_SIZE)


class Journal:
    """The records of one machine; any thread. `path` is None for one that is kept in memory."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._fd = -1
        self._good = 0  # bytes of the file that are whole records
        self._broken = False
        self._lock = threading.Lock()
        self._attempts: OrderedDict[str, Record] = OrderedDict()  # the last record of each
        self._last: Record | None = None
        self._epoch = 0

    @classmethod
    def open(cls, folder: Path, name: str) -> Self:
        """Open or make the journal of the machine `name` in `folder`, which is made too (0700).

        Raises JournalError if another process holds it, if it is damaged, or if the storage fails.
        """
        journal = cls()
        path = folder / f"{_file_name(name)}.journal"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            journal._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            journal.path = path
            journal._hold()
            journal._read()
            if journal._good > COMPACT:
                journal._compact()
            _sync_folder(folder)
        except OSError as exc:
            journal.close()
            raise JournalError(f"the journal {path} cannot be opened: {exc.strerror}") from exc
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def last(self) -> Record | None:
        """The newest record."""
        return self._last

    @property
    def epoch(self) -> int:
        """The highest epoch in any record; 0 without one."""
        return self._epoch

    def of(self, mid: bytes) -> Record | None:
        """The newest record of an attempt, or None for one that was never heard of."""
        with self._lock:
            return self._attempts.get(mid.hex())

    def note(self, record: Record) -> None:
        """Write a record. A crash may forget it. Raises JournalError; nothing was written then."""
        with self._lock:
            self._write(record)
            self._remember(record)

    def sync(self) -> None:
        """Make durable whatever was noted. Raises JournalError, and then it is not known whether it is."""
        if self._fd >= 0:
            try:
                os.fdatasync(self._fd)
            except OSError as exc:
                raise JournalError(f"the journal {self.path} cannot be made durable: {exc.strerror}") from exc

    def append(self, record: Record) -> None:
        """Write a record durably. Raises JournalError; it counts as not written then, and is written over."""
        with self._lock:
            before = self._good
            self._write(record)
            try:
                self.sync()
            except JournalError:
                self._take_back(before)
                raise
            self._remember(record)

    def close(self) -> None:
        """Let go of the file. Twice is fine."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    # ---------------------------------------------------------------------------------------- the file

    def _hold(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise JournalError(
                f"the journal {self.path} is held by another process",
                hint="a machine has one process; end the other one first",
            ) from exc

    def _read(self) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            number = 0
            while line := file.readline(LONGEST):
                number += 1
                record = _parse(line)
                if record is None:
                    if file.read(1) or not _torn(line):
                        raise JournalError(
                            f"line {number} of the journal {self.path} is damaged",
                            hint="whoever knows where the machine runs may move the file away and start afresh",
                        )
                    break  # a crash while it was written
                self._good += len(line)
                self._remember(record)
        os.ftruncate(self._fd, self._good)

    def _write(self, record: Record) -> None:
        if self.path is None:
            return
        if self._broken or self._fd < 0:
            raise JournalError(f"the journal {self.path} takes no more records: its storage has failed")
        line = _format(record)
        try:
            if os.pwrite(self._fd, line, self._good) != len(line):
                raise OSError(0, "only a part was written")
        except OSError as exc:
            self._take_back(self._good)
            raise JournalError(f"the journal {self.path} cannot be written: {exc.strerror}") from exc
        self._good += len(line)

    def _take_back(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
            self._good = size
        except OSError:
            self._broken = True

    def _remember(self, record: Record) -> None:
        self._last = record
        self._epoch = max(self._epoch, record.epoch)
        if record.mid:
            self._attempts[record.mid] = record
            self._attempts.move_to_end(record.mid)
            while len(self._attempts) > REMEMBERED:
                self._attempts.popitem(last=False)

    def _compact(self) -> None:
        """Write the journal anew with the last record of each attempt, in their order, and the very last."""
        assert self.path is not None, "in memory there is nothing to write anew"
        records = list(self._attempts.values())
        if self._last is not None and (not records or records[-1] is not self._last):
            records.append(self._last)
        data = b"".join(map(_format, records))
        new = self.path.with_suffix(".new")
        with suppress(FileNotFoundError):
            new.unlink()
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
            new.rename(self.path)
        except BaseException:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._good = fd, len(data)


def read(path: Path) -> Iterator[Record]:
    """The whole records of a journal, whoever holds it; for people who want to know. Raises JournalError, OSError."""
    with path.open("rb") as file:
        while line := file.readline(LONGEST):
            record = _parse(line)
            if record is None:
                if file.read(1) or not _torn(line):
                    raise JournalError(f"the journal {path} is damaged")
                return
            yield record


def _format(record: Record) -> bytes:
    text = json.dumps(attrs.asdict(record), separators=(",", ":"), ensure_ascii=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _torn(line: bytes) -> bool:
    """Whether a wrong last line is one that a crash has left half written: without its end, or with a hole in it."""
    return not line.endswith(b"\n") or b"\0" in line


def _parse(line: bytes) -> Record | None:
    """The record of a line, None if it is not a whole one."""
    text = line[9:-1]
    if not line.endswith(b"\n") or line[8:9] != b" " or line[:8] != b"%08x" % zlib.crc32(text):
        return None
    try:
        values: Mapping[str, Any] = json.loads(text)
        return Record(**values)
    except (ValueError, TypeError):
        return None


def _file_name(name: str) -> str:
    """A machine's name as a file's: what a path could not carry is written in hexadecimal."""
    return "".join(c if c.isalnum() or c in "-_" or (c == "." and i) else f"%{ord(c):02x}" for i, c in enumerate(name))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
