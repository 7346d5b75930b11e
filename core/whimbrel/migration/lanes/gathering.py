"""Tells the connections of one source apart as they come: the main channel and its lanes, in any order.

Each connection says what it is by its first four bytes: `QEVM` or the lanes' magic, and a lane then whose it is and
which (wire format, sections 5.1 and 5.2). They are read side by side, a thread for each, so that somebody who connects
and says nothing keeps nobody waiting; he is hung up on at the end.
"""

from __future__ import annotations

import threading
from typing import Final, Self

import attrs

from whimbrel.abc import Channel, Listener, Patience
from whimbrel.errors import ChannelClosed, ChannelError, ConnectError, MigrationError, Place, StreamError
from whimbrel.migration.attempt import unexpected
from whimbrel.migration.lanes.bundle import Bundle
from whimbrel.migration.lanes.method import Method
from whimbrel.migration.quietly import quietly
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.wire import multifd, skeleton
from whimbrel.wire.primitives import U32

HEAD: Final = 4  # bytes that tell what a connection is
STRANGERS: Final = 16  # connections that may say nothing meanwhile


@attrs.frozen(eq=False)
class Gathered:
    """All connections of one source. `head` are the bytes of `main` that were read already.

    `method` is what the lanes are to encode with; None if there are none.
    """

    main: Channel
    head: bytes = b""
    lanes: tuple[Channel, ...] = ()
    method: Method | None = None

    def bundle(self) -> Bundle:
        """All of them, to be closed as one."""
        bundle = Bundle(self.main)
        for lane in self.lanes:
            bundle.add(lane)
        return bundle


@attrs.frozen
class Expected:
    """How many lanes a source will have, and what they encode with."""

    lanes: int
    method: Method

    @classmethod
    def of(cls, settings: Settings, plugins: PluginManager) -> Self | None:
        """As these settings say, None without multifd. Raises ConfigError for a method that there is not."""
        if not settings.capabilities.multifd:
            return None
        parameters = settings.parameters
        return cls(parameters.multifd_channels, Method.of(parameters, plugins, settings.limits))


def accept(
    listener: Listener, patience: Patience, expected: Expected | None, *, uuid: bytes | None, seconds: float
) -> Gathered:
    """Wait for one source, as `Gathering` does, and close the listener; without lanes the first that connects is it.

    Raises as `Gathering.run` and `Listener.accept`.
    """
    if expected is not None:
        gathering = Gathering(listener, patience, lanes=expected.lanes, uuid=uuid, seconds=seconds)
        return attrs.evolve(gathering.run(), method=expected.method)
    try:
        return Gathered(listener.accept(patience))
    finally:
        quietly(listener.close, "closing the listener")


