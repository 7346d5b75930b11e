"""Migration URIs: `scheme:address`."""

from __future__ import annotations

import attrs

from whimbrel.abc import Listener, Transport, TransportSpec
from whimbrel.errors import ConfigError, UnknownNameError
from whimbrel.migration import security
from whimbrel.plugins import PluginManager
from whimbrel.settings import Capabilities, Settings


@attrs.frozen
class Destination:
    """A URI taken apart, with the transport of its scheme."""

    uri: str
    address: str
    spec: TransportSpec

    @property
    def duplex(self) -> bool:
        """Whether bytes travel both ways there, as far as that can be told before connecting."""
        return self.spec.duplex if self.spec.duplex_at is None else self.spec.duplex_at(self.address)

    def transport(self, capabilities: Capabilities) -> Transport:
        """The transport, made for a migration with these capabilities."""
        if self.spec.create_for is None:
            return self.spec.create()
        return self.spec.create_for(frozenset(name for name, on in capabilities.as_dict().items() if on))

    def connector(self, settings: Settings) -> security.Connector:
        """What connects there, encrypted or not as `settings` say. Raises ConfigError for what is not allowed."""
        return security.Connector.of(self.spec, self.address, self.transport(settings.capabilities), settings)

    def listen(self, settings: Settings) -> Listener:
        """Listen there, encrypted or not as `settings` say. Raises ConfigError and ConnectError."""
        return security.listen(self.spec, self.address, self.transport(settings.capabilities), settings)

    def missed_way_back(self, capabilities: Capabilities) -> list[str]:
        """Why these capabilities cannot do without a way back, where there is none; one sentence each."""
        problems = []
        if capabilities.return_path:
            problems.append(
                f"capability return-path is on, and transport {self.spec.name!r} has no way back; "
                "switch it off or use another transport"
            )
        if capabilities.switchover_ack:
            problems.append(f"capability switchover-ack needs a way back, and transport {self.spec.name!r} has none")
        return problems


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
