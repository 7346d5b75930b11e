"""Certificates for tests, made on the spot: nothing of this is ever kept."""

from __future__ import annotations

import datetime
import ipaddress
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["Authority"]

DAY = datetime.timedelta(days=1)
PARTS = {
    "CN": NameOID.COMMON_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "L": NameOID.LOCALITY_NAME,
    "C": NameOID.COUNTRY_NAME,
}


class Authority:
    """Signs certificates; `folder` writes what one host has of them, with QEMU's names."""

    def __init__(self, name="whimbrel test authority"):
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = _usage(key_cert_sign=True, crl_sign=True)
        self.certificate = (
            self._begun(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def folder(self, path, *, server="localhost", client="client", names=(), revoked=(), age=0):
        """Write a folder for both ends. Names are common names or `CN=x,O=y`; `names` the server's alternative ones.

        `revoked` are certificates, or None for an empty list; `age` in days is by how much the certificates are older.
        """
        path = Path(path)
        path.mkdir(mode=0o700)
        _write(path / "ca-cert.pem", self.certificate.public_bytes(serialization.Encoding.PEM))
        made = {}
        for end, name, usage in (("server", server, ExtendedKeyUsageOID.SERVER_AUTH),
                                 ("client", client, ExtendedKeyUsageOID.CLIENT_AUTH)):  # fmt: skip
            if name is None:
                continue
            made[end], key = self._sign(name, usage, names if end == "server" else (), age)
            _write(path / f"{end}-cert.pem", made[end].public_bytes(serialization.Encoding.PEM))
            _write(path / f"{end}-key.pem", key)
        if revoked != ():
            self.revoke(path, revoked or ())
        self.made = made
        return path

    def revoke(self, folder, certificates):
        """Write the list of those that are no longer believed."""
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(now - DAY).next_update(now + DAY)
        for certificate in certificates:
            one = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(now - DAY)
            builder = builder.add_revoked_certificate(one.build())
        signed = builder.sign(self._key, hashes.SHA256())
        _write(Path(folder) / "ca-crl.pem", signed.public_bytes(serialization.Encoding.PEM))

    def _sign(self, name, usage, names, age):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(name)
        builder = (
            self._begun(subject, key, age)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(_usage(digital_signature=True), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(one) for one in names]), False)
        made = builder.sign(self._key, hashes.SHA256())
        return made, key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def _begun(self, subject, key, age=0):
        now = datetime.datetime.now(datetime.UTC) - age * DAY
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
        )


def _write(path, data):
    path.write_bytes(data)
    path.chmod(0o600)


def _subject(name):
    parts = [part.partition("=") for part in name.split(",")] if "=" in name else [("CN", "=", name)]
    return x509.Name([x509.NameAttribute(PARTS[kind], value) for kind, _, value in reversed(parts)])


def _alternative(name):
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(**on):
    kinds = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{kind: on.get(kind, False) for kind in kinds})


@cache
def shared():
    """One authority for all tests that need no other."""
    return Authority()
