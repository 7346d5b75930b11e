"""The contracts: what transports, channels, savevm handlers, codecs, dirty trackers, drives and guests must do.

Each callback says, like a kernel header: who calls it, on which thread, with what locks, how often, and what it
leaves behind on failure. Names of threads used below:

* *migration thread*: one per outgoing migration, made by it, ended with it;
* *return-path thread*: reads the destination's answers, one per outgoing migration over a duplex channel;
* *incoming thread*: one per incoming migration;
* *any thread*: must be safe beside all others.

Abilities are declared, not probed: a spec says what its plugin can do (`duplex`, `iterable`, …), the plan is made
from that before a byte is sent, and the conformance suites hold plugins to it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from enum import Enum, IntEnum
from threading import Event as Flag
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar, runtime_checkable

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.errors import ConnectError, MigrationCancelled

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "ArrivingLanes",
    "BlockDevice",
    "BoolArray",
    "ByteArray",
    "Channel",
    "Codec",
    "CodecSpec",
    "DeltaCodec",
    "DepartingLanes",
    "DirtyTracker",
    "DirtyTrackerSpec",
    "Encoded",
    "GatheringChannel",
    "Guest",
    "IndexArray",
    "IterableHandler",
    "LendableDrive",
    "Listener",
    "MemoryRegion",
    "MigrationPlan",
    "Outcome",
    "PageSink",
    "Parser",
    "Patience",
    "Peek",
    "Progress",
    "RamControl",
    "RemoteMemory",
    "RemoteWritingChannel",
    "RemotelyWrittenChannel",
    "SaveVMHandler",
    "SaveVMSpec",
    "ScatteringChannel",
    "SectionKind",
    "Slice",
    "StreamReader",
    "StreamWriter",
    "Transport",
    "TransportSpec",
    "WatchfulChannel",
]

ByteArray: TypeAlias = npt.NDArray[np.uint8]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
IndexArray: TypeAlias = npt.NDArray[np.intp]

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------- transports


@attrs.define(eq=False)
class Patience:
    """How long, and on whose behalf, a blocking call may wait. Any thread may set `cancelled`.

    Implementations wait in slices of at most 50 ms, or on something that `cancelled` wakes, and call `check`.
    """

    seconds: float
    cancelled: Flag = attrs.field(factory=Flag)
    _started: float = attrs.field(factory=time.monotonic, init=False)

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._started + self.seconds - time.monotonic())

    def check(self, what: str) -> None:
        """Raise MigrationCancelled if told to stop, ConnectError if the time is up."""
        if self.cancelled.is_set():
            raise MigrationCancelled(f"cancelled while {what}")
        if self.remaining() <= 0:
            raise ConnectError(f"no answer within {self.seconds:g} s while {what}")


class Channel(ABC):
    """One stream of bytes between two processes, reliable and in order.

    One thread reads and one other thread writes at a time; `close` may come from any thread at any time and wakes
    both. Failures are `ChannelLost` (it broke) or `ChannelClosed` (we closed it), and once broken stays broken. The
    end of the peer's bytes looks the same for a finished peer and a dead one, so nothing may be concluded from it.
    """

    peer: str
    """Who is at the other end, for messages."""
    duplex: bool
    """Whether bytes travel both ways. Without it there is no return path and so no proof from the destination."""
    exposed: bool = False
    """Whether its bytes leave this host in the clear; known once it is connected."""

    @property
    def identity(self) -> bytes:
        """Who the peer has proved to be: a digest, the same for all channels of one peer; empty if it has not."""
        return b""

    @abstractmethod
    def recv_into(self, buffer: Buffer) -> int:
        """Wait for at least one byte, store as many as are there; returns the count, 0 at the end of the stream.

        `buffer` is writable and not empty. Called in a loop by one thread; releases the interpreter's lock.
        """

    @abstractmethod
    def send(self, data: Buffer) -> None:
        """Send all of `data` (any buffer type; empty sends nothing); returns when it may be overwritten.

        Called by one thread; releases the interpreter's lock. After a failure part of the data may have gone.
        """

    @abstractmethod
    def end_writing(self) -> None:
        """Tell the peer that no more bytes come, and go on reading. Twice is fine."""

    @abstractmethod
    def close(self) -> None:
        """Release everything and wake whoever is blocked in this channel. Any thread; twice is fine."""


@runtime_checkable
class GatheringChannel(Protocol):
    """A channel that can also send memory by address, many pieces at once; an ability, declared by having it."""

    def send_gathered(self, vectors: npt.NDArray[np.uint64]) -> None:
        """Send the pieces that `vectors` names (address and length in bytes, shape (n, 2), C order), in order.

        The caller keeps the memory alive; what is written into it meanwhile may or may not be sent. `vectors` may be
        changed. Threads, errors and the state after them are those of `Channel.send`.
        """


@runtime_checkable
class ScatteringChannel(Protocol):
    """A channel that can also receive straight into memory by address; an ability, declared by having it."""

    def recv_scattered(self, vectors: npt.NDArray[np.uint64]) -> None:
        """Fill the pieces that `vectors` names (address and length in bytes, shape (n, 2), C order), in order.

        Returns when all of them are full. The caller keeps the memory alive; `vectors` may be changed. Threads are
        those of `Channel.recv_into`. Raises ChannelError; ChannelLost if the stream ends before.
        """


class RamControl(Enum):
    """Which body of the RAM section a hook is about (QEMU's RAM_CONTROL_SETUP, _ROUND and _FINISH)."""

    SETUP = 0  # START
    ROUND = 1  # a PART
    FINISH = 3  # END


@runtime_checkable
class RemoteWritingChannel(Protocol):
    """A channel that also writes pages straight into the peer's RAM, past the stream; an ability, declared by it.

    The RAM handler calls it at the source, on the migration thread: for each body of its section `before`, `save_pages`
    any number of times (in START never), `after`. All raise ChannelError, and StreamError for what the peer answers;
    the channel is of no more use then.
    """

    @property
    def ram_written(self) -> int:
        """Bytes of RAM that have been taken care of so far, in whatever way. Any thread."""

    def ram_control_before_iterate(self, flags: RamControl, regions: Sequence[MemoryRegion]) -> None:
        """A body begins: its HOOK word was sent, and the peer's RAM handler has left the stream for the hook.

        `regions` are the blocks in the order in which START lists them, the same each time.
        """

    def ram_save_pages(self, region: int, memory: ByteArray, indices: IndexArray, zero: BoolArray) -> int:
        """Have pages of the region of that number be at the peer; returns how many went as zeros, without their bytes.

        `memory` has shape (size,) and stays; `indices` are ascending page numbers, shape (n,), each at most once in a
        body, and `zero`, of the same shape, says which of them were found to be zero. What is written into them
        meanwhile may or may not be sent. Returns before they have arrived.
        """

    def ram_control_after_iterate(self, flags: RamControl) -> None:
        """The body ends, its EOS is about to be written: returns when all of its pages are at the peer."""


class RemoteMemory(Protocol):
    """The RAM that a peer may be let write into, as `RemotelyWrittenChannel` sees it. Called on the incoming thread."""

    @property
    def regions(self) -> Sequence[MemoryRegion]:
        """The blocks in the order in which the source has listed them."""

    def expose(self, region: int, start: int, length: int) -> None:
        """Learn that the peer may write this range (inside of the region) from now on, and have memory for it.

        Raises StreamError for a region that is not to be written, MigrationError where there is no memory.
        """

    def fill(self, region: int, start: int, length: int, value: int) -> None:
        """Make each byte of a range (inside of the region) `value`. Raises StreamError as `expose` does."""


@runtime_checkable
class RemotelyWrittenChannel(Protocol):
    """A channel over which a peer writes straight into our RAM; an ability, declared by having it."""

    def ram_load_hook(self, flags: RamControl, memory: RemoteMemory) -> None:
        """A HOOK word has come in this body: do what the peer asks for, until it says that its pages are there.

        Called on the incoming thread, once for each HOOK, with the same `memory` each time. Raises StreamError for what
        may not be, PeerRefused where the peer gives up, ChannelError, and what `memory` raises.
        """

    def ram_revoke(self) -> None:
        """Let nobody write into our RAM any more; when it returns, nobody does. Any thread; twice is fine."""


@runtime_checkable
class WatchfulChannel(Protocol):
    """A channel that can find out by itself that its peer's host is gone; an ability, declared by having it."""

    def watch(self, silence: float, patience: float) -> None:
        """Ask the peer's host whether it is there after `silence` seconds without a word from it, and break once it has
        answered nothing, or taken none of what was sent, for `patience` seconds. 0 leaves that to the system.

        Called before the first byte. Raises ChannelError.
        """


class Listener(ABC):
    """Waits for one or more peers to connect."""

    uri: str
    """The full URI to connect to, with what the system chose (a port) filled in."""
    exposed: bool = False
    """Whether others than this host's processes can reach it, and its channels are in the clear."""

    @abstractmethod
    def accept(self, patience: Patience) -> Channel:
        """Wait for the next peer. Raises MigrationCancelled or ConnectError; the listener stays usable."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening, remove what was made (a socket file) and wake a blocked `accept`. Twice is fine."""


class Transport(ABC):
    """Makes channels for the URIs of one scheme. Has no state of its own; any thread."""

    @abstractmethod
    def connect(self, address: str, patience: Patience) -> Channel:
        """Connect to `address` (a URI without its scheme).

        Raises ConfigError for an address that cannot be, ConnectError for one that does not answer, and
        MigrationCancelled.
        """

    @abstractmethod
    def listen(self, address: str) -> Listener:
        """Begin to listen on `address`. Raises ConfigError, ConnectError; leaves nothing behind then."""


@attrs.frozen(kw_only=True)
class TransportSpec:
    """An offer of a transport: `name` is the scheme of its URIs."""

    name: str
    summary: str
    create: Callable[[], Transport]
    create_for: Callable[[frozenset[str]], Transport] | None = None
    """Makes the transport for a migration with these capabilities on, in place of `create`, where any matter to it."""
    duplex: bool = True
    duplex_at: Callable[[str], bool] | None = None
    """Where that depends on the address: whether bytes travel both ways at this one. Asked before anything is touched
    and never raises; True where it cannot be told, for in the end the channel says what it is."""
    several: bool = False
    """Whether one URI can be connected to several times, and its listener accepts several peers, as lanes need."""
    exposed_at: Callable[[str], bool] | None = None
    """Whether others than this host's processes have a way to this address, and its bytes are in the clear: without TLS
    such an address is refused, unless that was asked for. As far as can be told at once, before anything is touched;
    never raises. In the end the channel and the listener say what they are (`exposed`)."""
    host_at: Callable[[str], str] | None = None
    """The host that an address names, which the certificate of its TLS must bear; "" where it names none."""
    tls: bool = True
    """Whether TLS can go round its channels; it needs both ways too."""
    runs_programs: bool = False
    """Whether an address is a command to run on this host: a monitor's client may not name one unless allowed."""


# --------------------------------------------------------------------------------------------------- the stream


@attrs.frozen
class Peek:
    """A parser's request to see the next `size` bytes without consuming them."""

    size: int


# A parser asks for bytes by yielding a count (taken) or a Peek (looked at), is sent a memoryview of exactly that many
# bytes, valid until its next request, and returns its value. It knows nothing of where the bytes come from.
Parser: TypeAlias = Generator[int | Peek, memoryview, T]


class StreamReader(Protocol):
    """What a handler reads its section from."""

    @property
    def offset(self) -> int:
        """Bytes of the stream consumed so far."""

    def parse(self, parser: Parser[T]) -> T:
        """Run a parser on the stream. Raises ChannelLost at an early end, and what the parser raises."""

    def window(self, minimum: int) -> memoryview:
        """At least `minimum` bytes ahead, and all that are buffered; valid until the next call on the reader."""

    def advance(self, count: int) -> None:
        """Consume `count` bytes of the last window."""

    def read_into(self, buffer: Buffer) -> None:
        """Consume as many bytes as `buffer` (writable, C-contiguous) has, into it; mostly without a copy between.

        Raises ChannelLost at an early end: a part of `buffer` may be filled then.
        """


class StreamWriter(Protocol):
    """What a handler writes its section to."""

    @property
    def offset(self) -> int:
        """Bytes written to the stream so far."""

    @property
    def gathers(self) -> bool:
        """Whether `write_gathered` may be called."""

    def write(self, data: Buffer) -> None:
        """Write `data`; it may be overwritten on return. Raises ChannelError, and the same error ever after."""

    def write_gathered(self, vectors: npt.NDArray[np.uint64]) -> None:
        """Write memory by address, as `GatheringChannel.send_gathered` says. Raises as `write` does."""


class Slice(Protocol):
    """How much a handler may send before it returns, so that bandwidth holds and cancelling is quick."""

    def bytes_left(self) -> int:
        """Bytes that may still be sent in this slice; at least 1 while not `over`. Falls as the writer writes."""

    def over(self) -> bool:
        """Whether to return now: the budget or the time (50 ms) is used up, or the migration is being cancelled."""


# ----------------------------------------------------------------------------------------------- savevm handlers


class SectionKind(Enum):
    """Which element of the stream a section body came in (wire format, section 1.2)."""

    START = 1
    PART = 2
    END = 3
    FULL = 4


@attrs.define
class Progress:
    """Counters of an iterable handler, written by the migration thread alone and read by any."""

    page_size: int
    total: int = 0  # bytes in all
    remaining: int = 0  # bytes dirty and not sent
    duplicate: int = 0  # zero pages sent
    normal: int = 0  # whole pages sent
    transferred: int = 0  # bytes of its section bodies
    tracker: str = ""  # the dirty tracker at work, for `status`
    synced_dirty: int = 0  # bytes found dirty by all syncs so far, beyond those already known


class SaveVMHandler(ABC):
    """Saves and loads one part of a machine as one FULL section (a device).

    The engine makes handlers anew for every migration, saves and loads them in order of `priority` (higher first,
    ties by name) and calls each method on one thread: the migration thread at the source, the incoming thread at
    the destination. No lock is held; while `save` runs the guest is stopped.
    """

    iterable: ClassVar[bool] = False
    optional: ClassVar[bool] = False  # whether a stream is taken that does not have its section
    idstr: str
    instance_id: int = 0
    version_id: int = 1
    priority: int = 0

    def problems(self) -> Sequence[str]:
        """Why this part cannot be migrated, before anything is sent; one sentence each."""
        return ()

    def save(self, out: StreamWriter) -> Mapping[str, Any] | None:
        """Write the section's body; returns its entry for the stream's JSON description, or None.

        Called once, guest stopped. Must not change the machine: it may have to run on.
        """
        raise NotImplementedError(f"{type(self).__name__} has no FULL section")

    @abstractmethod
    def load(self, reader: StreamReader, kind: SectionKind, version_id: int) -> None:
        """Read one body, check all of it, and keep the values for `commit`; the machine is not touched.

        (A handler of much memory may write into its own blocks at once, if `rollback` can undo it.) Raises
        ProtocolError or ChannelError, after which `rollback` is called.
        """

    def commit(self) -> None:
        """Put what was loaded into the machine.

        Called once, after every section was loaded, before the guest may run. May raise IncompatibleError; `rollback`
        of every handler follows.
        """
        return

    def rollback(self) -> None:
        """Put the machine back as it was before `load`. Called once after a failure; must not raise."""
        return

    def finish(self) -> None:
        """Release what belongs to this migration alone. Called once at the end on either side, whatever happened."""
        return


class IterableHandler(SaveVMHandler):
    """Saves in rounds while the guest runs: START, any number of PARTs, END (RAM, drives).

    Per round the engine calls `sync`, then `save_part` in slices until `pending` is 0. Then, with the guest
    stopped, `sync` once more and `save_end`.
    """

    iterable: ClassVar[bool] = True
    progress: Progress
    statistics_key: str = ""  # "ram" or "disk": where query-migrate shows the progress; "" for nowhere

    def use_lanes(self, lanes: DepartingLanes) -> None:
        """Send pages over these from now on. Called before `save_start`, if the migration has lanes."""

    def await_lanes(self, lanes: ArrivingLanes) -> None:
        """Expect pages from these too. Called before the first `load`, if the migration has lanes."""

    def use_remote_writing(self, channel: RemoteWritingChannel, flush: Callable[[], None]) -> None:
        """Write pages by this from now on; `flush` sends what the stream's writer holds back.

        Called before `save_start`, if the channel can.
        """

    def await_remote_writing(self, channel: RemotelyWrittenChannel) -> None:
        """Let the peer write pages by this. Called before the first `load`, if the channel can."""

    def statistics(self) -> Mapping[str, Mapping[str, object]]:
        """Further members of query-migrate, by name (xbzrle-cache). Any thread, at any time."""
        return {}

    def tally(self) -> Mapping[str, int]:
        """How many units (pages, chunks) of each block or drive have gone, or come, by its name; the engine's thread.

        Both ends compare it before the source lets go. Nothing is compared of what is not named.
        """
        return {}

    @abstractmethod
    def save_start(self, out: StreamWriter) -> None:
        """Begin to track changes and write the START body. The guest runs. On failure `finish` follows."""

    @abstractmethod
    def sync(self) -> None:
        """Learn what has changed since the last sync; what is marked is marked clean before it is read."""

    @abstractmethod
    def pending(self) -> int:
        """Bytes known to be dirty and not sent; cheap, reads no memory."""

    def ready(self) -> bool:
        """Whether `save_part` has something to write at once; not while it waits for its own storage. Cheap."""
        return True

    @abstractmethod
    def save_part(self, out: StreamWriter, slice_: Slice) -> None:
        """Write one PART body: as much as the slice allows. The guest runs.

        Called while anything is `pending`; one that is not `ready` only if no other handler is.
        """

    @abstractmethod
    def save_end(self, out: StreamWriter) -> None:
        """Write the END body: everything that is still dirty. The guest is stopped."""


@attrs.frozen(kw_only=True)
class SaveVMSpec:
    """An offer of savevm handlers for one machine; `create` makes them, afresh for every migration."""

    name: str
    summary: str
    create: Callable[[], Sequence[SaveVMHandler]]


# ------------------------------------------------------------------------------------------------------- codecs


class Codec(ABC):
    """Turns a batch of pages into bytes and back. One instance per lane; one thread at a time."""

    @abstractmethod
    def encode(self, pages: ByteArray) -> bytes:
        """Encode `pages` (shape (n, page size), C-contiguous); decodable after all earlier results of this codec."""

    @abstractmethod
    def decode(self, data: Buffer, into: ByteArray) -> None:
        """Decode exactly `into.nbytes` bytes into `into`. Raises StreamError for anything else; never yields more."""


class Outcome(IntEnum):
    """What a delta codec made of a page."""

    UNCHANGED = 0  # nothing is to be sent
    ENCODED = 1
    OVERFLOW = 2  # the page is smaller as it is


@attrs.frozen(eq=False)
class Encoded:
    """What a delta codec made of n pages, in their order.

    The payload of page i is `data[starts[i] : ends[i]]`, empty unless its outcome is ENCODED. `data` is flat, uint8;
    `starts` and `ends` are of shape (n,); `outcomes` is of shape (n,), uint8, with values of `Outcome`.
    """

    data: ByteArray
    starts: IndexArray
    ends: IndexArray
    outcomes: ByteArray


class DeltaCodec(ABC):
    """Turns what has changed in pages into bytes and back. Has no state; any thread."""

    @abstractmethod
    def encode(self, old: ByteArray, new: ByteArray) -> Encoded:
        """Encode what makes pages `new` of pages `old` (both of shape (n, 4096), C-contiguous; nobody writes to them).

        n may be 0.
        """

    @abstractmethod
    def decode(
        self, data: ByteArray, starts: IndexArray, ends: IndexArray, memory: ByteArray, offsets: IndexArray
    ) -> None:
        """Change the pages at `memory[offsets[i] : offsets[i] + 4096]` as `data[starts[i] : ends[i]]` say.

        `data` and `memory` are flat, the others of shape (n,); the pages are inside of `memory` and apart. Raises
        StreamError if any of them is malformed; then nothing has changed.
        """


@attrs.frozen(kw_only=True)
class CodecSpec:
    """An offer of a codec."""

    name: str
    summary: str
    create: Callable[[], Codec | DeltaCodec]
    create_for_lane: Callable[[Mapping[str, object]], Codec] | None = None
    """Makes the codec of one lane (`multifd-compression`), which lives as long as the lane does: at the source with the
    migration's parameters by their names, from which it takes its level; at the destination with its own, and with its
    [limits]. None for a codec that lanes cannot use."""


# ------------------------------------------------------------------------------------------------------- lanes


class DepartingLanes(Protocol):
    """The further connections of an outgoing migration (`multifd`), as a savevm handler uses them: migration thread.

    What is sent between two syncs arrives in any order; a page is sent at most once between them.
    """

    @property
    def sync_each_body(self) -> bool:
        """Whether every body (START, each PART, END) ends with a `sync`; else one is due where a round ends.

        Then the handler says it on the main channel too (wire format, sections 5.5 and 5.7).
        """

    @property
    def take_zeros(self) -> bool:
        """Whether zero pages go over them too; else they are records on the main channel."""

    def send(self, block: str, memory: ByteArray, indices: IndexArray, zeros: IndexArray) -> None:
        """Send pages of `memory` (flat, the whole of the block) and say of others that they are zero.

        `indices` and `zeros` are ascending page numbers, apart, either may be empty. Blocks while all lanes are busy;
        returns before the pages are read, so `memory` stays, and what is written meanwhile must be found dirty later.
        Raises ChannelError, and the same ever after.
        """

    def sync(self) -> None:
        """Have everything before it arrive before anything behind it. Raises as `send` does."""


class PageSink(Protocol):
    """Where pages of arriving lanes go. Called on the lanes' threads, several at once, never for the same page."""

    def memory(self, block: str) -> ByteArray:
        """All bytes of a block, flat, writable. Raises StreamError if there is none of that name to write into."""

    def arriving(self, block: str, indices: IndexArray) -> None:
        """Learn that these pages (inside of the block, any order) are about to be written."""

    def zeros(self, block: str, indices: IndexArray) -> None:
        """Make these pages (inside of the block, any order) zero."""


class ArrivingLanes(Protocol):
    """The further connections of an incoming migration, as a savevm handler uses them: incoming thread."""

    def begin(self, sink: PageSink) -> None:
        """Let pages come, into `sink`; nothing is received before. Called once, when the blocks are agreed on."""

    def sync(self) -> None:
        """Wait until every lane has come to its next sync, then let all go on.

        Raises what a lane has failed with: StreamError for what it was sent, ChannelError.
        """

    def complete(self) -> None:
        """Take no more pages. Called once, behind the last sync; raises StreamError if some came behind that."""


# ----------------------------------------------------------------------------------------------- dirty tracking


class MemoryRegion(Protocol):
    """What a tracker sees of a RAM block."""

    @property
    def name(self) -> str:
        """The block's name, for messages."""

    @property
    def view(self) -> ByteArray:
        """All bytes, shape (size,), page aligned."""

    @property
    def address(self) -> int:
        """The first byte's address in this process."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of `page_size`."""

    @property
    def page_size(self) -> int:
        """Bytes a page."""

    @property
    def backing(self) -> str:
        """"anonymous", "memfd" or "file"."""  # fmt: skip

    @property
    def fd(self) -> int | None:
        """The descriptor behind shared memory, for another process to map; None behind anonymous memory."""

    def take_marks(self) -> list[tuple[int, int]]:
        """The (offset, length) ranges that the program has marked by hand, and forget them."""


class DirtyTracker(ABC):
    """Knows which pages of some regions were written. One instance per migration; called on the migration thread.

    The rule: a mark is cleared *before* the page is read, so that a write during the copy is seen next time.
    """

    @abstractmethod
    def start(self, regions: Sequence[MemoryRegion]) -> None:
        """From the return on every write is noted, however it is made. Raises TrackerUnavailable, leaving nothing."""

    @abstractmethod
    def collect(self, region: MemoryRegion, dirty: BoolArray) -> int:
        """Set `dirty[i]` (shape (pages,)) for each page i written since the last collect, and arm it again.

        Marks already set stay set. Returns how many were newly set. Raises TrackerUnavailable if that cannot be told
        any more; writes may be lost then, and the migration must end.
        """

    def untouched(self, region: MemoryRegion) -> BoolArray | None:  # noqa: ARG002 - not every tracker can tell
        """The pages that were certainly zero when tracking began, shape (pages,); None if that is not known.

        Such a page is zero as long as no collect has reported it, and need not be read to be sent.
        """
        return None

    def pages(self, region: MemoryRegion) -> ByteArray:
        """The bytes to send from, shape (size,): the memory itself, or the tracker's own copy of it."""
        return region.view

    @abstractmethod
    def stop(self) -> None:
        """End the tracking and release everything. Twice is fine; must not raise."""


@attrs.frozen(kw_only=True)
class DirtyTrackerSpec:
    """An offer of a dirty tracker.

    `probe(regions)` returns None where it works, else one sentence that says why not. `auto` takes the working
    tracker of the highest `rank`; rank None is only ever chosen by name.
    """

    name: str
    summary: str
    create: Callable[[], DirtyTracker]
    probe: Callable[[Sequence[MemoryRegion]], str | None]
    rank: int | None = None
    sees_other_processes: bool = False
    """Whether it also sees what other processes write into shared memory, through mappings of their own. Without it the
    tracker that the guest offers, if it does, works beside it, and `pages` must be the memory itself."""


# ------------------------------------------------------------------------------------------------------- drives


class BlockDevice(ABC):
    """What the bytes of a drive are kept on: an image that is read and written anywhere and outlives the process.

    Who may write is whoever holds its lock; it is taken before the machine runs and let go of with the machine. A
    range is in bytes, any alignment, inside of `size`. Methods from any thread, several at once, but `acquire`,
    `release`, `begin_load`, `end_load` and `close` one at a time; those that wait for the storage release the
    interpreter's lock. What the storage fails with is an OSError.
    """

    size: int
    """Bytes; stays as it is."""
    read_only: bool
    """Whether it is never written; such a device needs no lock and does not take part in a migration."""
    place: str
    """Where it is, for messages: mostly a path."""

    @property
    def fd(self) -> int | None:
        """A descriptor that another process can read and write it by, byte for byte; None if there is none."""
        return None

    @abstractmethod
    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` (writable, C-contiguous) from `offset` on. A write beside it may be seen in part."""

    def read_at_once(self, offset: int, buffer: Buffer) -> bool:  # noqa: ARG002 - most cannot promise it
        """Fill `buffer` as `read_into` does if that waits for nobody; False if it might: what it holds is undefined."""
        return False

    @abstractmethod
    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` (C-contiguous); whoever reads from now on sees it, a power failure may undo it.

        Raises StateError, having written nothing, without the lock or where it is read-only. After an OSError part of
        it may be written.
        """

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """Make a range read as zeros, and give its room back where that is possible. Raises as `write` does."""

    @abstractmethod
    def flush(self) -> None:
        """Make durable everything that was written before the call."""

    @abstractmethod
    def next_extent(self, offset: int) -> tuple[int, int] | None:
        """The first range at or behind `offset` that is allocated, as (start, end); None if there is none.

        What is not allocated reads as zeros. A device that cannot tell has one extent, all of it.
        """

    @property
    @abstractmethod
    def acquired(self) -> bool:
        """Whether this object holds the lock. Cheap."""

    @abstractmethod
    def in_use(self) -> bool:
        """Whether somebody else holds the lock now."""

    @abstractmethod
    def acquire(self) -> None:
        """Become the only one that may write; waits for nobody. Already holding it is fine.

        Raises StateError that names who holds it, if that is known, and where the device is read-only.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of the lock, so that somebody else may write. Not holding it is fine."""

    @abstractmethod
    def invalidate(self) -> None:
        """Forget what is kept in memory of it and was not written here: another host may have written it since."""

    @property
    @abstractmethod
    def incomplete(self) -> bool:
        """Whether a load into it has begun and never ended, in this process or any other: it is not to be used then."""

    @abstractmethod
    def begin_load(self) -> None:
        """Make it `incomplete`, durably; the lock is held. Already being so is fine. Raises as `write` does."""

    @abstractmethod
    def end_load(self) -> None:
        """End `incomplete`, durably; the lock is held, and everything was flushed."""

    def track(self) -> None:
        """From the return on, note writes that come by other ways than through this object. There are mostly none."""
        return

    def collect(self, dirty: BoolArray, granularity: int) -> None:  # noqa: ARG002 - mostly there are none to tell of
        """Set `dirty[i]` where bytes `i * granularity` and on were written so since the last collect, and forget it.

        `dirty` has shape (ceil(size / granularity),); marks already set stay set. Between `track` and `untrack`.
        """
        return

    def untrack(self) -> None:
        """End `track`. Twice is fine; must not raise."""
        return

    @abstractmethod
    def close(self) -> None:
        """Let go of everything, the lock too. Twice is fine."""


# -------------------------------------------------------------------------------------------------------- guests


class LendableDrive(Protocol):
    """A drive of the machine, as far as a guest in another process needs it."""

    name: str
    read_only: bool

    @property
    def place(self) -> str:
        """Where its image is."""

    def lend(self) -> tuple[int, int] | None:
        """Descriptors of the image and of the marks, a byte for each chunk of 1 MiB; None if it cannot be lent."""


class Guest(ABC):
    """What runs in a machine. Called under the machine's lock (`close` without it), on any thread but the guest's own.

    A guest whose own code raises sets `failure` and then calls `on_failure` with it, on its own thread.
    """

    failure: BaseException | None = None
    on_failure: Callable[[BaseException], object] | None = None

    def use_drives(self, drives: Sequence[LendableDrive]) -> None:  # noqa: ARG002 - most have the machine's own
        """Learn of all of the machine's drives; called before each `prepare`. Must not raise."""
        return

    def prepare(self, regions: Sequence[MemoryRegion]) -> None:  # noqa: ARG002 - most guests need not prepare
        """Get ready to run in this memory, all of the machine's. May take its time.

        Called once, before anything else but `use_drives`: at the first start, or when the machine begins to wait for
        another. What it raises is the caller's; it is called again at the next attempt then.
        """
        return

    def dirty_tracker(self) -> DirtyTrackerSpec | None:
        """Offer a tracker of what the guest writes that trackers in this process cannot see; None if there is none.

        Such are writes of other processes to shared memory. Its `name` is added to that of the tracker beside which it
        works, `rank` counts for nothing. Called on the migration thread, without the lock, once per migration.
        """
        return None

    @abstractmethod
    def power_on(self) -> None:
        """Fill a fresh machine, once, before its first start. Never called on a machine that arrived."""

    @abstractmethod
    def start(self) -> None:
        """Run (again). Returns at once."""

    @abstractmethod
    def stop(self) -> None:
        """Stop; returns when no step is running and none will until `start`. Never called twice in a row."""

    def throttle(self, percent: int) -> None:  # noqa: ARG002 - a guest that cannot be throttled ignores it
        """Give the guest at most 100 - `percent` per cent of its time, 0 to 99; holds until changed."""
        return

    def stopping_time(self) -> float:
        """How long `stop` may take, in seconds, as far as that is known; 0 where it is not. Any thread, no lock."""
        return 0.0

    def announce(self) -> None:
        """It has arrived and runs: tell the network. Called several times on a thread of the incoming side."""
        return

    def close(self) -> None:
        """The machine is done with; release threads and descriptors. The guest is stopped. Twice is fine."""
        return


# ------------------------------------------------------------------------------------------------------- the plan


@attrs.frozen(kw_only=True)
class MigrationPlan:
    """What an outgoing migration is about to do; what `whimbrel_check_migration` judges."""

    uri: str
    scheme: str
    duplex: bool
    machine: str
    capabilities: frozenset[str]
    parameters: Mapping[str, object]
    ram: Mapping[str, int]  # block name -> bytes
    sections: tuple[str, ...]  # idstr of every handler, in order
    codecs: tuple[str, ...] = ()  # names of those that are used
