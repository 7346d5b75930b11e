"""Migration URIs: `scheme:address`."""

from __future__ import annotations

import attrs

from whimbrel.abc import TransportSpec
from whimbrel.errors import ConfigError, UnknownNameError
from whimbrel.plugins import PluginManager


@attrs.frozen
class Destination:
    """A URI taken apart, with the transport of its scheme."""

    uri: str
    address: str
    spec: TransportSpec


def resolve(uri: str, plugins: PluginManager) -> Destination:
    """Find the transport for `uri`. Raises ConfigError; for an unknown scheme it lists those there are."""
    scheme, colon, address = uri.partition(":")
    if not colon or not scheme:
        schemes = ", ".join(sorted(spec.name for spec in plugins.transports()))
        raise ConfigError(f"{uri!r} is no migration URI: expected SCHEME:ADDRESS", hint=f"schemes there are: {schemes}")
    try:
        spec = plugins.transport(scheme)
    except UnknownNameError as exc:
        if exc.kind == "transport":
            exc.message = f"{exc.message} in {uri!r}"
        raise
    return Destination(uri, address, spec)
