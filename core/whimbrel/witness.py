"""The contract of witnesses: a cell for each attempt, which belongs to whoever writes it first.

A source and a destination that cannot hear one another any more still may not both run a machine. If both can reach a
third place that lets exactly one of two writers win, the winner runs and the loser does not: that place is a witness.

How it is used, by either side::

    spec = plugins.witness("folder")            # "folder:/mnt/shared" is a kind and a place
    witness = spec.create("/mnt/shared")        # reaches nothing yet
    witness.probe(patience)                     # while giving up is free
    owner = witness.claim(mid, "source", patience)

The rules it lives by:

* **A cell is written once.** The first claim that is whole decides, for ever; those that come later learn whose it is.
* **A cell belongs to one attempt**, and is found by the attempt's id (`mid`), never by the machine's name: with one
  cell for all attempts a late word of an old attempt makes two run.
* **What is not known is an error.** A claim that raises may have been written or not, and the caller may not run. It
  may ask again as often as it likes: a claim by the same `who` is the same claim.
* **An answer is durable**: whoever was told an owner may rely on it after a failure of anybody's power.
* **What makes no sense is an error too**, never a free cell.
* **Both sides must be at the same place.** A folder that is not mounted is another place. So the source claims the cell
  `meeting(mid)` while it is still free to give up, and the destination agrees only if it finds it there.

`who` is of one process: two that claim by one name both win.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from whimbrel.errors import WitnessError

if TYPE_CHECKING:
    from whimbrel.abc import Patience

__all__ = ["CELL_MAX", "MID_SIZE", "Witness", "WitnessSpec", "cell", "meeting", "owner"]

MID_SIZE: Final = 16
"""Bytes of the id of an attempt."""
CELL_MAX: Final = 128
"""Bytes of the longest cell."""

_WHO: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_CELL: Final = re.compile(rb"whimbrel ([0-9a-f]{32}) ([a-z0-9][a-z0-9._-]{0,63}) ([0-9a-f]{8})\n")


class Witness(ABC):
    """One place where cells are kept. One thread at a time; `close` from any, when nobody waits in it.

    Whatever waits asks its `patience`: MigrationCancelled if that was told to stop, WitnessError if its time is up. A
    call that gave up so may still take effect later, as one that raised may.
    """

    @abstractmethod
    def probe(self, patience: Patience) -> None:
        """Write and read a cell of no attempt's, and see that the first writer keeps it; leaves nothing behind.

        Raises WitnessError if that cannot be done: it is out of reach, read-only, or keeps no promises.
        """

    @abstractmethod
    def claim(self, mid: bytes, who: str, patience: Patience) -> str:
        """Write the cell of the attempt `mid` (16 bytes) if it is free; returns who owns it, which may be another.

        Raises WitnessError if that cannot be known, and ValueError for a `mid` or a `who` that no cell can have.
        """

    @abstractmethod
    def read(self, mid: bytes, patience: Patience) -> str | None:
        """Who owns the attempt `mid`; None if its cell was free. Raises as `claim` does."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Twice is fine."""


@attrs.frozen(kw_only=True)
class WitnessSpec:
    """An offer of a kind of witness.

    `create` makes the one at a place, which is what follows `name:` in a setting. It reaches nothing, and raises
    ConfigError for a place that cannot be one.
    """

    name: str
    summary: str
    create: Callable[[str], Witness]


def meeting(mid: bytes) -> bytes:
    """The id of the cell that shows that both sides of the attempt `mid` are at the same place."""
    return hashlib.sha256(b"whimbrel meeting" + mid).digest()[:MID_SIZE]


def cell(mid: bytes, who: str) -> bytes:
    """What a cell holds: one line of text, which tells by itself whose it is, of which attempt, and that it is whole.

    Raises ValueError for a `mid` that has not 16 bytes, or a `who` that is more than 64 small letters, digits, dots and
    hyphens.
    """
    if len(mid) != MID_SIZE:
        raise ValueError(f"the id of an attempt has {MID_SIZE} bytes, and this has {len(mid)}")
    if not _WHO.fullmatch(who):
        raise ValueError(f"expected 1 to 64 small letters, digits, dots and hyphens to claim for, and got {who!r}")
    text = b"%s %s" % (mid.hex().encode(), who.encode())
    return b"whimbrel %s %08x\n" % (text, zlib.crc32(text))


def owner(mid: bytes, data: bytes, place: str) -> str:
    """Whose the cell of `mid` is that holds `data`; `place` is for messages. Raises WitnessError for anything else."""
    found = _CELL.fullmatch(data) if len(data) <= CELL_MAX else None
    if found is None or b"%08x" % zlib.crc32(b" ".join(found.groups()[:2])) != found[3]:
        raise WitnessError(
            f"the cell of attempt {mid.hex()} in {place} holds {data[:CELL_MAX]!r}, which is not what a claim writes",
            hint="it is neither free nor anybody's; see what else writes there",
        )
    if found[1] != mid.hex().encode():
        raise WitnessError(f"the cell of attempt {mid.hex()} in {place} says that it is of {found[1].decode()}")
    return found[2].decode()
