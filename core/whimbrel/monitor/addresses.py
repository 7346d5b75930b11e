"""Where a monitor is: `unix:/path` or `tcp:host:port`, for both ends; and addresses as QMP spells them.

A TCP address without a host is 127.0.0.1, at either end: whoever wants to be reached from elsewhere says so, since
who reaches a monitor commands its machine.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Final

import attrs

from whimbrel.errors import ConfigError

__all__ = ["Address", "parse_address", "socket_address"]

LOOPBACK: Final = "127.0.0.1"
LONGEST_PATH: Final = 107  # bytes; sun_path has 108, the last of them a zero
_EXAMPLES: Final = "for example unix:/run/machine.qmp or tcp:127.0.0.1:4444"


@attrs.frozen
class Address:
    """A monitor's address taken apart: a `path`, or a `host` and a `port`."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"tcp:{_joined(self.host, self.port)}"

    def resolved(self) -> tuple[socket.AddressFamily, Any]:
        """The family and address to listen at; of a name the first. Raises OSError."""
        if self.path:
            return socket.AF_UNIX, self.path
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICSERV)
        return found[0][0], found[0][4]

    def connect(self, timeout: float) -> socket.socket:
        """A socket that is connected to it; of a name the first that answers. Raises OSError, leaving nothing behind.

        `timeout` is in seconds, for each address that a name has.
        """
        if not self.path:
            return socket.create_connection((self.host, self.port), timeout)
        fresh = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            fresh.settimeout(timeout)
            fresh.connect(self.path)
        except BaseException:
            fresh.close()
            raise
        return fresh


def parse_address(text: str) -> Address:
    """Read a monitor's address. Raises ConfigError, with examples."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest and "\0" not in rest:
        length = len(os.fsencode(rest))
        if length > LONGEST_PATH:
            raise ConfigError(
                f"the path of a unix socket is {length} bytes long; the system's limit is {LONGEST_PATH}: {rest!r}",
                hint="use a shorter one, perhaps relative to the working directory",
            )
        return Address(path=rest)
    host, port = _split(rest)
    if scheme == "tcp" and port is not None and _can_be_looked_up(host):
        return Address(host=host or LOOPBACK, port=port)
    raise ConfigError(f"{text!r} is no monitor's address: expected unix:PATH or tcp:HOST:PORT", hint=_EXAMPLES)


def socket_address(uri: str) -> dict[str, Any] | None:
    """A migration URI as QMP's SocketAddress (query-migrate); None for one that is no socket's."""
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        return {"type": "unix", "path": rest}
    host, port = _split(rest)
    if scheme != "tcp" or port is None:
        return None
    family = "ipv6" if ":" in host else "ipv4"
    return {"type": "inet", "host": host, "port": str(port), family: True}


def _split(text: str) -> tuple[str, int | None]:
    """Host and port; without a port that can be, None."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        return "", None
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if "\0" in host or (":" in host and not bracketed):
        return "", None
    return host, int(port)


def _can_be_looked_up(host: str) -> bool:
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
