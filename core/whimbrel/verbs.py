"""The contract of verbs: one-sided writes and messages between registered memory, as RDMA adapters offer them.

The names are those of rdma-core (libibverbs and librdmacm), so that a provider for a real adapter is a thin layer. What
differs is said where it differs: calls of the connection manager are the synchronous ones, completion channels need no
arming, and writes are posted in batches of arrays, so that thousands of pages cost no Python for each.

How it is used, in order; `listen` and `get_request` at one end, `resolve` at the other::

    provider.resolve(host, port)  → ConnectionId      listener.get_request() → ConnectionId (its private_data)
    id.context.alloc_pd(), .create_comp_channel(), .create_cq(), pd.reg_mr(…)                at both
    id.create_qp(pd, send_cq, recv_cq, …)  and  qp.post_recv(…)                              at both
    id.connect(private_data) → private data of the other                  id.accept(private_data)

How a transport gets at a provider: the hook `whimbrel_transports` may take the parameter `verbs`, a `VerbsOffers` that
belongs to the plugin manager. Keep it in the transport, and ask `verbs.provider()` when a connection is to be made::

    @hookimpl
    def whimbrel_transports(verbs: VerbsOffers) -> Sequence[TransportSpec]:
        return [TransportSpec(name="rdma", summary="…", create=lambda: RdmaTransport(verbs))]

The rules it lives by:

* **A failure of a request is a completion, never an exception.** Exceptions are for calls that cannot be: what was
  closed, a full queue, arrays that do not fit together.
* **After the first error a queue pair is in the state ERR, for ever**, and so is the peer's. Whatever is posted, before
  or after, completes with WR_FLUSH_ERR, signalled or not, each once.
* **The responder's rules count for a WRITE**: the rkey is known and alive, the range lies inside of its region, and the
  region allows REMOTE_WRITE. Otherwise the requester sees REM_ACCESS_ERR and not one byte of the request is written.
* **In order**: requests of one queue pair take effect in the order in which they were posted. Who has received a SEND
  sees the data of every WRITE that was posted before it.
* **Memory is the caller's.** It must stay mapped as long as it is registered, and what is posted must not be changed
  until it has completed.
* Addresses are of the process that registered the memory; keys mean nothing but to whoever gave them out.

Every object may be used from any thread; calls that wait release the interpreter's lock. `close` comes from any thread,
wakes whoever waits in the object, and twice is fine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum, IntFlag
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.errors import ConnectError, UnknownNameError

if TYPE_CHECKING:
    from typing import Self

    from whimbrel.abc import Patience

__all__ = [
    "AUTO",
    "MAX_PRIVATE_DATA",
    "Access",
    "CmEvent",
    "CmEventType",
    "CmListener",
    "CompletionChannel",
    "CompletionQueue",
    "ConnectRejected",
    "ConnectionId",
    "Context",
    "DeviceAttributes",
    "MemoryRegion",
    "ProtectionDomain",
    "QpState",
    "QueuePair",
    "VerbsOffers",
    "VerbsProvider",
    "VerbsProviderSpec",
    "WcOpcode",
    "WcStatus",
    "WorkCompletion",
    "choose",
]

AUTO: Final = "auto"
MAX_PRIVATE_DATA: Final = 56
"""Bytes of private data of a connect, an accept or a reject; rdma_cm's limit for a connect over the TCP port space."""

AddressArray: TypeAlias = npt.NDArray[np.uint64]


class Access(IntFlag):
    """What may be done with a region (`ibv_access_flags`). Reading it locally always may."""

    LOCAL_WRITE = 1
    """Receives may be put into it."""
    REMOTE_WRITE = 2
    """Peers may write it. Needs LOCAL_WRITE."""


class QpState(Enum):
    """Where a queue pair is (`ibv_qp_state`; states that only its making passes through are left out)."""

    INIT = "INIT"  # receives may be posted
    RTS = "RTS"  # connected
    ERR = "ERR"  # failed or disconnected: everything is flushed


