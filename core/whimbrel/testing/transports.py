"""The conformance suite for transports.

::

    class TestPigeon(TransportConformance):
        def make(self):
            return PigeonTransport()

        def address(self, tmp_path):
            return f"{tmp_path}/loft"

A transport whose ends do not meet at one address says `ends` instead of `address`; one that keeps what is sent, to be
read when it is whole, inherits from `whimbrel.testing.stored`.

The rules it lives by: nothing is skipped (what a transport cannot do it must refuse cleanly); nothing sleeps to let
something happen; whatever could block has a thread of its own and `timeout` seconds, so that a hang is a failure
that says where; and after each check no descriptor and no thread may be left.
"""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from whimbrel.abc import Channel, GatheringChannel, Transport
from whimbrel.errors import ChannelClosed, ChannelError, ChannelLost, ConfigError, ConnectError, MigrationCancelled
from whimbrel.testing._bench import Bench, Task, address_of, nothing_left, raises, same
from whimbrel.testing._bytes import (
    MEBIBYTE,
    buffers_to_fill,
    buffers_to_send,
    memory_to_send,
    nothings,
    odd_sizes,
    receive,
    receive_all,
    send_in_chunks,
    send_until_it_fails,
)

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

__all__ = ["CHECKS", "Bench", "Task", "TransportConformance", "receive", "receive_all", "send_until_it_fails"]


def _passes(bench: Bench, near: Channel, far: Channel) -> None:
    near.send(b"peep")
    assert bench.run(receive, far, 4) == b"peep"


# ------------------------------------------------------------------------------------------------------------ bytes


def check_bytes_arrive_in_order(bench: Bench) -> None:
    """What is sent arrives, whole and in order, and each end says what it is."""
    near, far = bench.pair()
    for end in (near, far):
        assert isinstance(end.peer, str)
        assert end.peer
        assert end.duplex is bench.duplex
    for sender, receiver in bench.directions(near, far):
        for word in (b"one ", b"two ", b"three"):
            sender.send(word)
        assert bench.run(receive, receiver, 13) == b"one two three"


def check_any_buffer_is_sent(bench: Bench) -> None:
    """Bytes, arrays of any shape, item and byte order, read-only or not, slices of them, mapped memory."""
    near, far = bench.pair()
    with buffers_to_send() as buffers:
        for buffer in buffers:
            near.send(buffer)
        expected = b"".join(memoryview(buffer).tobytes() for buffer in buffers)
        same(bench.run(receive, far, len(expected)), expected)


def check_memory_is_sent_by_address(bench: Bench) -> None:
    """A channel that gathers sends thousands of pieces of odd sizes in order, and fails as a send does."""
    near, far = bench.pair()
    if not isinstance(near, GatheringChannel):
        return  # declared by having the method; a channel without it is never asked
    memory, vectors = memory_to_send()
    receiving = bench.start(receive, far, memory.size)
    near.send_gathered(vectors)
    same(receiving.result(), memory.tobytes())
    near.send_gathered(np.empty((0, 2), np.uint64))
    near.end_writing()
    with raises(ChannelClosed):
        near.send_gathered(np.array([[memory.ctypes.data, 1]], np.uint64))


def check_any_buffer_is_received_into(bench: Bench) -> None:
    """Bytes go to the front of any writable buffer."""
    near, far = bench.pair()
    with buffers_to_fill() as buffers:
        for buffer in buffers:
            near.send(b"whimbrel")
            count = bench.run(far.recv_into, buffer)
            assert 1 <= count <= 8  # fewer than there are is allowed
            assert memoryview(buffer).tobytes()[:count] == b"whimbrel"[:count]
            assert bench.run(receive, far, 8 - count) == b"whimbrel"[count:]


def check_sent_memory_is_free_again(bench: Bench) -> None:
    """What was sent may be overwritten when `send` returns."""
    near, far = bench.pair()
    data = bytearray(b"before")
    near.send(data)
    data[:] = b"after!"
    assert bench.run(receive, far, 6) == b"before"


