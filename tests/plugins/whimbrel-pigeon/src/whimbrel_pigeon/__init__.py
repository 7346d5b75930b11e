"""A plugin for whimbrel: the transport `pigeon:FOLDER`, named pipes in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel.abc import TransportSpec
from whimbrel.hookspecs import hookimpl
from whimbrel_pigeon.transport import PigeonTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PigeonTransport", "whimbrel_transports"]


@hookimpl
def whimbrel_transports() -> Sequence[TransportSpec]:
    """Offer `pigeon:`."""
    return [TransportSpec(name="pigeon", summary="named pipes in a folder, pigeon:FOLDER", create=PigeonTransport)]
