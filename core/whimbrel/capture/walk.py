"""One stream of any machine, element by element: what comes next, and whose body it is.

Pull: `begin`, then `next_body` until it returns None, then `tail` is there. Whoever is given a body reads it, up to and
including its end mark, from `reader`, before asking for the next.

From the first FULL section on no length is known: the devices are kept as the bytes that came, and split when the
description tells their sizes, or by their footers (`whimbrel.wire.tail`). A live source may wait for us there, with
nothing to tell that it does but its silence:

* one that switches in two phases has sent a PING behind its last device: footers show it;
* one that has no description to send (`suppress-vmdesc`) and listens to a return path: after `GRACE`;
* one of a machine type without footers and description, listening: cannot be told, and is refused after `SILENCE`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import attrs

from whimbrel.abc import Channel, SectionKind
from whimbrel.capture.tail import Tail, TailCollector
from whimbrel.errors import IncompatibleError, Place, StreamError
from whimbrel.settings import Limits
from whimbrel.stream import Reader, Replay
from whimbrel.wire import commands, skeleton
from whimbrel.wire.commands import OpenReturnPath, Ping
from whimbrel.wire.order import SectionOrder
from whimbrel.wire.return_path import Message, Pong
from whimbrel.wire.skeleton import Configuration, Element, SectionHeader
from whimbrel.wire.tail import DeviceSection, Standing

GRACE: Final = 1.0  # seconds a description may be late by
SILENCE: Final = 10.0  # seconds without a byte after which a stream whose end cannot be told is given up

RAM: Final = "ram"


@attrs.frozen
class Body:
    """A body that stands at the reader's head."""

    kind: SectionKind
    header: SectionHeader


