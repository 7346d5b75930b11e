"""The transport `rdma:`: a connection for each direction, agreed on and accepted.

The stream has one each way. A peer that makes the first and not the second within RETURN_PATH seconds, such as a QEMU
whose return-path is off, has no way back.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Final, TypeVar

from whimbrel.abc import Channel, Listener, Patience, Transport
from whimbrel.errors import ChannelClosed, ConfigError, ConnectError, ProtocolError
from whimbrel.verbs import CmListener, ConnectionId, VerbsOffers, VerbsProvider
from whimbrel.wire import rdma as wire
from whimbrel_transports._hosts import parse_host_and_port
from whimbrel_transports._rdma_channel import ArrivingChannel, DepartingChannel
from whimbrel_transports._rdma_link import Link, ReceivingLink, SendingLink
from whimbrel_transports._sockets import is_loopback

PIN_ALL: Final = "rdma-pin-all"
RETURN_PATH: Final = 5.0  # seconds that the second connection may take


_log = logging.getLogger("whimbrel.transports.rdma")

L = TypeVar("L", bound=Link)


class RdmaTransport(Transport):
    """Channels over verbs. With `pin_all` a destination registers all of its memory at once, if both ends want it."""

    def __init__(self, verbs: VerbsOffers, *, pin_all: bool = False) -> None:
        self._verbs, self._pin_all = verbs, pin_all

    def connect(self, address: str, patience: Patience) -> Channel:
        """Connect to `address`, twice. Raises ConfigError, ConnectError, IncompatibleError and MigrationCancelled."""
        host, port = parse_host_and_port(address, "RDMA")
        if port == 0:
            raise ConfigError(f"cannot connect to {address!r}: port 0 is for listening on a free one")
        patience.check(f"connecting to '{address}'")
        provider = self._verbs.provider().create()
        with ExitStack() as undo:
            out, answer = _connected(provider, host, port, SendingLink, self._pin_all, patience, undo)
            pin_all = _agreed(answer, asked=self._pin_all)
            back = _return_path(provider, host, port, self._pin_all, patience, undo)
            undo.pop_all()
        return DepartingChannel(out, back, pin_all=pin_all, exposed=not is_loopback_host(host))

    def listen(self, address: str) -> Listener:
        """Listen on `address`. Raises ConfigError, ConnectError, leaving nothing."""
        host, port = parse_host_and_port(address, "RDMA")
        return _RdmaListener(self._verbs.provider().create().listen(host, port), pin_all=self._pin_all)


class _RdmaListener(Listener):
    """Accepts sources, each with its return path."""

    def __init__(self, listener: CmListener, *, pin_all: bool) -> None:
        self._listener, self._pin_all = listener, pin_all
        host = f"[{listener.host}]" if ":" in listener.host else listener.host
        self.uri = f"rdma:{host}:{listener.port}"
        self.exposed = not is_loopback_host(listener.host)

    def accept(self, patience: Patience) -> Channel:
        """Wait for the next source, as `Listener.accept` says; ChannelClosed once it is closed."""
        with ExitStack() as undo:
            back, pin_all = self._accepted(ReceivingLink, patience, undo)
            back.start()
            try:
                out, _ = self._accepted(SendingLink, Patience(RETURN_PATH, patience.cancelled), undo)
            except ConnectError as exc:
                _log.info("%s has no return path: %s", back.peer, exc)
                out = None
            undo.pop_all()
        return ArrivingChannel(out, back, pin_all=pin_all, exposed=self.exposed)

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def _accepted(self, make: type[L], patience: Patience, undo: ExitStack) -> tuple[L, bool]:
        while True:
            request = self._listener.get_request(patience)
            undo.callback(request.close)
            try:
                pin_all = wire.parse_private_data(request.private_data) and self._pin_all
            except ProtocolError as exc:
                _log.warning("%s: refused %s: %s", self.uri, request.peer, exc)
                request.reject(wire.private_data(pin_all=False))
                continue
            link = make(request)
            undo.callback(link.close)
            request.accept(wire.private_data(pin_all=pin_all), patience)
            return link, pin_all


def _connected(
    provider: VerbsProvider, host: str, port: int, make: type[L], pin_all: bool, patience: Patience, undo: ExitStack
) -> tuple[L, bytes]:
    connection: ConnectionId = provider.resolve(host, port, patience)
    undo.callback(connection.close)
    link = make(connection)
    undo.callback(link.close)
    return link, connection.connect(wire.private_data(pin_all=pin_all), patience)


def _return_path(
    provider: VerbsProvider, host: str, port: int, pin_all: bool, patience: Patience, undo: ExitStack
) -> ReceivingLink | None:
    with ExitStack() as own:
        try:
            back, _ = _connected(
                provider, host, port, ReceivingLink, pin_all, Patience(RETURN_PATH, patience.cancelled), own
            )
        except (ConnectError, ChannelClosed) as exc:
            _log.info("rdma:%s:%d has no return path: %s", host, port, exc)
            return None
        back.start()
        undo.push(own.pop_all())
        return back


def _agreed(answer: bytes, *, asked: bool) -> bool:
    """Whether all memory is pinned: if both ends want it."""
    granted = wire.parse_private_data(answer) and asked
    if asked and not granted:
        _log.warning("the destination does not pin all memory: %s must be on there too", PIN_ALL)
    return granted


def is_loopback_host(host: str) -> bool:
    """A name is not looked up here; one is this host's wherever it is looked up (RFC 6761)."""
    try:
        return is_loopback(host)
    except ValueError:
        return host == "localhost"
