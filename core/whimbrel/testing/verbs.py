"""The conformance suite for providers of verbs.

::

    class TestMine(VerbsConformance):
        def make(self):
            return MyProvider()

The rules it lives by are those of the transports' suite: nothing is skipped, nothing sleeps to let something happen,
whatever could block has a time, and after each check no descriptor, thread or mapping may be left. The judge
of writes is a plain copy of the memory that is written.
"""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import attrs
import numpy as np

from whimbrel.abc import Patience
from whimbrel.errors import ChannelClosed, ConfigError, ConnectError, MigrationCancelled, StateError
from whimbrel.machine.memory import MemoryArea
from whimbrel.testing._bench import Task, nothing_left, raises, same
from whimbrel.verbs import (
    MAX_PRIVATE_DATA,
    Access,
    CmEventType,
    CompletionQueue,
    ConnectionId,
    ConnectRejected,
    MemoryRegion,
    ProtectionDomain,
    QpState,
    QueuePair,
    VerbsProvider,
    WcOpcode,
    WcStatus,
    WorkCompletion,
)

if TYPE_CHECKING:
    import pytest

    from whimbrel.abc import IndexArray

__all__ = ["CHECKS", "End", "VerbsBench", "VerbsConformance"]

_SIZE: Final = 64 << 10
_PAGE: Final = 4096
_REMOTE: Final = Access.LOCAL_WRITE | Access.REMOTE_WRITE


@attrs.define(eq=False)
class End:
    """One end of a connection with memory of its own, all of it registered."""

    id: ConnectionId
    memory: MemoryArea
    queue: CompletionQueue
    pair: QueuePair
    region: MemoryRegion
    domain: ProtectionDomain
    timeout: float

    def register(self, memory: MemoryArea, access: Access) -> MemoryRegion:
        """Register more memory, to be used with our queue pair."""
        return self.domain.reg_mr(memory.address, memory.size, access, fd=memory.fd)

    def next(self) -> WorkCompletion:
        """Wait for the next completion."""
        self.queue.wait(Patience(self.timeout))
        (completion,) = self.queue.poll(1)
        return completion

    def write(
        self, far: End, target: int, length: int = 16, *, source: int = 0, rkey: int | None = None, wr_id: int = 1,
        imm_data: int | None = None, signalled: bool = True,
    ) -> None:  # fmt: skip
        """Post one write from our memory at `source` to address `target` of the far end."""
        columns = [np.array([value % (1 << 64)], np.uint64) for value in (self.memory.address + source, target, length)]
        key = far.region.rkey if rkey is None else rkey
        self.pair.post_write(
            columns[0], self.region.lkey, columns[1], key, columns[2], wr_id, imm_data=imm_data, signalled=signalled
        )

    def write_pages(self, far: End, pages: IndexArray, lengths: int = _PAGE) -> None:
        """Post a batch of whole pages, each to the place where it is here."""
        offsets = pages.astype(np.uint64) * np.uint64(_PAGE)
        sizes = np.full(len(pages), lengths, np.uint64)
        here, there = offsets + np.uint64(self.memory.address), offsets + np.uint64(far.memory.address)
        self.pair.post_write(here, self.region.lkey, there, far.region.rkey, sizes, 2)

    def receive(self, wr_id: int, offset: int = 0, length: int = 64) -> None:
        """Post a receive."""
        self.pair.post_recv(self.memory.address + offset, length, self.region.lkey, wr_id)

    def send(self, wr_id: int, length: int = 16, *, signalled: bool = True) -> None:
        """Send the first bytes of our memory."""
        self.pair.post_send(self.memory.address, length, self.region.lkey, wr_id, signalled=signalled)


