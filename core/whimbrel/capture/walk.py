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

from collections.abc import Callable
from typing import Final, TypeVar

import attrs

from whimbrel.abc import Channel, SectionKind
from whimbrel.capture.patient import PatientChannel
from whimbrel.capture.tail import Tail, TailCollector, describes
from whimbrel.errors import ChannelLost, IncompatibleError, MigrationError, Place, StreamError
from whimbrel.migration.lanes.method import Method, check_announced
from whimbrel.settings import Limits
from whimbrel.stream import Reader
from whimbrel.wire import commands, skeleton
from whimbrel.wire.commands import AnyCommand, OpenReturnPath, Ping
from whimbrel.wire.order import SectionOrder
from whimbrel.wire.return_path import Message, Pong
from whimbrel.wire.skeleton import Configuration, Element, SectionHeader
from whimbrel.wire.tail import DeviceSection, Standing

GRACE: Final = 1.0  # seconds a description may be late by
SILENCE: Final = 10.0  # seconds without a byte after which a stream whose end cannot be told is given up

RAM: Final = "ram"
BLOCK: Final = "block"
DEVICES: Final = "devices"

T = TypeVar("T")


@attrs.frozen
class Body:
    """A body that stands at the reader's head."""

    kind: SectionKind
    header: SectionHeader


