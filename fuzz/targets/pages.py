"""What pages come in: records, changes (XBZRLE), the packets of lanes, and what codecs make of payloads."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from fuzz import machines
from fuzz.target import MIB, Target, expect
from whimbrel.abc import ByteArray, Codec, IndexArray
from whimbrel.errors import ChannelError, MigrationError, ProtocolError, StreamError
from whimbrel.migration.lanes.arriving import Arriving
from whimbrel.migration.lanes.method import Method
from whimbrel.settings import Parameters
from whimbrel.stream import Reader, Replay
from whimbrel.wire import multifd
from whimbrel.wire import ram as wire
from whimbrel.wire.ram_batches import BatchReader
from whimbrel.wire.ram_changes import change_records
from whimbrel_codecs.xbzrle import NotEncoded, XbzrleCodec, encode_page
from whimbrel_codecs.zlib import ZlibCodec, ZlibLaneCodec
from whimbrel_codecs.zstd import ZstdLaneCodec

PAGE = wire.PAGE_SIZE
_DICE = np.random.default_rng(11)
_OLD: ByteArray = _DICE.integers(0, 256, (8, PAGE), np.uint8)


def _changed() -> ByteArray:
    new = _OLD.copy()
    new[:, 100:120] += 1
    new[1:, 2000] ^= 0xFF
    new[3] = 0
    new[4, ::400] += 7
    return new


class Records(Target):
    """RAM records, by both of their readers, which must see the same."""

    name = "ram"
    longest = 1 << 15
    room = 8 * MIB
    sizes: ClassVar = {"a": 3 * PAGE, "b": 40 * PAGE}

    def seeds(self) -> Iterable[bytes]:
        """Bodies with records of each kind."""
        stage = wire.RecordStage(pages=4, zeros=4)
        memory = _OLD.reshape(-1)
        pages = b"".join(map(bytes, stage.pages(memory[: 3 * PAGE], np.array([0, 2]), "a")))
        zeros = b"".join(map(bytes, stage.zeros(np.array([1, 3, 4]), "b")))
        encoded = XbzrleCodec().encode(_OLD, _changed())
        some = np.flatnonzero(encoded.ends > encoded.starts)
        changes = b"".join(
            map(bytes, change_records(some, encoded.data, encoded.starts[some], encoded.ends[some], "b"))
        )
        packed = ZlibCodec().encode(_OLD[:1] & 1)
        compressed = (5 * PAGE | 0x120).to_bytes(8, "big") + len(packed).to_bytes(4, "big") + packed
        yield pages + zeros + wire.EOS_RECORD
        yield zeros + wire.EOS_RECORD
        yield changes + compressed + zeros + wire.EOS_RECORD
        yield wire.EOS_RECORD

    def try_one(self, data: bytes) -> str:
        """Read them twice."""
        runs, one = self._read(wire.RecordReader(self.sizes), data)
        batches, other = self._read(BatchReader(self.sizes), data)
        expect(one == other, f"one reader says {one}, the other {other}")
        # A run that is wrong somewhere is refused as a whole, a batch is good up to there.
        expect(runs == batches[: len(runs)], "the readers do not see the same records")
        expect(one != "read" or len(runs) == len(batches), "the readers do not see as many records")
        return one

    @staticmethod
    def _read(records: wire.RecordReader | BatchReader, data: bytes) -> tuple[list[tuple[Any, ...]], str]:
        seen: list[tuple[Any, ...]] = []
        reader = Reader(Replay(data), capacity=1 << 14)
        try:
            for name, part in records.body(reader, 4000):
                flags = [int(part.flag)] * len(part.indices) if isinstance(part, wire.Run) else part.flags.tolist()
                seen += zip([name] * len(flags), flags, part.indices.tolist(), strict=True)
        except (ProtocolError, ChannelError) as exc:
            return seen, exc.code
        return seen, "read"


class Changes(Target):
    """XBZRLE payloads: a count, the length of each, and all of them; held against a decoder that is plain to see."""

    name = "xbzrle"

    def seeds(self) -> Iterable[bytes]:
        """What the encoder makes, one and several at once."""
        encoded = XbzrleCodec().encode(_OLD, _changed())
        payloads = [encoded.data[start:end].tobytes() for start, end in zip(encoded.starts, encoded.ends, strict=True)]
        payloads += [made for old, new in zip(_OLD, _changed(), strict=True)
                     if not isinstance(made := encode_page(old, new), NotEncoded)]  # fmt: skip
        for payload in payloads:
            yield b"\x01" + len(payload).to_bytes(2, "big") + payload
        some = [payload for payload in payloads if payload][:8]
        yield bytes((len(some),)) + b"".join(len(each).to_bytes(2, "big") for each in some) + b"".join(some)

    def try_one(self, data: bytes) -> str:
        """Decode them, and compare."""
        count = data[0] % 9 if data else 0
        lengths = [int.from_bytes(data[1 + 2 * n : 3 + 2 * n], "big") for n in range(count)]
        payload = data[1 + 2 * count :]
        ends: IndexArray = np.minimum(np.cumsum([0, *lengths]), len(payload)).astype(np.intp)
        pieces = [payload[start:end] for start, end in itertools.pairwise(ends)]
        expected: list[ByteArray | None] = [_plainly(piece, _OLD[n % 8]) for n, piece in enumerate(pieces)]
        wrong = any(page is None for page in expected)
        memory = _OLD.copy().reshape(-1)
        offsets: IndexArray = np.arange(count, dtype=np.intp) % 8 * PAGE
        try:
            XbzrleCodec().decode(np.frombuffer(payload, np.uint8), ends[:-1], ends[1:], memory, offsets)
        except StreamError as exc:
            expect(wrong, "a payload was refused that is right")
            expect(bool((memory == _OLD.reshape(-1)).all()), "a page was changed by what was refused")
            return exc.code
        expect(not wrong, "a payload was taken that is wrong")
        pages = memory.reshape(-1, PAGE)
        for n, page in enumerate(expected):
            expect(bool((pages[n % 8] == page).all()), f"page {n} is not what its payload says")
        return "decoded"


def _plainly(payload: bytes, old: ByteArray) -> ByteArray | None:
    """Page `old` after a payload; None for one that is malformed."""
    page, at, reach, first = old.copy(), 0, 0, True
    while at < len(payload):
        for changed in (False, True):
            length, shift = 0, 0
            while True:
                if at == len(payload) or shift > 7:
                    return None
                byte, at = payload[at], at + 1
                length |= (byte & 0x7F) << shift
                shift += 7
                if not byte & 0x80:
                    break
            if length == 0 and (changed or not first):
                return None
            if reach + length > PAGE or (changed and at + length > len(payload)):
                return None
            if changed:
                page[reach : reach + length] = np.frombuffer(payload, np.uint8, length, at)
                at += length
            elif at == len(payload):
                return None
            reach += length
        first = False
    return page


class _Sink:
    """Two blocks within a larger piece of memory, around which nothing may be written."""

    def __init__(self) -> None:
        self._all = np.zeros(48 * PAGE, np.uint8)
        self._blocks = {"a": self._all[4 * PAGE : 8 * PAGE], "b": self._all[12 * PAGE : 44 * PAGE]}

    def memory(self, block: str) -> ByteArray:
        if block not in self._blocks:
            raise StreamError(f"a packet names RAM block {block!r}, which is not there")
        return self._blocks[block]

    def arriving(self, block: str, indices: IndexArray) -> None:
        """Nothing is to be prepared."""

    def zeros(self, block: str, indices: IndexArray) -> None:
        self._blocks[block].reshape(-1, PAGE)[indices] = 0

    def is_sound(self) -> bool:
        """Whether nothing stands outside of the blocks."""
        beside = (self._all[: 4 * PAGE], self._all[8 * PAGE : 12 * PAGE], self._all[44 * PAGE :])
        return not any(part.any() for part in beside)


class Packets(Target):
    """A lane: which method it has, and its bytes, its first 64 included."""

    name = "multifd"
    longest = 1 << 15
    room = 8 * MIB
    methods = ("none", "zlib", "zstd")

    def __init__(self) -> None:
        plugins = machines.plugins()
        self._methods = [Method.of(Parameters(multifd_compression=name), plugins) for name in self.methods]

    def seeds(self) -> Iterable[bytes]:
        """Lanes of each method with pages in a row and apart, zero pages and syncs."""
        for number, method in enumerate(self._methods):
            codec, stage = method.new_codec(), multifd.PacketStage()
            data = bytes((number,)) + multifd.encode_init(multifd.Init(bytes(16), 0))
            for turn, pages in enumerate(([0, 1], [5, 3, 7], [])):
                indices: IndexArray = np.array(pages, np.intp)
                payload = _OLD[indices] & 3
                encoded = payload.tobytes() if codec is None else bytes(codec.encode(payload)) if pages else b""
                stage.pages(2 * turn, "b", method.bits, len(encoded), indices, np.array([9 + turn], np.intp))
                data += stage.header.tobytes() + encoded
                stage.sync(2 * turn + 1)
                data += stage.header.tobytes()
            yield data

    def try_one(self, data: bytes) -> str:
        """Have them come."""
        method, data = self._methods[data[0] % 3 if data else 0], data[1:]
        with suppress(StreamError):
            multifd.parse_init(memoryview(data[: multifd.INIT_SIZE].ljust(multifd.INIT_SIZE, b"\0")))
        sink = _Sink()
        lanes = Arriving([Replay(data[multifd.INIT_SIZE :])], method, on_failure=lambda: None)
        lanes.begin(sink)
        syncs, outcome = 0, ""
        try:
            while True:
                lanes.sync()
                syncs += 1
        except (ProtocolError, ChannelError) as exc:
            outcome = exc.code
        except MigrationError as exc:
            raise exc.__cause__ or exc from None
        finally:
            lanes.close()
        expect(sink.is_sound(), "something was written outside of the blocks")
        return f"{outcome} after {min(syncs, 3)} syncs"


class Payloads(Target):
    """Payloads of codecs: which, how many pages, and two packets for those that go on from one to the next."""

    name = "codec"
    longest = 1 << 15
    room = 24 * MIB  # zstd keeps a window of 8 MiB
    codecs = (ZlibCodec, ZlibLaneCodec, ZstdLaneCodec)

    def seeds(self) -> Iterable[bytes]:
        """What each codec makes of pages that are random, regular and zero."""
        for number, make in enumerate(self.codecs):
            for pages in (_OLD[:1], _OLD[:2] & 1, np.zeros((4, PAGE), np.uint8)):
                codec: Codec = make()
                first, second = bytes(codec.encode(pages)), bytes(codec.encode(pages))
                yield bytes((number, len(pages) - 1)) + len(first).to_bytes(2, "big") + first + second

    def try_one(self, data: bytes) -> str:
        """Decode both, into room that is known."""
        number, count, size = data[:1], data[1:2], int.from_bytes(data[2:4], "big")
        make = self.codecs[number[0] % 3 if number else 0]
        decoder: Codec = make()
        into = np.empty((1 + (count[0] % 4 if count else 0), PAGE), np.uint8)
        outcomes: list[str] = []
        for packet in self._packets(data[4:], size):
            into[:] = 0xAA
            try:
                decoder.decode(packet, into)
            except StreamError as exc:
                expect(bool((into == 0xAA).all()), "room was changed by what was refused")
                return " ".join([*outcomes, exc.code])
            if make is ZlibCodec:
                expect(zlib.decompress(packet) == into.tobytes(), "it decodes to something else")
            outcomes.append("decoded")
        return " ".join(outcomes)

    @staticmethod
    def _packets(data: bytes, size: int) -> Iterator[bytes]:
        yield data[:size]
        yield data[size:]
