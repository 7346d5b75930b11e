"""What stands between a transport and its channels: TLS, the refusal of plaintext, and the watch for dead peers.

Everything that a migration connects and accepts, main channel and lanes, of whatever transport, goes through here and
nowhere else. Without `tls-creds` what leaves the host in the clear is refused, connecting and listening, unless
`[security] insecure-plaintext` asks for it; each use of that is logged.
"""

from __future__ import annotations

import logging
from typing import Final, Self

import attrs

from whimbrel.abc import Channel, Listener, Patience, Transport, TransportSpec, WatchfulChannel
from whimbrel.errors import ConfigError, WhimbrelError
from whimbrel.migration.quietly import quietly
from whimbrel.settings import Settings
from whimbrel.stream.tls import TlsChannel
from whimbrel.stream.tls_credentials import Credentials

__all__ = ["Connector", "listen"]

_log = logging.getLogger("whimbrel.security")

_HOW: Final = "set tls-creds; or, on a network that nobody else is in, ask for it with --insecure-plaintext"


@attrs.frozen(eq=False)
class Connector:
    """Connects to one address, any number of times, as the settings were when it was made (`of`). Any thread."""

    transport: Transport
    address: str
    _settings: Settings
    _credentials: Credentials | None
    _hostname: str

    @classmethod
    def of(cls, spec: TransportSpec, address: str, transport: Transport, settings: Settings) -> Self:
        """Read the credentials. Raises ConfigError for what cannot be, and for plaintext that is not allowed."""
        parameters = settings.parameters
        credentials, hostname = None, ""
        if _wants_tls(spec, address, settings):
            hostname = parameters.tls_hostname or (spec.host_at(address) if spec.host_at is not None else "")
            if not hostname:
                raise ConfigError(
                    f"{spec.name}:{address} names no host that a certificate could bear",
                    hint="set tls-hostname to the name in the destination's certificate",
                )
            credentials = Credentials.of_client(parameters.tls_creds)
        elif spec.exposed_at is not None and spec.exposed_at(address):
            _refuse_plaintext(f"sending to {spec.name}:{address}", settings)
        return cls(transport, address, settings.copy(), credentials, hostname)

    def connect(self, patience: Patience) -> Channel:
        """Connect, and make the handshake. Raises ConfigError, ChannelError and MigrationCancelled; nothing is left."""
        channel = self.transport.connect(self.address, patience)
        try:
            _watch(channel, self._settings)
            if self._credentials is None:
                if channel.exposed:
                    _allow_plaintext(f"sending to {channel.peer}", self._settings)
                return channel
            return self._encrypted(channel, patience)
        except BaseException:
            quietly(channel.close, "closing a connection")
            raise

    def _encrypted(self, channel: Channel, patience: Patience) -> Channel:
        assert self._credentials is not None, "encrypted without credentials"
        tls = TlsChannel(channel, self._credentials, hostname=self._hostname, seconds=_handshake(self._settings))
        with tls.given_up_with(patience):
            tls.shake_hands()
        return tls


def listen(spec: TransportSpec, address: str, transport: Transport, settings: Settings) -> Listener:
    """Listen as the settings are now. Raises ConfigError, also for plaintext that is not allowed, and ConnectError."""
    parameters = settings.parameters
    credentials = None
    if _wants_tls(spec, address, settings):
        credentials = Credentials.of_server(parameters.tls_creds, parameters.tls_authz)
    elif parameters.tls_authz:
        raise ConfigError("tls-authz is set, and tls-creds is not: nobody could be told from anybody else")
    elif spec.exposed_at is not None and spec.exposed_at(address):
        _refuse_plaintext(f"waiting at {spec.name}:{address}", settings)
    listener = transport.listen(address)
    try:
        if credentials is None and listener.exposed:
            _allow_plaintext(f"waiting at {listener.uri}", settings)
    except BaseException:
        quietly(listener.close, "closing the listener")
        raise
    return _Secured(listener, settings.copy(), credentials)


class _Secured(Listener):
    """Whoever is accepted is encrypted and watched. The handshake is made by whoever reads first."""

    def __init__(self, inner: Listener, settings: Settings, credentials: Credentials | None) -> None:
        self.uri, self.exposed = inner.uri, inner.exposed
        self._inner, self._settings, self._credentials = inner, settings, credentials

    def accept(self, patience: Patience) -> Channel:
        """Wait for the next peer, as `Listener.accept` says."""
        channel = self._inner.accept(patience)
        try:
            _watch(channel, self._settings)
        except WhimbrelError:
            _log.debug("%s was gone at once", channel.peer)  # as whoever reads it will see
        if self._credentials is None:
            return channel
        return TlsChannel(
            channel,
            self._credentials,
            hostname=None,
            seconds=_handshake(self._settings),
            cut_ends=self._settings.security.unfinished_tls,
        )

    def close(self) -> None:
        """Stop listening."""
        self._inner.close()


def _wants_tls(spec: TransportSpec, address: str, settings: Settings) -> bool:
    """Whether this goes over TLS. Raises ConfigError where it ought to and cannot."""
    parameters = settings.parameters
    if not parameters.tls_creds:
        if parameters.tls_hostname:
            raise ConfigError("tls-hostname is set, and tls-creds is not: there would be no certificate to bear it")
        return False
    duplex = spec.duplex if spec.duplex_at is None else spec.duplex_at(address)
    if not spec.tls or not duplex:
        raise ConfigError(
            f"tls-creds is set, and transport {spec.name!r} cannot have TLS",
            hint='set tls-creds to "" for this migration, or use another transport',
        )
    return True


def _refuse_plaintext(what: str, settings: Settings) -> None:
    if not settings.security.insecure_plaintext:
        raise ConfigError(
            f"{what} without TLS is refused: others could read the guest's memory, or send another", hint=_HOW
        )


def _allow_plaintext(what: str, settings: Settings) -> None:
    _refuse_plaintext(what, settings)
    _log.warning(
        "%s without TLS, as insecure-plaintext asks for: whoever is on the way can read and change it all", what
    )


def _watch(channel: Channel, settings: Settings) -> None:
    if isinstance(channel, WatchfulChannel):
        channel.watch(settings.limits.keepalive, settings.limits.peer_timeout)


def _handshake(settings: Settings) -> float:
    return settings.limits.handshake_timeout
