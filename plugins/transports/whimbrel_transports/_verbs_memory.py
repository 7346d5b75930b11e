"""Registered memory of the emulated verbs: who may touch what, and since when no more.

The rules it lives by:

* **Judged as a batch**: bounds are compared for all pieces at once, by subtraction, so that no sum can wrap around.
* **A region that is used stays**: whoever writes into registered memory on behalf of a peer holds the region (`using`),
  and its deregistration waits for that to end, or cuts the peer off that does not let it end.
* Keys are random, so that a stale or guessed one fits nothing.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from whimbrel.errors import ChannelClosed, ConfigError
from whimbrel.verbs import Access, Context, MemoryRegion, ProtectionDomain
from whimbrel_transports._verbs_frames import MAX_REGIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["MAX_REGION", "AddressArray", "Domain", "Keys", "Refused", "Region", "Regions", "inside"]

AddressArray: TypeAlias = npt.NDArray[np.uint64]
Keys: TypeAlias = npt.NDArray[np.uint32] | int

MAX_REGION: Final = 1 << 46
_LETTING_GO: Final = 5.0  # seconds a peer in the middle of a write has, when the memory is taken from it


class Refused(Exception):
    """A key, or a range outside of its region; internal, for it becomes a completion."""


class Region(MemoryRegion):
    """One registration."""

    def __init__(
        self, regions: Regions, pd: Domain, address: int, length: int, access: Access,
        fd: int | None = None, fd_offset: int = 0,
    ) -> None:  # fmt: skip
        self.address, self.length, self.access, self.pd = address, length, access, pd
        self.fd, self.fd_offset = fd, fd_offset
        self.lkey = self.rkey = self.slot = 0  # given by `Regions.add`
        self.file = 0  # the number it goes by where it is shared
        self.users = 0
        self.alive = True
        self._regions = regions

    def dereg(self) -> None:
        """End the registration, as `MemoryRegion.dereg` says."""
        self._regions.remove(self)


class Domain(ProtectionDomain):
    """Says which regions belong together."""

    def __init__(self, context: Context, regions: Regions) -> None:
        self.context = context
        self._regions = regions
        self._closed = False

    def reg_mr(
        self, address: int, length: int, access: Access, *, fd: int | None = None, fd_offset: int = 0
    ) -> MemoryRegion:
        """Register memory, as `ProtectionDomain.reg_mr` says."""
        if self._closed:
            raise ChannelClosed("the protection domain was closed")
        if not 0 < length <= MAX_REGION or address <= 0 or address + length >= 1 << 63:
            raise ConfigError(
                f"cannot register {length} bytes at {address:#x}: expected 1 to {MAX_REGION} of a process"
            )
        if Access.REMOTE_WRITE in access and Access.LOCAL_WRITE not in access:
            raise ConfigError("cannot register memory for REMOTE_WRITE without LOCAL_WRITE")
        if fd is not None:
            _check_file(fd, fd_offset, length)
        return self._regions.add(Region(self._regions, self, address, length, access, fd, fd_offset))

    def close(self) -> None:
        """Deregister what is left."""
        self._closed = True
        for region in self._regions.of(self):
            region.dereg()


class Regions:
    """The regions of one context. Any thread.

    `on_add` is called with each new region, `on_remove` once nobody may begin to use it any more, and returns when the
    peer does not either; `cut` breaks the connection of a peer that does not stop.
    """

    def __init__(self) -> None:
        self.on_add: Callable[[Region], None] = _nothing
        self.on_remove: Callable[[Region], None] = _nothing
        self.cut: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._local: dict[int, Region] = {}
        self._remote: dict[int, Region] = {}
        self._slots: list[int] = []  # given back
        self._used = 0  # slots, ever
        self._closed = False

    def add(self, region: Region) -> Region:
        """Give it keys. Raises ConfigError where there are too many, ChannelClosed."""
        with self._changed:
            if self._closed:
                raise ChannelClosed("the verbs context was closed")
            if not self._slots and self._used >= MAX_REGIONS:
                raise ConfigError(f"{MAX_REGIONS} regions are registered, and no more can be")
            region.lkey, region.rkey = _fresh(self._local), _fresh(self._remote)
            region.slot = self._slots.pop() if self._slots else self._another_slot()
            self._local[region.lkey] = self._remote[region.rkey] = region
        self.on_add(region)
        return region

    def remove(self, region: Region) -> None:
        """Take its keys back, and wait until nobody writes into it."""
        with self._changed:
            if not region.alive:
                return
            region.alive = False
            del self._local[region.lkey], self._remote[region.rkey]
        if not self._let_go(region, _LETTING_GO):
            self.cut()
            self._let_go(region, float("inf"))  # its socket is shut down, so nobody can be inside for long
        self.on_remove(region)
        with self._changed:
            self._slots.append(region.slot)

    def close(self) -> None:
        """Deregister everything; none can be added from now on."""
        with self._changed:
            self._closed = True
        for region in self.alive():
            self.remove(region)

    def alive(self) -> list[Region]:
        """Those that are registered now."""
        with self._changed:
            return list(self._local.values())

    def of(self, pd: Domain) -> list[Region]:
        """Those of one domain."""
        return [region for region in self.alive() if region.pd is pd]

    def check_local(self, pd: Domain, keys: Keys, addresses: AddressArray, lengths: AddressArray) -> None:
        """Raise Refused unless each piece lies inside of the region of its lkey."""
        with self._changed:
            self._find(self._local, pd, Access(0), keys, addresses, lengths)

    @contextmanager
    def reading(self, pd: Domain, keys: Keys, addresses: AddressArray, lengths: AddressArray) -> Iterator[None]:
        """Hold the regions that pieces of ours are read from. Raises Refused, holding none, unless all are inside."""
        with self._held(self._local, pd, Access(0), keys, addresses, lengths):
            yield

    @contextmanager
    def using_local(self, pd: Domain, key: int, address: int, length: int) -> Iterator[None]:
        """Hold the region that a receive was posted for. Raises Refused if it is none of ours, or not to be written."""
        with self._held(self._local, pd, Access.LOCAL_WRITE, key, *_single(address, length)):
            yield

    @contextmanager
    def using_remote(self, pd: Domain, keys: Keys, addresses: AddressArray, lengths: AddressArray) -> Iterator[None]:
        """Hold the regions that a peer writes into. Raises Refused, holding none, unless every piece is allowed."""
        with self._held(self._remote, pd, Access.REMOTE_WRITE, keys, addresses, lengths):
            yield

    @contextmanager
    def _held(
        self, table: dict[int, Region], pd: Domain, access: Access, keys: Keys, addresses: AddressArray,
        lengths: AddressArray,
    ) -> Iterator[None]:  # fmt: skip
        with self._changed:
            held = self._find(table, pd, access, keys, addresses, lengths)
            for region in held:
                region.users += 1
        try:
            yield
        finally:
            with self._changed:
                for region in held:
                    region.users -= 1
                self._changed.notify_all()

    def _find(
        self, table: dict[int, Region], pd: Domain, access: Access, keys: Keys, addresses: AddressArray,
        lengths: AddressArray,
    ) -> list[Region]:  # fmt: skip
        distinct = [keys] if isinstance(keys, int) else np.unique(keys).tolist()
        found: list[Region] = []
        for key in distinct:
            region = table.get(key)
            if region is None or region.pd is not pd:
                raise Refused(f"there is no region with the key {key:#010x}")
            if access not in region.access:
                raise Refused(f"the region with the key {key:#010x} does not allow {access.name}")
            mine = slice(None) if isinstance(keys, int) or len(distinct) == 1 else keys == key
            if not inside(region.address, region.length, addresses[mine], lengths[mine]):
                raise Refused(f"a piece lies outside of the region with the key {key:#010x}")
            found.append(region)
        return found

    def _another_slot(self) -> int:
        self._used += 1
        return self._used

    def _let_go(self, region: Region, seconds: float) -> bool:
        end = time.monotonic() + seconds
        with self._changed:
            while region.users:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 1.0))
        return True


def _nothing(region: Region) -> None:
    """What there is to do about a region where nobody shares it."""


def inside(address: int, length: int, addresses: AddressArray, lengths: AddressArray) -> bool:
    """Whether all pieces lie inside of a range."""
    room = np.uint64(length)
    offsets = addresses - np.uint64(address)  # what lies before wraps around to more than any length
    return bool(((lengths <= room) & (offsets <= room - np.minimum(lengths, room))).all())


def _single(address: int, length: int) -> tuple[AddressArray, AddressArray]:
    return np.array([address], np.uint64), np.array([length], np.uint64)


def _fresh(taken: dict[int, Region]) -> int:
    while True:
        key = secrets.randbits(32)
        if key and key not in taken:
            return key


def _check_file(fd: int, offset: int, length: int) -> None:
    try:
        size = os.fstat(fd).st_size
    except OSError as error:
        raise ConfigError(f"cannot register memory of descriptor {fd}: {error}") from error
    if offset < 0 or offset + length > size:
        raise ConfigError(f"cannot register {length} bytes at {offset} of descriptor {fd}: it has {size}")
