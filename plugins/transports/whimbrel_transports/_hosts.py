"""`HOST:PORT` in an address, and looking a host up without keeping anybody waiting who has been told to stop."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from whimbrel.abc import Patience
from whimbrel.errors import ConfigError
from whimbrel_transports._sockets import SLICE

LOOPBACK: Final = "127.0.0.1"  # where no host is given: whoever wants to be reached from elsewhere says so

_EXPECTED: Final = "expected HOST:PORT, with an IPv6 address in [brackets]"

Found = TypeVar("Found")


def parse_host_and_port(address: str, kind: str) -> tuple[str, int]:
    """The host and the port in an address of `kind` ("TCP"). Raises ConfigError for one that cannot be."""
    what = f"the {kind} address {address!r}"
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ConfigError(f"{what} has the port {port!r}; {_EXPECTED}, and a port from 0 to 65535")
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1:].removesuffix("]"))
        except ValueError as error:
            raise ConfigError(f"{what} has no IPv6 address in its brackets: {error}") from error
        if not host.endswith("]"):
            raise ConfigError(f"{what} has a bracket that does not close; {_EXPECTED}")
        host = host[1:-1]
    elif any(character in host for character in ":[]\0"):
        raise ConfigError(f"{what} has the host {host!r}; {_EXPECTED}")
    return host or LOOPBACK, int(port)


def look_up_patiently(look_up: Callable[[], Found], host: str, patience: Patience) -> Found:
    """What `look_up` finds for `host`; a resolver cannot be interrupted, so it has a thread to be slow on.

    Raises what it raises, MigrationCancelled, and ConnectError when the patience is over.
    """
    answers: list[Found] = []
    failures: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(look_up())
        except Exception as error:  # noqa: BLE001 - raised by the thread that waits
            failures.append(error)

    thread = threading.Thread(target=ask, name="whimbrel-resolver", daemon=True)
    thread.start()
    while thread.is_alive():
        patience.check(f"looking up {host!r}")
        thread.join(min(SLICE, patience.remaining()))
    if failures:
        raise failures[0]
    return answers[0]
