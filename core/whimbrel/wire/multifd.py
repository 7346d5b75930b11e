"""What goes over a lane (`multifd`): its first 64 bytes, and packets (wire format, section 5).

A packet has a header of 1344 bytes and is of one RAM block: up to 128 pages whose bytes follow the header, as they are
or encoded together, and pages that are zero, which cost no more than their place in the header. Offsets are numpy
arrays; no Python runs per page.
"""

from __future__ import annotations

import re
import struct
from enum import Enum, IntFlag
from functools import lru_cache
from hashlib import sha256
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.abc import ByteArray, IndexArray
from whimbrel.errors import StreamError
from whimbrel.wire.primitives import checked_name
from whimbrel.wire.ram import PAGE_SIZE, consecutive
from whimbrel.wire.skeleton import LANE_MAGIC

MAGIC: Final = LANE_MAGIC
VERSION: Final = 1
INIT_SIZE: Final = 64
UUID_SIZE: Final = 16
LANES_MAX: Final = 256  # the number of a lane is one byte; settings allow one less

PAGES_MAX: Final = 128
HEADER_SIZE: Final = 320 + 8 * PAGES_MAX
PAYLOAD_MAX: Final = 1 << 20  # bytes; what a QEMU 7.2 has room for, and more than any codec makes of 128 pages

TOKEN_SIZE: Final = 32
_TOKEN_MAGIC: Final = b"whmb\0\0\0"  # in a room that QEMU leaves zero, and does not look at: a token follows
_INIT: Final = struct.Struct(">II16sB7s32s")
_HEAD: Final = struct.Struct(">IIIIIIQI28x256s")

_NO_INDICES: Final[IndexArray] = np.empty(0, np.intp)


class PacketFlag(IntFlag):
    """The flags of a packet; the method's bits say what its payload is."""

    SYNC = 0x01
    ZLIB = 0x02
    ZSTD = 0x04
    QPL = 0x08
    UADK = 0x10
    QATZIP = 0x20
    DEVICE_STATE = 0x40


METHOD_MASK: Final = 0x3E
OTHER_METHOD: Final = 0x3E  # what no QEMU uses: a codec that both ends have agreed on by name

METHODS: Final = {"none": 0, "zlib": int(PacketFlag.ZLIB), "zstd": int(PacketFlag.ZSTD)}
"""The methods that a QEMU 7.2 has, each with its bits."""

_QEMUS_LATER: Final = {int(PacketFlag.QPL): "qpl", int(PacketFlag.UADK): "uadk", int(PacketFlag.QATZIP): "qatzip"}

# As plain numbers: operations on flags themselves take microseconds, and each packet has a few.
_SYNC: Final = int(PacketFlag.SYNC)
_DEVICE_STATE: Final = int(PacketFlag.DEVICE_STATE)


def method_bits(name: str) -> int:
    """The bits of packets whose payload `name` has made."""
    return METHODS.get(name, OTHER_METHOD)


def method_name(bits: int) -> str:
    """What packets with these bits hold, for messages."""
    names = {bits: name for name, bits in METHODS.items()} | _QEMUS_LATER
    return names.get(bits, f"another codec's ({bits:#04x})")


# ------------------------------------------------------------------------------------------------------------- modes


class LaneMode(Enum):
    """What lanes and the main channel share out between them: a property of the machine's type (section 5.7)."""

    EACH_SECTION = "up to 8.0"  # a sync before the EOS of each body; zero pages are records on the main channel
    EACH_ROUND = "8.1 and 8.2"  # a sync, and a MULTIFD_FLUSH on the main channel, per round
    ZERO_PAGES_IN_PACKETS = "from 9.0"  # zero pages are in the packets too

    @property
    def sync_each_body(self) -> bool:
        """Whether each body ends with a sync, and no word on the main channel says so."""
        return self is LaneMode.EACH_SECTION

    @property
    def takes_zeros(self) -> bool:
        """Whether zero pages go over lanes."""
        return self is LaneMode.ZERO_PAGES_IN_PACKETS


_VERSIONED: Final = re.compile(r"-([0-9]{1,4})\.([0-9]{1,4})\Z")


def mode_of(machine: str) -> LaneMode:
    """The mode for a machine of this name: QEMU's by the version in it, the newest for any without one."""
    found = _VERSIONED.search(machine)
    if found is None:
        return LaneMode.ZERO_PAGES_IN_PACKETS
    version = int(found[1]), int(found[2])
    if version <= (8, 0):
        return LaneMode.EACH_SECTION
    return LaneMode.EACH_ROUND if version < (9, 0) else LaneMode.ZERO_PAGES_IN_PACKETS


# ------------------------------------------------------------------------------------------------------ the beginning


@attrs.frozen
class Init:
    """What a lane begins with: the UUID of the machine that it is of (16 bytes, zeros for none), and its number.

    A whimbrel's may bring a token too (`token_of`), which is empty in others.
    """

    uuid: bytes
    number: int
    token: bytes = b""


def encode_init(init: Init) -> bytes:
    """The first 64 bytes of a lane: a QEMU's, byte for byte, without a token."""
    marked = _TOKEN_MAGIC if init.token else b""
    return _INIT.pack(MAGIC, VERSION, init.uuid, init.number, marked, init.token)


def parse_init(data: memoryview) -> Init:
    """Read the first 64 bytes of a lane. Raises StreamError for another magic or version."""
    magic, version, uuid, number, marked, token = _INIT.unpack(data)
    _check_head(magic, version, "a lane")
    return Init(uuid, number, token if marked == _TOKEN_MAGIC else b"")


def token_of(mid: bytes) -> bytes:
    """What binds the lanes of the attempt `mid` to it (TOKEN_SIZE bytes): from it nobody can tell the id."""
    return sha256(b"whimbrel lane" + mid).digest()


