"""The block section's two ends: what the source writes, what the destination does with it, and with anything else."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from whimbrel.abc import Progress, SectionKind
from whimbrel.errors import ChannelLost, IncompatibleError, MigrationError, StreamError
from whimbrel.machine import BareMachine, RawImage
from whimbrel.machine.drives import Leaving
from whimbrel.settings import Settings
from whimbrel.stream import Reader, Writer
from whimbrel.testing.memory import ReplayChannel
from whimbrel.wire import block as wire
from whimbrel_savevm import _block_loader as loading
from whimbrel_savevm import _block_reading as reading
from whimbrel_savevm.block import BlockHandler, whimbrel_savevm_handlers

MIB = 1 << 20


class Tape:
    """Keeps what is sent."""

    peer, duplex = "tape", False

    def __init__(self):
        self.data = bytearray()

    def send(self, data):
        self.data += memoryview(data).cast("B")


class Unlimited:
    """A slice that is over after so many bytes."""

    def __init__(self, out, size=1 << 60):
        self.out, self.end = out, out.offset + size

    def bytes_left(self):
        return self.end - self.out.offset

    def over(self):
        return self.bytes_left() <= 0


class Source:
    """A machine that runs, and its handler; `bodies` are what it has written since the last look."""

    def __init__(self, machine):
        self.machine = machine
        if machine.drives.leaving is Leaving.NOTHING:
            machine.drives.leaving = Leaving.EVERYTHING
        self.handler = BlockHandler(machine)
        self.tape = Tape()
        self.out = Writer(self.tape)

    def body(self, write):
        write()
        self.out.flush()
        data = bytes(self.tape.data)
        self.tape.data.clear()
        return data

    def start(self):
        return self.body(lambda: self.handler.save_start(self.out))

    def part(self, size=1 << 60):
        return self.body(lambda: self.handler.save_part(self.out, Unlimited(self.out, size)))

    def round(self, size=1 << 60):
        bodies = []
        while self.handler.pending():
            bodies.append(self.part(size))
        return bodies

    def end(self):
        return self.body(lambda: self.handler.save_end(self.out))


@pytest.fixture
def make(tmp_path):
    """`make(sizes, …)`: a machine with drives of these sizes; `started`, or waiting for another, or neither (None)."""
    made = []

    def build(sizes, *, started=True, zero_blocks=False, leaving=Leaving.NOTHING, device=RawImage):
        settings = Settings()
        settings.capabilities.zero_blocks = zero_blocks
        machine = BareMachine("m", settings=settings)
        made.append(machine)
        for name, size in sizes.items():
            path = tmp_path / f"{len(made)}-{name}.img"
            with path.open("wb") as file:
                file.truncate(size)
            machine.drives.add(name, device(path))
        machine.drives.leaving = leaving
        if started:
            machine.start()
        elif started is not None:
            machine.expect_arrival()
        return machine

    yield build
    for machine in made:
        machine.close()


@pytest.fixture
def source(make):
    """`source(sizes, …)`: a Source, ended after the test."""
    made = []

    def build(sizes, **more):
        made.append(Source(make(sizes, **more)))
        return made[-1]

    yield build
    for one in made:
        one.handler.finish()


def records(body):
    """The records of a body; a chunk is (device, number, its bytes or None), a progress its percentage."""
    found, reader = [], Reader(ReplayChannel(body))
    while not isinstance(record := reader.parse(wire.parse_record()), wire.End):
        if isinstance(record, wire.Progress):
            found.append(record.percent)
            continue
        data = None
        if not record.zero:
            data = bytearray()
            while len(data) < wire.CHUNK:
                piece = bytes(reader.window(1)[: wire.CHUNK - len(data)])
                data += piece
                reader.advance(len(piece))
        found.append((record.device, record.number, None if data is None else bytes(data)))
    assert reader.offset == len(body)
    return found


def chunks(bodies):
    return [record for body in bodies for record in records(body) if isinstance(record, tuple)]


def load(machine, *bodies):
    """Load START and then `bodies` as PARTs, the last as END; returns the handler, committed."""
    handler = BlockHandler(machine)
    kinds = [SectionKind.START, *[SectionKind.PART] * (len(bodies) - 1), SectionKind.END]
    try:
        for kind, body in zip(kinds, (wire.EOS_RECORD, *bodies), strict=True):
            reader = Reader(ReplayChannel(body))
            handler.load(reader, kind, 1)
            assert reader.offset == len(body)
        handler.commit()
    except BaseException:
        handler.rollback()
        handler.finish()
        raise
    handler.finish()
    return handler


def contents(machine, name):
    drive = machine.drives[name]
    data = bytearray(drive.size)
    drive.device.read_into(0, data)
    return data


def same(found, expected):
    """Nothing that prints megabytes when it fails."""
    return len(found) == len(expected) and bool(
        (np.frombuffer(found, np.uint8) == np.frombuffer(expected, np.uint8)).all()
    )


# ------------------------------------------------------------------------------------------------------- the source


def test_the_start_is_the_end_of_a_body(source):
    one = source({"a": MIB})
    assert one.start() == bytes.fromhex("00 00 00 00 00 00 00 02")
    assert one.handler.pending() == MIB


def test_a_golden_body(source):
    one = source({"a": 2 * MIB, "b": 512})
    one.machine.drives["a"].write(MIB, b"\x11" * MIB)
    one.machine.drives["b"].write(0, b"\x22" * 512)
    one.start()
    zeros, data = bytes(MIB), b"\x11" * MIB
    word = "00 00 00 00 00 {} 00 01"
    percent = [bytes.fromhex(f"00 00 00 00 00 00 {value * 2:02x} 04") for value in (33, 66, 100)]
    body = one.end()
    assert one.handler.pending() == 0
    assert same(
        body,
        percent[0] + bytes.fromhex(word.format("00") + "01 61") + zeros
        + percent[1] + bytes.fromhex(word.format("10") + "01 61") + data
        + percent[2] + bytes.fromhex(word.format("00") + "01 62") + b"\x22" * 512 + bytes(MIB - 512)
        + wire.EOS_RECORD,
    )  # fmt: skip


def test_the_end_has_what_is_left_and_then_says_that_it_is_all(source):
    one = source({"a": 2 * MIB})
    one.start()
    body = one.end()
    assert [record if isinstance(record, int) else record[:2] for record in records(body)] == [
        50, ("a", 0), 100, ("a", 1)
    ]  # fmt: skip
    empty = source({"a": MIB}, leaving=Leaving.ALLOCATED)
    empty.start()
    assert records(empty.end()) == [100]


def test_every_chunk_comes_once_and_what_is_written_again(source):
    one = source({"a": 40 * MIB, "b": 3 * MIB + 1})
    for number in range(40):
        one.machine.drives["a"].write(number * MIB, bytes([number + 1]))
    one.start()
    first = chunks(one.round(5 * MIB))
    assert sorted(record[:2] for record in first) == [("a", n) for n in range(40)] + [("b", n) for n in range(4)]
    one.handler.sync()
    assert one.handler.pending() == 0
    one.machine.drives["a"].write(7 * MIB - 1, b"xy")
    one.machine.drives["b"].write(3 * MIB, b"z")
    one.handler.sync()
    assert one.handler.pending() == 3 * MIB
    again = chunks(one.round())
    assert [record[:2] for record in again] == [("a", 6), ("a", 7), ("b", 3)]
    assert again[0][2][-1:] + again[1][2][:1] + again[2][2][:2] == b"xyz\0"
    assert one.handler.progress.synced_dirty == 3 * MIB
    assert one.handler.progress.transferred > 46 * MIB  # b's last part was zero at first, and a mark


def test_zeros_are_marks_where_they_may_be(source):
    one = source({"a": 6 * MIB}, zero_blocks=True)
    drive = one.machine.drives["a"]
    drive.write(0, b"x" * MIB)
    drive.write(2 * MIB, b"x")
    drive.write(2 * MIB, b"\0")  # allocated, and zero
    one.start()
    found = chunks(one.round())
    assert {number: data is None for _, number, data in found} == {0: False, **dict.fromkeys(range(1, 6), True)}
    assert one.handler.progress.duplicate == 5 * 256
    assert one.handler.progress.normal == 256
    drive.write(5 * MIB, b"now")
    drive.discard(0, MIB)
    one.handler.sync()
    assert {number: data is None for _, number, data in chunks(one.round())} == {0: True, 5: False}


def test_a_hole_is_not_read(source, tmp_path):
    class Counting(RawImage):
        reads = 0

        def read_into(self, offset, buffer):
            type(self).reads += 1
            super().read_into(offset, buffer)

        def read_at_once(self, offset, buffer):
            type(self).reads += 1
            return super().read_at_once(offset, buffer)

    one = source({"a": 50 * MIB}, device=Counting)
    one.machine.drives["a"].write(30 * MIB, b"x")
    one.start()
    found = chunks(one.round())
    assert len(found) == 50
    assert Counting.reads == 1


def test_only_what_is_allocated(source):
    one = source({"a": 6 * MIB}, leaving=Leaving.ALLOCATED)
    drive = one.machine.drives["a"]
    drive.write(2 * MIB, b"x")
    one.start()
    assert [record[:2] for record in chunks(one.round())] == [("a", 2)]
    drive.write(4 * MIB, b"later")
    one.handler.sync()
    assert [record[:2] for record in chunks(one.round())] == [("a", 4)]


class Held(RawImage):
    """Reads wait until they are let go on."""

    def __init__(self, path):
        super().__init__(path)
        self.go_on = threading.Event()
        self.begun = threading.Semaphore(0)

    def read_at_once(self, offset, buffer):
        return False

    def read_into(self, offset, buffer):
        self.begun.release()
        assert self.go_on.wait(60)
        super().read_into(offset, buffer)


def test_several_chunks_are_read_at_once_and_no_more_than_there_are_buffers(source):
    one = source({"a": 64 * MIB}, device=Held)
    drive = one.machine.drives["a"]
    for number in range(64):
        drive.write(number * MIB, bytes([number]) * 100)
    one.start()
    assert not one.handler.ready()
    for _ in range(reading.READERS):
        assert drive.device.begun.acquire(timeout=60)
    body = one.part()  # waits for a moment, and returns with nothing rather than wait for the disk
    assert records(body) == []
    assert one.handler.pending() == 64 * MIB
    assert len(one.handler._saver._reads) == reading.IN_FLIGHT
    drive.device.go_on.set()
    assert [record[1] for record in chunks(one.round())] == list(range(64))


def test_what_is_in_memory_is_read_without_a_thread_and_not_ahead(source):
    class Counting(RawImage):
        reads = 0

        def read_at_once(self, offset, buffer):
            type(self).reads += 1
            assert super().read_at_once(offset, buffer)
            return True

        def read_into(self, offset, buffer):
            raise AssertionError("nothing has to be waited for")

    one = source({"a": 8 * MIB + 512}, device=Counting)
    drive = one.machine.drives["a"]
    for number in range(9):
        drive.write(number * MIB, bytes([number + 1]) * 512)
    one.start()
    for _ in range(3):
        assert one.handler.ready()
        assert Counting.reads == 1
    drive.write(0, b"after the reading")
    found = chunks(one.round())
    assert [record[1] for record in found] == list(range(9))
    assert all(found[number][2][:512] == bytes([number + 1]) * 512 for number in range(9))
    assert found[8][2][512:] == bytes(MIB - 512), "what is behind the end has gone out"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("whimbrel-block")]
    one.handler.sync()
    assert [(record[1], record[2][:17]) for record in chunks(one.round())] == [(0, b"after the reading")]


@pytest.mark.parametrize("known", [{0, 1, 2, 5, 9, 10, 11}, set(range(6)), set(range(6, 12))])
def test_what_is_in_memory_and_what_is_not_go_out_in_order(source, known):
    class Partly(RawImage):
        def read_at_once(self, offset, buffer):
            return offset // MIB in known and super().read_at_once(offset, buffer)

    one = source({"a": 12 * MIB}, device=Partly)
    for number in range(12):
        one.machine.drives["a"].write(number * MIB, bytes([number + 1]))
    one.start()
    found = chunks(one.round())
    assert [(record[1], record[2][0]) for record in found] == [(number, number + 1) for number in range(12)]


def test_a_chunk_that_is_written_while_it_is_read_goes_out_again_and_last(source):
    """However reads overtake each other, the newest contents of a chunk are the last that are sent."""
    one = source({"a": 4 * MIB}, device=Held)
    drive = one.machine.drives["a"]
    for number in range(4):
        drive.write(number * MIB, b"old")
    one.start()
    one.handler.ready()
    drive.write(0, b"new")
    one.handler.sync()
    one.handler.ready()
    drive.device.go_on.set()
    found = chunks(one.round())
    assert [record[1] for record in found] == [0, 1, 2, 3, 0]
    assert found[-1][2][:3] == b"new"


def test_a_source_that_ends_early_waits_for_its_reads_and_tracks_no_more(source):
    one = source({"a": 30 * MIB}, device=Held)
    drive = one.machine.drives["a"]
    drive.write(0, b"x" * (2 * MIB))
    one.start()
    one.handler.ready()
    drive.device.go_on.set()
    one.handler.finish()
    one.handler.finish()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("whimbrel-block")]
    with pytest.raises(AssertionError):
        drive.collect()


# -------------------------------------------------------------------------------------------------- the destination


@hypothesis_settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_what_is_saved_is_loaded(make, data):
    sizes = {"a": data.draw(st.sampled_from((1, 511, MIB - 1, MIB, MIB + 1, 3 * MIB + 512))), "b": 2 * MIB}
    one = Source(make(sizes, zero_blocks=data.draw(st.booleans())))
    there = make(sizes, started=False)
    for name, size in sizes.items():
        stale = there.drives[name].device
        stale.acquire()
        stale.write(0, b"\xee" * size)
        stale.release()
    bodies = [one.start()]

    def write():
        for _ in range(data.draw(st.integers(0, 4))):
            name = data.draw(st.sampled_from(sorted(sizes)))
            at = data.draw(st.integers(0, sizes[name] - 1))
            size = min(sizes[name] - at, data.draw(st.sampled_from((1, 4096, 65536, 300_000))))
            byte = data.draw(st.sampled_from((0, 1, 255)))
            one.machine.drives[name].write(at, bytes([byte]) * size)

    write()
    for _ in range(data.draw(st.integers(0, 3))):
        bodies += one.round(data.draw(st.sampled_from((1, MIB, 5 * MIB))))
        write()
        one.handler.sync()
    one.machine.stop()
    one.handler.sync()
    bodies.append(one.end())
    one.handler.finish()
    load(there, *bodies[1:])
    for name in sizes:
        assert same(contents(there, name), contents(one.machine, name))
    there.drives.take_over()
    one.machine.close()
    there.close()


def chunk(name, number, data=None):
    if data is None:
        return wire.chunk(name, number, zero=True)
    return wire.chunk(name, number) + data + bytes(MIB - len(data))


def test_the_last_chunk_is_cut_to_the_drive(make):
    there = make({"a": MIB + 100}, started=False)
    load(there, wire.chunk("a", 1) + b"\xff" * MIB + wire.chunk("a", 0) + b"\x11" * MIB + wire.EOS_RECORD)
    assert there.drives["a"].device.size == MIB + 100
    assert contents(there, "a")[-100:] == b"\xff" * 100
    assert contents(there, "a")[MIB - 1] == 0x11


def test_zeros_become_holes_whether_they_are_marks_or_not(make):
    there = make({"a": 8 * MIB}, started=False)
    device = there.drives["a"].device
    device.acquire()
    device.write(0, b"\xee" * (8 * MIB))
    body = chunk("a", 0) + chunk("a", 1, b"") + chunk("a", 2, bytes(512 << 10) + b"x") + wire.EOS_RECORD
    load(there, body)
    piece = loading.PIECE
    assert device.next_extent(0) == (2 * MIB + (512 << 10), 2 * MIB + (512 << 10) + piece)
    assert device.next_extent(2 * MIB + (512 << 10) + piece)[0] == 3 * MIB


@pytest.mark.parametrize("zero_blocks", [False, True])
@pytest.mark.parametrize("leaving", [Leaving.EVERYTHING, Leaving.ALLOCATED])
def test_both_ends_count_the_same_chunks_each_once(source, make, zero_blocks, leaving):
    sizes = {"a": 5 * MIB + 1, "b": 2 * MIB, "empty": 3 * MIB}
    one = source(sizes, zero_blocks=zero_blocks, leaving=leaving)
    there = make(sizes, started=False)
    assert one.handler.tally() == BlockHandler(there).tally() == {}
    one.machine.drives["a"].write(MIB, b"x" * (2 * MIB))
    one.machine.drives["b"].write(MIB, b"y")
    one.start()
    bodies = one.round()
    one.machine.drives["a"].write(MIB, b"again")
    one.handler.sync()
    bodies.append(one.end())
    everything = {"a": 6, "b": 2, "empty": 3}
    expected = everything if leaving is Leaving.EVERYTHING else {"a": 2, "b": 1}
    assert one.handler.tally() == expected
    assert load(there, *bodies).tally() == expected


def test_the_last_word_wins(make):
    there = make({"a": MIB}, started=False)
    load(there, chunk("a", 0, b"one") + chunk("a", 0) + chunk("a", 0, b"three") + wire.EOS_RECORD)
    assert contents(there, "a")[:6] == b"three\0"


def test_the_marker_is_there_while_it_is_loaded_and_until_it_is_taken_over(make):
    there = make({"a": MIB, "b": MIB}, started=False)
    a, b = (there.drives[name].device for name in "ab")
    load(there, chunk("a", 0, b"x") + wire.EOS_RECORD)
    assert a.acquired
    assert b.acquired
    assert a.incomplete
    assert not b.incomplete
    there.drives.take_over()
    assert not a.incomplete


@pytest.mark.parametrize("body", [
    wire.chunk("other", 0) + bytes(MIB),
    wire.chunk("a", 3, zero=True),
    wire.chunk("ro", 0, zero=True),
    wire.chunk("empty", 0, zero=True),
    (1 << 60 | 1).to_bytes(8, "big") + b"\x01a",
    b"\xff" * 8,
    bytes(8),
    (101 << 9 | 4).to_bytes(8, "big"),
])  # fmt: skip
def test_what_is_refused_changes_nothing(make, tmp_path, body):
    there = make({"a": 3 * MIB, "empty": 0}, started=None)
    (tmp_path / "base").write_bytes(b"base")
    there.drives.add("ro", tmp_path / "base", read_only=True)
    there.expect_arrival()
    with pytest.raises(StreamError):
        load(there, body + wire.EOS_RECORD)
    assert not any(contents(there, "a"))
    assert not there.drives["a"].device.incomplete
    assert not there.drives["a"].device.acquired
    assert (tmp_path / "base").read_bytes() == b"base"


def test_a_body_that_is_cut_at_any_place(make):
    there = make({"a": MIB}, started=False)
    body = wire.progress(0) + chunk("a", 0, b"x") + wire.EOS_RECORD
    for end in (*range(20), *range(20, MIB, 99_991), *range(len(body) - 10, len(body))):
        with pytest.raises(ChannelLost):
            load(there, body[:end])
        assert not there.drives["a"].device.acquired
    assert there.drives["a"].device.incomplete
    load(there, body)
    there.drives.take_over()
    assert contents(there, "a")[:2] == b"x\0"


@hypothesis_settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.one_of(
    st.binary(max_size=12),
    st.builds(wire.chunk, st.sampled_from("ab"), st.integers(0, 3), zero=st.booleans()),
    st.builds(wire.progress, st.integers(0, 120)),
    st.just(wire.EOS_RECORD),
), max_size=6))  # fmt: skip
def test_whatever_comes_ends_in_one_error_or_none(shared_destination, parts):
    handler = BlockHandler(shared_destination)
    handler.load(Reader(ReplayChannel(wire.EOS_RECORD)), SectionKind.START, 1)
    try:
        handler.load(Reader(ReplayChannel(b"".join(parts))), SectionKind.PART, 1)
    except MigrationError:
        pass
    finally:
        handler.rollback()
        handler.finish()
    assert not any(drive.device.acquired for drive in shared_destination.drives)


@pytest.fixture
def shared_destination(make):
    return make({"a": 2 * MIB + 5, "b": MIB}, started=False)


def test_what_is_written_is_flushed_on_the_way_and_a_failing_flush_is_told(make, monkeypatch):
    monkeypatch.setattr(loading, "FLUSH", MIB)
    monkeypatch.setattr(loading, "BACKLOG", 2 * MIB)
    there = make({"a": 8 * MIB}, started=False)
    flushed = []
    flush = there.drives["a"].device.flush

    def counted():
        flushed.append(threading.current_thread().name)
        flush()

    monkeypatch.setattr(there.drives["a"].device, "flush", counted)
    body = b"".join(chunk("a", number, b"x" * MIB) for number in range(8)) + wire.EOS_RECORD
    load(there, body)
    assert any(name.startswith("whimbrel-block-flush") for name in flushed)
    assert flushed[-1] == threading.current_thread().name

    def fail():
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(there.drives["a"].device, "flush", fail)
    with pytest.raises(MigrationError, match="cannot be flushed"):
        load(there, body)
    assert there.drives["a"].device.incomplete


@pytest.mark.parametrize(("told", "last"), [((0, 25, 50), 2), ((0,), 15), ((0, 1), 1), ((10,), 1)])
def test_a_source_that_stops_in_the_middle_is_found_out(make, told, last):
    """As a QEMU 7.2 does: its last word is 100 whatever it has sent."""
    there = make({"a": 16 * MIB}, started=False)
    words = b"".join(map(wire.progress, told))
    body = b"".join(chunk("a", number) for number in range(last + 1))
    if last == 2:
        load(
            there,
            words + body + wire.EOS_RECORD,
            wire.progress(66) + wire.EOS_RECORD,
            wire.progress(100) + wire.EOS_RECORD,
        )
    with pytest.raises(StreamError, match="per cent through"):
        load(there, words + body + wire.EOS_RECORD, wire.progress(100) + wire.EOS_RECORD)


@pytest.mark.parametrize(
    ("told", "numbers"), [((0, 25, 50, 75), range(4)), ((0, 4, 15, 100), (0, 3, 10)), ((), ()), ((0,), (0,))]
)
def test_one_that_has_come_to_the_end_is_not(make, told, numbers):
    """Words of a QEMU 7.2: of a disk of 4 MiB, of an overlay with three chunks in it, and of less."""
    there = make({"a": 16 * MIB}, started=False)
    body = b"".join(map(wire.progress, told)) + b"".join(chunk("a", number) for number in numbers)
    load(there, body + wire.EOS_RECORD, chunk("a", 0) + wire.progress(100) + wire.EOS_RECORD)


@pytest.mark.slow
def test_a_source_that_never_sends_a_chunk_is_given_up(make):
    """As a QEMU 7.2 does whose max-bandwidth is 0: one body more than it may, and it is told what to set."""
    there = make({"a": 2 * MIB}, started=False)
    body = wire.progress(0) + wire.EOS_RECORD
    with pytest.raises(StreamError, match="20001 bodies") as caught:
        load(there, *[body] * 20_001, wire.EOS_RECORD)
    assert "max-bandwidth" in caught.value.hint
    assert not there.drives["a"].device.acquired
    assert not there.drives["a"].device.incomplete


def test_a_source_that_is_idle_for_a_while_is_not_given_up(make, monkeypatch):
    monkeypatch.setattr(loading, "IDLE_BODIES", 50)
    there = make({"a": 2 * MIB}, started=False)
    nothing = wire.EOS_RECORD
    came = chunk("a", 0) + wire.EOS_RECORD
    load(there, *[nothing] * 49, came, *[nothing] * 51, chunk("a", 1) + wire.EOS_RECORD)


def test_writes_are_made_in_order_and_one_that_fails_is_told_at_once(make):
    class Noting(RawImage):
        def __init__(self, path):
            super().__init__(path)
            self.order, self.fails_at = [], -1

        def write(self, offset, data):
            if offset == self.fails_at:
                raise OSError(28, "No space left on device")
            self.order.append(offset // MIB)
            super().write(offset, data)

    there = make({"a": 4 * MIB}, started=False, device=Noting)
    device = there.drives["a"].device
    stream = b"".join(chunk("a", number, bytes([number + 1]) * MIB) for number in (2, 0, 3, 1)) + wire.EOS_RECORD
    load(there, stream)
    assert device.order == [2, 0, 3, 1]
    assert [contents(there, "a")[number * MIB] for number in range(4)] == [1, 2, 3, 4]
    device.order.clear()
    device.fails_at = 3 * MIB
    with pytest.raises(MigrationError, match=f"drive 'a' cannot be written at {3 * MIB}.*No space left") as caught:
        load(there, stream)
    assert caught.value.place.block == "a"
    assert device.order == [2, 0], "something was written behind a write that has failed"
    assert device.incomplete


def test_an_image_in_use_is_refused_before_any_changes(make):
    there = make({"a": MIB, "b": MIB}, started=False)
    other = RawImage(there.drives["b"].device.place)
    other.acquire()
    with pytest.raises(IncompatibleError, match=r"drive 'b' cannot be loaded.*in use"):
        load(there, chunk("a", 0, b"x") + wire.EOS_RECORD)
    assert not any(contents(there, "a"))
    other.close()


def test_a_full_section_is_no_block_section(make):
    handler = BlockHandler(make({"a": MIB}, started=False))
    with pytest.raises(StreamError, match="FULL"):
        handler.load(Reader(ReplayChannel(b"")), SectionKind.FULL, 1)
    handler.finish()


# ------------------------------------------------------------------------------------------------------- the plugin


def test_there_is_a_handler_only_where_drives_go_along_or_may_come(make):
    def handlers(machine):
        [spec] = whimbrel_savevm_handlers(machine)
        return len(spec.create())

    assert handlers(make({})) == handlers(make({}, started=False)) == 0
    assert handlers(make({"a": MIB})) == 0
    assert handlers(make({"empty": 0}, leaving=Leaving.EVERYTHING)) == 0
    assert handlers(make({"a": MIB}, leaving=Leaving.EVERYTHING)) == 1
    assert handlers(make({"a": MIB}, leaving=Leaving.ALLOCATED)) == 1
    assert handlers(make({"a": MIB}, started=False)) == 1


def test_progress_counts_the_bytes_of_the_drives(source):
    one = source({"a": MIB + 1, "b": 5})
    assert one.handler.progress == Progress(page_size=4096, total=MIB + 6)
