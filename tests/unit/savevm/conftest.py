"""Machines, trackers and channels that the RAM handler's two rooms are tested between."""

import ctypes
import struct
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest

from whimbrel.abc import Channel, DirtyTracker, Progress, SectionKind
from whimbrel.machine import BareMachine
from whimbrel.machine.dirty import ManualTracker
from whimbrel.settings import Backends, Settings
from whimbrel.stream import Reader, Writer
from whimbrel_codecs import xbzrle, zlib
from whimbrel_savevm._ram_loader import RamLoader
from whimbrel_savevm._ram_saver import BATCH, RamSaver
from whimbrel_savevm._ram_sending import PlainSender

hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")

PAGE = 4096
CODECS = {spec.name: spec for module in (xbzrle, zlib) for spec in module.whimbrel_codecs()}


class Tape(Channel):
    """Keeps what is sent and gives it back, as much at a time as fits."""

    peer = "tape"
    duplex = False

    def __init__(self, data=b""):
        self.data = bytearray(data)
        self._read = 0

    def send(self, data):
        self.data += memoryview(data).cast("B")

    def recv_into(self, buffer):
        count = min(len(buffer), len(self.data) - self._read)
        memoryview(buffer)[:count] = self.data[self._read : self._read + count]
        self._read += count
        return count

    def end_writing(self):
        raise AssertionError("not a handler's business")

    def close(self):
        raise AssertionError("not a handler's business")


class GatheringTape(Tape):
    """One that takes memory by address as well."""

    def send_gathered(self, vectors):
        for address, length in vectors.tolist():
            self.data += ctypes.string_at(address, length)


class PerfectTracker(DirtyTracker):
    """Is told what is written, page by page; `reading` is called whenever pages are about to be read."""

    def __init__(self, *, tells_untouched=True):
        self.written = {}
        self.reading = lambda: None
        self.tells_untouched = tells_untouched
        self.stopped = 0
        self._zero = {}

    def start(self, regions):
        for region in regions:
            self.written[region.name] = np.zeros(region.pages, np.bool_)
            self._zero[region.name] = ~region.view.reshape(-1, PAGE).any(axis=1)
            self._zero[region.name].flags.writeable = False

    def collect(self, region, dirty):
        before = np.count_nonzero(dirty)
        dirty |= self.written[region.name]
        self.written[region.name][:] = False
        return int(np.count_nonzero(dirty) - before)

    def untouched(self, region):
        return self._zero[region.name] if self.tells_untouched else None

    def pages(self, region):
        self.reading()
        return region.view

    def stop(self):
        self.stopped += 1


class Budget:
    """A slice of so many bytes; `between` is called each time it is asked whether it is over."""

    def __init__(self, out, size, between=lambda: None):
        self._out, self._end, self._between = out, out.offset + size, between

    def bytes_left(self):
        return self._end - self._out.offset

    def over(self):
        self._between()
        return self.bytes_left() <= 0


class Source:
    """A machine's RAM being saved: bodies go to `tape`, and `bodies` says where each one begins and of what kind."""

    def __init__(self, machine, tracker=None, tape=None):
        self.machine = machine
        self.tracker = tracker or PerfectTracker()
        self.progress = Progress(page_size=PAGE)
        self.saver = RamSaver(list(machine.ram), self.tracker, self.progress, PlainSender(self.progress, zeros=BATCH))
        self.tape = tape if tape is not None else Tape()
        self.out = Writer(self.tape)
        self.bodies = []

    def write(self, block, page, data=b"", at=0):
        """What the guest does: writes, then marks. No data fills the page with zeros."""
        block = self.machine.ram[block]
        view = block.view[page * PAGE : (page + 1) * PAGE]
        if data:
            view[at : at + len(data)] = np.frombuffer(data, np.uint8)
        else:
            view[:] = 0
        block.mark_dirty(page * PAGE, PAGE)
        if isinstance(self.tracker, PerfectTracker) and self.tracker.written:
            self.tracker.written[block.name][page] = True

    def start(self):
        self._body(SectionKind.START, lambda: self.saver.start(self.out))

    def part(self, size=1 << 30, between=lambda: None):
        self._body(SectionKind.PART, lambda: self.saver.part(self.out, Budget(self.out, size, between)))

    def round(self, size=1 << 30):
        """Sync, and send until nothing is pending."""
        self.saver.sync()
        while self.saver.pending():
            self.part(size)

    def end(self):
        self.saver.sync()
        self._body(SectionKind.END, lambda: self.saver.end(self.out))

    def _body(self, kind, save):
        self.out.flush()
        self.bodies.append((kind, len(self.tape.data)))
        save()
        self.out.flush()


def load_all(machine, tape, kinds, *, capacity=1 << 20):
    """Load bodies of `kinds` off the tape; the loader is returned unfinished."""
    loader, reader = RamLoader(machine), Reader(Tape(tape.data), capacity=capacity)
    try:
        for kind in kinds:
            loader.load(reader, kind)
    except BaseException:
        loader.finish()
        raise
    assert reader.offset == len(tape.data), "the bodies do not add up to the tape"
    return loader


def parse_bodies(data):
    """The records of a run of bodies, read by a parser of its own: lists of (flags, name or None, page, payload)."""
    bodies, at, lists = [[]], 0, []
    while at < len(data):
        (word,) = struct.unpack_from(">Q", data, at)
        at += 8
        flags, offset = word & 0xFFF, word & ~0xFFF
        if flags == 0x10:
            bodies.append([])
            continue
        if flags == 0x04:
            blocks = {}
            while offset:
                size = data[at]
                name = bytes(data[at + 1 : at + 1 + size]).decode()
                (blocks[name],) = struct.unpack_from(">Q", data, at + 1 + size)
                at += 9 + size
                offset -= blocks[name]
            lists.append(blocks)
            continue
        name = None
        if not flags & 0x20:
            size = data[at]
            name = bytes(data[at + 1 : at + 1 + size]).decode()
            at += 1 + size
        size = {0x08: PAGE, 0x02: 1}[flags & ~0x20]
        bodies[-1].append((flags, name, offset // PAGE, bytes(data[at : at + size])))
        at += size
    assert bodies.pop() == [], "the last body has no end"
    return lists, bodies


def new_machine(layout, memory="anonymous", **limits):
    settings = Settings(backends=Backends(memory=memory))
    for name, value in limits.items():
        setattr(settings.limits, name, value)
    machine = BareMachine("m", settings=settings, codec_spec=CODECS.__getitem__)
    for name, pages in layout.items():
        machine.ram.add(name, pages * PAGE)
    return machine


@pytest.fixture(scope="session")
def bench():
    return SimpleNamespace(
        Tape=Tape,
        GatheringTape=GatheringTape,
        PerfectTracker=PerfectTracker,
        ManualTracker=ManualTracker,
        Budget=Budget,
        Source=Source,
        load_all=load_all,
        parse_bodies=parse_bodies,
        machine=new_machine,
        PAGE=PAGE,
    )