class VerbsBench:
    """A provider on trial: makes connections for one check, and puts them away after it."""

    def __init__(self, provider: VerbsProvider, memory: str, timeout: float, stack: ExitStack) -> None:
        self.provider, self.memory, self.timeout = provider, memory, timeout
        self._stack = stack

    def patience(self, seconds: float | None = None) -> Patience:
        """As long as a check may take, or `seconds`."""
        return Patience(self.timeout if seconds is None else seconds)

    def start(self, call: Callable[[], object]) -> Task[object]:
        """Make a call on a thread of its own."""
        return Task(call, "verbs", self.timeout)

    def request(self, port: int | None = None) -> tuple[ConnectionId, Callable[[], ConnectionId]]:
        """An end that has resolved its peer, and what waits for its request at the other."""
        listener = self.provider.listen("127.0.0.1", 0)
        self._stack.callback(listener.close)
        found: list[ConnectionId] = []

        def hear() -> None:
            made = listener.get_request(self.patience())
            self._stack.callback(made.close)
            found.append(made)

        hearing = self.start(hear)
        near = self.provider.resolve("127.0.0.1", listener.port if port is None else port, self.patience())
        self._stack.callback(near.close)

        def far() -> ConnectionId:
            hearing.result()
            return found[0]

        return near, far

    def end(self, made: ConnectionId, *, access: Access = _REMOTE, seed: int = 0) -> End:
        """Memory, a queue and a queue pair of room for 8 requests each way."""
        memory = MemoryArea(_SIZE, self.memory)
        self._stack.callback(memory.close)
        memory.view[:] = np.random.default_rng(seed).integers(0, 256, _SIZE, np.uint8)
        domain = made.context.alloc_pd()
        queue = made.context.create_cq(64)
        pair = made.create_qp(domain, queue, queue, max_send_wr=8, max_recv_wr=8)
        region = domain.reg_mr(memory.address, _SIZE, access, fd=memory.fd)
        return End(made, memory, queue, pair, region, domain, self.timeout)

    def pair(self, *, access: Access = _REMOTE, rnr_retry: int = 7) -> tuple[End, End]:
        """Two connected ends; `access` and `rnr_retry` are the far one's."""
        made, accepted = self.request()
        near = self.end(made, seed=1)
        ends: list[End] = []

        def accept() -> None:
            ends.append(self.end(accepted(), access=access, seed=2))
            ends[0].id.accept(b"", self.patience(), rnr_retry=rnr_retry)

        accepting = self.start(accept)
        made.connect(b"", self.patience())
        accepting.result()
        self.settle(near, ends[0])
        return near, ends[0]

    def settle(self, near: End, far: End) -> None:
        """Have a word each way: what either end told the other in the beginning has come then."""
        for one, other in ((near, far), (far, near)):
            other.pair.post_recv(0, 0, 0, 100)
            one.pair.post_send(0, 0, 0, 101)
            _is(other.next(), 100, WcStatus.SUCCESS)
            _is(one.next(), 101, WcStatus.SUCCESS)


def _is(completion: WorkCompletion, wr_id: int, status: WcStatus, opcode: WcOpcode | None = None) -> None:
    assert (completion.wr_id, completion.status) == (wr_id, status)
    assert opcode is None or completion.opcode is opcode


def _ended(end: End, bench: VerbsBench) -> None:
    assert end.id.get_event(bench.patience()).event is CmEventType.DISCONNECTED
    assert end.pair.state is QpState.ERR


# ------------------------------------------------------------------------------------------------- what arrives


def check_a_message_arrives(bench: VerbsBench) -> None:
    """Whole, in the receive that was posted first, with its immediate data."""
    near, far = bench.pair()
    sent = near.memory.view[:16].tobytes()
    far.receive(1, 128)
    far.receive(2, 256)
    near.send(3)
    near.pair.post_send(near.memory.address, 0, near.region.lkey, 4, imm_data=0xFFFF_FFFE)
    first, second = far.next(), far.next()
    _is(first, 1, WcStatus.SUCCESS, WcOpcode.RECV)
    assert (first.byte_len, first.imm_data, second.wr_id, second.byte_len) == (16, None, 2, 0)
    assert second.imm_data == 0xFFFF_FFFE
    same(far.memory.view[128:144].tobytes(), sent)
    _is(near.next(), 3, WcStatus.SUCCESS, WcOpcode.SEND)
    _is(near.next(), 4, WcStatus.SUCCESS, WcOpcode.SEND)


