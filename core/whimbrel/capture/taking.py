"""Takes one machine out of a channel or a file: RAM into blocks, devices as bytes, and the source's last word.

Whatever fails before the end leaves nothing here, and tells a source that listens to go on (SHUT 1). A source that
listens is told that all is well (SHUT 0, or the PONG of its proof) only after `keep` has returned: what `keep` has
stored by then is stored for good, or the source goes on. If the link breaks while it is being told, or it does not
hang up then, nobody here can know what the source does; the machine is kept then (`CaptureUndecided`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from os import PathLike
from typing import Final, Protocol, runtime_checkable

from whimbrel.abc import Channel, IterableHandler, Listener, Patience, SaveVMHandler, SectionKind
from whimbrel.capture.images import Images
from whimbrel.capture.machine import UNNAMED, CapturedMachine
from whimbrel.capture.tail import Tail
from whimbrel.capture.walk import BLOCK, Body, Walk
from whimbrel.errors import (
    ChannelError,
    ChannelLost,
    HandoverUndecided,
    IncompatibleError,
    MigrationCancelled,
    MigrationError,
    Place,
    StreamError,
    WhimbrelError,
)
from whimbrel.migration.answers import LINGER, answerer, refuse
from whimbrel.migration.attempt import unexpected
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.handover import last_word_timeout
from whimbrel.migration.lanes import Arriving, Expected, Gathered, accept
from whimbrel.migration.machine import manager_for
from whimbrel.migration.quietly import quietly
from whimbrel.migration.uri import resolve
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.stream import Reader, Replay
from whimbrel.units import format_size
from whimbrel.wire import ram as wire
from whimbrel.wire.description import Description
from whimbrel.wire.form import Form
from whimbrel.wire.primitives import parse_u64
from whimbrel.wire.return_path import Message, Shut

_log = logging.getLogger("whimbrel")

FOR_EVER: Final = float("inf")
LISTED_MAX: Final = 1 << 56  # bytes; nothing is mapped before the sum is compared with what may be
ORDER: Final = last_word_timeout(0.0)  # seconds to wait for the last word of a source that may have let go
IGNORE_SHARED: Final = "x-ignore-shared"


def half_of_ram() -> int:
    """Half of the host's RAM, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def file_uri(path: str | PathLike[str]) -> str:
    """The URI of a file."""
    return f"file:{os.fspath(path)}"


def take(
    source: str | PathLike[str] | Channel | Listener,
    *,
    drives: Mapping[str, str | PathLike[str]],
    create: bool,
    max_ram: int | None,
    settings: Settings | None,
    plugins: PluginManager | None,
) -> CapturedMachine:
    """What `CapturedMachine.load` does."""
    settings = settings if settings is not None else Settings()
    plugins = plugins if plugins is not None else manager_for(settings)
    images = Images(drives, create=create, settings=settings, plugins=plugins)
    try:
        gathered = _gather(source, settings, plugins)
        machine = Capture(gathered, settings=settings, plugins=plugins, max_ram=max_ram, images=images).run()
    except BaseException:
        images.give_up()
        raise
    finally:
        images.close()
    for name, path in drives.items():
        machine.drives.add(name, path)
    return machine


def _gather(source: str | PathLike[str] | Channel | Listener, settings: Settings, plugins: PluginManager) -> Gathered:
    if isinstance(source, Listener):
        return wait_for(source, Patience(FOR_EVER), settings, plugins)
    if isinstance(source, Channel):
        return Gathered(source)
    destination = resolve(file_uri(source), plugins)
    listener = destination.spec.create().listen(destination.address)
    patience = Patience(settings.limits.connect_timeout)
    return accept(listener, patience, None, uuid=None, limits=settings.limits, several=False)


def wait_for(listener: Listener, patience: Patience, settings: Settings, plugins: PluginManager) -> Gathered:
    """Wait for one source at `listener`, with all of its lanes if multifd is on. Raises as `lanes.accept`."""
    expected = Expected.of(settings, plugins)
    # Which machine it is says the main channel, which nobody reads yet.
    return accept(listener, patience, expected, uuid=None, limits=settings.limits, several=False)


@runtime_checkable
class CountsPages(Protocol):
    """A handler of RAM that can tell how many pages of a block came; an ability, declared by having it."""

    def pages_come(self, name: str) -> int:
        """How many pages of block `name` came so far."""


