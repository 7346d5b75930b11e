"""A queue pair over a line: requests are frames, and an engine thread does what the peer's ask for.

The rules it lives by:

* **The engine is the responder's adapter**: it alone reads the line, judges what the peer asks, puts the bytes where
  they belong and acknowledges. No thread of the program is woken but by a completion.
* **The responder judges, always**: where a write cannot be done by way of shared memory, for whatever reason, it goes
  as a frame, and is refused at the other end if it must be.
* **Large writes into shared memory go on beside whoever posts them** (`_verbs_copying`); nothing that is posted behind
  them overtakes them.
* Completions are queued under the lock under which the state changes, so their order is that of the requests.
* A message for which no receive is posted is kept, one of them; meanwhile the engine goes on hearing answers, so that
  two ends which both wait for a receive hear of what they have sent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import numpy as np
import numpy.typing as npt

from whimbrel.errors import ChannelClosed, ChannelLost, StateError, StreamError
from whimbrel.verbs import QpState, QueuePair, WcOpcode, WcStatus, WorkCompletion
from whimbrel_transports._verbs_copy import memory_at, merged
from whimbrel_transports._verbs_copying import Copying
from whimbrel_transports._verbs_frames import MAX_BATCH, MAX_MESSAGE, MAX_WRITE, PIECE, Frame, Kind, Refusal
from whimbrel_transports._verbs_memory import AddressArray, Domain, Keys, Refused, Regions

if TYPE_CHECKING:
    from collections.abc import Callable

    from whimbrel_transports._verbs_completions import Queue
    from whimbrel_transports._verbs_line import Line

__all__ = ["NO_END", "Pair", "Shortcut"]

NO_END: Final = 7  # of `rnr_retry`
_RNR_TIMER: Final = 0.05  # seconds for each of the retries
_LAST_WORDS: Final = 2.0  # seconds the peer has to hear why it was refused
_LARGE: Final = 256 << 10  # bytes of a write from which another thread is worth its while
_REQUESTS: Final = frozenset({Kind.SEND, Kind.WRITE, Kind.WROTE})
_STATUS: Final = {
    Refusal.RNR: WcStatus.RNR_RETRY_EXC_ERR,
    Refusal.ACCESS: WcStatus.REM_ACCESS_ERR,
    Refusal.LENGTH: WcStatus.REM_INV_REQ_ERR,
    Refusal.OPERATION: WcStatus.REM_OP_ERR,
}
_PIECE: Final = np.dtype([("address", ">u8"), ("length", ">u8"), ("rkey", ">u4"), ("zero", ">u4")])
_MASK: Final = (1 << 32) - 1

_log = logging.getLogger("whimbrel.transports.verbs")


class Shortcut(Protocol):
    """A way to the peer's memory beside the line."""

    def begin(self) -> None:
        """The pair is connected: tell the peer of our memory."""

    def write(self, sources: AddressArray, targets: AddressArray, keys: Keys, lengths: AddressArray) -> bool:
        """Copy a batch into the peer's memory; False if that cannot be, and then the line is the way."""

    def take(self, frame: Frame) -> None:
        """A frame of the shortcut's own has come. Raises StreamError."""

    def close(self) -> None:
        """Let go of the peer's memory."""


@attrs.define(eq=False)
class _Posted:
    wr_id: int
    opcode: WcOpcode
    length: int
    signalled: bool
    number: int | None = None  # of its frame, if it has one
    done: bool = False

    def completion(self, status: WcStatus, qp_num: int) -> WorkCompletion:
        return WorkCompletion(self.wr_id, status, self.opcode, self.length, None, qp_num)


@attrs.define(eq=False)
class _Write:
    """A batch that is to be written, and what holds the memory that it is read from."""

    posted: _Posted
    sources: AddressArray
    targets: AddressArray
    keys: Keys
    lengths: AddressArray
    total: int
    imm_data: int | None
    held: ExitStack

    def keep(self) -> None:
        """The caller's arrays may change from now on."""
        self.sources, self.targets, self.lengths = self.sources.copy(), self.targets.copy(), self.lengths.copy()
        if not isinstance(self.keys, int):
            self.keys = self.keys.copy()


@attrs.frozen(eq=False)
class _Receive:
    wr_id: int
    address: int
    length: int
    lkey: int


class _Refuse(Exception):
    """A request of the peer is to be refused; `status` is what becomes of the receive that it took, if it took one."""

    def __init__(self, refusal: Refusal, status: WcStatus | None = None) -> None:
        super().__init__(refusal.name)
        self.refusal, self.status = refusal, status


