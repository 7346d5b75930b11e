"""The shared provider's shortcut: a write is one copy into the peer's memory, which this process has mapped.

The memory is that of memfds and files, whose descriptors travel over the unix socket between the two. Each end tells
the other of its regions (FILE, REGION, REVOKE), and has a control page, sealed in its size, that the other maps:

========= =====================================================================================================
word 0    not 0 while this end is copying into the other's memory
word n    the epoch of the region in slot n; a region is good for as long as the word is the one it was told with
========= =====================================================================================================

The rules it lives by:

* **What is not certain goes over the line**, where the owner's engine judges it: an unknown key, a range that does not
  fit, a region without a descriptor, one that was revoked. So refusals are the responder's, as everywhere.
* **A deregistration turns the epoch and then looks at the writer's word 0; a writer sets word 0 and then looks at the
  epoch.** Whichever comes first, none writes after `dereg` has returned: no answer of the peer is needed for that, and
  a peer that died in the middle is known by its process descriptor.
* Only the registered range is mapped, in whole pages, when it is first written; its pages are entered ahead of the
  writer, and it is unmapped behind a deregistration, on a thread beside (`_verbs_mapping`).

What this cannot do: a peer of ill will has the descriptor, and with it all of the file, for as long as it keeps it; and
it can make a file shorter, which ends whoever writes there. It is of the same user, who could do worse.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from whimbrel.errors import StreamError
from whimbrel.verbs import Access
from whimbrel_transports._verbs_copy import copy_pieces
from whimbrel_transports._verbs_frames import MAX_FILES, MAX_REGIONS, REGION, Frame, Kind
from whimbrel_transports._verbs_mapping import Mapping, Paging
from whimbrel_transports._verbs_memory import MAX_REGION, AddressArray, Domain, Keys, Region, Regions, inside

if TYPE_CHECKING:
    from whimbrel_transports._verbs_line import Line

__all__ = ["SharedMemory"]

_WORDS: Final = MAX_REGIONS + 1
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_CHUNK: Final = 16 << 20  # bytes copied between two looks at the epochs
_SPARSE: Final = 16  # times more is entered than written, at most
_LETTING_GO: Final = 5.0  # seconds a writer has to end a chunk
_CREDENTIALS: Final = struct.Struct("iII")

_log = logging.getLogger("whimbrel.transports.verbs")


class _Words:
    """A control page. Its words are read and written whole, as the processor does for aligned ones."""

    def __init__(self, fd: int, *, write: bool) -> None:
        self._mapping = Mapping(fd, 0, 4 * _WORDS, write=write)
        self._words = (ctypes.c_uint32 * _WORDS).from_address(self._mapping.address)
        self._fence = threading.Lock()

    def get(self, index: int) -> int:
        return self._words[index]

    def set(self, index: int, value: int) -> None:
        self._words[index] = value
        with self._fence:  # taking a lock is a barrier: what is read from now on is read after the word was written
            pass

    def close(self) -> None:
        self._mapping.close()


@attrs.define(eq=False)
class _Theirs:
    """A region of the peer's, as it was told."""

    address: int
    length: int
    file: int
    offset: int
    slot: int
    epoch: int
    mapping: Mapping | None = None
    hopeless: bool = False  # it cannot be mapped


