"""One connection of `rdma:` and the control messages on it: who sends the stream, and who receives it.

The rules it lives by (wire format, sections 8.2 and 8.3):

* **Whoever is about to receive says READY first**, and one READY pays for one message. Answers need none: who asks has
  posted a receive for the answer before.
* **The receiving end says READY ahead**, from a thread of its own, as long as it has room for what comes. So a `send`
  returns when its bytes are in the peer's process, whether somebody is reading there or not.
* **A receive is posted for each thing that may come**: what was asked for, an answer, and an ERROR, which nobody asks
  for. Whichever it is goes to the one that was posted first.
* **A message has arrived when its SEND has completed**; what completed before a disconnect is read before its end.
* Failed completions become `ChannelLost` here, once, and the link stays so.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from whimbrel.abc import Patience
from whimbrel.errors import ChannelClosed, ChannelLost, MigrationError, StreamError
from whimbrel.verbs import Access, CompletionQueue, ConnectionId, WcStatus, WorkCompletion
from whimbrel.wire import rdma as wire
from whimbrel.wire.rdma import ControlType, Message, RecordArray, WorkKind

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from whimbrel.verbs import AddressArray

__all__ = ["Link", "ReceivingLink", "SendingLink"]

SEND_QUEUE: Final = 512  # requests, as QEMU has it
RECEIVE_QUEUE: Final = 3
COMPLETIONS: Final = 1536

AHEAD: Final = 1 << 20  # bytes of the stream that are received before somebody reads them
LAST_WORD: Final = 0.2  # seconds that a peer has to take our ERROR

_FOR_EVER: Final = float("inf")
_ERROR: Final = wire.work_id(WorkKind.CONTROL_SEND, 1)  # the id of an ERROR, to tell it from another message
_SAYS_ERROR: Final = wire.header(ControlType.ERROR)[4:8]
_MESSAGE: Final = wire.work_id(WorkKind.CONTROL_SEND)


class Link:
    """A connection with its queues and its buffers; the base of both ends. It takes `connection` over.

    Each room of the buffers has `wire.MESSAGE_MAX` bytes: 0 is for sending, 1 for an ERROR, the others to receive.
    """

    def __init__(self, connection: ConnectionId) -> None:
        self.connection = connection
        self.peer = connection.peer
        context = connection.context
        self.domain = context.alloc_pd()
        self._sent = context.create_cq(COMPLETIONS)
        self._received = context.create_cq(COMPLETIONS)
        self._queues = connection.create_qp(
            self.domain, self._sent, self._received, max_send_wr=SEND_QUEUE, max_recv_wr=RECEIVE_QUEUE
        )
        self._buffers = np.zeros((2 + RECEIVE_QUEUE, wire.MESSAGE_MAX), np.uint8)  # not touched before they are used
        self._region = self.domain.reg_mr(self._buffers.ctypes.data, self._buffers.size, Access.LOCAL_WRITE)
        self._taken: int | None = None  # the room of the last message, until the next is waited for
        self._waiting = Patience(_FOR_EVER)
        self._completing = threading.Lock()
        self._messages = 0  # that were posted and have not completed
        self._error_told = threading.Event()
        self._lost = ""  # why nothing goes any more
        self._gone = False  # the peer has disconnected, and said nothing to that
        self._closed = False
        self.on_written: Callable[[], object] = lambda: None
        """Called for each completed batch of writes, in the order in which they were posted."""
        for room in range(2, 2 + RECEIVE_QUEUE):
            self._offer(room)

    # ------------------------------------------------------------------------------------------------- receives

    def _offer(self, room: int) -> None:
        work = wire.work_id(WorkKind.RECEIVE_READY + room - 2, room)
        self._queues.post_recv(self._address(room), wire.MESSAGE_MAX, self._region.lkey, work)

    def _next(self) -> Message:
        """Wait for the next message; valid until this is called again.

        Raises StreamError, and ChannelLost, also for an ERROR.
        """
        if self._taken is not None:
            with self._unless_closed():
                self._offer(self._taken)
            self._taken = None
        completion = self._wait(self._received)
        if completion.status is not WcStatus.SUCCESS:
            raise self._failed(completion)
        room = self._taken = wire.work_place(completion.wr_id)[0]
        message = wire.parse_message(self._buffers[room, : completion.byte_len].data)
        if message.kind is ControlType.ERROR:
            self._lost = self._lost or f"{self.peer} says that it has failed (ERROR)"
            raise ChannelLost(self._lost, hint="its own log says why")
        return message

    def _wait(self, queue: CompletionQueue) -> WorkCompletion:
        while True:
            self.check()
            with self._unless_closed():
                found = queue.poll(1)
                if found:
                    return found[0]
                queue.wait(self._waiting)

    # ---------------------------------------------------------------------------------------------------- sends

    def _post(self, kind: ControlType, data: Buffer | None = None, *, repeat: int = 1) -> None:
        """SEND a message, and wait until the peer has it. Raises ChannelLost, ChannelClosed."""
        self.check()
        payload = b"" if data is None else memoryview(data).cast("B")
        head = wire.header(kind, len(payload), repeat)
        room = self._buffers[0]
        room[: len(head)] = np.frombuffer(head, np.uint8)
        if payload:
            room[len(head) : len(head) + len(payload)] = np.frombuffer(payload, np.uint8)
        with self._completing:
            self._messages += 1
        with self._unless_closed():
            self._queues.post_send(self._address(0), len(head) + len(payload), self._region.lkey, _MESSAGE)
        while self._messages:
            self.complete_one()

    def complete_one(self) -> None:
        """Wait until one of our requests has completed. Raises ChannelLost, ChannelClosed."""
        self._completed(self._wait(self._sent))

    def _completed(self, completion: WorkCompletion) -> None:
        if completion.wr_id == _ERROR:
            self._error_told.set()
            return
        if completion.status is not WcStatus.SUCCESS:
            raise self._failed(completion)
        if wire.work_kind(completion.wr_id) == WorkKind.WRITE:
            self.on_written()
            return
        with self._completing:
            self._messages -= 1

    # ------------------------------------------------------------------------------------------------------ end

    def check(self) -> None:
        """Raise ChannelClosed or ChannelLost once the link is of no more use."""
        if self._closed:
            raise self._we_closed()
        if self._lost:
            raise ChannelLost(self._lost)

    def tell_error(self) -> None:
        """Tell the peer that we have failed, if it can still be told; waits for LAST_WORD at most. Any thread."""
        head = wire.header(ControlType.ERROR)
        self._buffers[1, : len(head)] = np.frombuffer(head, np.uint8)
        patience = Patience(LAST_WORD)
        # One that has no receive posted may hold up even the posting.
        too_long = threading.Timer(LAST_WORD, self.connection.disconnect)
        too_long.start()
        with suppress(MigrationError):
            self._queues.post_send(self._address(1), len(head), self._region.lkey, _ERROR)
            while not self._error_told.is_set() and patience.remaining() > 0:
                if any(completion.wr_id == _ERROR for completion in self._sent.poll(SEND_QUEUE)):
                    self._error_told.set()
                if not self._error_told.is_set():
                    self._sent.wait(patience)
        too_long.cancel()
        too_long.join()

    def close(self) -> None:
        """Disconnect and release everything; wakes whoever waits. Twice is fine."""
        self._closed = True
        self.connection.close()

    def _failed(self, completion: WorkCompletion) -> ChannelLost:
        what = completion.opcode.value
        if not self._lost:
            if self._error_has_come():
                self._lost = f"{self.peer} says that it has failed (ERROR)"
            elif completion.status is WcStatus.WR_FLUSH_ERR:
                self._lost, self._gone = f"{self.peer} has disconnected", True
            else:
                self._lost = f"the connection to {self.peer} broke: {what}: {completion.status.value}"
        return ChannelLost(self._lost)

    def _error_has_come(self) -> bool:
        """Whether a peer that is no more has said ERROR before, where nobody has looked yet."""
        with suppress(MigrationError):
            for completion in self._received.poll(RECEIVE_QUEUE):
                if completion.status is WcStatus.SUCCESS:
                    room = wire.work_place(completion.wr_id)[0]
                    if self._buffers[room, 4:8].tobytes() == _SAYS_ERROR:
                        return True
        return False

    @contextmanager
    def _unless_closed(self) -> Iterator[None]:
        try:
            yield
        except ChannelClosed:
            raise self._we_closed() from None

    def _we_closed(self) -> ChannelClosed:
        return ChannelClosed(f"the connection to {self.peer} was closed on this side")

    def _address(self, room: int) -> int:
        return int(self._buffers.ctypes.data) + room * wire.MESSAGE_MAX


class SendingLink(Link):
    """The end that sends the stream, and asks; one thread, but `close` and `tell_error` from any."""

    def tell(self, kind: ControlType, data: Buffer | None = None, *, repeat: int = 1) -> None:
        """Send a message without an answer. Raises ChannelLost, ChannelClosed and StreamError."""
        self._await_ready()
        self._post(kind, data, repeat=repeat)

    def ask(self, kind: ControlType, records: RecordArray | None, answer: ControlType) -> Message:
        """Send a request and wait for its answer, which is valid until the next request.

        Raises as `tell` does, StreamError also for another answer.
        """
        self._await_ready()
        if records is None:
            self._post(kind)
        else:
            self._post(kind, records.tobytes(), repeat=len(records))
        came = self._next()
        if came.kind is not answer:
            raise StreamError(f"the destination answers {kind.name} with {came.kind.name}, expected {answer.name}")
        return came

    def write(
        self,
        local: AddressArray,
        lkeys: npt.NDArray[np.uint32],
        remote: AddressArray,
        rkeys: npt.NDArray[np.uint32],
        lengths: AddressArray,
        work: int,
    ) -> None:
        """Write pieces of our memory into the peer's; `on_written` tells that they are there. Raises as `tell`."""
        self.check()
        with self._unless_closed():
            self._queues.post_write(local, lkeys, remote, rkeys, lengths, work)

    def disconnect(self) -> None:
        """End the connection in order: everything that was sent is at the peer."""
        self.connection.disconnect()

    def _await_ready(self) -> None:
        came = self._next()
        if came.kind is not ControlType.READY:
            raise StreamError(f"the peer sent {came.kind.name} where it had to say READY")