class _Over(Exception):
    """The peer has refused a request of ours: there is nothing more to hear."""


class Pair(QueuePair):
    """One queue pair. `shortcut` is None where there is no other way than the line."""

    def __init__(
        self, number: int, pd: Domain, regions: Regions, send_cq: Queue, recv_cq: Queue,
        line: Line, shortcut: Shortcut | None, *, max_send_wr: int, max_recv_wr: int,
    ) -> None:  # fmt: skip
        self.qp_num, self.pd = number, pd
        self.on_end: Callable[[], None] = lambda: None
        self._regions, self._line, self._shortcut = regions, line, shortcut
        self._send_cq, self._recv_cq = send_cq, recv_cq
        self._max_send_wr, self._max_recv_wr = max_send_wr, max_recv_wr
        self._copying = Copying()
        self._posting = threading.Lock()  # one request after the other
        self._lock = threading.RLock()  # of everything below, for moments only
        self._state = QpState.INIT
        self._closed = False
        self._posted: deque[_Posted] = deque()
        self._receives: deque[_Receive] = deque()
        self._sent = 0
        self._acknowledged = 0
        self._parked = False
        self._taken: _Receive | None = None  # by the engine, and not completed yet
        # The engine's own:
        self._served = 0
        self._held: Frame | None = None
        self._retries = NO_END
        self._engine: threading.Thread | None = None

    @property
    def state(self) -> QpState:
        """Where it is."""
        return self._state

    def start(self, rnr_retry: int) -> None:
        """It is connected: RTS, and the engine runs. Raises ChannelClosed if it was closed meanwhile."""
        with self._lock:
            if self._closed:
                raise ChannelClosed("the queue pair was closed")
            self._state, self._retries = QpState.RTS, rnr_retry
            self._engine = threading.Thread(target=self._run, name=f"whimbrel-verbs-{self.qp_num}", daemon=True)
            self._engine.start()
        if self._shortcut is not None:
            self._shortcut.begin()

    # ------------------------------------------------------------------------------------------------- posting

    def post_recv(self, address: int, length: int, lkey: int, wr_id: int) -> None:
        """Offer memory for a message, as `QueuePair.post_recv` says."""
        receive = _Receive(wr_id, address, length, lkey)
        with self._lock:
            if self._closed:
                raise ChannelClosed("the queue pair was closed")
            if self._state is QpState.ERR:
                self._recv_cq.push([self._received(receive, WcStatus.WR_FLUSH_ERR)])
                return
            if len(self._receives) >= self._max_recv_wr:
                raise StateError(f"the receive queue is full: it has room for {self._max_recv_wr}")
            self._receives.append(receive)
            if self._parked:
                self._line.wake()

    def post_send(
        self, address: int, length: int, lkey: int, wr_id: int, *, imm_data: int | None = None, signalled: bool = True
    ) -> None:
        """Send a message, as `QueuePair.post_send` says."""
        if not 0 <= length <= MAX_MESSAGE:
            raise ValueError(f"a message has {length} bytes; expected 0 to {MAX_MESSAGE}")
        pieces = np.array([[address, length]], np.uint64)
        with self._posting:
            posted = self._admit(wr_id, WcOpcode.SEND, length, signalled=signalled)
            self._copying.wait()
            if posted is None or (length and not self._is_ours(posted, lkey, pieces[:, 0], pieces[:, 1])):
                return
            self._transmit(posted, Kind.SEND, imm_data, length, 0, b"", pieces if length else pieces[:0])

    def post_write(
        self,
        local_addresses: AddressArray,
        lkeys: Keys,
        remote_addresses: AddressArray,
        rkeys: Keys,
        lengths: AddressArray,
        wr_id: int,
        *,
        imm_data: int | None = None,
        signalled: bool = True,
    ) -> None:
        """Write a batch of pieces, as `QueuePair.post_write` says."""
        total = _check_batch(local_addresses, lkeys, remote_addresses, rkeys, lengths)
        with self._posting:
            posted = self._admit(wr_id, WcOpcode.RDMA_WRITE, total, signalled=signalled)
            if posted is None:
                return
            held = ExitStack()
            try:
                held.enter_context(self._regions.reading(self.pd, lkeys, local_addresses, lengths))
            except Refused as error:
                self._copying.wait()
                self._is_refused_here(posted, error)
                return
            write = _Write(posted, local_addresses, remote_addresses, rkeys, lengths, total, imm_data, held)
            if self._shortcut is None or total < _LARGE or imm_data is not None:
                self._copying.wait()
                self._write(write)
            else:
                write.keep()
                self._copying.add(lambda: self._write(write))

    def _write(self, write: _Write) -> None:
        """Do a write, unless it was flushed."""
        with write.held:
            if self._state is QpState.ERR:
                return
            posted, imm_data, lengths = write.posted, write.imm_data, write.lengths
            if self._shortcut is not None and self._shortcut.write(write.sources, write.targets, write.keys, lengths):
                if imm_data is None:
                    self._settle(posted)
                else:
                    self._transmit(posted, Kind.WROTE, imm_data, 0, write.total, b"", _nothing())
                return
            head = np.zeros(len(lengths), _PIECE)
            head["address"], head["length"], head["rkey"] = write.targets, lengths, write.keys
            sources, _, sizes = merged(write.sources, write.targets, lengths)
            vectors = np.stack((sources, sizes), axis=1)
            self._transmit(
                posted, Kind.WRITE, imm_data, head.nbytes + write.total, len(lengths), head.tobytes(), vectors
            )

    def _admit(self, wr_id: int, opcode: WcOpcode, length: int, *, signalled: bool) -> _Posted | None:
        """Take a request into the queue; None if it was flushed at once."""
        posted = _Posted(wr_id, opcode, length, signalled)
        with self._lock:
            if self._closed:
                raise ChannelClosed("the queue pair was closed")
            if self._state is QpState.INIT:
                raise StateError("the queue pair is not connected")
            if self._state is QpState.ERR:
                self._send_cq.push([posted.completion(WcStatus.WR_FLUSH_ERR, self.qp_num)])
                return None
            if len(self._posted) >= self._max_send_wr:
                raise StateError(f"the send queue is full: it has room for {self._max_send_wr}")
            self._posted.append(posted)
        return posted

    def _is_ours(self, posted: _Posted, keys: Keys, addresses: AddressArray, lengths: AddressArray) -> bool:
        try:
            self._regions.check_local(self.pd, keys, addresses, lengths)
        except Refused as error:
            self._is_refused_here(posted, error)
            return False
        return True

    def _is_refused_here(self, posted: _Posted, error: Refused) -> None:
        _log.debug("queue pair %d: %s", self.qp_num, error)
        self._fail(posted, WcStatus.LOC_PROT_ERR)

    def _transmit(
        self, posted: _Posted, kind: Kind, imm_data: int | None, size: int, count: int, body: bytes,
        pieces: npt.NDArray[np.uint64],
    ) -> None:  # fmt: skip
        with self._lock:
            self._sent += 1
            posted.number = self._sent
        frame = Frame(kind, (imm_data or 0) & _MASK, posted.number, size, count, imm_data is not None)
        try:
            self._line.send_memory(frame, body, pieces)
        except OSError as error:
            _log.debug("queue pair %d: %s", self.qp_num, error)
            self._fail()

    def _settle(self, posted: _Posted) -> None:
        with self._lock:
            posted.done = True
            self._retire()

    def _retire(self) -> None:
        """Queue the completions of what is done, in order; `_lock` is held."""
        done = []
        while self._posted and self._posted[0].done:
            posted = self._posted.popleft()
            if posted.signalled:
                done.append(posted.completion(WcStatus.SUCCESS, self.qp_num))
        if not self._send_cq.push(done):
            _log.warning("queue pair %d: its completion queue is full", self.qp_num)
            self._fail()

    # ------------------------------------------------------------------------------------------------- the end

    def _fail(self, culprit: _Posted | None = None, status: WcStatus = WcStatus.WR_FLUSH_ERR, *,
              hang_up: bool = True) -> None:  # fmt: skip
        """Go to ERR and flush; `culprit` ends with `status`, what was acknowledged as it was. Any thread."""
        with self._lock:
            if self._state is not QpState.ERR:
                self._state = QpState.ERR
                sent = [
                    posted.completion(status if posted is culprit else WcStatus.WR_FLUSH_ERR, self.qp_num)
                    for posted in self._posted
                ]
                self._posted.clear()
                self._send_cq.push(sent)
                if self._taken is not None:
                    self._receives.appendleft(self._taken)
                self._recv_cq.push([self._received(receive, WcStatus.WR_FLUSH_ERR) for receive in self._receives])
                self._receives.clear()
        if hang_up:
            self._line.hang_up()

    def disconnect(self) -> None:
        """End the connection; everything is flushed."""
        self._fail()

    def close(self) -> None:
        """Disconnect, and wait for the engine and for those that post to leave."""
        with self._lock:
            self._closed = True
        self._fail()
        self._copying.close()
        engine = self._engine
        if engine is not None and engine is not threading.current_thread():
            engine.join()
        elif engine is None and self._shortcut is not None:
            self._shortcut.close()
        with self._posting:
            self._line.close()

    # ------------------------------------------------------------------------------------------------- the engine

    def _run(self) -> None:
        culprit = None
        try:
            while (frame := self._next()) is not None:
                if frame.kind in _REQUESTS:
                    self._serve(frame)
                else:
                    self._hear(frame)
        except _Over:
            pass
        except _Refuse as refused:
            self._refuse(refused)
        except (StreamError, ChannelLost) as error:
            _log.warning("queue pair %d: %s", self.qp_num, error)
        except OSError as error:
            _log.debug("queue pair %d: the line broke: %s", self.qp_num, error)
            with self._lock:
                culprit = self._posted[0] if self._posted else None
        finally:
            self._fail(culprit, WcStatus.RETRY_EXC_ERR)
            if self._shortcut is not None:
                self._shortcut.close()
            self.on_end()

    def _next(self) -> Frame | None:
        held, self._held = self._held, None
        while held is None:
            if self._line.wait(None):
                return self._line.receive_frame()
            if self._state is QpState.ERR:
                return None
        return held

    def _hear(self, frame: Frame) -> None:
        """An answer of the peer's, or a word about its memory."""
        if frame.kind is Kind.ACK:
            with self._lock:
                self._acknowledge(frame.number)
                self._retire()
        elif frame.kind is Kind.NAK:
            self._heard_refusal(frame)
        elif self._shortcut is not None:
            self._shortcut.take(frame)
        else:
            raise StreamError(f"a verbs frame {frame.kind.name} came over a line that has no use for it")

    def _acknowledge(self, number: int) -> None:
        if not self._acknowledged < number <= self._sent:
            raise StreamError(
                f"a verbs peer acknowledges request {number}; expected {self._acknowledged + 1} to {self._sent}"
            )
        self._acknowledged = number
        for posted in self._posted:
            if posted.number is not None:
                if posted.number > number:
                    break
                posted.done = True

    def _heard_refusal(self, frame: Frame) -> None:
        try:
            status = _STATUS[Refusal(frame.word)]
        except ValueError:
            raise StreamError(f"a verbs peer refuses a request for the reason {frame.word}") from None
        with self._lock:
            self._acknowledge(frame.number)
            refused = next((posted for posted in self._posted if posted.number == frame.number), None)
            if refused is not None:
                refused.done = False
            self._retire()
            self._fail(refused, status)
        raise _Over

    def _serve(self, frame: Frame) -> None:
        """A request of the peer's."""
        if frame.number != self._served + 1:
            raise StreamError(f"a verbs peer posts request {frame.number}; expected {self._served + 1}")
        if frame.kind is Kind.SEND:
            self._take_message(frame)
        else:
            written = frame.count
            if frame.kind is Kind.WRITE:
                written = self._apply(frame)
            if frame.immediate:
                receive, _ = self._receive(0)
                self._push(self._received(receive, WcStatus.SUCCESS, WcOpcode.RECV_RDMA_WITH_IMM, written, frame))
        self._served = frame.number
        self._line.acknowledge(frame.number)

    def _take_message(self, frame: Frame) -> None:
        receive, kept = self._receive(frame.size)
        if frame.size > receive.length:
            raise _Refuse(Refusal.LENGTH, WcStatus.LOC_LEN_ERR)
        if receive.length:
            try:
                with self._regions.using_local(self.pd, receive.lkey, receive.address, receive.length):
                    if kept is None:
                        self._line.receive_memory(receive.address, frame.size)
                    elif kept:
                        memory_at(receive.address, frame.size)[:] = kept
            except Refused:
                raise _Refuse(Refusal.OPERATION, WcStatus.LOC_PROT_ERR) from None
        self._push(self._received(receive, WcStatus.SUCCESS, WcOpcode.RECV, frame.size, frame))

    def _apply(self, frame: Frame) -> int:
        """Put a write where it belongs; returns its bytes."""
        head = np.frombuffer(self._line.receive_bytes(frame.count * PIECE.size), _PIECE)
        addresses, lengths = head["address"].astype(np.uint64), head["length"].astype(np.uint64)
        total = frame.size - head.nbytes
        if (lengths > MAX_WRITE).any() or int(lengths.sum()) != total or total > MAX_WRITE:
            raise StreamError(
                f"the pieces of a verbs write have other lengths than the {total} bytes that were announced"
            )
        try:
            with self._regions.using_remote(self.pd, head["rkey"].astype(np.uint32), addresses, lengths):
                starts, _, sizes = merged(addresses, addresses, lengths)
                self._line.receive_pieces(np.stack((starts, sizes), axis=1))
        except Refused as error:
            _log.warning("queue pair %d: refused a write: %s", self.qp_num, error)
            raise _Refuse(Refusal.ACCESS) from None
        return total

    def _receive(self, size: int) -> tuple[_Receive, bytearray | None]:
        """The receive that is posted first, and the message if it had to wait for that; it is `size` bytes."""
        with self._lock:
            if self._receives:
                return self._take(), None
            self._parked = True
        try:
            end = None if self._retries == NO_END else time.monotonic() + self._retries * _RNR_TIMER
            kept = self._line.receive_bytes(size)
            while True:
                with self._lock:
                    if self._receives:
                        return self._take(), kept
                    if self._state is QpState.ERR:
                        raise _Over
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    raise _Refuse(Refusal.RNR)
                if self._line.wait(left, reading=self._held is None) and self._held is None:
                    self._hear_while_parked()
        finally:
            self._parked = False

    def _take(self) -> _Receive:
        self._taken = self._receives.popleft()
        return self._taken

    def _hear_while_parked(self) -> None:
        frame = self._line.receive_frame()
        if frame is None:
            raise _Over
        if frame.kind in _REQUESTS:
            self._held = frame
        else:
            self._hear(frame)

    def _refuse(self, refused: _Refuse) -> None:
        """Tell the peer why, go to ERR, and wait until it has heard."""
        with self._lock:
            if refused.status is not None and self._taken is not None and self._state is not QpState.ERR:
                self._recv_cq.push([self._received(self._taken, refused.status)])
                self._taken = None
        self._line.say(Frame(Kind.NAK, refused.refusal, self._served + 1))
        self._fail(hang_up=False)
        self._line.drain(_LAST_WORDS)

    def _push(self, completion: WorkCompletion) -> None:
        with self._lock:
            if self._state is QpState.ERR:  # and the receive was flushed
                raise _Over
            self._taken = None
            if not self._recv_cq.push([completion]):
                _log.warning("queue pair %d: its completion queue is full", self.qp_num)
                raise _Over

    def _received(
        self, receive: _Receive, status: WcStatus, opcode: WcOpcode = WcOpcode.RECV, length: int = 0,
        frame: Frame | None = None,
    ) -> WorkCompletion:  # fmt: skip
        imm_data = None if frame is None else frame.imm_data
        return WorkCompletion(receive.wr_id, status, opcode, length, imm_data, self.qp_num)


