"""`rdma:HOST:PORT`, as QEMU writes it: RAM is written straight into the destination's memory.

The protocol is QEMU's (wire format, section 8). What moves the bytes is a provider of verbs, found by the plugin
manager (`[backends] verbs-provider`): an adapter's, or one of those that emulate it. Port 0 listens on a free one,
which the listener's `uri` tells; without a host it is 127.0.0.1, on either side.

All of it is imported when it is first used: a process that moves over TCP need not wait for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel.abc import Transport, TransportSpec
from whimbrel.errors import ConfigError
from whimbrel.hookspecs import hookimpl
from whimbrel_transports._hosts import parse_host_and_port

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from whimbrel.verbs import VerbsOffers

__all__ = ["is_exposed_at", "whimbrel_transports"]


@hookimpl
def whimbrel_transports(verbs: VerbsOffers) -> Sequence[TransportSpec]:
    """Offer `rdma:`."""

    def create(capabilities: Collection[str] = ()) -> Transport:
        from whimbrel_transports._rdma_transport import PIN_ALL, RdmaTransport

        return RdmaTransport(verbs, pin_all=PIN_ALL in capabilities)

    return [
        TransportSpec(
            name="rdma",
            summary="one-sided writes into the destination's memory, rdma:HOST:PORT",
            create=create,
            create_for=create,
            exposed_at=is_exposed_at,
            tls=False,
        )
    ]


def is_exposed_at(address: str) -> bool:
    """Whether an address is one that others than this host's processes have a way to; True where it cannot be told."""
    from whimbrel_transports._rdma_transport import is_loopback_host

    try:
        return not is_loopback_host(parse_host_and_port(address, "RDMA")[0])
    except ConfigError:
        return True