def check_written_pages_are_there_when_a_message_behind_them_is(bench: VerbsBench) -> None:
    """Scattered pages, neighbours, all of them, and none: what was written, and nothing else."""
    near, far = bench.pair()
    model = far.memory.view.copy()
    for number, pages in enumerate(([1, 3, 4, 5, 9], list(range(16)), [15, 0, 7], [])):
        chosen = np.array(pages, np.intp)
        near.memory.view[:] ^= np.uint8(number + 1)
        model.reshape(-1, _PAGE)[chosen] = near.memory.view.reshape(-1, _PAGE)[chosen]
        near.write_pages(far, chosen)
        far.pair.post_recv(0, 0, 0, 7)
        near.pair.post_send(0, 0, 0, 8, signalled=False)
        _is(far.next(), 7, WcStatus.SUCCESS)
        same(far.memory.view.tobytes(), model.tobytes())
        done = near.next()
        _is(done, 2, WcStatus.SUCCESS, WcOpcode.RDMA_WRITE)
        assert done.byte_len == len(pages) * _PAGE


def check_a_write_with_immediate_takes_a_receive(bench: VerbsBench) -> None:
    """And its data are there."""
    near, far = bench.pair()
    far.pair.post_recv(0, 0, 0, 5)
    near.write(far, far.memory.address + 8, 100, imm_data=7, wr_id=6)
    heard = far.next()
    _is(heard, 5, WcStatus.SUCCESS, WcOpcode.RECV_RDMA_WITH_IMM)
    assert (heard.byte_len, heard.imm_data) == (100, 7)
    same(far.memory.view[8:108].tobytes(), near.memory.view[:100].tobytes())
    _is(near.next(), 6, WcStatus.SUCCESS, WcOpcode.RDMA_WRITE)


def check_any_pieces_are_written(bench: VerbsBench) -> None:
    """Pieces of any size and place, against a model in plain bytes."""
    near, far = bench.pair()
    model = bytearray(far.memory.view.tobytes())
    dice = np.random.default_rng(7)
    for _ in range(30):
        count = int(dice.integers(1, 60))
        lengths = dice.integers(0, 300, count).astype(np.uint64)
        sources, targets = (dice.integers(0, _SIZE - 300, count).astype(np.uint64) for _ in range(2))
        for source, target, length in zip(sources.tolist(), targets.tolist(), lengths.tolist(), strict=True):
            model[target : target + length] = near.memory.view[source : source + length].tobytes()
        keys = np.full(count, far.region.rkey, np.uint32)
        near.pair.post_write(
            sources + np.uint64(near.memory.address), near.region.lkey, targets + np.uint64(far.memory.address),
            keys, lengths, 1,
        )  # fmt: skip
        _is(near.next(), 1, WcStatus.SUCCESS)
        same(far.memory.view.tobytes(), bytes(model))


def check_unsignalled_requests_make_room(bench: VerbsBench) -> None:
    """Only what is signalled completes, and places come free."""
    near, far = bench.pair()
    for number in range(50):
        near.write(far, far.memory.address, 8, signalled=False)
        near.write(far, far.memory.address, 8, wr_id=number)
        _is(near.next(), number, WcStatus.SUCCESS)
    assert not near.queue.poll(1)


# ------------------------------------------------------------------------------------------------- what is refused


def _refused(bench: VerbsBench, near: End, far: End, write: Callable[[], None]) -> None:
    """The requester hears of it, both ends are in ERR and flushed, and not a byte was touched."""
    before = far.memory.view.tobytes()
    far.receive(50)
    near.receive(51)
    write()
    near.send(60)
    first = near.next()
    _is(first, 1, WcStatus.REM_ACCESS_ERR)
    rest = sorted(((one.wr_id, one.status) for one in (near.next(), near.next())), key=lambda one: one[0])
    assert rest == [(51, WcStatus.WR_FLUSH_ERR), (60, WcStatus.WR_FLUSH_ERR)]
    _is(far.next(), 50, WcStatus.WR_FLUSH_ERR)
    _ended(near, bench)
    _ended(far, bench)
    same(far.memory.view.tobytes(), before)
    near.send(61)
    _is(near.next(), 61, WcStatus.WR_FLUSH_ERR)