def _check_batch(
    local_addresses: AddressArray, lkeys: Keys, remote_addresses: AddressArray, rkeys: Keys, lengths: AddressArray
) -> int:
    """The bytes of a batch. Raises ValueError for arrays that do not fit together."""
    shape = lengths.shape
    for name, array in (("lengths", lengths), ("local", local_addresses), ("remote", remote_addresses)):
        if array.ndim != 1 or array.shape != shape or array.dtype != np.uint64:
            raise ValueError(f"{name} of a write: expected shape {shape}, uint64; got {array.shape}, {array.dtype}")
    for name, keys in (("lkeys", lkeys), ("rkeys", rkeys)):
        if isinstance(keys, np.ndarray) and (keys.shape != shape or keys.dtype != np.uint32):
            raise ValueError(f"{name} of a write: expected shape {shape}, uint32; got {keys.shape}, {keys.dtype}")
        if isinstance(keys, int) and not 0 <= keys <= _MASK:
            raise ValueError(f"{name} of a write: {keys} is no key of 32 bits")
    if len(lengths) > MAX_BATCH:
        raise ValueError(f"a write has {len(lengths)} pieces; at most {MAX_BATCH} go into one batch")
    total = int(lengths.sum()) if not (lengths > MAX_WRITE).any() else MAX_WRITE + 1
    if total > MAX_WRITE:
        raise ValueError(f"a write has more than the {MAX_WRITE} bytes that go into one batch")
    return total


def _nothing() -> npt.NDArray[np.uint64]:
    return np.empty((0, 2), np.uint64)