class WcStatus(Enum):
    """How a request ended (`ibv_wc_status`)."""

    SUCCESS = "success"
    LOC_LEN_ERR = "local length error"  # a message was longer than the receive that was posted for it
    LOC_PROT_ERR = "local protection error"  # an lkey, or a range outside of its region, of our own
    WR_FLUSH_ERR = "work request flushed"
    REM_INV_REQ_ERR = "remote invalid request error"  # ours was longer than the peer's receive
    REM_ACCESS_ERR = "remote access error"
    REM_OP_ERR = "remote operation error"
    RETRY_EXC_ERR = "transport retry counter exceeded"  # the peer is gone
    RNR_RETRY_EXC_ERR = "RNR retry counter exceeded"  # the peer has no receive posted
    GENERAL_ERR = "general error"


class WcOpcode(Enum):
    """What a completed request was (`ibv_wc_opcode`). It counts for failed ones too, unlike in libibverbs."""

    SEND = "SEND"
    RDMA_WRITE = "RDMA_WRITE"  # with or without immediate data, at the requester
    RECV = "RECV"
    RECV_RDMA_WITH_IMM = "RECV_RDMA_WITH_IMM"


@attrs.frozen
class WorkCompletion:
    """One entry of a completion queue (`ibv_wc`)."""

    wr_id: int
    status: WcStatus
    opcode: WcOpcode
    byte_len: int = 0
    """Bytes received, or, where `opcode` is RECV_RDMA_WITH_IMM, written by the peer; of requests, their own length."""
    imm_data: int | None = None
    """The 32 bits that came with the message, in host order."""
    qp_num: int = 0


@attrs.frozen(kw_only=True)
class DeviceAttributes:
    """What a device can do (`ibv_device_attr`). Sizes in bytes."""

    name: str
    max_mr_size: int
    max_mr: int
    max_qp_wr: int
    """Requests that may be posted to one direction of a queue pair and not completed; a batch of writes is one."""
    max_cqe: int
    max_msg_size: int
    """Of one SEND."""
    max_write_batch: int
    """Writes in one call of `post_write`."""
    max_write_size: int
    """All writes of one batch together."""
    applies_unasked: bool = True
    """Whether a WRITE is done without the peer's processor; False where it costs the peer time."""


# -------------------------------------------------------------------------------------------------------- memory


