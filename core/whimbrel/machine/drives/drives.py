"""`Drives`: all drives of a machine, and who may write to them.

A drive's lock says which side owns the machine's disks. A machine takes the locks before its guest runs for the first
time, keeps them while it is paused, and lets go of them only when it was handed over; a destination takes them before
it runs. Where both sides have images of their own, each lock is taken on its own side; where they share one, the lock
alone passes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

from whimbrel.abc import BlockDevice
from whimbrel.errors import ConfigError, IncompatibleError, StateError
from whimbrel.machine.drives.drive import Drive
from whimbrel.machine.drives.gate import Gate
from whimbrel.machine.drives.lent import UnknownDrive
from whimbrel.machine.drives.raw import RawImage

__all__ = ["Drives", "Leaving"]


class Leaving(Enum):
    """What of the drives goes along when the machine leaves."""

    NOTHING = "nothing"  # both sides see the same images
    EVERYTHING = "everything"
    ALLOCATED = "allocated"  # what is allocated: the destination has the rest already


class Drives:
    """The drives of one machine, in the order they were added. `check_may_change` raises while none may be added."""

    def __init__(self, check_may_change: Callable[[], None]) -> None:
        self._check_may_change = check_may_change
        self._drives: dict[str, Drive] = {}
        self._gate = Gate()
        self.leaving = Leaving.NOTHING
        """What goes along with the migration that is about to begin."""

    def add(self, name: str, path_or_device: str | os.PathLike[str] | BlockDevice, read_only: bool = False) -> Drive:
        """Add a drive: an image (a regular or block special file that is there) or a device of the program's own.

        A device belongs to the machine then, which closes it. Raises ConfigError if the name is taken or not 1 to 255
        printable ASCII characters, or if the image cannot be opened; StateError while the machine's parts are fixed.
        Nothing is added then.
        """
        self._check_may_change()
        if not (name.isascii() and name.isprintable() and 1 <= len(name) <= 255):
            raise ConfigError(f"a drive's name has 1 to 255 printable ASCII characters, got {name!r}")
        if name in self._drives:
            raise ConfigError(f"there is already a drive {name!r}")
        if isinstance(path_or_device, BlockDevice):
            device = path_or_device
            if read_only and not device.read_only:
                raise ConfigError(f"the device of drive {name!r} is not read-only: make it so")
        else:
            device = RawImage(path_or_device, read_only=read_only)
        drive = self._drives[name] = Drive(name, device, self._gate)
        return drive

    def __getitem__(self, name: str) -> Drive:
        """The drive of that name; raises UnknownNameError, which is a KeyError too here."""
        try:
            return self._drives[name]
        except KeyError:
            raise UnknownDrive(name, list(self._drives)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._drives

    def __iter__(self) -> Iterator[Drive]:
        return iter(list(self._drives.values()))

    def __len__(self) -> int:
        return len(self._drives)

    @property
    def writable(self) -> list[Drive]:
        """Those that a migration is about: not read-only, and not of no bytes."""
        return [drive for drive in self if drive.size and not drive.read_only]

    # ------------------------------------------------------------------------------------ the guest's writes

    def admit(self) -> None:
        """Let the guest write; the locks are held."""
        self._gate.open()

    def bar(self) -> None:
        """Let nobody write any more; returns when no write is under way."""
        self._gate.close()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Let the guest write for the length of a `with`."""
        self.admit()
        try:
            yield
        finally:
            self.bar()

    # --------------------------------------------------------------------------------------------- ownership

    def acquire(self) -> None:
        """Take the locks of all drives, so that the machine may run; all of them or none.

        Raises StateError for an image that somebody else uses or that is incomplete.
        """
        taken: list[Drive] = []
        try:
            for drive in self:
                new = not drive.device.acquired
                drive.use()
                if new:
                    taken.append(drive)
        except BaseException:
            for drive in taken:
                drive.let_go()
            raise

    def release(self) -> None:
        """Let go of all locks: the machine is somebody else's, or about to be."""
        for drive in self:
            drive.let_go()

    def flush(self) -> None:
        """Make durable what was written to any of them. Raises OSError."""
        for drive in self.writable:
            drive.flush()

    def refuse_unsent(self) -> None:
        """Raise IncompatibleError for a drive that was not sent and that the source, which holds its lock, has not got.

        Called at the destination while the source still has its locks: an image that both see is locked now.
        """
        for drive in self.writable:
            if not (drive.device.acquired or drive.device.in_use()):
                raise IncompatibleError(
                    f"drive {drive.name!r} was not sent, and {drive.device.place!r} is not the source's image: nobody "
                    "holds its lock",
                    hint="migrate with block=True (blk), or let both sides have the same image",
                )

    def take_over(self) -> None:
        """Become the owner at the destination: all locks are ours then, and every load has ended. All or none.

        Raises StateError where somebody else still has a lock, or the storage fails.
        """
        missing = [drive for drive in self.writable if not drive.device.acquired]
        try:
            for drive in missing:
                drive.use()
                drive.device.invalidate()
            for drive in self.writable:
                if drive.loading:
                    drive.end_load()
            self.acquire()
        except BaseException as exc:
            for drive in missing:
                drive.let_go()
            if isinstance(exc, OSError):
                raise StateError(f"the drives cannot be taken over: {exc}") from exc
            raise

    def close(self) -> None:
        """Close all images, and with them the locks. Twice is fine."""
        self.bar()
        for drive in self:
            drive.close()