def check_a_receive_returns_what_is_there(bench: Bench) -> None:
    """It waits for a byte, not for a full buffer, and writes to nothing but its buffer."""
    near, far = bench.pair()
    near.send(b"short")
    large = bytearray(MEBIBYTE)
    count = bench.run(far.recv_into, large)
    assert 1 <= count <= 5
    assert large[:count] == b"short"[:count]
    assert bench.run(receive, far, 5 - count) == b"short"[count:]
    near.send(b"0123456789")
    room = bytearray(b"." * 9)
    count = bench.run(far.recv_into, memoryview(room)[3:6])
    assert room == b"..." + b"012"[:count].ljust(3, b".") + b"..."


def check_an_empty_send_is_no_end(bench: Bench) -> None:
    """Nothing is nothing, in any kind of buffer."""
    near, far = bench.pair()
    for nothing in nothings():
        near.send(nothing)
    _passes(bench, near, far)


def check_both_directions_at_once(bench: Bench) -> None:
    """A mebibyte each way at the same time, in chunks of odd sizes, into buffers of others."""
    near, far = bench.pair()
    dice = random.Random(20)  # noqa: S311 - the same chunks each time
    receiving: list[tuple[bytes, Task[bytes]]] = []
    for sender, receiver in bench.directions(near, far):
        data = dice.randbytes(MEBIBYTE)
        sizes = odd_sizes(dice)
        receiving.append((data, bench.start(receive_all, receiver, sizes[::-1])))
        bench.start(send_in_chunks, sender, data, sizes)
    for data, task in receiving:
        same(task.result(), data)


# ------------------------------------------------------------------------------------------------------------- ends


def check_data_before_a_close_arrives(bench: Bench) -> None:
    """The last words, however many, then the end, and the end again."""
    near, far = bench.pair()
    words = bytes(range(256)) * 4096
    sending = bench.start(near.send, words)
    assert bench.run(receive, far, 1) == words[:1]
    hearing = bench.start(receive_all, far)
    sending.result()
    if bench.close_abandons:
        bench.run(near.end_writing)
    near.close()
    assert hearing.result() == words[1:]
    for _ in range(2):
        assert bench.run(far.recv_into, bytearray(8)) == 0


def check_ending_one_direction_keeps_the_other(bench: Bench) -> None:
    """`end_writing` ends what we send and nothing else; twice is fine."""
    near, far = bench.pair()
    near.send(b"question")
    bench.run(near.end_writing)
    bench.run(near.end_writing)
    assert bench.run(receive_all, far) == b"question"
    if bench.duplex:
        far.send(b"answer")
        far.end_writing()
        assert bench.run(receive_all, near) == b"answer"
        assert bench.run(near.recv_into, bytearray(8)) == 0


def check_a_missing_direction_is_refused(bench: Bench) -> None:
    """Where bytes go one way only, the other way is a ChannelError at once."""
    near, far = bench.pair()
    if bench.duplex:
        _passes(bench, far, near)
        return
    with raises(ChannelError):
        bench.run(far.send, b"x")
    with raises(ChannelError):
        bench.run(near.recv_into, bytearray(1))


def check_use_after_close(bench: Bench) -> None:
    """Closing twice is fine; whatever else comes after is ChannelClosed."""
    near, far = bench.pair()
    for end in (near, far):
        end.close()
        end.close()
        with raises(ChannelClosed):
            bench.run(end.recv_into, bytearray(1))
        with raises(ChannelClosed):
            bench.run(end.send, b"x")
        with raises(ChannelClosed):
            bench.run(end.end_writing)


def check_close_wakes_a_reader(bench: Bench) -> None:
    """A reader blocked on either end is told that we closed."""
    for turn in range(2 if bench.duplex else 1):
        near, far = bench.pair()
        _, receiver = bench.directions(near, far)[turn]
        reading = bench.start(receiver.recv_into, bytearray(1))
        reading.wait_until_blocked()
        bench.close_promptly(receiver)
        with raises(ChannelClosed):
            reading.result()
        bench.close()


def check_close_wakes_a_writer(bench: Bench) -> None:
    """A writer blocked by a peer that does not read is told that we closed."""
    near, _ = bench.pair()
    writing = bench.start(send_until_it_fails, near)
    writing.wait_until_blocked()
    bench.close_promptly(near)
    with raises(ChannelClosed):
        writing.result()