class Walk:
    """Follows one stream; one thread, one use.

    `answer` sends a message on the return path; None where nobody listens. `lanes` is what pages beside the stream are
    to be encoded with; None where there are no lanes. `drives` says whether bodies of drives are wanted. `prove` is
    called when the source asks, behind the devices, whether everything is here, with what has come; if it returns, the
    answer is yes.
    """

    def __init__(
        self,
        channel: Channel,
        limits: Limits,
        *,
        answer: Callable[[Message], None] | None = None,
        lanes: Method | None = None,
        drives: bool = False,
        prove: Callable[[Tail], object] = lambda _: None,
    ) -> None:
        self.channel = PatientChannel(channel)
        """The channel that is read here: whoever reads on behind the end reads from it."""
        self.reader = Reader(self.channel)
        self.configuration: Configuration | None = None
        self.footers = False
        self.return_path_open = False
        self.proved = False
        self.end: Tail | None = None
        self.base = 0
        """Where in the stream the devices begin that came last."""
        self._limits, self._lanes = limits, lanes
        self._answer, self._prove = answer, prove
        self._order = SectionOrder(limits.sections)
        self._open: Body | None = None  # whose footer has not been read
        self._ram_came = self._drives_came = False
        self._drives = drives
        self._devices: list[DeviceSection] = []  # those that came before a section of RAM
        self._proof: list[tuple[SectionHeader, int, int]] = []  # of what was here when the source asked

    # ------------------------------------------------------------------------------------------- in order

    def begin(self) -> Configuration | None:
        """Read the header and the configuration, if there is one. Raises StreamError or ChannelLost."""
        self._at("header", lambda: self.reader.parse(skeleton.parse_header()))
        self.configuration = self._at("configuration", self._read_configuration)
        self.footers = self.configuration is not None
        return self.configuration

    def next_body(self) -> Body | None:
        """What stands at the reader's head: a body of START, PART or END, or None at the end (see `end`)."""
        if self._open is not None:
            self._finish(self._open)
        while True:
            element = self._at("head", self._peek)
            if element in (Element.SECTION_FULL, Element.EOF):
                self.end = self._collect()
                if self.end is not None:
                    return None
                continue
            self.reader.advance(1)
            if element is Element.COMMAND:
                self._obey(self._at("command", lambda: self.reader.parse(commands.parse_command())))
                continue
            kind = skeleton.KIND_OF_ELEMENT[element]
            self._open = self._at("head", lambda: self._begin_section(kind))  # noqa: B023 - called at once
            return self._open

    def _read_configuration(self) -> Configuration | None:
        if self.reader.window(1)[0] != Element.CONFIGURATION:
            return None
        self.reader.advance(1)
        configuration = self.reader.parse(skeleton.parse_configuration())
        # How lanes encode is of this stream alone, not of the machine's later ones.
        return attrs.evolve(configuration, capabilities=check_announced(configuration.capabilities, self._lanes))

    def _peek(self) -> Element:
        element = self.reader.window(1)[0]
        if element not in skeleton.TOP_LEVEL:
            raise StreamError(f"unknown section type {element:#04x}, expected one of 00 01 02 03 04 08")
        return Element(element)

    def _begin_section(self, kind: SectionKind) -> Body:
        header = self._order.accept(kind, self.reader.parse(skeleton.parse_section_header(kind)))
        if header.idstr == BLOCK and not self._drives:
            raise IncompatibleError(
                "the stream brings drives along, and nothing says which images they are to be stored in",
                hint="name them (drives=…, --drive NAME=IMAGE), or migrate without block (blk, inc) at the source",
            )
        if header.idstr not in (RAM, BLOCK):
            raise IncompatibleError(
                f"the stream has a section {header.idstr!r} that is saved in rounds, and only RAM and drives can be "
                "taken so",
                hint="switch off at the source what it belongs to (dirty-bitmaps)",
            )
        if kind is SectionKind.START:
            self._note_start(header)
        return Body(kind, header)

    def _note_start(self, header: SectionHeader) -> None:
        if self._ram_came if header.idstr == RAM else self._drives_came:
            raise StreamError(f"a second section {header.idstr!r} begins, with id {header.section_id}")
        if header.idstr == RAM:
            self._ram_came = True
        else:
            self._drives_came = True

    def _finish(self, body: Body) -> None:
        self._open = None
        self._at(f"{body.header.idstr!r} (id {body.header.section_id})", lambda: self._read_footer(body))

    def _read_footer(self, body: Body) -> None:
        if body.kind is SectionKind.START and self.configuration is None:
            self.footers = self.reader.window(1)[0] == Element.SECTION_FOOTER
        if self.footers:
            self.reader.parse(skeleton.parse_section_footer(body.header.section_id))

    def _obey(self, command: AnyCommand) -> None:
        if isinstance(command, OpenReturnPath):
            self.return_path_open = True
        elif isinstance(command, Ping) and self._answer is not None and self.return_path_open:
            self._answer(Pong(command.value))

    def _at(self, section: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except MigrationError as exc:
            raise exc.at(Place(section=section, offset=self.reader.offset)) from exc.__cause__

    # ------------------------------------------------------------------------------------------- the tail

    @property
    def early(self) -> tuple[DeviceSection, ...]:
        """The devices so far that came before a section of RAM."""
        return tuple(self._devices)

    @property
    def _heard(self) -> bool:
        """Whether the source listens, and so waits for our word."""
        return self.return_path_open and self._answer is not None

    def _collect(self) -> Tail | None:
        """Keep what comes from here on, to the stream's end; None if sections of RAM go on behind it."""
        self.base = self.reader.offset
        collector = TailCollector(
            self.reader.offset,
            footers=self.footers,
            seen={*self._order.ids(), *(device.header.section_id for device in self._devices)},
            started=self._order.started(),
            first=len(self._devices),
            before=sum(len(device.body) for device in self._devices),
            limits=self._limits,
        )
        while True:
            behind = collector.behind()
            if behind is not None and behind.element in skeleton.KIND_OF_ELEMENT:
                if behind.element is not Element.SECTION_START or not self._ram_came:
                    self._resume(collector, behind)
                    return None
                # All sections that are saved in rounds have begun long ago: these are a device's bytes.
                collector.doubt_footers()
                behind = None
            if behind is not None and behind.element is Element.COMMAND:
                self._obey_behind_devices(collector, behind)
                continue
            if (tail := collector.described()) is not None:
                return self._whole(tail)
            if collector.too_long() or self._at(DEVICES, lambda: self._silent(collector, behind)):  # noqa: B023
                return self._whole(collector.ended())
            if not self._at(DEVICES, lambda: self._grow(collector.data)):
                return self._whole(self._hung_up(collector.ended()))

    def _grow(self, data: bytearray) -> bool:
        """Wait for more; False at the stream's end."""
        if self.reader.ended():
            return False
        window = self.reader.window(1)
        data += window
        self.reader.advance(len(window))
        return True

    def _silent(self, collector: TailCollector, behind: Standing | None) -> bool:
        """Wait for more where the source may be waiting for us; True if it is, and all is here that will come."""
        end = behind is not None and behind.element is Element.EOF
        if not self._heard or (collector.has_footers and not end) or len(self.reader.window(0)):
            return False
        complete = (end and behind is not None and behind.end == len(collector.data)) or collector.description_came
        if self.channel.wait(GRACE if complete else SILENCE):
            return False
        if complete or (end and self.proved):
            return True
        raise StreamError(
            f"the source has been silent for {SILENCE:g} s, and nothing tells whether its devices are all here",
            hint="a machine type with neither footers nor a description cannot be taken so: switch return-path off",
        )

    def _hung_up(self, tail: Tail) -> Tail:
        """The end of a stream whose source has gone, at once or before it was told anything: then it has given up."""
        if tail.error is not None or tail.description is not None or not self._heard or self.proved:
            return tail
        lost = ChannelLost(
            "the source hung up before it was told that all is here",
            hint="its own error says why; it has not let go of its machine",
            place=Place(section=DEVICES, offset=self.reader.offset),
        )
        return attrs.evolve(tail, error=lost)

    def _resume(self, collector: TailCollector, behind: Standing) -> None:
        """The devices so far came early; go on with what stands behind them."""
        self._devices += collector.devices()
        self._check_count(len(self._devices))
        self.channel.give_back(memoryview(collector.data)[behind.offset :])
        self.reader = Reader(self.channel, offset=collector.base + behind.offset)

    def _obey_behind_devices(self, collector: TailCollector, command: Standing) -> None:
        """Answer a PING. Behind all that will come its source waits for it, and then the answer is a proof."""
        ping = collector.ping(command)
        if ping is not None and self._heard:
            assert self._answer is not None
            if self._order.started() or not self._ram_came:
                self._answer(Pong(ping.value))  # the devices so far came early
            elif command.end == len(collector.data) and not self.proved:
                tail = self._whole(Tail(collector.devices()))
                self._prove(tail)
                self.proved, self._proof = True, _outline(tail)
                self._answer(Pong(ping.value))
        collector.pass_over(command)

    def _whole(self, tail: Tail) -> Tail:
        """`tail` with the devices that came early, if it is not too much and what was proved."""
        early = list(self._devices)
        if tail.description is not None:
            for number, described in enumerate(tail.description.devices[: len(early)]):
                if describes(described, early[number].header):
                    early[number] = attrs.evolve(early[number], described=described)
        self._check_count(len(early) + len(tail.sections))
        whole = attrs.evolve(tail, sections=(*early, *tail.sections))
        if self.proved and tail.error is None and _outline(whole) != self._proof:
            raise StreamError(
                f"the {len(whole.sections)} device sections are not the {len(self._proof)} that were here when the "
                "source asked whether all are",
                hint="what was kept then is not the whole machine",
                place=Place(section=DEVICES, offset=self.reader.offset),
            )
        return whole

    def _check_count(self, devices: int) -> None:
        if devices + self._ram_came + self._drives_came > self._limits.sections:
            raise StreamError(
                f"more than {self._limits.sections} sections",
                hint="[limits] sections says how many may come",
                place=Place(section=DEVICES, offset=self.reader.offset),
            )


def _outline(tail: Tail) -> list[tuple[SectionHeader, int, int]]:
    return [(section.header, section.offset, len(section.body)) for section in tail.sections]