def _find_shared(machine: CapturedMachine, handler: SaveVMHandler) -> None:
    """Under x-ignore-shared every page of a block comes at least once, or none does: both ends share it then."""
    if isinstance(handler, CountsPages):
        for block in machine.ram:
            block.shared = block.guest_address is not None and handler.pages_come(block.name) == 0


class CaptureUndecided(HandoverUndecided):
    """Everything came, and the source's last word did not: it may have let go of its machine, or go on with it.

    `machine` is the machine, whole; it is the catcher's to close.
    """

    def __init__(self, message: str, *, machine: CapturedMachine, place: Place | None = None) -> None:
        super().__init__(
            message,
            hint="ask the source: if it runs on, what was taken here is a copy from its past and must not be run",
            place=place,
        )
        self.machine = machine


class Capture:
    """The taking of one machine; one use.

    `keep` is called once with the machine, when all of it is here and before the source is told so; with a source that
    switches in two phases the description comes only after that. Drives go into `images`, which are the caller's to
    close; without any a stream that brings drives is refused, before anything is written. `cancel` and `received` from
    any thread.
    """

    def __init__(
        self,
        source: Channel | Gathered,
        *,
        settings: Settings,
        plugins: PluginManager,
        max_ram: int | None = None,
        images: Images | None = None,
        keep: Callable[[CapturedMachine], object] = lambda _: None,
    ) -> None:
        self._settings, self._plugins = settings, plugins
        self._max_ram = half_of_ram() if max_ram is None else max_ram
        self._keep = keep
        self._images = images if images is not None and len(images) else None
        gathered = source if isinstance(source, Gathered) else Gathered(source)
        channel = gathered.bundle()
        answer = answerer(channel) if channel.duplex else None
        self._walk = Walk(
            channel,
            settings.limits,
            answer=answer,
            prove=self._proof,
            lanes=gathered.method,
            drives=self._images is not None,
        )
        self._channel = self._walk.channel
        self._channel.give_back(gathered.head)
        self._lanes: Arriving | None = None
        if gathered.method is not None:
            self._lanes = Arriving(gathered.lanes, gathered.method, on_failure=partial(self._lane_failed, answer))
        self._handler: SaveVMHandler | None = None
        self._handler_finished = False
        self._deciding = threading.Lock()  # a cancel and the word that all is well exclude each other
        self._cancelled = threading.Event()
        self._committed = False  # the source is told, or about to be, and may let go
        self._order: Deadline | None = None  # by which the source must say that it let go
        self._refused: BaseException | None = None  # what `keep` raised
        self.machine: CapturedMachine | None = None
        self.told = False
        """Whether the source listened, and was told that all is well."""

    @property
    def heard(self) -> bool:
        """Whether the source listens: it has opened a return path, and lets go only once it was told."""
        return self._channel.duplex and self._walk.return_path_open

    @property
    def received(self) -> int:
        """Bytes of the stream so far."""
        return self._walk.reader.offset

    def cancel(self) -> None:
        """Give it up: a source that listens goes on. Returns at once.

        Too late once the source is being told that all is well; one that asked for a proof is not waited for then, and
        what it does is undecided.
        """
        with self._deciding:
            if self._committed and not self._walk.proved:
                return
            self._cancelled.set()
        self._channel.close()

    def run(self) -> CapturedMachine:
        """Take the machine, on this thread. Raises as `CapturedMachine.load` does, and MigrationCancelled.

        What `keep` raises is raised again.
        """
        try:
            machine = self._take()
            self._say_that_all_is_well()
        except BaseException as exc:
            self._give_up(exc)
            judged = self._judged(exc)
            if judged is exc:
                raise
            raise judged from exc
        finally:
            if self._order is not None:
                self._order.lift()
            quietly(self._channel.close, "closing the channel")
            self._channel.rest()
            if self._lanes is not None:
                self._lanes.close()
        return machine

    def _lane_failed(self, answer: Callable[[Message], None] | None) -> None:
        """A lane is broken, and whoever reads the stream waits for bytes that need not come: say so, and wake him."""
        if answer is not None:
            with suppress(ChannelError):
                answer(Shut(1))
        quietly(self._channel.close, "closing the channel")

    # -------------------------------------------------------------------------------------------- the stream

    def _take(self) -> CapturedMachine:
        with Deadline(self._settings.limits.header_timeout, self._channel) as deadline:
            try:
                configuration = self._walk.begin()
            except ChannelError as exc:
                if not deadline.passed or self._cancelled.is_set():
                    raise
                raise StreamError(
                    f"the peer sent no stream header within {deadline.seconds:g} s",
                    hint="[limits] header-timeout says how long to wait",
                    place=exc.place,
                ) from exc
        name = configuration.machine if configuration is not None else UNNAMED
        machine = self.machine = CapturedMachine(
            name, Form(configuration), settings=self._settings, plugins=self._plugins
        )
        while (body := self._walk.next_body()) is not None:
            self._load(machine, body)
        tail = self._walk.end
        assert tail is not None, "the walk ended without an end"
        if tail.error is not None:
            raise tail.error
        self._hear_the_end()
        if not self._walk.proved:
            self._complete(machine, tail)
            self._store(machine)
        else:
            machine.complete(tail.sections, self._form(machine, tail.description), guessed=tail.guessed)
        return machine

    def _hear_the_end(self) -> None:
        """What brought a whole stream may have failed all the same: that is told, and no reason to drop a machine
        that its source has let go of.
        """  # fmt: skip
        try:
            if not self._channel.duplex and self._channel.wait(LINGER):
                self._channel.recv_into(bytearray(1))
        except ChannelError as exc:
            if self._cancelled.is_set():
                raise
            _log.warning("the stream came whole, and what brought it failed then: %s", exc)

    def _load(self, machine: CapturedMachine, body: Body) -> None:
        reader = self._walk.reader
        place = Place(section=f"{body.header.idstr!r} (id {body.header.section_id})")
        try:
            if body.header.idstr == BLOCK:
                assert self._images is not None, "the walk refuses drives that nobody wants"
                self._images.load(reader, body.kind, body.header.version_id)
            elif body.kind is SectionKind.START:
                self._begin(machine, body, reader)
            else:
                assert self._handler is not None, "a PART without START"
                self._handler.load(reader, body.kind, body.header.version_id)
        except MigrationError as exc:
            raise exc.at(place).at(Place(offset=reader.offset)) from exc.__cause__

    def _begin(self, machine: CapturedMachine, body: Body, reader: Reader) -> None:
        """Make the blocks that the stream lists, and give the handler their list in its own words."""
        if body.header.version_id != wire.VERSION_ID:
            raise IncompatibleError(f"the RAM section has version {body.header.version_id}, expected {wire.VERSION_ID}")
        configuration = self._walk.configuration
        listed = reader.parse(
            wire.parse_block_list(
                total_limit=LISTED_MAX,
                blocks_limit=self._settings.limits.blocks,
                guest_addresses=configuration is not None and IGNORE_SHARED in configuration.capabilities,
            )
        )
        total = sum(block.size for block in listed)
        if total > self._max_ram:
            raise IncompatibleError(
                f"the machine has {format_size(total)} of RAM, and at most {format_size(self._max_ram)} may be taken",
                hint="max_ram (--max-ram) says how much",
            )
        end = reader.parse(parse_u64())
        flush = b""
        if end == wire.Flag.MULTIFD_FLUSH and self._lanes is not None:
            flush, end = wire.FLUSH_RECORD, reader.parse(parse_u64())
        if end != wire.Flag.EOS:
            raise StreamError(f"behind the list of RAM blocks stands {end:#x}, expected the end of the body (0x10)")
        for block in listed:
            machine.ram.add(block.name, block.size).guest_address = block.guest_address
        self._handler = machine.ram_handler(body.header.idstr)
        if self._lanes is not None:
            if not isinstance(self._handler, IterableHandler):
                raise IncompatibleError(f"the handler of {body.header.idstr!r} knows nothing of lanes")
            self._handler.await_lanes(self._lanes)
        again = Replay(wire.block_list(listed) + flush + wire.EOS_RECORD, peer=self._channel.peer)
        self._handler.load(Reader(again), SectionKind.START, body.header.version_id)

    # --------------------------------------------------------------------------------------------- the end

    def _proof(self, tail: Tail) -> None:
        """The source asks whether everything is here."""
        if tail.error is not None:
            raise tail.error
        assert self.machine is not None, "a proof without a machine"
        self._complete(self.machine, tail)
        self._store(self.machine)
        self._commit()
        # From here on the source may have let go, and nobody runs: its word must come soon.
        self._order = Deadline(ORDER, self._channel).start()

    def _store(self, machine: CapturedMachine) -> None:
        images = self._images
        if self.heard:
            self._channel.hung_up()  # from here on that is noticed
        elif images is not None:  # the source has let go, so they are the only ones
            images.take_over()
            images.settle()
        try:
            self._keep(machine)
            if images is not None and self.heard:
                images.take_over()
        except BaseException as exc:
            self._refused = exc
            raise

    def _commit(self) -> None:
        with self._deciding:
            if self._cancelled.is_set():
                raise MigrationCancelled("cancelled before the source was told that all is well")
            if self._channel.hung_up():
                raise ChannelLost(
                    "the source hung up while its machine was being stored",
                    hint="it goes on there; a whimbrel waits for its [limits] handover-timeout: make it longer than "
                    "storing takes",
                )
            self._committed = True
            if self._images is not None:
                self._images.settle()

    def _complete(self, machine: CapturedMachine, tail: Tail) -> None:
        if self._handler is None:
            raise StreamError("the stream has no RAM", place=Place(offset=self._walk.reader.offset))
        if self._images is not None:
            self._images.complete()
        self._handler.commit()
        _find_shared(machine, self._handler)
        self._handler_finished = True
        self._handler.finish()
        machine.complete(tail.sections, self._form(machine, tail.description), guessed=tail.guessed)
        if tail.behind:
            _log.warning("%d bytes came behind the end of the stream", tail.behind)

    def _form(self, machine: CapturedMachine, description: Description | None) -> Form:
        text = description.text if description is not None else None
        return Form(machine.form().configuration, self._walk.footers, text is not None, text)

    def _say_that_all_is_well(self) -> None:
        """Tell a source that listens, and wait until it has hung up in order: it is through then.

        One that had its proof let go before it said so. Any other does when it hears this word, so its silence may mean
        that it never has.
        """
        if not self.heard:
            return
        if not self._committed:
            self._commit()
        with Deadline(LINGER if self._walk.proved else ORDER, self._channel) as deadline:
            try:
                answerer(self._channel)(Shut(0))
                self._channel.recv_into(bytearray(1))
            except ChannelError as exc:
                if not deadline.passed:
                    raise
                silence = f"the source has not hung up within {deadline.seconds:g} s"
                if not self._walk.proved:
                    raise ChannelLost(silence, place=exc.place) from exc
                _log.warning("%s: %s", silence, exc)
        self.told = True

    def _give_up(self, exc: BaseException) -> None:
        if self._lanes is not None:
            self._lanes.close()  # nothing is put back while they write
        if self._handler is not None and not self._handler_finished:
            quietly(self._handler.rollback, "the rollback of the RAM section")
            quietly(self._handler.finish, "the end of the RAM section")
        if self._images is not None:
            self._images.give_up()  # before the source goes on, which it may do into the same ones
        if self._committed:
            return
        if isinstance(exc, Exception) and not self._cancelled.is_set():
            quietly(partial(refuse, self._channel), "the channel")
        if self.machine is not None:
            quietly(self.machine.close, "closing the machine")

    def _judged(self, exc: BaseException) -> BaseException:
        """What to raise for what went wrong."""
        if not isinstance(exc, Exception):
            return exc
        if self._lanes is not None and self._lanes.failure is not None and isinstance(exc, ChannelError):
            exc = self._lanes.failure
        if exc is self._refused and not (self._cancelled.is_set() and self.heard):
            return exc
        if self._cancelled.is_set() and isinstance(exc, MigrationError) and not self._committed:
            return MigrationCancelled("cancelled; a source that listens goes on")
        if not isinstance(exc, WhimbrelError):
            exc = unexpected(exc)
        if self._committed:
            assert self.machine is not None, "committed without a machine"
            late = self._order is not None and self._order.passed
            reason = f"its word has not come within {ORDER:g} s" if late else exc
            return CaptureUndecided(
                f"the machine is here, and the source has not said that it let go ({reason})",
                machine=self.machine,
                place=getattr(exc, "place", None),
            )
        return exc.at(Place(peer=self._channel.peer)) if isinstance(exc, MigrationError) else exc
