"""Tells the connections of one source from those of others, and apart: the main channel and its lanes, in any order.

Each connection says what it is by its first four bytes: `QEVM`, the lanes' magic (a lane then whose it is and which),
or that of a word about ownership (wire format, sections 1.1, 5.1, 5.2 and 11.1). The rules:

* **They are read side by side**, a thread for each, so that somebody who connects and says nothing keeps nobody
  waiting; he is hung up on when his time is over, and so is whoever connects while there are too many of his kind.
* **A stranger ends nothing.** Whoever hangs up, fails in TLS or says something else is hung up on, with a line in the
  log, and the waiting goes on.
* **A source is believed to be there when a stream's header came.** From then on its lanes have their time, and if they
  do not come, or more than are expected do, that is an error of that source's, which ends the wait. A second source is
  a stranger.
* **Lanes are one source's** if they say the same UUID and token and have shown the certificate of the main channel.
  Without TLS a UUID is no secret, and a token is: whether it is that of the main channel's attempt shows when that says
  which attempt it is, before the guest stops.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Final, Self, TypeAlias

import attrs

from whimbrel.abc import Channel, Listener, Patience
from whimbrel.errors import ChannelClosed, ChannelError, MigrationError, StreamError
from whimbrel.migration.attempt import unexpected
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.lanes.bundle import Bundle
from whimbrel.migration.lanes.method import Method
from whimbrel.migration.quietly import quietly
from whimbrel.plugins import PluginManager
from whimbrel.settings import Limits, Settings
from whimbrel.wire import handover, multifd, skeleton
from whimbrel.wire.primitives import U32

_log = logging.getLogger("whimbrel")

MAGIC_SIZE: Final = 4  # bytes that tell what a connection is
_TLS_HANDSHAKE: Final = 0x1603  # how each TLS connection begins
_OTHER_PEER: Final = "it is a lane of another peer than the main channel: it has shown another certificate"

OnWord: TypeAlias = Callable[[Channel, bytes], object]
"""Takes over a connection that began with a word about ownership, of which it gets the bytes; on its own thread."""

_Owner: TypeAlias = tuple[bytes, bytes, bytes]  # whose a lane is: the certificate it has shown, UUID and token


@attrs.frozen(eq=False)
class Gathered:
    """All connections of one source. `head` are the bytes of `main` that were read already.

    `method` is what the lanes are to encode with, None if there are none; `token` what all of them have said, which is
    empty if they said none.
    """

    main: Channel
    head: bytes = b""
    lanes: tuple[Channel, ...] = ()
    token: bytes = b""
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
    listener: Listener,
    patience: Patience,
    expected: Expected | None,
    *,
    uuid: bytes | None,
    limits: Limits,
    several: bool,
    on_word: OnWord | None = None,
) -> Gathered:
    """Wait for one source, as `Gathering` does, and close the listener.

    Where the listener gives but one connection (not `several`), that is it. Raises as `Gathering.run` and
    `Listener.accept`.
    """
    if expected is None and not several:
        try:
            return Gathered(listener.accept(patience))
        finally:
            quietly(listener.close, "closing the listener")
    gathering = Gathering(
        listener,
        patience,
        lanes=0 if expected is None else expected.lanes,
        uuid=uuid,
        seconds=limits.header_timeout,
        strangers=limits.strangers,
        on_word=on_word,
    )
    return attrs.evolve(gathering.run(), method=None if expected is None else expected.method)


class Gathering:
    """One wait for one source with `lanes` lanes, which may be none; `run` on one thread, and once.

    `uuid` is what the lanes must say (16 bytes), or None if any will do that is the same for all. A connection has
    `seconds` to say what it is, a lane as long to see its main channel come, and from the main channel on the lanes
    have as long. Beside the source's own there are at most `strangers` connections at a time. `on_word` is given what
    begins with a word about ownership, and without it that is a stranger's. The listener is closed at the end.
    """

    def __init__(
        self,
        listener: Listener,
        patience: Patience,
        *,
        lanes: int,
        uuid: bytes | None,
        seconds: float,
        strangers: int,
        on_word: OnWord | None = None,
    ) -> None:
        self._listener, self._patience = listener, patience
        self._count, self._uuid, self._seconds, self._on_word = lanes, uuid, seconds, on_word
        self._room = 1 + lanes + strangers
        self._deciding = threading.Lock()
        self._main: tuple[Channel, bytes] | None = None
        self._lanes: dict[_Owner, dict[int, Channel]] = defaultdict(dict)
        self._whole: tuple[Channel, ...] | None = None  # the lanes, once all of them are here
        self._token = b""  # what they have said
        self._failure: MigrationError | None = None
        self._refused_lane = ""  # why the last lane was hung up on that was
        self._readers: dict[Channel, threading.Thread] = {}  # of each connection that is held
        self._words = 0  # connections that `on_word` has
        self._over = threading.Event()

    def run(self) -> Gathered:
        """Wait for all of them. Raises StreamError, ChannelError and MigrationCancelled; all are closed then."""
        try:
            self._accept()
        except ChannelClosed:
            if not self._over.is_set():
                raise
        finally:
            self._finish()
        if self._failure is not None:
            raise self._failure
        assert self._main is not None, "gathered without a main channel"
        assert self._whole is not None, "gathered without the lanes"
        main, head = self._main
        return Gathered(main, head, self._whole, self._token)

    def _accept(self) -> None:
        while not self._over.is_set():
            channel = self._listener.accept(self._patience)
            reader = threading.Thread(target=self._read, args=(channel,), name="whimbrel-gathering", daemon=True)
            with self._deciding:
                full = len(self._readers) + self._words >= self._room
                if not full:
                    self._readers[channel] = reader
            if full:
                _log.warning("%s was hung up on: %d connections are here that may be the source's", channel.peer,
                             self._room)  # fmt: skip
                quietly(channel.close, "closing a connection")
            else:
                reader.start()

    def _finish(self) -> None:
        """Hang up on whoever is not wanted, and on all after a failure."""
        with self._deciding:
            self._over.set()
            readers = dict(self._readers)
            wanted: set[Channel] = set()
            if self._whole is not None and self._main is not None:
                wanted = {self._main[0], *self._whole}
        quietly(self._listener.close, "closing the listener")
        for channel in readers:
            if channel not in wanted:
                quietly(channel.close, "closing a connection")
        for reader in readers.values():
            reader.join()

    # ------------------------------------------------------------------------------------- a connection's thread

    def _read(self, channel: Channel) -> None:
        try:
            self._sort(channel)
        except MigrationError as exc:
            self._drop(channel, exc)
        except BaseException as exc:  # noqa: BLE001 - a transport's or our own bug is that connection's end, and no more
            self._drop(channel, unexpected(exc))

    def _sort(self, channel: Channel) -> None:
        """Hear what it is, and hold it until it is wanted or its time is over."""
        magic, head = self._introduced(channel)
        if magic == handover.MAGIC:
            self._hand_over(channel, head)
            return
        if magic == skeleton.MAGIC:
            self._settle(channel, head)
        else:
            try:
                self._settle_lane(channel, multifd.parse_init(memoryview(head)))
            except StreamError as exc:
                self._refused_lane = exc.message
                raise
        if not self._over.wait(self._seconds):
            self._wait_no_longer(channel)

    def _introduced(self, channel: Channel) -> tuple[int, bytes]:
        """What it says that it is, with the bytes that have said so. Raises StreamError and ChannelError."""
        with Deadline(self._seconds, channel) as deadline:
            try:
                head = _take(channel, MAGIC_SIZE)
                magic = U32.unpack(head)[0]
                return magic, head + _take(channel, self._size(magic) - MAGIC_SIZE)
            except ChannelError as exc:
                if not deadline.passed:
                    raise
                raise StreamError(
                    f"the peer sent no stream header within {self._seconds:g} s",
                    hint="[limits] header-timeout says how long to wait",
                ) from exc

    def _size(self, magic: int) -> int:
        """How many bytes what begins so has to say before it is known. Raises StreamError."""
        if magic == skeleton.MAGIC:
            return len(skeleton.HEADER)
        if magic == multifd.MAGIC and self._count:
            return multifd.INIT_SIZE
        if magic == handover.MAGIC and self._on_word is not None:
            return handover.SIZE
        if magic == multifd.MAGIC:
            raise StreamError("it is a lane of multifd", hint="switch the capability multifd on here too")
        raise StreamError(
            f"it begins with {magic:#010x}, expected {skeleton.MAGIC:#010x} ('QEVM')"
            + (f" or, for a lane, {multifd.MAGIC:#010x}" if self._count else ""),
            hint="it speaks TLS: both ends need tls-creds"
            if magic >> 16 == _TLS_HANDSHAKE
            else "this is not a migration stream",
        )

    def _hand_over(self, channel: Channel, word: bytes) -> None:
        assert self._on_word is not None, "heard a word for nobody"
        with self._deciding:
            if self._readers.pop(channel, None) is None or self._over.is_set():
                quietly(channel.close, "closing a connection")
                return
            self._words += 1
        try:
            self._on_word(channel, word)
        except BaseException as exc:  # noqa: BLE001 - as in `_read`
            _log.warning("a word about ownership from %s came to nothing: %s", channel.peer, exc)
            quietly(channel.close, "closing a connection")
        finally:
            with self._deciding:
                self._words -= 1

    def _settle(self, channel: Channel, head: bytes) -> None:
        with self._deciding:
            if self._over.is_set():
                return
            if self._main is not None:
                raise StreamError("another source has come before it")
            self._main = channel, head
            self._conclude()
            others = [] if self._over.is_set() else self._forget(lambda owner: owner[0] != channel.identity)
        for lane in others:
            self._drop(lane, StreamError(_OTHER_PEER))

    def _settle_lane(self, channel: Channel, init: multifd.Init) -> None:
        with self._deciding:
            if self._over.is_set():
                return
            if self._uuid is not None and init.uuid != self._uuid:
                raise StreamError(
                    f"lane {init.number} is of a machine with UUID {init.uuid.hex()}, expected {self._uuid.hex()}",
                    hint="another source may have connected here",
                )
            if self._main is not None and channel.identity != self._main[0].identity:
                raise StreamError(_OTHER_PEER)
            lanes = self._lanes[channel.identity, init.uuid, init.token]
            if init.number in lanes:
                raise StreamError(f"lane {init.number} has come twice")
            lanes[init.number] = channel
            self._conclude()

    def _conclude(self) -> None:
        """End the wait if all of one source's are here. The caller holds `_deciding`."""
        if self._main is None:
            return
        identity = self._main[0].identity
        of_source = [(owner[2], lanes) for owner, lanes in self._lanes.items() if owner[0] == identity]
        for token, lanes in of_source if self._count else [(b"", {})]:
            if (highest := max(lanes, default=0)) > max(self._count - 1, 0):
                # A QEMU whose lane is hung up on may stand still for good, so this must not go on with the others.
                self._failure = StreamError(
                    f"lane {highest} has come, expected 0 to {self._count - 1}",
                    hint="multifd-channels must be the same at both ends",
                )
                self._end()
                return
            if len(lanes) == self._count:
                self._whole, self._token = tuple(lanes[number] for number in range(self._count)), token
                self._end()
                return

    def _wait_no_longer(self, channel: Channel) -> None:
        """Its time is over, and it is not known to be wanted."""
        with self._deciding:
            if self._over.is_set():
                return
            if self._main is not None:
                if channel is self._main[0]:
                    self._failure = self._too_few()
                    self._end()
                return  # a lane goes with the main channel
        raise StreamError(
            f"it is a lane, and no main channel has come within {self._seconds:g} s",
            hint="[limits] header-timeout says how long to wait",
        )

    def _too_few(self) -> StreamError:
        most = max(map(len, self._lanes.values()), default=0)
        there = f"{most} of {self._count} lanes have come within {self._seconds:g} s"
        return StreamError(
            f"{there}; another was hung up on: {self._refused_lane}" if self._refused_lane else there,
            hint="both ends need capability multifd on and the same multifd-channels",
        )

    def _forget(self, others: Callable[[_Owner], bool]) -> list[Channel]:
        """Take the lanes of owners that are `others` out. The caller holds `_deciding`."""
        owners = [owner for owner in self._lanes if others(owner)]
        return [lane for owner in owners for lane in self._lanes.pop(owner).values()]

    def _end(self) -> None:
        """Wake whoever waits. The caller holds `_deciding`."""
        self._over.set()
        quietly(self._listener.close, "closing the listener")

    def _drop(self, channel: Channel, reason: MigrationError) -> None:
        """Hang up on one that is not the source's, or cannot be told from such."""
        with self._deciding:
            if self._readers.pop(channel, None) is None or self._over.is_set():
                quietly(channel.close, "closing a connection")
                return
            for lanes in self._lanes.values():
                for number in [number for number, lane in lanes.items() if lane is channel]:
                    del lanes[number]
            self._lanes = defaultdict(dict, {owner: lanes for owner, lanes in self._lanes.items() if lanes})
        _log.warning("%s was hung up on, and the source is waited for: %s", channel.peer, reason)
        quietly(channel.close, "closing a connection")


def _take(channel: Channel, count: int) -> bytes:
    data = memoryview(bytearray(count))
    have = 0
    while have < count:
        came = channel.recv_into(data[have:])
        if came == 0:
            raise ChannelError("it hung up before it said what it is")
        have += came
    return bytes(data)
