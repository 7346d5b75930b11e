"""Who we are and whom we believe: a folder of PEM files with QEMU's names, and a list of who may connect.

::

    ca-cert.pem       whose certificates are believed; both ends
    ca-crl.pem        those that no longer are; where there is one
    server-cert.pem   what a destination shows, and its key
    server-key.pem
    client-cert.pem   what a source shows, and its key
    client-key.pem

Both ends show a certificate, always. A key that others can read, and a folder or an authority that others can change,
are refused: what is built on them would prove nothing.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from whimbrel.errors import ChannelLost, ConfigError

if TYPE_CHECKING:
    from typing import Self

__all__ = ["AllowedNames", "Credentials"]

LIST_MAX: Final = 1 << 20  # bytes of a file of names

_log = logging.getLogger("whimbrel.tls")

_SHORT: Final = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
    "emailAddress": "EMAIL",
}
_ESCAPED: Final = re.compile(r'([,+"\\<>;])|^([# ])|( )$')


@attrs.frozen
class AllowedNames:
    """Patterns of names, of which a peer's certificate must bear one. `*` stands for any number of characters.

    A pattern with a `=` is compared with the whole distinguished name, as QEMU writes it (`CN=here,O=Example,C=GB`,
    the most special part first); any other one with the common name and the alternative names (DNS names, addresses,
    e-mail addresses, URIs), without regard to case.
    """

    patterns: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Self | None:
        """Read `tls-authz`: names with commas between them, or, with a `/` in it, the path of a file with one a line.

        None for an empty one: whoever has a certificate may connect. In a file a line that begins with `#` is a
        comment; only there a distinguished name can stand. Raises ConfigError, also for a list without a name.
        """
        if not text:
            return None
        items = _lines(Path(text)) if "/" in text else text.split(",")
        patterns = tuple(item.strip() for item in items if item.strip())
        if not patterns:
            raise ConfigError(f"tls-authz {text!r} names nobody", hint='leave it empty ("") to let everybody in')
        return cls(patterns)

    def allow(self, certificate: dict[str, Any]) -> bool:
        """Whether one of the patterns fits the certificate, as `SSLObject.getpeercert` returns it."""
        whole, names = distinguished_name(certificate), plain_names(certificate)
        for pattern in self.patterns:
            if "=" in pattern:
                if _fits(pattern, whole):
                    return True
            elif any(_fits(pattern, name, flags=re.IGNORECASE) for name in names):
                return True
        return False


@attrs.frozen(eq=False)
class Credentials:
    """What one end needs for TLS: the context of OpenSSL, and who may connect (None: whoever has a certificate)."""

    context: ssl.SSLContext
    allowed: AllowedNames | None = None

    @classmethod
    def of_server(cls, folder: str, authz: str = "") -> Self:
        """Of a destination: from `tls-creds` and `tls-authz`. Raises ConfigError."""
        allowed = AllowedNames.of(authz)
        if allowed is None:
            _log.warning("tls-authz is empty: whoever has a certificate of this authority may connect")
        return cls(_context(folder, "server", ssl.PROTOCOL_TLS_SERVER), allowed)

    @classmethod
    def of_client(cls, folder: str) -> Self:
        """Of a source: from `tls-creds`. Raises ConfigError."""
        return cls(_context(folder, "client", ssl.PROTOCOL_TLS_CLIENT))

    def authorise(self, tls: ssl.SSLObject, peer: str) -> None:
        """Raise ChannelLost unless the peer of a finished handshake is one of those who are allowed."""
        certificate: dict[str, Any] = tls.getpeercert() or {}
        if not certificate:  # not with these contexts; but everything rests on it
            raise ChannelLost(f"{peer} has shown no certificate")
        if self.allowed is not None and not self.allowed.allow(certificate):
            raise ChannelLost(
                f"{peer} is {distinguished_name(certificate)!r}, which tls-authz does not allow to connect"
            )


def distinguished_name(certificate: dict[str, Any]) -> str:
    """The subject as RFC 4514 writes it, and QEMU: the most special part first."""
    return ",".join(
        "+".join(f"{_SHORT.get(kind, kind)}={_escaped(value)}" for kind, value in several)
        for several in reversed(certificate.get("subject", ()))
    )


def plain_names(certificate: dict[str, Any]) -> list[str]:
    """The common names and the alternative names."""
    subject = [value for several in certificate.get("subject", ()) for kind, value in several if kind == "commonName"]
    return subject + [value for _, value in certificate.get("subjectAltName", ()) if isinstance(value, str)]


def _escaped(value: str) -> str:
    return _ESCAPED.sub(lambda found: "\\" + found[0], value)


def _fits(pattern: str, name: str, *, flags: int = 0) -> bool:
    expression = ".*".join(re.escape(part) for part in re.sub(r"\*+", "*", pattern).split("*"))
    return re.fullmatch(expression, name, flags | re.DOTALL) is not None


def _lines(path: Path) -> Sequence[str]:
    _refuse_changeable(path, "tls-authz")
    try:
        with path.open("rb") as file:
            data = file.read(LIST_MAX + 1)
        if len(data) > LIST_MAX:
            raise ConfigError(f"the file {str(path)!r} of tls-authz is larger than {LIST_MAX} bytes")
        lines = data.decode().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"tls-authz: {str(path)!r} cannot be read: {_reason(exc)}") from exc
    return [line for line in lines if not line.lstrip().startswith("#")]


# ------------------------------------------------------------------------------------------------------- the folder


def _context(folder: str, end: str, protocol: int) -> ssl.SSLContext:
    where = Path(folder)
    if not where.is_dir():
        raise ConfigError(
            f"tls-creds {folder!r} is no folder", hint="it holds ca-cert.pem, and a certificate and a key for each end"
        )
    _refuse_changeable(where, "tls-creds")
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # nobody comes back
    context.verify_mode = ssl.CERT_REQUIRED
    _load(where / "ca-cert.pem", "an authority's certificate", _refuse_changeable, context.load_verify_locations)
    if (revoked := where / "ca-crl.pem").exists():
        _load(revoked, "a list of revoked certificates", _refuse_changeable, context.load_verify_locations)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    key, certificate = where / f"{end}-key.pem", where / f"{end}-cert.pem"
    _load(certificate, "a certificate", _refuse_changeable)
    _load(key, f"the key of {certificate.name}", _refuse_readable,
          lambda path: context.load_cert_chain(certificate, path, partial(_no_password, path)))  # fmt: skip
    return context


def _load(
    path: Path, what: str, check: Callable[[Path, str], None], load: Callable[[Path], object] | None = None
) -> None:
    try:
        path.stat()
        check(path, "tls-creds")
        if load is not None:
            load(path)
    except FileNotFoundError as exc:
        raise ConfigError(f"tls-creds: there is no {path.name} in {str(path.parent)!r}: {what}") from exc
    except OSError as exc:  # as ssl.SSLError is
        raise ConfigError(f"tls-creds: {str(path)!r} is not usable as {what}: {_reason(exc)}") from exc


def _refuse_readable(path: Path, setting: str) -> None:
    """Raise ConfigError for a key that anybody but its owner can read, or that is somebody else's."""
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{setting}: others can get at the key {str(path)!r} (its mode is {mode:04o})", hint=f"chmod 600 {path}"
        )
    _refuse_strange(path, found, setting)


def _refuse_changeable(path: Path, setting: str) -> None:
    """Raise ConfigError for what somebody else owns or can write; what is not there is for others to say."""
    try:
        found = path.stat()
    except OSError:
        return
    mode = stat.S_IMODE(found.st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{setting}: others can change {str(path)!r} (its mode is {mode:04o})", hint=f"chmod go-w {path}"
        )
    _refuse_strange(path, found, setting)


def _refuse_strange(path: Path, found: os.stat_result, setting: str) -> None:
    if found.st_uid not in {os.geteuid(), 0}:
        raise ConfigError(f"{setting}: {str(path)!r} is of user {found.st_uid}", hint="it must be your own, or root's")


def _no_password(path: Path) -> str:
    raise ConfigError(f"tls-creds: the key {str(path)!r} has a password, and nobody is there to be asked for it")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "it is no PEM file").replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)