class Walk:
    """Follows one stream; one thread, one use.

    `answer` sends a message on the return path; None where nobody listens. `prove` is called when the source asks,
    behind the devices, whether everything is here, with what has come; if it returns, the answer is yes.
    """

    def __init__(
        self,
        channel: Channel,
        limits: Limits,
        *,
        answer: Callable[[Message], None] | None = None,
        prove: Callable[[Tail], object] = lambda _: None,
    ) -> None:
        self.reader = Reader(channel)
        self.configuration: Configuration | None = None
        self.footers = False
        self.return_path_open = False
        self.proved = False
        self.end: Tail | None = None
        self._channel, self._limits = channel, limits
        self._answer, self._prove = answer, prove
        self._order = SectionOrder(limits.sections)
        self._open: Body | None = None  # whose footer has not been read
        self._devices: list[DeviceSection] = []  # those that came before a section of RAM
        self._look: _Look | None = None

    # ------------------------------------------------------------------------------------------- in order

    def begin(self) -> Configuration | None:
        """Read the header and the configuration, if there is one. Raises StreamError or ChannelLost."""
        self.reader.parse(skeleton.parse_header())
        if self.reader.window(1)[0] == Element.CONFIGURATION:
            self.reader.advance(1)
            self.configuration = self.reader.parse(skeleton.parse_configuration())
            self.footers = True
        return self.configuration

    def next_body(self) -> Body | None:
        """What stands at the reader's head: a body of START, PART or END, or None at the end (see `end`)."""
        if self._open is not None:
            self._finish(self._open)
        while True:
            element = Element(self._peek())
            if element in (Element.SECTION_FULL, Element.EOF):
                self.end = self._collect()
                if self.end is not None:
                    return None
                continue
            self.reader.advance(1)
            if element is Element.COMMAND:
                self._obey(self.reader.parse(commands.parse_command()))
                continue
            self._open = self._begin_section(skeleton.KIND_OF_ELEMENT[element])
            return self._open

    def _peek(self) -> int:
        element = self.reader.window(1)[0]
        if element not in skeleton.TOP_LEVEL:
            raise StreamError(
                f"unknown section type {element:#04x}, expected one of 00 01 02 03 04 08",
                place=Place(offset=self.reader.offset),
            )
        return element

    def _begin_section(self, kind: SectionKind) -> Body:
        header = self._order.accept(kind, self.reader.parse(skeleton.parse_section_header(kind)))
        if header.idstr != RAM:
            raise IncompatibleError(
                f"the stream has a section {header.idstr!r} that is saved in rounds, and only RAM can be taken so",
                hint="switch off at the source what it belongs to (block migration, dirty-bitmaps)",
                place=Place(offset=self.reader.offset),
            )
        return Body(kind, header)

    def _finish(self, body: Body) -> None:
        self._open = None
        if body.kind is SectionKind.START and self.configuration is None:
            self.footers = self.reader.window(1)[0] == Element.SECTION_FOOTER
        if self.footers:
            self.reader.parse(skeleton.parse_section_footer(body.header.section_id))

    def _obey(self, command: OpenReturnPath | Ping) -> None:
        if isinstance(command, OpenReturnPath):
            self.return_path_open = True
        elif self._answer is not None and self.return_path_open:
            self._answer(Pong(command.value))

    # ------------------------------------------------------------------------------------------- the tail

    def _collect(self) -> Tail | None:
        """Keep what comes from here on, to the stream's end; None if sections of RAM go on behind it."""
        collector = TailCollector(
            self.reader.offset,
            footers=self.footers,
            seen={*self._order.ids(), *(device.header.section_id for device in self._devices)},
            started=self._order.started(),
            first=len(self._devices),
            limit=self._limits.description,
        )
        while True:
            behind = collector.behind()
            if behind is not None and behind.element in skeleton.KIND_OF_ELEMENT:
                self._resume(collector, behind)
                return None
            if behind is not None and behind.element is Element.COMMAND:
                self._obey_behind_devices(collector, behind)
                continue
            if (tail := collector.described()) is not None:
                return self._whole(tail)
            collector.check_length()
            complete = behind is not None and behind.element is Element.EOF
            if self._silent(complete=complete) or not self._grow(collector.data):
                return self._whole(collector.ended())

    def _grow(self, data: bytearray) -> bool:
        """Wait for more; False at the stream's end."""
        if self.reader.ended():
            return False
        window = self.reader.window(1)
        data += window
        self.reader.advance(len(window))
        return True

    def _silent(self, *, complete: bool) -> bool:
        """Wait for more where the source may be waiting for us; True if it is, and all is here."""
        if not self.return_path_open or self._answer is None or (self.footers and not complete):
            return False
        if self._look is None:
            self._look = _Look(self.reader)
        if self._look.done(GRACE if complete else SILENCE):
            self._look = None
            return False
        if complete:
            return True
        raise StreamError(
            f"the source has been silent for {SILENCE:g} s, and nothing tells whether its devices are all here",
            hint="its machine type has neither footers nor a description: switch return-path off at the source",
            place=Place(section="devices", offset=self.reader.offset),
        )

    def _resume(self, collector: TailCollector, behind: Standing) -> None:
        """The devices so far came early; go on with what stands behind them."""
        self._devices += collector.devices()
        rest = bytes(collector.data[behind.offset :])
        self.reader = Reader(Replay(rest, self._channel), offset=collector.base + behind.offset)

    def _obey_behind_devices(self, collector: TailCollector, command: Standing) -> None:
        """Answer a PING that its source waits for: everything before it is here."""
        ping = collector.ping(command)
        if ping is not None and self._answer is not None and self.return_path_open and not self.proved:
            self._prove(self._whole(Tail(collector.devices())))
            self.proved = True
            self._answer(Pong(ping.value))
        collector.pass_over(command)

    def _whole(self, tail: Tail) -> Tail:
        """`tail` with the devices that came early."""
        if not self._devices:
            return tail
        early = list(self._devices)
        if tail.description is not None:
            described = tail.description.devices
            early = [
                attrs.evolve(early_, described=described[n]) for n, early_ in enumerate(early) if n < len(described)
            ]
        return attrs.evolve(tail, sections=(*early, *tail.sections))


class _Look:
    """Waits for one more byte on a thread of its own, so that the waiting can be given up."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._wait, name="whimbrel-look", daemon=True)
        self._thread.start()

    def done(self, seconds: float) -> bool:
        """Whether something has come, or the end, within `seconds`. Raises what the waiting raised."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def _wait(self) -> None:
        try:
            self._reader.ended()
        except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
            self._error = exc
