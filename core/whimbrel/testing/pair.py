"""`Pair`: a source and a destination in one process, joined by a link that can be watched and broken.

::

    with Pair(build) as pair:                      # build(settings=…, plugins=…) makes the machine, twice
        pair.source.start()
        pair.faults = Faults(cut_sent=1000)        # for the next connection
        incoming, outgoing = pair.migrate()
        with pytest.raises(MigrationError):
            outgoing.wait(20)
        assert pair.source.run_state == "running"
        assert pair.recorded.sent[:4] == b"QEVM"

The link is the one inside of this process unless another URI is given, such as `tcp:127.0.0.1:0`. What has gone over
the last connection, as the source's end saw it, is in `recorded`; what each side's notifiers were told, in
`source_events` and `destination_events`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from whimbrel.abc import Channel, TransportSpec
from whimbrel.events import Event
from whimbrel.hookspecs import hookimpl
from whimbrel.migration import IncomingMigration, Machine, OutgoingMigration
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.testing.faults import ChannelWrapper, Faults, FaultyChannel, FaultyTransport
from whimbrel.testing.memory import MemoryNetwork
from whimbrel.wire.skeleton import HEADER

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Build", "Pair", "RecordingChannel", "settle"]

Build: TypeAlias = Callable[..., Machine]
"""Makes a machine; called as `build(settings=settings, plugins=plugins)`, once for each side."""

_LINK: Final = "pair-link"
_DRAIN: Final = 20.0  # seconds


class RecordingChannel(ChannelWrapper):
    """Remembers every byte that has gone through it, either way."""

    def __init__(self, inner: Channel) -> None:
        super().__init__(inner)
        self.sent = bytearray()
        self.received = bytearray()

    def recv_into(self, buffer: Buffer) -> int:
        """Receive, and remember what came."""
        view = memoryview(buffer).cast("B")
        count = self.inner.recv_into(view)
        self.received += view[:count]
        return count

    def send(self, data: Buffer) -> None:
        """Send, and remember what went."""
        self.inner.send(data)
        self.sent += memoryview(data).tobytes()


class Pair:
    """Two machines that `build` made, and a link between them. Not for several threads.

    `uri` is where the destination listens; `duplex` counts for `memory:` alone. `settings` are the source's, and the
    destination's as well unless it is given its own; `plugins` are registered for both sides.
    """

    def __init__(
        self,
        build: Build,
        *,
        uri: str = "memory:pair",
        duplex: bool = True,
        settings: Settings | None = None,
        destination_settings: Settings | None = None,
        plugins: Sequence[object] = (),
        handover: str = "auto",
    ) -> None:
        self.uri = uri
        self.handover = handover
        self.faults = Faults()
        self.channel: FaultyChannel | None = None
        self.recorded: RecordingChannel | None = None
        self.source_events: list[Event] = []
        self.destination_events: list[Event] = []
        self._changed = threading.Condition()
        self._scheme = uri.partition(":")[0]
        self._build = build
        self._plugins = (self._link(duplex=duplex), *plugins)
        settings = settings or Settings()
        self._destination_settings = destination_settings or settings.copy()
        self.source = self._make(settings, self.source_events)
        self.destination = self._make(self._destination_settings, self.destination_events)

    def migrate(self, *, start: bool | None = None) -> tuple[IncomingMigration, OutgoingMigration]:
        """Let the destination wait and the source set off; returns both migrations as they run."""
        self.channel = self.recorded = None
        incoming = self.destination.incoming(self.uri, start=start)
        try:
            return incoming, self.source.migrate(incoming.uri, handover=self.handover)
        except BaseException:
            incoming.close()
            raise

    def run(self, *, start: bool | None = None, timeout: float = 60.0) -> tuple[IncomingMigration, OutgoingMigration]:
        """Migrate and wait for both ends, whichever; raises nothing of theirs. TimeoutError if they do not end."""
        incoming, outgoing = self.migrate(start=start)
        self.settle(incoming, outgoing, timeout)
        return incoming, outgoing

    def settle(self, incoming: IncomingMigration, outgoing: OutgoingMigration, timeout: float = 60.0) -> None:
        """Wait for both ends, as `run`; a destination that never saw a stream's header would wait on, and is told."""
        settle(outgoing, timeout)
        recorded = self.recorded
        if outgoing.error is not None and (recorded is None or not _introduced(bytes(recorded.sent[: len(HEADER)]))):
            incoming.cancel()
        settle(incoming, timeout)

    def wait_stalled(self, timeout: float = 60.0) -> FaultyChannel:
        """Wait until the next connection stands still where `faults` say; TimeoutError if it does not."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.channel is not None, timeout) or self.channel is None:
                raise TimeoutError("there is no connection")
        if not self.channel.stalled.wait(timeout):
            raise TimeoutError("the connection does not stand still")
        return self.channel

    def new_source(self) -> Machine:
        """Put the source away and make a fresh one with the same settings."""
        settings = self.source.settings
        self.source.close()
        self.source_events = []
        self.source = self._make(settings, self.source_events)
        return self.source

    def new_destination(self) -> Machine:
        """Put the destination away and make a fresh one with the same settings."""
        self.destination.close()
        self.destination_events = []
        self.destination = self._make(self._destination_settings, self.destination_events)
        return self.destination

    def forget_events(self) -> None:
        """Wait until all that has happened was told, and begin the records anew."""
        for machine, events in ((self.source, self.source_events), (self.destination, self.destination_events)):
            if not machine.notifiers.drain(_DRAIN):
                raise TimeoutError(f"the events of {machine.name!r} were not delivered")
            events.clear()

    def move_on(self) -> Machine:
        """Put the source away and let the destination take its place, with a fresh destination behind it."""
        self.source.close()
        self.source, self.source_events = self.destination, self.destination_events
        self.destination_events = []
        self.destination = self._make(self._destination_settings.copy(), self.destination_events)
        return self.destination

    def close(self) -> None:
        """Close both machines."""
        self.source.close()
        self.destination.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _make(self, settings: Settings, events: list[Event]) -> Machine:
        manager = PluginManager(prefer={**settings.plugins.prefer, self._scheme: _LINK}, active=settings.plugins.active)
        for number, plugin in enumerate(self._plugins):
            manager.register(plugin, name=_LINK if number == 0 else None)
        machine = self._build(settings=settings, plugins=manager)
        machine.notifiers.add(events.append)
        return machine

    def _link(self, *, duplex: bool) -> object:
        if self._scheme == "memory":
            spec = MemoryNetwork(duplex=duplex).spec()
        else:
            spec = PluginManager().transport(self._scheme)
        transport = FaultyTransport(spec.create(), on_connect=self._connected)
        return _LinkPlugin(
            TransportSpec(
                name=spec.name,
                summary=spec.summary,
                create=lambda: transport,
                duplex=spec.duplex,
                several=spec.several,
            )
        )

    def _connected(self, channel: Channel) -> Channel:
        with self._changed:
            self.recorded = RecordingChannel(channel)
            self.channel = FaultyChannel(self.recorded, self.faults)
            self._changed.notify_all()
            return self.channel


class _LinkPlugin:
    def __init__(self, spec: TransportSpec) -> None:
        self._spec = spec

    @hookimpl
    def whimbrel_transports(self) -> Sequence[TransportSpec]:
        """Offer the link under the scheme of the transport inside of it."""
        return [self._spec]


def _introduced(sent: bytes) -> bool:
    """Whether a destination takes this for the beginning of a stream, of whatever version."""
    return len(sent) == len(HEADER) and sent.startswith(HEADER[:4])


def settle(migration: IncomingMigration | OutgoingMigration, timeout: float) -> None:
    """Wait for the end of a migration, whichever; its `error` has the reason. TimeoutError if it does not come."""
    try:
        migration.wait(timeout)
    except TimeoutError:
        raise
    except Exception:
        if migration.error is None:
            raise
