"""What is to be moved and how, said once for both sides; and what a side measured of it.

`whimbrel_pairs.migrate` and `qemu_pairs.migrate` both take a `Work` and return a `Run`: whoever compares them knows
neither. Sizes are in bytes unless their name says otherwise.
"""

from __future__ import annotations

from typing import Final

import attrs

MIB: Final = 1 << 20
PAGE: Final = 4096
WORDS: Final = 512  # of 8 bytes in a page
LOW: Final = MIB
"""Where a guest's working set begins: below is what a firmware needs."""
UNLIMITED: Final = 0


class RunFailed(Exception):
    """A run did not come to an end that can be measured; its text says why."""


@attrs.frozen
class Pattern:
    """What a guest writes, page after page of its working set, for ever.

    `rate` is in bytes of pages per second, 0 for as fast as it can; `words` of 512 are changed in each page. Without a
    working set it does nothing, a thousand times a second. It runs in the process of the machine, or, `apart`, in one
    of its own (ProcessGuest; a QEMU has it where a QEMU has it).
    """

    working_set: int = 0
    rate: int = 0
    words: int = 1
    apart: bool = False


@attrs.frozen(kw_only=True)
class Work:
    """One migration on this host."""

    mib: int
    """Size of RAM."""
    content: str = "random"
    """"none" (never touched), "touched" (zero all the same), "random", or "words", which can be compressed."""
    shared: bool = False
    """Whether memory is shared (memfd) at both ends, and not anonymous."""
    destination: str = "fresh"
    """"fresh" or "preallocated" memory."""
    host: str = "warm"
    """Whether the memory that a fresh destination asks for is there already: "warm" or "cold"; see `warming`."""
    transport: str = "tcp"
    """What of whimbrel's it goes over, of those whose addresses are HOST:PORT; a QEMU goes over TCP."""
    pin_all: bool = False
    """Whether all memory is registered at the start (rdma-pin-all)."""
    lanes: int = 0
    """Further connections (multifd); 0 for one connection and no more."""
    compression: str = "none"
    xbzrle: bool = False
    bandwidth: int = UNLIMITED
    """Bytes per second."""
    downtime_limit: int = 300
    """Milliseconds."""
    pattern: Pattern | None = None
    """What its guest writes; None for a guest that stands still."""
    source_image: str = ""
    """The image of a drive that goes along; none if empty."""
    destination_image: str = ""
    """The image that it goes to."""
    zero_blocks: bool = False
    before: float = 0.5
    """Seconds that a guest is watched before it is moved, if it writes."""
    bound: float = 60.0
    """Seconds after which it is taken for one that never ends, and cancelled."""

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return self.mib * MIB


@attrs.frozen(kw_only=True)
class Run:
    """What a side told of one migration, and what was seen of it from outside."""

    converged: bool
    """Whether it ended by itself within the bound; if not, all but the counts of pages mean nothing."""
    seconds: float
    """The source's own total time."""
    outside: float
    """Seconds from the order until both sides had said that it is over."""
    downtime: float
    """Milliseconds, as the source tells it."""
    rounds: int
    sent: int
    """Bytes, as the source tells it."""
    cpu: float
    """Seconds of both processes together, guests in processes of their own left out."""
    destination_cpu: float = 0.0
    """Seconds of the destination's process alone; of whimbrel's only."""
    overhead: int
    """Bytes that the source's memory grew by at most."""
    pages_before: float = 0.0
    """Pages that the guest wrote per second before."""
    pages_during: float = 0.0
    """Pages that the guest wrote per second from the order to the end, its standstill included."""