class MemoryRegion(ABC):
    """Registered memory (`ibv_mr`)."""

    address: int
    length: int
    access: Access
    lkey: int
    """For our own requests, 32 bits."""
    rkey: int
    """For the peer's writes, 32 bits; of a region without REMOTE_WRITE it is refused as if there were none."""

    @abstractmethod
    def dereg(self) -> None:
        """End the registration: when this returns no peer writes into the memory any more, whatever it has posted.

        Waits for writes that are under way; a peer that does not let go within seconds is disconnected. Twice is fine.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.dereg()


class ProtectionDomain(ABC):
    """What regions and queue pairs must have in common to be used together (`ibv_pd`)."""

    context: Context

    @abstractmethod
    def reg_mr(
        self, address: int, length: int, access: Access, *, fd: int | None = None, fd_offset: int = 0
    ) -> MemoryRegion:
        """Register `length` bytes of this process at `address`, any alignment.

        Where the memory is a shared mapping of a memfd or file, `fd` and `fd_offset` may say which, and where
        `address` is in it (as ibv_reg_dmabuf_mr has it): a provider that shares memory needs that to be fast. The
        descriptor stays the caller's. May take long for large regions of a real adapter. Raises ConfigError, leaving
        nothing registered, for a length of 0 or beyond `max_mr_size`, for REMOTE_WRITE without LOCAL_WRITE, for a
        descriptor that has not these bytes, and where too many regions or too much locked memory are in use;
        ChannelClosed once it was closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Deallocate it, and its regions with it."""


# --------------------------------------------------------------------------------------------------- completions


class CompletionChannel(ABC):
    """Where to wait for completions of several queues (`ibv_comp_channel`)."""

    @abstractmethod
    def get_event(self, patience: Patience) -> CompletionQueue:
        """Wait until one of its queues has a completion and return that queue; nothing is armed or acknowledged.

        A queue that already has one is returned at once. Raises MigrationCancelled or ConnectError of `patience`, and
        ChannelClosed once the channel was closed; the queues are as they were.
        """

    @abstractmethod
    def close(self) -> None:
        """Wake whoever waits; its queues can still be polled."""


class CompletionQueue(ABC):
    """Where requests report that they are done (`ibv_cq`)."""

    @abstractmethod
    def poll(self, count: int) -> Sequence[WorkCompletion]:
        """Take out at most `count` completions, oldest first; waits for nothing. Raises ChannelClosed once closed."""

    @abstractmethod
    def wait(self, patience: Patience) -> None:
        """Wait until `poll` would find something. Raises as `CompletionChannel.get_event` does."""

    @abstractmethod
    def close(self) -> None:
        """Destroy it. Its queue pairs must be closed before; what they still report is lost."""


# ---------------------------------------------------------------------------------------------------- queue pairs


class QueuePair(ABC):
    """Two queues of requests, connected to those of a peer, reliable and in order (`ibv_qp`, RC).

    A queue has room for as many requests as it was made with; a place is free again once its completion was *queued*,
    and, where it was not signalled, that of the next one which was. Posting beyond raises StateError and posts
    nothing. All `post_*` raise ChannelClosed once it was closed, and then nothing is posted.

    A wrong lkey, and a range outside of its region, are a completion with LOC_PROT_ERR, and the state ERR.
    """

    qp_num: int

    @property
    @abstractmethod
    def state(self) -> QpState:
        """Where it is. ERR is final."""

    @abstractmethod
    def post_recv(self, address: int, length: int, lkey: int, wr_id: int) -> None:
        """Offer memory for one message of the peer; in the order of posting. In INIT and RTS; flushed in ERR.

        Its region must allow LOCAL_WRITE. With a `length` of 0 the memory is not looked at: enough for a write with
        immediate data. The completion's opcode is RECV or RECV_RDMA_WITH_IMM.
        """

    @abstractmethod
    def post_send(
        self, address: int, length: int, lkey: int, wr_id: int, *, imm_data: int | None = None, signalled: bool = True
    ) -> None:
        """Send one message into the receive that the peer posted first. May wait for the link; in RTS, flushed in ERR.

        A peer that has no receive posted is given the time of its `rnr_retry`; then it is RNR_RETRY_EXC_ERR. One
        whose receive is too short makes it REM_INV_REQ_ERR, and sees LOC_LEN_ERR itself. In INIT: StateError.
        """

    @abstractmethod
    def post_write(
        self,
        local_addresses: AddressArray,
        lkeys: npt.NDArray[np.uint32] | int,
        remote_addresses: AddressArray,
        rkeys: npt.NDArray[np.uint32] | int,
        lengths: AddressArray,
        wr_id: int,
        *,
        imm_data: int | None = None,
        signalled: bool = True,
    ) -> None:
        """Write a batch of n pieces of our memory into the peer's: one request with one completion.

        Addresses and lengths are of shape (n,), dtype uint64, C order; keys of the same shape, uint32, or one for all.
        The arrays may be changed on return, the memory not before the completion, whose `byte_len` is the sum. With
        `imm_data` it takes a receive of the peer, which completes after the data are there. n and lengths may be 0.

        All pieces are judged before the first is written: where one is refused, none is. (A real adapter may have
        written those before it.) May wait for the link, or for the copy itself. Raises ValueError for arrays that do
        not fit together or exceed `max_write_batch` or `max_write_size`, and then nothing is posted. In RTS, flushed in
        ERR; in INIT: StateError.
        """

    @abstractmethod
    def close(self) -> None:
        """Destroy it: disconnect, flush what is posted, and wait for what touches memory of ours to be over."""


# --------------------------------------------------------------------------------------------- connection manager


class CmEventType(Enum):
    """What happens to a connection (`rdma_cm_event_type`)."""

    ADDR_RESOLVED = "RDMA_CM_EVENT_ADDR_RESOLVED"
    ADDR_ERROR = "RDMA_CM_EVENT_ADDR_ERROR"
    ROUTE_RESOLVED = "RDMA_CM_EVENT_ROUTE_RESOLVED"
    ROUTE_ERROR = "RDMA_CM_EVENT_ROUTE_ERROR"
    CONNECT_REQUEST = "RDMA_CM_EVENT_CONNECT_REQUEST"
    CONNECT_RESPONSE = "RDMA_CM_EVENT_CONNECT_RESPONSE"
    CONNECT_ERROR = "RDMA_CM_EVENT_CONNECT_ERROR"
    UNREACHABLE = "RDMA_CM_EVENT_UNREACHABLE"
    REJECTED = "RDMA_CM_EVENT_REJECTED"
    ESTABLISHED = "RDMA_CM_EVENT_ESTABLISHED"
    DISCONNECTED = "RDMA_CM_EVENT_DISCONNECTED"
    DEVICE_REMOVAL = "RDMA_CM_EVENT_DEVICE_REMOVAL"
    TIMEWAIT_EXIT = "RDMA_CM_EVENT_TIMEWAIT_EXIT"


@attrs.frozen
class CmEvent:
    """Something that happened to a connection (`rdma_cm_event`)."""

    event: CmEventType
    private_data: bytes = b""


class ConnectRejected(ConnectError):
    """The peer has rejected the connection (RDMA_CM_EVENT_REJECTED); `private_data` is what it said to that."""

    def __init__(self, message: str, private_data: bytes = b"", *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.private_data = private_data


class Context(ABC):
    """An open device (`ibv_context`); belongs to the connection that led to it, and is closed with it."""

    attributes: DeviceAttributes

    @abstractmethod
    def alloc_pd(self) -> ProtectionDomain:
        """Make a protection domain. Raises ChannelClosed once closed."""

    @abstractmethod
    def create_comp_channel(self) -> CompletionChannel:
        """Make a completion channel. Raises ChannelClosed once closed."""

    @abstractmethod
    def create_cq(self, cqe: int, channel: CompletionChannel | None = None) -> CompletionQueue:
        """Make a completion queue of room for `cqe`; with `channel` it can be waited for there, beside others.

        The caller sizes it for the queues of its queue pairs. Raises ValueError beyond `max_cqe`, ChannelClosed once
        closed.
        """


class ConnectionId(ABC):
    """One connection, before and after it is made (`rdma_cm_id`).

    Everything that was made from it or its context is closed with it.
    """

    context: Context
    """The device that leads to the peer."""
    peer: str
    """Who is at the other end, for messages; says by which way it is reached."""
    private_data: bytes
    """What the peer's connect brought, at the end that accepts; of the other, what accept brought. At most 56 bytes;
    a real adapter may pad it with zeros."""

    @abstractmethod
    def create_qp(
        self,
        pd: ProtectionDomain,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        *,
        max_send_wr: int,
        max_recv_wr: int,
    ) -> QueuePair:
        """Make the connection's only queue pair, in INIT. Before `connect` or `accept`.

        Raises ValueError beyond `max_qp_wr`, StateError for a second one, ChannelClosed.
        """

    @abstractmethod
    def connect(self, private_data: bytes, patience: Patience, *, rnr_retry: int = 7) -> bytes:
        """Ask the peer for the connection; returns the private data of its `accept`, and the queue pair is in RTS.

        `rnr_retry` is how often, 0 to 7, a SEND of the peer's is tried again where we have no receive; 7 is without
        end. Raises ConnectRejected, ConnectError or MigrationCancelled, after which only `close` is left; ValueError
        for private data of more than 56 bytes, StateError without a queue pair.
        """

    @abstractmethod
    def accept(self, private_data: bytes, patience: Patience, *, rnr_retry: int = 7) -> None:
        """Agree to a peer's request; returns when it is established. Arguments and errors as in `connect`."""

    @abstractmethod
    def reject(self, private_data: bytes = b"") -> None:
        """Refuse a peer's request, and close. Raises ValueError for private data of more than 56 bytes."""

    @abstractmethod
    def get_event(self, patience: Patience) -> CmEvent:
        """Wait for what happens to the connection once it is established: DISCONNECTED, once; then ChannelClosed.

        DEVICE_REMOVAL and TIMEWAIT_EXIT are a real adapter's. Raises as `patience` does.
        """

    @abstractmethod
    def disconnect(self) -> None:
        """End the connection at both ends (`rdma_disconnect`): the queue pairs go to ERR and are flushed.

        What was posted before may not arrive. Waits for nobody. Twice is fine.
        """

    @abstractmethod
    def close(self) -> None:
        """Disconnect, and destroy it with its queue pair, domains, regions, queues and channels."""