def check_a_write_outside_of_the_region_is_refused(bench: VerbsBench) -> None:
    """Before, behind, past the end by one byte, where address and length wrap around, and one bad piece among good."""
    for place, length in ((-1, 1), (_SIZE, 1), (_SIZE - 15, 16), (-16, 16)):
        near, far = bench.pair()
        write = partial(near.write, far, far.memory.address + place, length)
        _refused(bench, near, far, write)
    near, far = bench.pair()
    _refused(bench, near, far, partial(near.write, far, (1 << 64) - 8, 16))
    near, far = bench.pair()
    here, there, lengths = (
        np.array(column, np.uint64)
        for column in ([near.memory.address] * 2, [far.memory.address, far.memory.address + _SIZE - 1], [16, 2])
    )
    post = near.pair.post_write
    _refused(bench, near, far, partial(post, here, near.region.lkey, there, far.region.rkey, lengths, 1))


def check_an_unknown_or_stale_key_is_refused(bench: VerbsBench) -> None:
    """One that never was, the lkey, and one whose region was deregistered."""
    near, far = bench.pair()
    _refused(bench, near, far, lambda: near.write(far, far.memory.address, rkey=far.region.rkey ^ 1))
    near, far = bench.pair()
    near.write(far, far.memory.address)
    _is(near.next(), 1, WcStatus.SUCCESS)
    far.region.dereg()
    far.region.dereg()
    before = far.memory.view.tobytes()
    near.write(far, far.memory.address, source=512)
    _is(near.next(), 1, WcStatus.REM_ACCESS_ERR)
    same(far.memory.view.tobytes(), before)


def check_a_region_without_remote_write_is_refused(bench: VerbsBench) -> None:
    """Its key is no key for peers."""
    near, far = bench.pair(access=Access.LOCAL_WRITE)
    _refused(bench, near, far, lambda: near.write(far, far.memory.address))


def check_memory_of_our_own_is_judged_too(bench: VerbsBench) -> None:
    """A wrong lkey, and a range outside of its region, are LOC_PROT_ERR."""
    for shift, key in ((_SIZE - 8, 0), (0, 1)):
        near, far = bench.pair()
        near.pair.post_send(near.memory.address + shift, 16, near.region.lkey ^ key, 3)
        _is(near.next(), 3, WcStatus.LOC_PROT_ERR)
        _ended(near, bench)
        _ended(far, bench)


def check_nonsense_is_an_exception(bench: VerbsBench) -> None:
    """Arrays that do not fit, a full queue, an unconnected pair, a registration that cannot be; nothing is posted."""
    near, far = bench.pair()
    one = np.zeros(1, np.uint64)
    with raises(ValueError):
        near.pair.post_write(one, 1, one, 1, np.zeros(2, np.uint64), 1)
    with raises(ValueError):
        near.pair.post_write(one, 1, one.astype(np.int64), 1, one, 1)
    for _ in range(8):
        far.receive(1)
    with raises(StateError):
        far.receive(1)
    domain = near.id.context.alloc_pd()
    with raises(ConfigError):
        domain.reg_mr(near.memory.address, 0, Access.LOCAL_WRITE)
    with raises(ConfigError):
        domain.reg_mr(near.memory.address, 8, Access.REMOTE_WRITE)
    assert near.pair.state is QpState.RTS
    assert not near.queue.poll(1)
    made, _ = bench.request()
    with raises(StateError):
        bench.end(made).send(1)


def check_a_receive_that_is_too_short(bench: VerbsBench) -> None:
    """Both hear of it, and nothing is written behind its end."""
    near, far = bench.pair()
    before = far.memory.view.tobytes()
    far.receive(1, 0, 15)
    near.send(2)
    _is(far.next(), 1, WcStatus.LOC_LEN_ERR)
    _is(near.next(), 2, WcStatus.REM_INV_REQ_ERR)
    same(far.memory.view.tobytes(), before)


