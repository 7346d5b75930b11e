"""The drives of a machine: `Drives` holds them, a `Drive` is what the guest reads and writes, a `RawImage` keeps it.

What a guest in a process of its own has of them is in `lent`.
"""

from whimbrel.machine.drives.drive import CHUNK, Drive, DriveFile
from whimbrel.machine.drives.drives import Drives, Leaving
from whimbrel.machine.drives.lent import GuestDrives
from whimbrel.machine.drives.made import MadeImage
from whimbrel.machine.drives.raw import RawImage

__all__ = ["CHUNK", "Drive", "DriveFile", "Drives", "GuestDrives", "Leaving", "MadeImage", "RawImage"]
