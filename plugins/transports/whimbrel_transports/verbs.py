"""The bundled providers of verbs: emulations in software, for hosts without an adapter.

`software` takes shared memory where both ends are on one host and TCP otherwise; `shared` and `socket` insist on one of
the two. They understand one another, so only one end need insist. What they
cannot do is told in docs/concepts/verbs.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from whimbrel.hookspecs import hookimpl
from whimbrel.verbs import VerbsProvider, VerbsProviderSpec

__all__ = ["whimbrel_verbs_providers"]


@hookimpl
def whimbrel_verbs_providers() -> Sequence[VerbsProviderSpec]:
    """Offer `software`, `shared` and `socket`."""
    return [
        VerbsProviderSpec(
            name="software",
            summary="emulated: shared memory on one host, TCP across hosts",
            create=partial(_emulation, shared=True, socket=True),
            probe=_always,
            rank=10,
        ),
        VerbsProviderSpec(
            name="shared",
            summary="emulated: shared memory on one host",
            create=partial(_emulation, shared=True),
            probe=_always,
        ),
        VerbsProviderSpec(
            name="socket", summary="emulated: TCP", create=partial(_emulation, socket=True), probe=_always
        ),
    ]


def _emulation(*, shared: bool = False, socket: bool = False) -> VerbsProvider:
    """Import it when it is first used: most processes do not."""
    from whimbrel_transports._verbs_rendezvous import Emulation, Ways

    return Emulation((Ways.SHARED if shared else Ways(0)) | (Ways.SOCKET if socket else Ways(0)))


def _always() -> str | None:
    return None
