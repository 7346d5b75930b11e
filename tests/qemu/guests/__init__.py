"""Guests for a real QEMU, of a few hundred bytes each, and what their memory must look like.

The sources are beside this file, and beside each its bytes as hexadecimal text, so that nobody needs an assembler
(`assemble` writes them anew; a test compares the two). All say A on the first serial port when they begin, and
B again and again as long as they run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

PAGE: Final = 4096
LOW: Final = 1 << 20
"""Where the guests' own pages begin."""

FOLDER: Final = Path(__file__).parent
_PARAMETERS: Final = 0x1F0  # in a boot sector: where its pages end, and how many rounds it makes before it says B
_OFTEN: Final = 1 << 17  # pages written from one B to the next, some tens of milliseconds where writes are tracked


def code(name: str) -> bytes:
    """The bytes of a guest, as they were assembled."""
    return bytes.fromhex((FOLDER / f"{name}.hex").read_text())


def high(mib: int) -> int:
    """Where the pages of a guest end on a machine of `mib` MiB; the firmware keeps its tables in the MiB above."""
    return (mib - 1) << 20


def sweep(mib: int) -> bytes:
    """A boot sector that adds one to the first byte of every page of LOW..high(mib), for ever; see `check_sweep`."""
    return _boot_sector("sweep", high(mib))


def mix(mib: int) -> bytes:
    """A boot sector that changes the pages of LOW..high(mib) in all the ways that XBZRLE tells apart, for ever."""
    return _boot_sector("mix", high(mib))


def tiny() -> bytes:
    """A firmware of 64 KiB for a machine without any other: it counts in one page."""
    start = code("tiny")
    jump = bytes.fromhex("ea 0000 00f0")  # to f000:0000, where the firmware begins; this is where a processor does
    return (start.ljust(0xFFF0, b"\0") + jump).ljust(0x10000, b"\0")


def _boot_sector(name: str, end: int) -> bytes:
    every = max(1, _OFTEN // ((end - LOW) // PAGE))
    parameters = end.to_bytes(4, "little") + every.to_bytes(4, "little")
    whole = code(name)
    return whole[:_PARAMETERS] + parameters + whole[_PARAMETERS + len(parameters) :]


def check_sweep(memory: bytes) -> None:
    """Judge the memory of a stopped `sweep`: `memory` is that of LOW..high.

    The first bytes of its pages are n + 1 up to some page, and n from there on; all others are zero. Raises
    AssertionError with the first page that is wrong.
    """
    pages = np.frombuffer(memory, np.uint8).reshape(-1, PAGE)
    other = np.flatnonzero(pages[:, 1:].any(axis=1))
    if len(other):
        raise AssertionError(
            f"{len(other)} pages have bytes that no guest wrote, the first at {LOW + other[0] * PAGE:#x}"
        )
    first = pages[:, 0]
    steps = np.flatnonzero(np.diff(first))
    if len(steps) > 1 or any(int(first[at]) != (int(first[at + 1]) + 1) % 256 for at in steps):
        shown = [f"{LOW + (at + 1) * PAGE:#x}: {first[at]} then {first[at + 1]}" for at in steps[:4].tolist()]
        raise AssertionError(f"the sweep has {len(steps)} steps where one, downwards by 1, may be; {'; '.join(shown)}")