def _check_head(magic: int, version: int, what: str) -> None:
    if magic != MAGIC:
        raise StreamError(f"{what} begins with {magic:#010x}, expected {MAGIC:#010x}")
    if version != VERSION:
        raise StreamError(f"{what} has version {version}, expected {VERSION}")


# ----------------------------------------------------------------------------------------------------------- packets


@attrs.frozen(eq=False)
class Packet:
    """What a packet's header says.

    `pages` are the numbers of the pages whose bytes follow, (n,), in the order of the payload, and `zeros`, (z,), of
    those that are zero; both inside of no block as yet. `block` is "" where there are neither. `size` is how many bytes
    follow, `method` says how they are encoded; both are 0 without pages.
    """

    sync: bool
    number: int
    block: str = ""
    method: int = 0
    size: int = 0
    pages: IndexArray = _NO_INDICES
    zeros: IndexArray = _NO_INDICES
    run: slice | None = None
    """`pages` as a slice, where each is the one before plus one."""

    def check_inside(self, size: int) -> None:
        """Raise StreamError unless all of its pages are inside of a block of `size` bytes."""
        for indices, run in ((self.pages, self.run), (self.zeros, None)):
            if len(indices) and (last := int(indices.max()) if run is None else run.stop - 1) >= size // PAGE_SIZE:
                raise StreamError(
                    f"a page at {last * PAGE_SIZE:#x} is outside of block {self.block!r} of {size:#x} bytes"
                )


class PacketStage:
    """The header of one packet, made anew in the same place; one thread. `header` is to be sent, from `address`."""

    def __init__(self) -> None:
        self.header: ByteArray = np.zeros(HEADER_SIZE, np.uint8)
        self.address = self.header.ctypes.data
        self._offsets = self.header[320:].view(">u8")

    def pages(self, number: int, block: str, method: int, size: int, pages: IndexArray, zeros: IndexArray) -> None:
        """Make the header of a packet with at most PAGES_MAX pages and zero pages, of which `size` bytes follow."""
        count = len(pages)
        self._head(method if count else 0, count, size, number, len(zeros), block)
        self._offsets[:count] = pages * PAGE_SIZE
        self._offsets[count : count + len(zeros)] = zeros * PAGE_SIZE

    def sync(self, number: int) -> None:
        """Make the header of a packet that says SYNC and holds nothing: a QEMU 9.2.0 would lose what it held."""
        self._head(_SYNC, 0, 0, number, 0, "")

    def _head(self, flags: int, pages: int, size: int, number: int, zeros: int, block: str) -> None:
        # The offsets behind those in use are stale, as a QEMU's are.
        _HEAD.pack_into(
            self.header.data, 0, MAGIC, VERSION, flags, PAGES_MAX, pages, size, number, zeros, block.encode("ascii")
        )


def parse_packet(data: memoryview, method: int) -> Packet:
    """Read the header of a packet (1344 bytes) on a lane whose payloads have the bits of `method`.

    Raises StreamError for whatever may not be, except for pages outside of a block (`Packet.check_inside`). What a QEMU
    7.2 leaves in packets without pages, a size and a name, is passed over.
    """
    magic, version, flags, allocated, pages, size, number, zeros, name = _HEAD.unpack_from(data)
    _check_head(magic, version, "a packet")
    if flags & _DEVICE_STATE:
        raise StreamError(f"packet {number} holds device state, which has no place here")
    if flags & ~(METHOD_MASK | _SYNC):
        raise StreamError(
            f"packet {number} has flags {flags:#x}, of which {flags & ~(METHOD_MASK | _SYNC):#x} are unknown"
        )
    if allocated > PAGES_MAX:
        raise StreamError(f"packet {number} has room for {allocated} pages, at most {PAGES_MAX} may be")
    if pages + zeros > allocated:
        raise StreamError(f"packet {number} has {pages} pages and {zeros} zero pages, and room for {allocated}")
    sync = bool(flags & _SYNC)
    if not pages + zeros:
        return Packet(sync, number)
    if pages:
        _check_payload(number, flags & METHOD_MASK, method, pages, size)
    indices = _indices(data, pages + zeros, number)
    if not pages:
        return Packet(sync, number, _block(name), zeros=indices)
    normal = indices[:pages]
    return Packet(sync, number, _block(name), method, size, normal, indices[pages:], consecutive(normal))


def _check_payload(number: int, came: int, method: int, pages: int, size: int) -> None:
    if came != method:
        raise StreamError(
            f"the payload of packet {number} is {method_name(came)}, expected {method_name(method)}",
            hint="multifd-compression must be the same at both ends",
        )
    if size > PAYLOAD_MAX:
        raise StreamError(f"{size} bytes follow packet {number}, at most {PAYLOAD_MAX} may")
    if not method and size != pages * PAGE_SIZE:
        raise StreamError(f"{size} bytes follow packet {number}, expected {pages * PAGE_SIZE}: {pages} pages")


def _indices(data: memoryview, count: int, number: int) -> IndexArray:
    offsets: npt.NDArray[np.uint64] = np.frombuffer(data, ">u8", count, 320).astype(np.uint64)
    if int(np.bitwise_or.reduce(offsets)) % PAGE_SIZE:
        raise StreamError(f"packet {number} has an offset that is not of a whole page")
    # 52 bits at most are left, so the page numbers are exact as signed integers.
    return (offsets >> np.uint64(12)).view(np.int64).astype(np.intp, copy=False)


@lru_cache(maxsize=64)  # packet after packet is of the same block
def _block(name: bytes) -> str:
    text, _, _ = name.partition(b"\0")
    if not text:
        raise StreamError("a packet with pages names no RAM block")
    return checked_name(text, "a RAM block")