class ReceivingLink(Link):
    """The end that receives the stream, and answers. One thread reads; `close` and `tell_error` from any.

    `start` begins to receive, once it is connected.
    """

    def __init__(self, connection: ConnectionId) -> None:
        super().__init__(connection)
        self._changed = threading.Condition()
        self._queue: deque[memoryview | Message] = deque()
        self._queued = 0  # bytes of the stream
        self._end: MigrationError | None = None  # of what comes
        self._thread = threading.Thread(target=self._receive, name="whimbrel-rdma", daemon=True)

    def start(self) -> None:
        """Say READY and begin to receive."""
        self._thread.start()

    def recv_into(self, buffer: Buffer) -> int:
        """Take bytes of the stream, as `Channel.recv_into` says. Raises StreamError where something else has come."""
        room = np.frombuffer(memoryview(buffer), np.uint8)
        if not room.size:
            raise ValueError("a buffer to receive into must not be empty")
        with self._changed:
            head = self._head()
            if head is None:
                return 0
            if isinstance(head, Message):
                raise StreamError(f"the peer sent {head.kind.name} where bytes of the stream were expected")
            count = min(len(head), room.size)
            room[:count] = np.frombuffer(head[:count], np.uint8)
            if count == len(head):
                self._queue.popleft()
            else:
                self._queue[0] = head[count:]
            self._queued -= count
            self._changed.notify_all()
        return count

    def next_message(self) -> Message:
        """Wait for a message that is not of the stream; valid until `handled`, which must be called before the next.

        Raises StreamError where bytes of the stream came, ChannelLost where there are no more.
        """
        with self._changed:
            head = self._head()
        if head is None:
            raise ChannelLost(f"{self.peer} has disconnected where more was expected")
        if not isinstance(head, Message):
            raise StreamError("bytes of the stream came where the peer had to say what it writes")
        return head

    def answer(self, kind: ControlType, records: RecordArray | None = None, *, repeat: int | None = None) -> None:
        """Answer the message that is being handled. Raises ChannelLost, ChannelClosed."""
        data = None if records is None else records.tobytes()
        self._post(kind, data, repeat=repeat if repeat is not None else 1 if records is None else len(records))

    def handled(self) -> None:
        """Done with the message: the next may come."""
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()

    def close(self) -> None:
        """Disconnect and release everything; wakes whoever waits. Twice is fine."""
        super().close()
        with self._changed:
            self._changed.notify_all()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _head(self) -> memoryview | Message | None:
        """What comes next, None at the end; waits for it. With `_changed` held."""
        self._changed.wait_for(lambda: self._queue or self._end is not None or self._closed)
        if self._closed:
            raise self._we_closed()
        if self._queue:
            return self._queue[0]
        if self._gone:
            return None
        assert self._end is not None, "neither an end nor a closed link"
        raise self._end

    def _receive(self) -> None:
        try:
            while True:
                self._say_ready()
                self._take(self._next())
        except MigrationError as exc:
            with self._changed:
                self._end = exc
                self._changed.notify_all()

    def _say_ready(self) -> None:
        """Pay for the next message. A peer that is gone may have said something before: the next receive has it."""
        try:
            self._post(ControlType.READY)
        except ChannelLost:
            self._lost, self._gone = "", False

    def _error_has_come(self) -> bool:
        """Nobody but the thread that receives may take what has come, and it is told in its turn."""
        return False

    def _take(self, message: Message) -> None:
        """Queue what has come, and wait until there is room for the next."""
        if message.kind is ControlType.READY:
            raise StreamError("the peer says READY to the end that receives")
        with self._changed:
            if message.kind is ControlType.QEMU_FILE:
                self._queue.append(memoryview(bytes(message.data)))
                self._queued += len(message.data)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queued < AHEAD or self._closed)
            else:
                self._queue.append(message)
                self._changed.notify_all()
                self._changed.wait_for(lambda: message not in self._queue or self._closed)
        self.check()