def check_close_wakes_both(bench: Bench) -> None:
    """A reader and a writer in the same channel, closed by several threads at once."""
    near, _ = bench.pair()
    writing = bench.start(send_until_it_fails, near)
    reading = bench.start(near.recv_into, bytearray(1)) if bench.duplex else None
    writing.wait_until_blocked()
    gate = threading.Barrier(4)

    def close() -> None:
        gate.wait()
        near.close()

    for task in [bench.start(close) for _ in range(4)]:
        task.result()
    with raises(ChannelClosed):
        writing.result()
    if reading is not None:
        with raises(ChannelClosed):
            reading.result()


def check_a_gone_peer_stays_gone_for_a_reader(bench: Bench) -> None:
    """The reader sees the end or ChannelLost, and the same ever after."""
    near, far = bench.pair()
    reading = bench.start(far.recv_into, bytearray(1))
    reading.wait_until_blocked()
    near.close()
    outcomes = [_end_or_lost(reading)] + [_end_or_lost(bench.start(far.recv_into, bytearray(1))) for _ in range(3)]
    assert len(set(outcomes)) == 1


def check_a_gone_peer_stays_gone_for_a_writer(bench: Bench) -> None:
    """The writer sees ChannelLost, and the same ever after."""
    near, far = bench.pair()
    writing = bench.start(send_until_it_fails, near)
    writing.wait_until_blocked()
    far.close()
    with raises(ChannelLost):
        writing.result()
    for _ in range(3):
        with raises(ChannelLost):
            bench.run(near.send, b"anybody there?")


def _end_or_lost(reading: Task[int]) -> str:
    try:
        count = reading.result()
    except ChannelLost:
        return "lost"
    assert count == 0
    return "end"


# -------------------------------------------------------------------------------------------------------- listening


def check_an_address_is_free_again(bench: Bench) -> None:
    """A listener that is closed leaves nothing that is in the way of the next."""
    for _ in range(3):
        listener = bench.listen()
        near, far = bench.connect(listener)
        _passes(bench, near, far)
        for made in (near, far, listener):
            made.close()


def check_an_address_has_one_listener(bench: Bench) -> None:
    """The second is refused and takes nothing from the first."""
    if bench.ends is not None:
        return  # it is an end of its own, and nobody connects to it
    first = bench.listen()
    with raises(ConnectError):
        bench.listen(address_of(first))
    _passes(bench, *bench.connect(first))


def check_every_peer_has_a_channel_of_its_own(bench: Bench) -> None:
    """Several peers of one listener do not mix."""
    listener = bench.listen()
    pairs = [bench.connect(listener)]
    if bench.ends is not None:
        with raises(ConnectError):
            bench.run(listener.accept, bench.patience(0.2))
        pairs += [bench.pair() for _ in range(2)]
    elif bench.several_peers:
        pairs += [bench.connect(listener) for _ in range(2)]
    else:
        with raises(ConnectError):
            bench.run(bench.transport.connect, address_of(listener), bench.patience(0.2))
    for number, (near, _) in enumerate(pairs):
        near.send(bytes([number]))
    for number, (_, far) in reversed(list(enumerate(pairs))):
        assert bench.run(receive, far, 1) == bytes([number])


def check_a_closed_listener_keeps_what_it_accepted(bench: Bench) -> None:
    """Channels live on without their listener."""
    listener = bench.listen()
    near, far = bench.connect(listener)
    listener.close()
    for sender, receiver in bench.directions(near, far):
        _passes(bench, sender, receiver)


def check_closing_a_listener_wakes_accept(bench: Bench) -> None:
    """A blocked `accept` is told that we closed, and so is every later one; closing twice is fine."""
    listener = bench.listen()
    accepting = bench.start(listener.accept, bench.patience())
    accepting.wait_until_blocked()
    bench.close_promptly(listener)
    listener.close()
    with raises(ChannelClosed):
        accepting.result()
    with raises(ChannelClosed):
        bench.run(listener.accept, bench.patience())


def check_a_cancelled_accept(bench: Bench) -> None:
    """It ends promptly, and the listener stays usable."""
    listener, patience = bench.listen(), bench.patience()
    accepting = bench.start(listener.accept, patience)
    accepting.wait_until_blocked()
    started = time.monotonic()
    patience.cancelled.set()
    with raises(MigrationCancelled):
        accepting.result()
    assert time.monotonic() - started < bench.prompt
    _passes(bench, *bench.connect(listener))


