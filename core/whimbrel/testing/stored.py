"""The conformance suite for transports that keep what is sent, to be read when it is whole.

::

    class TestFile(StoredTransportConformance):
        def make(self):
            return FileTransport()

        def address(self, tmp_path):
            return f"{tmp_path}/machine"

Connecting writes and listening reads, never at once. Its law: at an address there is, at any time, either what was
there before or all of what was sent, and never a part of it. The rules of `whimbrel.testing.transports` are its own.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from whimbrel.abc import Channel, GatheringChannel
from whimbrel.errors import ChannelClosed, ChannelError, ConfigError, ConnectError, MigrationCancelled
from whimbrel.testing._bench import Bench, raises, same
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
from whimbrel.testing.transports import Check, TransportConformance

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["STORED_CHECKS", "StoredTransportConformance"]


def _begin(bench: Bench) -> Channel:
    return bench.open(bench.transport.connect, bench.address, bench.patience())


def _store(bench: Bench, *words: Buffer) -> None:
    writer = _begin(bench)
    for word in words:
        writer.send(word)
    writer.end_writing()
    writer.close()


def _reader(bench: Bench) -> Channel:
    listener = bench.listen()
    reader = bench.open(listener.accept, bench.patience())
    listener.close()
    return reader


def _nothing_is_there(bench: Bench) -> None:
    with raises(ConnectError):
        bench.listen()


def check_what_is_stored_is_read(bench: Bench) -> None:
    """All of it, in order; each end says what it is, and that bytes go one way."""
    writer = _begin(bench)
    for word in (b"one ", b"two ", b"three"):
        writer.send(word)
    writer.end_writing()
    reader = _reader(bench)
    assert receive_all(reader) == b"one two three"
    for end in (writer, reader):
        assert isinstance(end.peer, str)
        assert end.peer
        assert end.duplex is False


def check_any_buffer_is_stored(bench: Bench) -> None:
    """Bytes, arrays of any shape, item and byte order, read-only or not, slices of them, mapped memory."""
    with buffers_to_send() as buffers:
        _store(bench, *buffers)
        expected = b"".join(memoryview(buffer).tobytes() for buffer in buffers)
    same(receive_all(_reader(bench)), expected)


def check_memory_is_stored_by_address(bench: Bench) -> None:
    """A channel that gathers stores thousands of pieces of odd sizes in order, between other bytes."""
    writer = _begin(bench)
    if not isinstance(writer, GatheringChannel):
        return  # declared by having the method; a channel without it is never asked
    memory, vectors = memory_to_send()
    writer.send(b"head")
    writer.send_gathered(vectors)
    writer.send_gathered(vectors[:0])
    writer.send(b"tail")
    writer.end_writing()
    same(receive_all(_reader(bench)), b"head" + memory.tobytes() + b"tail")
    with raises(ChannelClosed):
        writer.send_gathered(memory_to_send()[1])


def check_any_buffer_is_read_into(bench: Bench) -> None:
    """Bytes go to the front of any writable buffer, and nowhere else."""
    with buffers_to_fill() as buffers:
        _store(bench, b"whimbrel")
        for buffer in buffers:
            reader = _reader(bench)
            count = reader.recv_into(buffer)
            assert 1 <= count <= 8  # fewer than there are is allowed
            assert memoryview(buffer).tobytes()[:count] == b"whimbrel"[:count]
            assert receive(reader, 8 - count) == b"whimbrel"[count:]


def check_stored_memory_is_free_again(bench: Bench) -> None:
    """What was sent may be overwritten when `send` returns."""
    writer, data = _begin(bench), bytearray(b"before")
    writer.send(data)
    data[:] = b"after!"
    writer.end_writing()
    assert receive_all(_reader(bench)) == b"before"


def check_nothing_can_be_stored(bench: Bench) -> None:
    """Empty buffers of any kind are no end; a stream without a byte is there, and ends at once."""
    _store(bench, *nothings(), b"something", *nothings())
    assert receive_all(_reader(bench)) == b"something"
    _store(bench)
    assert receive_all(_reader(bench)) == b""


def check_a_mebibyte_in_odd_chunks(bench: Bench) -> None:
    """Written in chunks of odd sizes, read into buffers of others."""
    dice = random.Random(20)  # noqa: S311 - the same chunks each time
    data, sizes = dice.randbytes(MEBIBYTE), odd_sizes(dice)
    send_in_chunks(_begin(bench), data, sizes)
    same(receive_all(_reader(bench), sizes[::-1]), data)


# ---------------------------------------------------------------------------------------------------------- the law


def check_there_is_nothing_before_the_end(bench: Bench) -> None:
    """However much was sent: nobody can read a part of it."""
    writer = _begin(bench)
    _nothing_is_there(bench)
    writer.send(bytes(MEBIBYTE))
    _nothing_is_there(bench)
    writer.end_writing()
    assert len(receive_all(_reader(bench))) == MEBIBYTE


def check_what_was_there_stays_until_the_end(bench: Bench) -> None:
    """And is replaced at once then, also by less."""
    _store(bench, b"the old one, which is longer")
    writer = _begin(bench)
    writer.send(b"the new one")
    assert receive_all(_reader(bench)) == b"the old one, which is longer"
    writer.end_writing()
    assert receive_all(_reader(bench)) == b"the new one"


def check_a_close_before_the_end_changes_nothing(bench: Bench) -> None:
    """Neither where nothing was nor where something is."""
    for before in (None, b"precious"):
        if before is not None:
            _store(bench, before)
        writer = _begin(bench)
        writer.send(b"half of it")
        writer.close()
        if before is None:
            _nothing_is_there(bench)
        else:
            assert receive_all(_reader(bench)) == before


def check_a_reader_keeps_what_it_has_opened(bench: Bench) -> None:
    """Also when another takes its place meanwhile."""
    _store(bench, b"first")
    reader = _reader(bench)
    assert receive(reader, 2) == b"fi"
    _store(bench, b"second")
    assert receive_all(reader) == b"rst"


def check_two_writers_do_not_mix(bench: Bench) -> None:
    """Whoever ends last is there, whole."""
    one, other = _begin(bench), _begin(bench)
    for word in (b"a", b"b"):
        one.send(b"one " + word)
        other.send(b"other " + word)
    other.end_writing()
    assert receive_all(_reader(bench)) == b"other aother b"
    one.end_writing()
    assert receive_all(_reader(bench)) == b"one aone b"


# ------------------------------------------------------------------------------------------------------------- ends


def check_the_end_is_the_end(bench: Bench) -> None:
    """For a reader, as often as it asks; for a writer, who may say so twice and send no more."""
    writer = _begin(bench)
    writer.send(b"all")
    writer.end_writing()
    writer.end_writing()
    with raises(ChannelClosed):
        writer.send(b" and more")
    reader = _reader(bench)
    assert receive_all(reader) == b"all"
    for _ in range(2):
        assert reader.recv_into(bytearray(8)) == 0


def check_the_other_way_is_refused(bench: Bench) -> None:
    """A writer cannot be read from and a reader not be written to: a ChannelError at once."""
    _store(bench, b"something")
    with raises(ChannelError):
        _begin(bench).recv_into(bytearray(1))
    with raises(ChannelError):
        _reader(bench).send(b"x")


def check_a_stored_channel_after_close(bench: Bench) -> None:
    """Closing twice is fine; whatever else comes after is ChannelClosed."""
    _store(bench, b"something")
    for end in (_begin(bench), _reader(bench)):
        end.close()
        end.close()
        with raises(ChannelClosed):
            end.recv_into(bytearray(1))
        with raises(ChannelClosed):
            end.send(b"x")
        with raises(ChannelClosed):
            end.end_writing()


def check_close_stops_a_writer(bench: Bench) -> None:
    """One that sends and sends is told that we closed, and nothing is kept."""
    writer, under_way = _begin(bench), threading.Event()

    def write() -> None:
        writer.send(b"x")
        under_way.set()
        send_until_it_fails(writer)

    writing = bench.start(write)
    assert under_way.wait(bench.timeout)
    bench.close_promptly(writer)
    with raises(ChannelClosed):
        writing.result()
    _nothing_is_there(bench)


# ------------------------------------------------------------------------------------------------------- addresses


def check_a_stored_stream_has_one_reader_a_listener(bench: Bench) -> None:
    """A second accept is refused; after a close it is ChannelClosed; what was accepted lives on."""
    _store(bench, b"something")
    listener = bench.listen()
    reader = bench.open(listener.accept, bench.patience())
    with raises(ConnectError):
        listener.accept(bench.patience(0.2))
    listener.close()
    listener.close()
    with raises(ChannelClosed):
        listener.accept(bench.patience())
    assert receive_all(reader) == b"something"


def check_whoever_was_cancelled_before(bench: Bench) -> None:
    """It is not even tried, and a listener stays usable."""
    patience = bench.patience()
    patience.cancelled.set()
    with raises(MigrationCancelled):
        bench.transport.connect(bench.address, patience)
    _nothing_is_there(bench)
    _store(bench, b"something")
    listener = bench.listen()
    with raises(MigrationCancelled):
        listener.accept(patience)
    assert receive_all(bench.open(listener.accept, bench.patience())) == b"something"


def check_an_unread_listener_leaves_nothing(bench: Bench) -> None:
    """It is closed without anybody having accepted."""
    _store(bench, b"something")
    bench.listen().close()
    assert receive_all(_reader(bench)) == b"something"


def check_stored_addresses_that_cannot_be(bench: Bench) -> None:
    """They are a ConfigError on either side."""
    for address in bench.bad_addresses:
        with raises(ConfigError):
            bench.run(bench.transport.listen, address)
        with raises(ConfigError):
            bench.run(bench.transport.connect, address, bench.patience())


STORED_CHECKS: tuple[Check, ...] = tuple(check for name, check in list(globals().items()) if name.startswith("check_"))
"""Every check of the suite, in the order above."""


class StoredTransportConformance(TransportConformance):
    """Inherit, implement `make` and `address`, and perhaps say `bad_addresses`."""

    checks: ClassVar[Sequence[Check]] = STORED_CHECKS
    duplex: ClassVar[bool] = False
