"""Reads one stream into the handlers of one machine: what may come, in which order, and who gets it.

Knows no thread, socket or status. Nothing reaches the machine before `prepare`: every section is parsed and checked
first (RAM, which has blocks of its own to write into, can undo it). `prepare` happens at the first PING behind a
device section, whose PONG is the proof that everything is here, or at EOF.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar
from uuid import UUID

from whimbrel.abc import SectionKind, StreamReader
from whimbrel.errors import IncompatibleError, MigrationError, Place, StreamError
from whimbrel.machine import BareMachine
from whimbrel.migration.digest import StreamDigest
from whimbrel.migration.lanes.method import Method, check_announced
from whimbrel.migration.savevm import Entry, Registry
from whimbrel.stream import Reader, TappedReader
from whimbrel.wire import commands, description, handover, skeleton
from whimbrel.wire.commands import AnyCommand, Attempt, Digest, Ping
from whimbrel.wire.order import SectionOrder
from whimbrel.wire.return_path import Message, Pong, SwitchoverAck
from whimbrel.wire.skeleton import Element

_log = logging.getLogger("whimbrel")

CONFIGURATION_SECTION: Final = "configuration"
HEAD: Final = "head"  # where it says what comes next

T = TypeVar("T")


class StreamLoader:
    """Loads a stream; one thread, one use.

    `answer` sends a message on the return path (None where there is no way back), `method` is what lanes are to encode
    with (None where there are none). `on_attempt` is told which attempt this is, if the source offers to hand over in
    pairs; without it the offer is not accepted. `on_meet` says whether it is at our witness too.
    After `load` the machine is complete but not started; after any failure the caller calls `rollback`.
    """

    def __init__(
        self,
        machine: BareMachine,
        registry: Registry,
        reader: Reader,
        answer: Callable[[Message], None] | None,
        *,
        on_prepared: Callable[[], None],
        on_attempt: Callable[[Attempt], None] | None = None,
        on_meet: Callable[[], bool] = lambda: False,
        method: Method | None = None,
    ) -> None:
        self._machine, self._registry, self._reader = machine, registry, reader
        self._answer = answer
        self._on_prepared, self._on_attempt, self._on_meet = on_prepared, on_attempt, on_meet
        self._digest = StreamDigest(registry)
        self._attempt: Attempt | None = None
        self._agreed = False  # what has come is what was sent
        self._met: bool | None = None  # at the witness; None as long as nobody has asked
        self.witnessed = False  # the source has let go, and the witness decides
        self._method = method
        self._limits = machine.settings.limits
        self._order = SectionOrder(self._limits.sections)
        self._entries: dict[int, Entry] = {}
        self._ended: set[int] = set()  # registry ids of what has come whole
        self.return_path_open = False
        self._acknowledge = machine.settings.capabilities.switchover_ack
        self.proved = False  # a PING behind the devices was answered: the source switches in two phases
        self.prepared = False

    def load_header(self) -> None:
        """Read the file header. Raises StreamError."""
        self._at("header", self._load_header)

    def load(self) -> None:
        """Read from behind the header up to and including EOF. Raises ProtocolError or ChannelError."""
        self._at(CONFIGURATION_SECTION, self._load_configuration)
        while (element := self._at(HEAD, self._next_element)) is not Element.EOF:
            if element is Element.COMMAND:
                self._at("command", self._obey)
            else:
                self._load_section(skeleton.KIND_OF_ELEMENT[element])
        self._at("end of stream", self._prepare)

    def load_description(self) -> None:
        """Read what may follow EOF: the description, or nothing. Raises StreamError or ChannelError."""
        self._at("description", lambda: self._reader.parse(description.parse_and_skip(self._limits.description)))

    def rollback(self) -> None:
        """Put the machine back as it was before the stream."""
        self._registry.rollback()

    # -------------------------------------------------------------------------------------------- sections

    def _load_header(self) -> None:
        self._reader.parse(skeleton.parse_header())

    def _load_configuration(self) -> None:
        if self._reader.window(1)[0] != Element.CONFIGURATION:
            return
        self._reader.advance(1)
        config = self._reader.parse(skeleton.parse_configuration())
        if config.machine != self._machine.name:
            raise IncompatibleError(f"the source is a machine {config.machine!r}, this one is {self._machine.name!r}")
        capabilities = check_announced(config.capabilities, self._method)
        if capabilities:
            raise IncompatibleError(
                f"the source has capabilities on that this machine has not: {', '.join(capabilities)}"
            )
        if config.uuid is not None:
            self._check_uuid(UUID(bytes=config.uuid))

    def _check_uuid(self, uuid: UUID) -> None:
        if self._machine.uuid is None:
            _log.warning("the source has UUID %s and this machine has none: not compared", uuid)
        elif uuid != self._machine.uuid:
            raise IncompatibleError(f"the source has UUID {uuid}, this machine has {self._machine.uuid}")

    def _load_section(self, kind: SectionKind) -> None:
        header = self._at(HEAD, lambda: self._load_head(kind))
        self._at(f"{header.idstr!r} (id {header.section_id})", lambda: self._load_body(kind, header))

    def _next_element(self) -> Element:
        return self._reader.parse(skeleton.parse_element())

    def _load_head(self, kind: SectionKind) -> skeleton.SectionHeader:
        return self._order.accept(kind, self._reader.parse(skeleton.parse_section_header(kind)))

    def _load_body(self, kind: SectionKind, header: skeleton.SectionHeader) -> None:
        if self.prepared:
            raise StreamError("a section came behind the PING that asked whether everything is here")
        if kind in (SectionKind.START, SectionKind.FULL):
            self._entries[header.section_id] = self._find(header)
        elif self._acknowledge:
            self._acknowledge_switchover()
        entry = self._entries[header.section_id]
        reader: StreamReader = self._reader
        if kind is SectionKind.FULL:
            reader = TappedReader(reader, self._digest.devices)
        entry.handler.load(reader, kind, header.version_id)
        self._reader.parse(skeleton.parse_section_footer(header.section_id))
        if kind in (SectionKind.END, SectionKind.FULL):
            self._ended.add(entry.section_id)

    def _find(self, header: skeleton.SectionHeader) -> Entry:
        entry = self._registry.find(header.idstr, header.instance_id)
        if entry is None:
            there = ", ".join(f"{name!r}" for name in self._registry.names())
            raise IncompatibleError(
                f"this machine has no {header.idstr!r} with instance id {header.instance_id}", hint=f"it has {there}"
            )
        if entry in self._entries.values():
            raise StreamError(f"section {header.idstr!r} with instance id {header.instance_id} came twice")
        if not 1 <= header.version_id <= entry.handler.version_id:
            raise IncompatibleError(
                f"the source's {header.idstr!r} has version {header.version_id}, "
                f"this machine knows up to {entry.handler.version_id}"
            )
        return entry

    # -------------------------------------------------------------------------------------------- commands

    def _obey(self) -> None:
        at = self._reader.offset - 1  # where its type byte is
        command: AnyCommand = self._reader.parse(commands.parse_command())
        match command:
            case Ping():
                self._pong(command)
            case Attempt():
                self._begin(command)
            case Digest():
                self._compare(command, at)
            case _:
                self._open_return_path()

    def _open_return_path(self) -> None:
        if self._answer is None:
            raise StreamError("the source wants a return path, and this transport has no way back")
        if self.return_path_open:
            raise StreamError("the source opens the return path twice")
        self.return_path_open = True

    def _pong(self, ping: Ping) -> None:
        if self._answer is None or not self.return_path_open:
            raise StreamError("a PING came without an open return path")
        if ping.value == handover.OFFER and self._on_attempt is not None:
            self._answer(Pong(handover.ACCEPT))
        elif ping.value == handover.MEET and self._attempt is not None and not self._devices_seen():
            if self._met is not None:
                raise StreamError("the source asks twice for our witness")
            self._met = self._on_meet()
            if self._met:
                self._answer(Pong(handover.MET))
        elif self._devices_seen() and not self.prepared:
            if self._attempt is not None and not self._agreed:
                raise StreamError("the source asks for the proof without having said what it has sent")
            self.witnessed = ping.value == handover.WITNESSED
            if self.witnessed and not self._met:
                raise StreamError("the source leaves it to a witness at which we have not met")
            self.proved = True
            self._prepare()
        self._answer(Pong(ping.value))

    def _begin(self, attempt: Attempt) -> None:
        if self._on_attempt is None or not self.return_path_open:
            raise StreamError("the source says which attempt this is, and nobody has accepted its offer")
        if self._attempt is not None or self.prepared or self._devices_seen():
            raise StreamError("the source says too late, or twice, which attempt this is")
        self._attempt = attempt
        self._on_attempt(attempt)

    def _compare(self, digest: Digest, at: int) -> None:
        if self._attempt is None or self._agreed or not self._devices_seen():
            raise StreamError("the source says what it has sent at the wrong time")
        self._digest.compare(digest, at)
        self._agreed = True

    def _acknowledge_switchover(self) -> None:
        if self._answer is not None and self.return_path_open:
            self._answer(SwitchoverAck())
        self._acknowledge = False

    def _devices_seen(self) -> bool:
        return any(entry.section_id in self._ended for entry in self._registry.full)

    # --------------------------------------------------------------------------------------------- the end

    def _prepare(self) -> None:
        """Everything must be here; put it into the machine. Once."""
        if self.prepared:
            return
        missing = [
            entry.handler.idstr
            for entry in self._registry.entries
            if entry.section_id not in self._ended
            and not (entry.handler.optional and entry not in self._entries.values())
        ]
        if missing:
            raise IncompatibleError(f"the stream lacks what this machine has: {', '.join(missing)}")
        for entry in self._registry.entries:
            self._at(f"{entry.handler.idstr!r}", entry.handler.commit)
        self.prepared = True
        self._on_prepared()

    def _at(self, section: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except MigrationError as exc:
            raise exc.at(Place(section=section, offset=self._reader.offset)) from exc.__cause__