class CmListener(ABC):
    """Waits for peers to ask for connections (`rdma_listen`)."""

    host: str
    port: int
    """What it listens on, with what the system chose filled in."""

    @abstractmethod
    def get_request(self, patience: Patience) -> ConnectionId:
        """Wait for the next CONNECT_REQUEST. The caller accepts, rejects or closes it.

        A peer that connects and says nothing, or nonsense, holds up nobody else. Raises MigrationCancelled or
        ConnectError, with the listener still usable; ChannelClosed once it was closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop listening and forget requests that nobody took; connections that were taken live on."""


class VerbsProvider(ABC):
    """A connection manager and the devices behind it. Has no state of its own; any thread."""

    @abstractmethod
    def listen(self, host: str, port: int) -> CmListener:
        """Begin to listen; `host` "" is every address, `port` 0 one of the system's choice.

        Raises ConfigError for an address that cannot be, ConnectError; leaves nothing behind then.
        """

    @abstractmethod
    def resolve(self, host: str, port: int, patience: Patience) -> ConnectionId:
        """Find the device that leads to `host` (ADDR_RESOLVED, ROUTE_RESOLVED).

        Raises ConfigError for an address that cannot be, ConnectError for one that does not answer, and
        MigrationCancelled; leaves nothing behind then.
        """