def check_a_message_without_a_receive(bench: VerbsBench) -> None:
    """It fails when the retries are used up, and arrives if a receive comes before."""
    near, far = bench.pair(rnr_retry=1)
    near.send(1)
    near.send(2)
    _is(near.next(), 1, WcStatus.RNR_RETRY_EXC_ERR)
    _is(near.next(), 2, WcStatus.WR_FLUSH_ERR)
    _ended(far, bench)
    near, far = bench.pair()
    near.send(1)
    near.send(2)
    waiting = bench.start(near.next)
    waiting.wait_until_blocked()
    far.receive(3)
    far.receive(4, 64)
    for number in (3, 4):
        _is(far.next(), number, WcStatus.SUCCESS)
    assert waiting.result() == WorkCompletion(1, WcStatus.SUCCESS, WcOpcode.SEND, 16, None, near.pair.qp_num)


def check_both_wait_for_receives_and_hear_of_what_they_sent(bench: VerbsBench) -> None:
    """A parked message does not hold up the answer to what was sent the other way."""
    near, far = bench.pair()
    near.send(1)
    far.send(2)
    near.receive(3)
    _is(far.next(), 2, WcStatus.SUCCESS)
    far.receive(4)
    assert {near.next().wr_id, near.next().wr_id} == {1, 3}
    _is(far.next(), 4, WcStatus.SUCCESS)


# ------------------------------------------------------------------------------------------------- connections


def check_private_data(bench: VerbsBench) -> None:
    """Goes both ways, of any length up to the limit, and not beyond."""
    most = bytes(range(MAX_PRIVATE_DATA))
    made, accepted = bench.request()
    bench.end(made)
    with raises(ValueError):
        made.connect(most + b"x", bench.patience())

    def accept() -> None:
        far = accepted()
        bench.end(far)
        with raises(ValueError):
            far.accept(most + b"x", bench.patience())
        assert far.private_data.startswith(most)
        far.accept(most[::-1], bench.patience())

    accepting = bench.start(accept)
    assert made.connect(most, bench.patience()).startswith(most[::-1])
    accepting.result()


def check_a_rejection(bench: VerbsBench) -> None:
    """Says so, with its private data."""
    made, accepted = bench.request()
    bench.end(made)
    rejecting = bench.start(lambda: accepted().reject(b"no"))
    said = b""
    try:
        made.connect(b"please", bench.patience())
    except ConnectRejected as error:
        said = error.private_data
    assert said.startswith(b"no")
    rejecting.result()


def check_two_connections_do_not_mix(bench: VerbsBench) -> None:
    """A key of one is none of the other, and the end of one is none of the other's."""
    near, far = bench.pair()
    near2, far2 = bench.pair()
    near.write(far, far.memory.address, rkey=far2.region.rkey)
    _is(near.next(), 1, WcStatus.REM_ACCESS_ERR)
    near2.write(far2, far2.memory.address, 100)
    _is(near2.next(), 1, WcStatus.SUCCESS)
    same(far2.memory.view[:100].tobytes(), near2.memory.view[:100].tobytes())


def check_a_disconnect_flushes_both_ends(bench: VerbsBench) -> None:
    """Each request once, and then events and calls say that it is over."""
    near, far = bench.pair()
    for number in range(3):
        near.receive(number)
        far.receive(number)
    near.id.disconnect()
    near.id.disconnect()
    for end in (near, far):
        for number in range(3):
            _is(end.next(), number, WcStatus.WR_FLUSH_ERR)
        _ended(end, bench)
        with raises(ChannelClosed):
            end.id.get_event(bench.patience())
        end.id.close()
        end.id.close()
        with raises(ChannelClosed):
            end.send(1)
        with raises(ChannelClosed):
            end.queue.poll(1)


def check_waiting_can_be_cancelled_and_closed(bench: VerbsBench) -> None:
    """For a request, for an answer, for a completion; what is waited in stays usable after a cancel."""
    near, _ = bench.pair()
    for wait in (near.queue.wait, near.id.get_event):
        patience = bench.patience()
        waiting = bench.start(lambda wait=wait, patience=patience: wait(patience))  # type: ignore[misc]
        waiting.wait_until_blocked()
        patience.cancelled.set()
        with raises(MigrationCancelled):
            waiting.result()
    waiting = bench.start(lambda: near.queue.wait(bench.patience()))
    waiting.wait_until_blocked()
    near.id.close()
    with raises(ChannelClosed):
        waiting.result()
    listener = bench.provider.listen("127.0.0.1", 0)
    with raises(ConnectError):
        listener.get_request(bench.patience(0.06))
    waiting = bench.start(lambda: listener.get_request(bench.patience()))
    waiting.wait_until_blocked()
    listener.close()
    with raises(ChannelClosed):
        waiting.result()
    with raises(ConnectError):
        bench.provider.resolve("127.0.0.1", listener.port, bench.patience())


