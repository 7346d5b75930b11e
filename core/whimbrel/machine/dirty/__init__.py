"""Dirty trackers: who knows which pages were written since the last look.

=========== ==== =================================================================== =============================
name        rank how                                                                 costs
=========== ==== =================================================================== =============================
userfaultfd 30   the kernel write-protects pages and notes who writes (Linux 6.7)    1 to 2 µs per page and round
compare     20   compares memory with a copy of it, page by page                     as much memory again; a pass
                                                                                     over all memory per round
manual      10   the program says what it wrote (`RamBlock.mark_dirty`)              the program's care
=========== ==== =================================================================== =============================

`auto` takes the working one of the highest rank. What a program marks by hand counts under every tracker.

Besides the contract, each of the three knows which pages were certainly zero when it started: `untouched(region)`,
a bool array of shape (pages,). They can be sent as zero without being read; a write since then is in a later collect.

A guest in a process of its own (`whimbrel.machine.process`) writes through a mapping of its own, which `compare` sees
and the others do not: a `RemoteTracker` of what it writes works beside them then (`CombinedTracker`).
"""

from whimbrel.machine.dirty.choosing import choose
from whimbrel.machine.dirty.combined import CombinedTracker, with_guests
from whimbrel.machine.dirty.compare import CompareTracker
from whimbrel.machine.dirty.manual import ManualTracker
from whimbrel.machine.dirty.remote import RemoteTracker
from whimbrel.machine.dirty.userfaultfd import UserfaultTracker

__all__ = [
    "CombinedTracker",
    "CompareTracker",
    "ManualTracker",
    "RemoteTracker",
    "UserfaultTracker",
    "choose",
    "with_guests",
]