class SharedMemory:
    """What one end knows of the other's memory, and tells of its own. Fits `_verbs_pair.Shortcut`."""

    def __init__(self, line: Line, connected: socket.socket, regions: Regions) -> None:
        self._line, self._regions = line, regions
        self.pd: Domain | None = None
        self._process = _open_process(connected)
        self._control = os.memfd_create("whimbrel:verbs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._control, 4 * _WORDS)
        fcntl.fcntl(self._control, fcntl.F_ADD_SEALS, _SEALS)
        self._ours = _Words(self._control, write=True)
        self._telling = threading.Lock()  # so that a region is told of behind its file
        self._connected = False
        self._ended = False
        self._paging = Paging()
        self._told: set[int] = set()
        self._files: dict[tuple[int, int], tuple[int, int]] = {}  # (device, inode) → (number, our descriptor)
        self._told_files: set[int] = set()
        self._using = threading.Lock()  # of what is the peer's; held while it is copied into
        self._words: _Words | None = None
        self._their_files: dict[int, int] = {}
        self._theirs: dict[int, _Theirs] = {}
        self._closed = False

    # ------------------------------------------------------------------------------------------- ours, told

    def keep(self, region: Region) -> None:
        """A region of ours is new: hold on to its file, and tell the peer if there is one."""
        if region.fd is None or Access.REMOTE_WRITE not in region.access:
            return
        with self._telling:
            found = os.fstat(region.fd)
            identity = found.st_dev, found.st_ino
            if identity not in self._files:
                if not stat.S_ISREG(found.st_mode) or len(self._files) >= MAX_FILES or self._ended:
                    return  # its writes go over the line
                self._files[identity] = 1 + len(self._files), os.dup(region.fd)
            region.file = self._files[identity][0]
            self._tell(region)

    def begin(self) -> None:
        """Tell of the control page, and of what is registered already."""
        with self._telling, suppress(OSError):
            self._line.send(Frame(Kind.CONTROL, count=_WORDS), files=[self._control])
            self._connected = True
            for region in self._regions.alive():
                self._tell(region)

    def revoke(self, region: Region) -> None:
        """A region of ours is no more: returns when the peer does not write into it."""
        if not region.file:
            return
        self._ours.set(region.slot, self._ours.get(region.slot) + 1 & 0xFFFFFFFF)
        with self._telling:
            told = region.rkey in self._told
            self._told.discard(region.rkey)
            if told and not self._ended:
                self._line.say(Frame(Kind.REVOKE, region.rkey))
        if told:
            self._await_writer()

    def _tell(self, region: Region) -> None:
        if not self._connected or not region.file or region.pd is not self.pd or region.rkey in self._told:
            return
        descriptor = next(fd for number, fd in self._files.values() if number == region.file)
        with suppress(OSError):  # the engine will see that the line broke
            if region.file not in self._told_files:
                self._line.send(Frame(Kind.FILE, number=region.file), files=[descriptor])
                self._told_files.add(region.file)
            self._told.add(region.rkey)
            epoch = self._ours.get(region.slot)
            body = REGION.pack(region.address, region.length, region.file, region.fd_offset, epoch, 0)
            frame = Frame(Kind.REGION, region.rkey, region.slot, len(body))
            self._line.send(frame, body)

    def _await_writer(self) -> None:
        """Wait until the peer is not copying; whoever begins now will see the new epoch."""
        words = self._words
        end = time.monotonic() + _LETTING_GO
        pause = threading.Event()
        while words is not None and words.get(0) and not self._has_died():
            if time.monotonic() > end:
                _log.error("a verbs peer has been in the middle of a write for %g s: giving up on it", _LETTING_GO)
                self._line.hang_up()
                return
            pause.wait(0.0005)

    def _has_died(self) -> bool:
        if self._process is None:
            return False
        poller = select.poll()
        poller.register(self._process, select.POLLIN)
        return bool(poller.poll(0))

    # ------------------------------------------------------------------------------------------- theirs, written

    def write(self, sources: AddressArray, targets: AddressArray, keys: Keys, lengths: AddressArray) -> bool:
        """Copy a batch into the peer's memory; False if the line must carry it, all of it."""
        with self._using:
            if self._words is None or self._closed or not len(lengths):
                return False
            distinct = [keys] if isinstance(keys, int) else np.unique(keys).tolist()
            regions: list[_Theirs] = []
            places = targets.copy()
            for key in distinct:
                region = self._theirs.get(key)
                mine = slice(None) if isinstance(keys, int) or len(distinct) == 1 else keys == key
                if region is None or not inside(region.address, region.length, targets[mine], lengths[mine]):
                    return False
                mapping = self._mapped(region)
                if mapping is None:
                    return False
                places[mine] += np.uint64((mapping.address - region.address) % (1 << 64))
                if not mapping.entered:
                    _enter(mapping, places[mine], lengths[mine])
                regions.append(region)
            return self._copy(regions, self._words, sources, places, lengths)

    def _copy(
        self, regions: list[_Theirs], words: _Words, sources: AddressArray, places: AddressArray, lengths: AddressArray
    ) -> bool:
        chunks = (np.cumsum(lengths) - lengths) // np.uint64(_CHUNK)
        cuts = [0, *(np.flatnonzero(chunks[1:] != chunks[:-1]) + 1).tolist(), len(lengths)]
        for first, last in pairwise(cuts):
            self._ours.set(0, 1)
            try:
                if any(words.get(region.slot) != region.epoch for region in regions):
                    return False
                copy_pieces(sources[first:last], places[first:last], lengths[first:last])
            except OSError as error:
                _log.warning("%s", error)
                return False
            finally:
                self._ours.set(0, 0)
        return True

    def _mapped(self, region: _Theirs) -> Mapping | None:
        if region.mapping is None and not region.hopeless:
            fd = self._their_files.get(region.file)
            try:
                if fd is None or os.fstat(fd).st_size < region.offset + region.length:
                    region.hopeless = True
                else:
                    region.mapping = Mapping(fd, region.offset, region.length, write=True)
                    self._paging.enter(region.mapping)
            except OSError as error:
                _log.warning("%s; its writes go over the line", error)
                region.hopeless = True
        return region.mapping

    def take(self, frame: Frame) -> None:
        """A word about the peer's memory. Raises StreamError for one that makes no sense."""
        if frame.kind is Kind.REGION:
            body = self._line.receive_bytes(frame.size)
            with self._using:
                self._take_region(frame, body)
        elif frame.kind is Kind.REVOKE:
            with self._using:
                region = self._theirs.pop(frame.word, None)
                if region is None:
                    raise StreamError(f"a verbs peer revokes the key {frame.word:#010x}, which it never told of")
                if region.mapping is not None:
                    self._paging.unmap(region.mapping)
        elif frame.kind in {Kind.CONTROL, Kind.FILE}:
            if not self._line.files:
                raise StreamError(f"a verbs frame {frame.kind.name} came without a descriptor")
            descriptor = self._line.files.pop()
            with self._using:
                try:
                    self._take_file(frame, descriptor)
                except OSError as error:
                    os.close(descriptor)
                    raise StreamError(f"what a verbs peer shares cannot be used: {error}") from error
                except BaseException:
                    os.close(descriptor)
                    raise
        else:
            raise StreamError(f"a verbs frame {frame.kind.name} came on a line that is made")

    def _take_file(self, frame: Frame, descriptor: int) -> None:
        """A descriptor of the peer's; it is still the caller's if this raises."""
        if frame.kind is Kind.FILE:
            if not 0 < frame.number <= MAX_FILES or frame.number in self._their_files:
                raise StreamError(f"a verbs peer shares a file as number {frame.number}")
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StreamError("a verbs peer shares a file that is none")
            self._their_files[frame.number] = descriptor
            return
        if self._words is not None or frame.count != _WORDS:
            raise StreamError(f"a verbs peer has a control page of {frame.count} words; expected one of {_WORDS}")
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        if not sealed or os.fstat(descriptor).st_size != 4 * _WORDS:
            raise StreamError("a verbs peer's control page is not sealed, or of another size")
        self._words = _Words(descriptor, write=False)
        os.close(descriptor)

    def _take_region(self, frame: Frame, body: bytearray) -> None:
        address, length, file, offset, epoch, zero = REGION.unpack(body)
        fits = 0 < length <= MAX_REGION and 0 < address < (1 << 63) and offset < (1 << 62) and not zero
        if not fits or not 0 < frame.number < _WORDS or file not in self._their_files:
            raise StreamError(f"a verbs peer tells of a region of {length} bytes at {address:#x} that cannot be")
        if frame.word in self._theirs or len(self._theirs) >= MAX_REGIONS:
            raise StreamError(f"a verbs peer tells of the key {frame.word:#010x} twice, or of too many")
        self._theirs[frame.word] = _Theirs(address, length, file, offset, frame.number, epoch)

    # ------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Let go of what is the peer's. Ours stays until `release`."""
        with self._using:
            self._closed = True
            for region in self._theirs.values():
                if region.mapping is not None:
                    self._paging.unmap(region.mapping)
            self._theirs.clear()
            for descriptor in self._their_files.values():
                os.close(descriptor)
            self._their_files.clear()

    def release(self) -> None:
        """Let go of the rest; the pair is closed, and no region is left."""
        self._paging.close()
        with self._telling:
            self._ended = True
            for _, descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()
            if self._words is not None:
                self._words.close()
                self._words = None
            self._ours.close()
            os.close(self._control)
            if self._process is not None:
                os.close(self._process)
                self._process = None


def _enter(mapping: Mapping, places: AddressArray, lengths: AddressArray) -> None:
    """Have the pages of pieces entered, unless they lie so far apart that a fault for each costs less."""
    first, last = int(places.min()), int((places + lengths).max())
    if last - first <= _SPARSE * int(lengths.sum()):
        mapping.enter(first, last - first)


def _open_process(connected: socket.socket) -> int | None:
    """A descriptor of the peer's process, to know whether it lives; None where the kernel gives none."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, _, _ = _CREDENTIALS.unpack(raw)
    try:
        return os.pidfd_open(process)
    except OSError:
        return None