@attrs.frozen(kw_only=True)
class VerbsProviderSpec:
    """An offer of verbs.

    `probe()` returns None where it works, else one sentence that says why not. `auto` takes the working provider of
    the highest `rank`; rank None is only ever chosen by name. Both ends of a connection need providers that understand
    one another.
    """

    name: str
    summary: str
    create: Callable[[], VerbsProvider]
    probe: Callable[[], str | None]
    rank: int | None = None


class VerbsOffers(Protocol):
    """What the plugin manager hands to the hook `whimbrel_transports` as `verbs`."""

    def provider(self) -> VerbsProviderSpec:
        """The provider that `[backends] verbs-provider` names, or the best that works. Not within the hook itself.

        Raises UnknownNameError and PluginError for a name that nobody offers, and ConnectError where none works here.
        """


def choose(name: str, specs: Sequence[VerbsProviderSpec]) -> VerbsProviderSpec:
    """Choose the provider `name`, or with "auto" the working one of the highest rank.

    Raises UnknownNameError if there is none of that name, and ConnectError, with every reason, if the one named, or
    every one that "auto" may take, cannot work here.
    """
    if name != AUTO:
        for spec in specs:
            if spec.name == name:
                reason = _why_not(spec)
                if reason is not None:
                    raise ConnectError(f"the verbs provider {name!r} cannot work here: {reason}")
                return spec
        raise UnknownNameError("verbs provider", name, [AUTO, *(spec.name for spec in specs)])
    ranked = [(spec.rank, spec) for spec in specs if spec.rank is not None]
    reasons: list[str] = []
    for _, spec in sorted(ranked, key=lambda pair: (-pair[0], pair[1].name)):
        reason = _why_not(spec)
        if reason is None:
            return spec
        reasons.append(f"{spec.name}: {reason}")
    raise ConnectError("no verbs provider works here" + "".join(f"; {reason}" for reason in reasons))


def _why_not(spec: VerbsProviderSpec) -> str | None:
    try:
        return spec.probe()
    except Exception as exc:  # noqa: BLE001 - a stranger's plugin; its failure is a reason, not an end
        return f"its probe failed: {exc!r}"