class Gathering:
    """One wait for one source with `lanes` lanes; `run` on one thread, and once.

    `uuid` is what the lanes must say (16 bytes), or None if any will do that is the same for all. From the first
    connection on the others have `seconds` to come. The listener is closed at the end.
    """

    def __init__(
        self, listener: Listener, patience: Patience, *, lanes: int, uuid: bytes | None, seconds: float
    ) -> None:
        self._listener, self._patience = listener, patience
        self._uuid, self._seconds = uuid, seconds
        self._lanes: list[Channel | None] = [None] * lanes
        self._main: tuple[Channel, bytes] | None = None
        self._deciding = threading.Lock()
        self._failure: MigrationError | None = None
        self._over = False
        self._came: list[Channel] = []
        self._readers: list[threading.Thread] = []

    def run(self) -> Gathered:
        """Wait for all of them. Raises StreamError, ChannelError and MigrationCancelled; all are closed then."""
        try:
            self._accept()
        except ChannelClosed:
            if not self._over:
                raise
        finally:
            self._finish()
        if self._failure is not None:
            raise self._failure
        assert self._main is not None, "gathered without a main channel"
        main, head = self._main
        return Gathered(main, head, tuple(lane for lane in self._lanes if lane is not None))

    def _accept(self) -> None:
        patience = self._patience
        while not self._over:
            try:
                channel = self._listener.accept(patience)
            except ConnectError as exc:
                raise (self._too_few() if self._came and patience.remaining() <= 0 else exc) from exc
            self._came.append(channel)
            if len(self._came) == 1:
                patience = Patience(self._seconds, self._patience.cancelled)
            if len(self._came) > len(self._lanes) + 1 + STRANGERS:
                raise StreamError(f"{len(self._came)} connections came, expected {len(self._lanes) + 1}")
            reader = threading.Thread(target=self._read, args=(channel,), name="whimbrel-gathering", daemon=True)
            self._readers.append(reader)
            reader.start()

    def _finish(self) -> None:
        """Hang up on whoever is not wanted, and on all after a failure."""
        with self._deciding:
            whole = self._over and self._failure is None
            self._over = True
            wanted = {id(self._main[0]), *map(id, self._lanes)} if whole and self._main else set()
        quietly(self._listener.close, "closing the listener")
        for channel in self._came:
            if id(channel) not in wanted:
                quietly(channel.close, "closing a connection")
        for reader in self._readers:
            reader.join()

    def _too_few(self) -> StreamError:
        with self._deciding:
            lanes, main = sum(lane is not None for lane in self._lanes), self._main is not None
        if not main and not lanes:
            return StreamError(
                f"the peer sent no stream header within {self._seconds:g} s",
                hint="[limits] header-timeout says how long to wait",
            )
        there = f"{lanes} of {len(self._lanes)} lanes have come within {self._seconds:g} s"
        return StreamError(
            there if main else f"{there}, and no main channel",
            hint="both ends need capability multifd on and the same multifd-channels",
        )

    # ------------------------------------------------------------------------------------- a connection's thread

    def _read(self, channel: Channel) -> None:
        try:
            self._sort(channel, _take(channel, HEAD))
        except ChannelError:
            # It hung up before it was known what it is; what is missed then will be told by the time.
            quietly(channel.close, "closing a connection")
        except MigrationError as exc:
            self._fail(exc.at(Place(peer=channel.peer)))
        except BaseException as exc:  # noqa: BLE001 - a transport's or our own bug must not leave us waiting
            self._fail(unexpected(exc))

    def _sort(self, channel: Channel, head: bytes) -> None:
        magic = U32.unpack(head)[0]
        if magic == skeleton.MAGIC:
            self._settle(channel, head)
        elif magic == multifd.MAGIC:
            rest = _take(channel, multifd.INIT_SIZE - HEAD)
            self._settle_lane(channel, multifd.parse_init(memoryview(head + rest)))
        else:
            raise StreamError(
                f"a connection begins with {magic:#010x}, expected {skeleton.MAGIC:#010x} ('QEVM') or, for a lane, "
                f"{multifd.MAGIC:#010x}",
                hint="this is not a migration stream",
            )

    def _settle(self, channel: Channel, head: bytes) -> None:
        with self._deciding:
            if self._over:
                return
            if self._main is not None:
                raise StreamError("a second main channel has come")
            self._main = channel, head
            self._conclude()

    def _settle_lane(self, channel: Channel, init: multifd.Init) -> None:
        with self._deciding:
            if self._over:
                return
            if init.number >= len(self._lanes):
                raise StreamError(
                    f"lane {init.number} has come, expected 0 to {len(self._lanes) - 1}",
                    hint="multifd-channels must be the same at both ends",
                )
            if self._lanes[init.number] is not None:
                raise StreamError(f"lane {init.number} has come twice")
            if self._uuid is None:
                self._uuid = init.uuid
            if init.uuid != self._uuid:
                raise StreamError(
                    f"lane {init.number} is of a machine with UUID {init.uuid.hex()}, expected {self._uuid.hex()}",
                    hint="another source may have connected here",
                )
            self._lanes[init.number] = channel
            self._conclude()

    def _conclude(self) -> None:
        if self._main is not None and None not in self._lanes:
            self._refuse_others(self._main[0])
            self._over = True
            self._listener.close()  # which wakes whoever waits there

    def _refuse_others(self, main: Channel) -> None:
        """Raise StreamError unless all of them are one peer's, where it has to show who it is."""
        for number, lane in enumerate(self._lanes):
            if lane is not None and lane.identity != main.identity:
                raise StreamError(
                    f"lane {number} is of another peer than the main channel: it has shown another certificate",
                    hint="another source may have connected here",
                )

    def _fail(self, failure: MigrationError) -> None:
        with self._deciding:
            if self._over:
                return
            self._failure, self._over = failure, True
        self._listener.close()


def _take(channel: Channel, count: int) -> bytes:
    data = memoryview(bytearray(count))
    have = 0
    while have < count:
        came = channel.recv_into(data[have:])
        if came == 0:
            raise ChannelError("it hung up")
        have += came
    return bytes(data)