def check_a_channel_tells_which_queue(bench: VerbsBench) -> None:
    """Of several queues, the one that has something."""
    made, accepted = bench.request()
    channel = made.context.create_comp_channel()
    queues = [made.context.create_cq(8, channel) for _ in range(2)]
    pair = made.create_qp(made.context.alloc_pd(), *queues, max_send_wr=4, max_recv_wr=4)
    with raises(ConnectError):
        channel.get_event(bench.patience(0.06))
    pair.post_recv(0, 0, 0, 9)
    made.disconnect()
    assert channel.get_event(bench.patience()) is queues[1]
    _is(queues[1].poll(8)[0], 9, WcStatus.WR_FLUSH_ERR)
    channel.close()
    with raises(ChannelClosed):
        channel.get_event(bench.patience())
    del accepted


_VICTIM: Final = """
import pickle, sys
from whimbrel.abc import Patience
provider, port = pickle.loads(bytes.fromhex(sys.argv[1])), sys.argv[2]
made = provider.resolve("127.0.0.1", int(port), Patience(20))
queue = made.context.create_cq(8)
made.create_qp(made.context.alloc_pd(), queue, queue, max_send_wr=4, max_recv_wr=4)
made.connect(b"", Patience(20))
print("connected", flush=True)
sys.stdin.read()
"""


def check_the_death_of_the_peer(bench: VerbsBench) -> None:
    """A process that is killed looks like one that has disconnected, and memory can be deregistered."""
    import pickle

    listener = bench.provider.listen("127.0.0.1", 0)
    command = [sys.executable, "-c", _VICTIM, pickle.dumps(bench.provider).hex(), str(listener.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)) as victim:
        try:
            far = listener.get_request(bench.patience())
            listener.close()
            end = bench.end(far)
            far.accept(b"", bench.patience())
            assert victim.stdout is not None
            assert victim.stdout.readline() == b"connected\n"
            end.receive(1)
        finally:
            victim.kill()
        _is(end.next(), 1, WcStatus.WR_FLUSH_ERR)
        _ended(end, bench)
        end.region.dereg()
        far.close()


CHECKS: Final[tuple[Callable[[VerbsBench], None], ...]] = tuple(
    value for name, value in list(globals().items()) if name.startswith("check_")
)
"""Every check; each takes a `VerbsBench`."""


class VerbsConformance(ABC):
    """Inherit, say what makes the provider, and every check is a test."""

    memories: ClassVar[tuple[str, ...]] = ("memfd", "anonymous")
    """The memory that is registered; the descriptor goes along where there is one."""
    timeout: ClassVar[float] = 20.0

    @abstractmethod
    def make(self) -> VerbsProvider:
        """The provider on trial; it can be pickled."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make a test of each check and memory."""
        if "verbs_check" in metafunc.fixturenames:
            metafunc.parametrize("verbs_check", CHECKS, ids=[check.__name__.removeprefix("check_") for check in CHECKS])
            metafunc.parametrize("memory", self.memories)

    def test_conformance(self, verbs_check: Callable[[VerbsBench], None], memory: str) -> None:
        """One check, and nothing left behind."""
        with nothing_left(self.timeout), _no_mapping_left(), ExitStack() as stack:
            verbs_check(VerbsBench(self.make(), memory, self.timeout, stack))


@contextmanager
def _no_mapping_left() -> Iterator[None]:
    before = _mapped()
    yield
    left = _mapped() - before
    assert not left, f"still mapped: {sorted(left)}"


def _mapped() -> set[str]:
    """Where this process has shared memory of whimbrel's mapped, and what."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {" ".join(line.split()) for line in lines if "/memfd:whimbrel" in line}
