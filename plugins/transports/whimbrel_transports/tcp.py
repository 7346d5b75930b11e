"""`tcp:HOST:PORT`, as QEMU writes it.

HOST is a name, an IPv4 address, or an IPv6 address in [brackets]; every address of a name is tried. Without a host
it is 127.0.0.1, on either side: whoever wants to be reached from elsewhere says so. Port 0 listens on a free one,
which the listener's `uri` tells.
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from whimbrel.abc import Channel, Listener, Patience, Transport, TransportSpec
from whimbrel.errors import ConfigError, ConnectError
from whimbrel.hookspecs import hookimpl
from whimbrel_transports._hosts import look_up_patiently, parse_host_and_port
from whimbrel_transports._sockets import (
    BACKLOG,
    SocketChannel,
    SocketListener,
    connect_socket,
    connecting,
    is_loopback,
    listening,
    tune_tcp,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TcpTransport", "whimbrel_transports"]


@hookimpl
def whimbrel_transports() -> Sequence[TransportSpec]:
    """Offer `tcp:`."""
    return [
        TransportSpec(
            name="tcp",
            summary="a TCP connection, tcp:HOST:PORT",
            create=TcpTransport,
            several=True,
            exposed_at=is_exposed_at,
            host_at=host_of,
        )
    ]


class TcpTransport(Transport):
    """Channels over TCP."""

    def connect(self, address: str, patience: Patience) -> Channel:
        """Connect to `address`. Raises ConfigError, ConnectError and MigrationCancelled, leaving nothing behind.

        A name that is being looked up when the patience ends leaves its thread behind until the resolver gives up.
        """
        host, port = parse_host_and_port(address, "TCP")
        if port == 0:
            raise ConfigError(f"cannot connect to {address!r}: port 0 is for listening on a free one")
        failure = ConnectError(f"Failed to connect to '{address}': it has no address")
        found = _looked_up(host, port, address, patience)
        for family, where in found:
            try:
                connected = connect_socket(family, where, address, patience)
                with connecting(address):
                    channel = _channel(connected, where)
                channel.exposed |= _lead_out(found)
            except ConnectError as error:
                if patience.remaining() <= 0:
                    raise
                failure = error
            else:
                return channel
        raise failure

    def listen(self, address: str) -> Listener:
        """Listen on the first address of a name that can be. Raises ConfigError, ConnectError, leaving nothing."""
        host, port = parse_host_and_port(address, "TCP")
        failure = ConnectError(f"Failed to listen on '{address}': it has no address")
        found = _addresses(host, port, address)
        for family, where in found:
            try:
                with listening(address):
                    listener = _listener(family, where)
                listener.exposed |= _lead_out(found)
            except ConnectError as error:
                failure = error
            else:
                return listener
        raise failure


def is_exposed_at(address: str) -> bool:
    """Whether it is an address that others have a way to; a name has to be looked up first, and is none here."""
    try:
        return not is_loopback(parse_host_and_port(address, "TCP")[0])
    except (ConfigError, ValueError):
        return False


def host_of(address: str) -> str:
    """The host in it; "" for what is no address of TCP."""
    with suppress(ConfigError):
        return parse_host_and_port(address, "TCP")[0]
    return ""


def _listener(family: int, where: object) -> Listener:
    fresh = socket.socket(family, socket.SOCK_STREAM)
    try:
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        fresh.bind(where)  # type: ignore[arg-type] # of the family's own shape
        fresh.listen(BACKLOG)
        return SocketListener(fresh, _uri(fresh.getsockname()), _channel)
    except BaseException:
        fresh.close()
        raise


def _channel(connected: socket.socket, where: object) -> Channel:
    try:
        if connected.getsockname() == connected.getpeername():
            # A port of the range for outgoing connections, on this host, with nobody there, can reach itself.
            raise ConnectionRefusedError("Connection refused")
        tune_tcp(connected)
        return SocketChannel(connected, _uri(where))
    except BaseException:
        connected.close()
        raise


def _lead_out(found: Sequence[tuple[int, Any]]) -> bool:
    """Whether any of a name's addresses is not this host's alone: which of them is taken is a matter of luck."""
    return not all(is_loopback(where[0]) for _, where in found)


def _uri(where: Any) -> str:
    host, port = where[:2]
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def _addresses(host: str, port: int, address: str) -> list[tuple[int, object]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICSERV)
    except UnicodeError as error:
        raise ConfigError(f"the TCP address {address!r} has a host that cannot be: {error}") from error
    except OSError as error:
        raise ConnectError(f"address resolution failed for {address}: {error.strerror}") from error
    return [(family, where) for family, _, _, _, where in found]


def _looked_up(host: str, port: int, address: str, patience: Patience) -> list[tuple[int, object]]:
    """The addresses of a host; only a name has to be asked about."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return _addresses(host, port, address)
    return look_up_patiently(lambda: _addresses(host, port, address), host, patience)