def check_an_accept_that_takes_too_long(bench: Bench) -> None:
    """It is a ConnectError, and the listener stays usable."""
    listener = bench.listen()
    with raises(ConnectError):
        bench.run(listener.accept, bench.patience(0.06))
    _passes(bench, *bench.connect(listener))


# ------------------------------------------------------------------------------------------------------- connecting


def check_nobody_answers(bench: Bench) -> None:
    """Connecting to where nobody listens any more is a ConnectError."""
    if bench.ends is not None:
        for call in (bench.transport.listen, lambda address: bench.transport.connect(address, bench.patience())):
            with raises(ConnectError):
                bench.run(call, bench.nobody)
        return
    listener = bench.listen()
    listener.close()
    with raises(ConnectError):
        bench.run(bench.transport.connect, address_of(listener), bench.patience())


def check_a_connect_that_was_cancelled_before(bench: Bench) -> None:
    """It is not even tried."""
    listener, patience = bench.listen(), bench.patience()
    patience.cancelled.set()
    with raises(MigrationCancelled):
        bench.run(bench.transport.connect, bench.address_to(listener), patience)


def check_addresses_that_cannot_be(bench: Bench) -> None:
    """They are a ConfigError on either side."""
    for address in bench.bad_addresses:
        with raises(ConfigError):
            bench.run(bench.transport.listen, address)
        with raises(ConfigError):
            bench.run(bench.transport.connect, address, bench.patience())


Check = Callable[[Bench], None]

CHECKS: tuple[Check, ...] = tuple(check for name, check in list(globals().items()) if name.startswith("check_"))
"""Every check of the suite, in the order above."""


class TransportConformance(ABC):
    """Inherit, implement `make` and `address`, and perhaps say more in the attributes."""

    checks: ClassVar[Sequence[Check]] = CHECKS
    """What is checked, each as a test of its own."""

    timeout: ClassVar[float] = 20.0
    """Seconds after which anything that still blocks is a failure."""

    prompt: ClassVar[float] = 2.0
    """Seconds within which a cancel or a close must be noticed: the contract's 50 ms, on a busy host."""

    bad_addresses: ClassVar[Sequence[str]] = ("",)
    """Addresses that cannot be, for listening and connecting alike."""

    several_peers: ClassVar[bool] = True
    """Whether one listener takes several peers; one that does not must refuse the second."""

    duplex: ClassVar[bool] = True
    """What the transport's spec declares. Without it only the end that connected writes."""

    close_abandons: ClassVar[bool] = False
    """Whether a close without `end_writing` may lose what was sent, as where it ends a program."""

    nobody: ClassVar[str] = ""
    """Where there are `ends`: an address where nothing is and nothing ever will be, for either side."""

    @abstractmethod
    def make(self) -> Transport:
        """The transport to test."""

    def address(self, tmp_path: Path) -> str:
        """Where to listen (a URI without its scheme): free, and usable again after the listener was closed."""
        raise NotImplementedError(f"{type(self).__name__} says neither `address` nor `ends`")

    def ends(self, tmp_path: Path) -> tuple[str, str]:
        """Two fresh addresses that lead to one another: where to connect, and where to listen.

        Instead of `address`, for a transport whose ends do not meet at one address but are both there already, such as
        those of a pipe. Its listener accepts when the first byte is there, and once.
        """
        raise NotImplementedError(f"{type(self).__name__} says neither `address` nor `ends`")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make each check a test; called by pytest."""
        if "check" in metafunc.fixturenames:
            names = [check.__name__.removeprefix("check_") for check in self.checks]
            metafunc.parametrize("check", self.checks, ids=names)

    def test_conforms(self, check: Check, tmp_path: Path) -> None:
        """One check, after which everything is closed and nothing may be left."""
        meets = type(self).ends is TransportConformance.ends
        bench = Bench(
            self.make(),
            self.address(tmp_path) if meets else "",
            timeout=self.timeout,
            prompt=self.prompt,
            bad_addresses=tuple(self.bad_addresses),
            several_peers=self.several_peers,
            duplex=self.duplex,
            ends=None if meets else lambda: self.ends(tmp_path),
            close_abandons=self.close_abandons,
            nobody=self.nobody,
        )
        with nothing_left(self.prompt):
            try:
                check(bench)
            finally:
                bench.close()
