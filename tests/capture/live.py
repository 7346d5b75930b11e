"""Sources that play a script over a link with a way back, and a look at what they heard, when."""

from __future__ import annotations

import struct
import threading

from whimbrel.capture.taking import Capture
from whimbrel.errors import ChannelError
from whimbrel.testing.faults import ChannelWrapper
from whimbrel.testing.memory import memory_pair

from .streams import Device, Script, page

LONG = 60.0  # seconds; only what hangs ever waits so long

SHUT, PONG = 1, 2


def with_way_back(shape, *, blocks=None):
    """The beginning of a stream whose source listens."""
    return Script(shape, blocks or {"a": 2, "b": 1}).header().open_return_path().ping()


def rest(script):
    """Its RAM, with a question in between, and its devices."""
    script.start().part(("a", 0, page(1)), ("b", 0, 0)).ping(0x10001).part(("a", 1, 7)).end(("a", 1, 9))
    return script.full(Device("timer", 4, b"\x01\x02\x00"), Device("twin", 5, b"one"), Device("twin", 6, b""))


class Heard(Exception):
    """The source heard something else than it waited for."""


class Source:
    """One end of a link, and a thread that does `play(source)` with it. What it raises is raised by `join`."""

    def __init__(self, channel, play, diary):
        self.channel, self.diary = channel, diary
        self._play = play
        self._error = None
        self._thread = threading.Thread(target=self._run, name="whimbrel-test-source", daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self._play(self)
        except BaseException as exc:
            self._error = exc
        finally:
            self.channel.close()

    def join(self):
        self._thread.join(LONG)
        assert not self._thread.is_alive(), "the source waits for something that does not come"
        if self._error is not None:
            raise self._error

    def send(self, data, *, pieces=1 << 30):
        for at in range(0, len(data), pieces):
            self.channel.send(bytes(data[at : at + pieces]))

    def hear(self):
        """The next message, as (kind, value); None at the link's end, however it ends."""
        head = self._take(4)
        if head is None:
            self.diary.append("end")
            return None
        kind, length = struct.unpack(">HH", head)
        assert length == 4
        value = int.from_bytes(self._take(4), "big")
        self.diary.append(f"{({SHUT: 'SHUT', PONG: 'PONG'})[kind]} {value:#x}")
        return kind, value

    def expect(self, *message):
        heard = self.hear()
        if heard != message:
            raise Heard(f"{heard}, expected {message}")

    def expect_end(self):
        if (heard := self.hear()) is not None:
            raise Heard(f"{heard}, expected the end")

    def hang_up(self):
        self.channel.close()

    def _take(self, size):
        data = b""
        while len(data) < size:
            piece = bytearray(size - len(data))
            try:
                count = self.channel.recv_into(piece)
            except ChannelError:
                return None
            if not count:
                assert not data, "half a message"
                return None
            data += piece[:count]
        return data


class Watched(ChannelWrapper):
    """The capturing end of a link. `wait_for(n)` returns when all n bytes were received and more is waited for."""

    def __init__(self, inner):
        super().__init__(inner)
        self.received = 0
        self._changed = threading.Condition()
        self._waiting_at = -1
        self._readers = 0
        self.crowded = False  # two have read at once
        self.failing = None  # called in each `recv_into`
        self.failing_send = None

    def recv_into(self, buffer):
        with self._changed:
            self._readers += 1
            self.crowded |= self._readers > 1
            self._waiting_at = self.received
            self._changed.notify_all()
        try:
            if self.failing is not None:
                self.failing()
            count = self.inner.recv_into(buffer)
        finally:
            with self._changed:
                self._readers -= 1
        with self._changed:
            self.received += count
        return count

    def send(self, data):
        if self.failing_send is not None:
            self.failing_send()
        self.inner.send(data)

    def wait_for(self, received):
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting_at >= received, LONG), "it is not read so far"


class Link:
    """A Capture at one end, a Source at the other; `diary` says what happened in which order."""

    def __init__(self, play, *, settings, plugins, keep=None, max_ram=1 << 24, duplex=True, on_keep=None):
        self.diary = []
        self.kept = []
        near, far = memory_pair(duplex=duplex)
        self.near, self.far = near, Watched(far)
        self.on_keep = on_keep or (lambda machine: None)
        self.capture = Capture(self.far, settings=settings, plugins=plugins, max_ram=max_ram, keep=keep or self._keep)
        self.source = Source(near, play, self.diary)

    def _keep(self, machine):
        self.kept.append(machine)
        self.on_keep(machine)
        self.diary.append("kept")

    @property
    def heard(self):
        """What the source heard, in order."""
        return [what for what in self.diary if what != "kept"]

    def kept_before(self, what):
        """Whether the machine was kept, once, before the source heard `what`."""
        return self.diary.count("kept") == 1 and self.diary.index("kept") < self.diary.index(what)

    def run(self):
        """The machine, or raise what became of it; then the source is through as well."""
        try:
            return self.capture.run()
        finally:
            self.source.join()
            assert not self.far.crowded, "two threads read one channel at once"


class Running:
    """A Link whose capture runs on a thread of its own."""

    def __init__(self, link):
        self.link = link
        self.machine = self.error = None
        self._thread = threading.Thread(target=self._run, name="whimbrel-test-capture", daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self.machine = self.link.capture.run()
        except BaseException as exc:
            self.error = exc

    def join(self):
        self._thread.join(LONG)
        assert not self._thread.is_alive(), "the capture hangs"
        self.link.source.join()
        assert not self.link.far.crowded, "two threads read one channel at once"
        return self.machine, self.error
