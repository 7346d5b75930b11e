"""TLS round a channel: the suite of transports over it, who is let in, and an end that is told from a cut."""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading

import pytest

from whimbrel.errors import ChannelClosed, ChannelError, ChannelLost, ConfigError
from whimbrel.stream.tls_credentials import AllowedNames, Credentials
from whimbrel.testing.transports import TransportConformance, receive

from .authority import shared
from .conftest import LONG, Encrypted, Ends, raised_by


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return shared().folder(tmp_path_factory.mktemp("tls") / "host", names=("localhost",))


class TestOverTcp(TransportConformance):
    @pytest.fixture(autouse=True)
    def _host(self, host):
        self.host = host

    def make(self):
        return Encrypted(self.host, eager=True)

    def address(self, tmp_path):
        return "127.0.0.1:0"


class TestOverUnix(TestOverTcp):
    def make(self):
        return Encrypted(self.host, "unix", eager=True)

    def address(self, tmp_path):
        return f"{tmp_path}/link"


def tls_1_2(context):
    context.maximum_version = ssl.TLSVersion.TLSv1_2


class TestTheOlderProtocol(TestOverTcp):
    def make(self):
        return Encrypted(self.host, context=tls_1_2, eager=True)


# ---------------------------------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize(("context", "protocol"), [(None, "TLSv1.3"), (tls_1_2, "TLSv1.2")])
def test_the_newest_protocol_that_both_have(host, ends, context, protocol):
    pair = ends(host, context=context)
    assert (pair.near.protocol, pair.near.identity) == ("", b"")
    assert pair.shake_hands() == []
    assert (pair.near.protocol, pair.far.protocol) == (protocol, protocol)


def test_what_is_older_is_refused(host, ends):
    def old(context):
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")

    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        pair = ends(host, context=old)
    assert pair.shake_hands()
    assert pair.far.protocol == ""


def test_nothing_can_be_read_below(host):
    import hashlib

    near, far = socket.socketpair()
    from whimbrel.stream.tls import TlsChannel
    from whimbrel_transports._sockets import SocketChannel

    taps = []

    class Tapped(SocketChannel):
        def send(self, data):
            taps.append(bytes(data))
            super().send(data)

    client = TlsChannel(Tapped(near, "a"), Credentials.of_client(str(host)), hostname="localhost", seconds=LONG)
    server = TlsChannel(Tapped(far, "b"), Credentials.of_server(str(host)), hostname=None, seconds=LONG)
    try:
        word = b"the guest's own memory " * 100
        thread = threading.Thread(target=client.send, args=(word,))
        thread.start()
        heard = receive(server, len(word))
        thread.join()
        assert hashlib.sha256(heard).digest() == hashlib.sha256(word).digest()
        assert taps
        assert not any(b"memory" in tap for tap in taps)
    finally:
        client.close()
        server.close()


def test_both_ways_at_once(host, ends):
    """Each end reads and writes on two threads, in odd sizes: nothing is lost, and nothing comes twice."""
    pair = ends(host)
    data = random.Random(7).randbytes(5_000_011)
    wrong = []

    def write(channel):
        dice, at = random.Random(1), 0
        while at < len(data):
            size = dice.choice((1, 100, 16384, 16385, 300_000))
            channel.send(data[at : at + size])
            at += size

    def read(channel):
        heard = receive(channel, len(data))
        if heard != data:
            wrong.append(next(at for at, (one, two) in enumerate(zip(heard, data, strict=False)) if one != two))

    threads = [threading.Thread(target=work, args=(end,)) for end in (pair.near, pair.far) for work in (write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert wrong == []


@pytest.mark.parametrize("context", [None, tls_1_2])
@pytest.mark.parametrize("size", [1, 20_000, 200_000])
def test_the_end_of_one_way_leaves_the_other_open(host, ends, context, size):
    """Also where bytes of the peer's have come and nobody has read them yet."""
    pair = ends(host, context=context)
    assert pair.shake_hands() == []
    data = os.urandom(size)
    pair.far.send(data)
    assert receive(pair.near, 1) == data[:1]
    pair.near.end_writing()
    pair.near.end_writing()
    assert pair.far.recv_into(bytearray(10)) == 0
    pair.far.send(b"more")
    assert (receive(pair.near, size + 3) == data[1:] + b"more") is True
    with pytest.raises(ChannelClosed):
        pair.near.send(b"x")


# ------------------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("context", [None, tls_1_2])
def test_a_close_is_an_end(host, ends, context):
    pair = ends(host, context=context)
    assert pair.shake_hands() == []
    pair.near.send(b"last words")
    pair.near.close()
    assert receive(pair.far, 10) == b"last words"
    assert pair.far.recv_into(bytearray(1)) == 0
    assert pair.far.recv_into(bytearray(1)) == 0


@pytest.mark.parametrize("context", [None, tls_1_2])
@pytest.mark.parametrize("how", ["close", "end_writing"])
def test_an_end_below_is_a_cut(host, ends, context, how):
    """What dies says no goodbye, and neither does who cuts the link."""
    pair = ends(host, context=context)
    assert pair.shake_hands() == []
    pair.near.send(b"last words")
    getattr(pair.near.inner, how)()
    assert receive(pair.far, 10) == b"last words"
    for _ in range(2):
        with pytest.raises(ChannelLost, match="without the goodbye"):
            pair.far.recv_into(bytearray(1))


def test_a_record_that_was_changed_is_a_break(host, ends):
    pair = ends(host)
    assert pair.shake_hands() == []
    pair.near.send(b"good")
    pair.near.inner.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert receive(pair.far, 4) == b"good"
    for _ in range(2):
        with pytest.raises(ChannelLost, match="broke"):
            pair.far.recv_into(bytearray(1))


def test_a_close_does_not_wait_for_a_peer_that_takes_nothing(host, ends):
    pair = ends(host)
    assert pair.shake_hands() == []
    raised = []

    def fill():
        try:
            while True:
                pair.near.send(bytes(1 << 20))
        except ChannelError as exc:
            raised.append(exc)

    thread = threading.Thread(target=fill)
    thread.start()
    pair.near.close()
    thread.join(LONG)
    assert isinstance(raised[0], ChannelClosed)


# ---------------------------------------------------------------------------------------------------------- who it is


def failure(pair, words):
    raised = pair.shake_hands()
    assert any(words in str(each) for each in raised), [str(each) for each in raised]
    assert all(isinstance(each, ChannelLost) for each in raised)
    return raised


def test_all_channels_of_a_peer_have_one_identity(host, folder, ends):
    first, second, other = ends(host), ends(host), ends(folder(client="other"))
    for pair in (first, second, other):
        assert pair.shake_hands() == []
    assert len(first.far.identity) == 32
    assert first.far.identity == second.far.identity != other.far.identity
    assert first.near.identity == second.near.identity != first.far.identity


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_names_and_addresses(folder, ends, name):
    assert ends(folder(), hostname=name).shake_hands() == []


def test_the_common_name_does_where_there_is_no_other(folder, ends):
    assert ends(folder(names=(), server="here.example.org"), hostname="here.example.org").shake_hands() == []


@pytest.mark.parametrize("name", ["elsewhere", "127.0.0.2", "localhost.example.org", "local"])
def test_another_name(host, ends, name):
    pair = ends(host, hostname=name)
    failure(pair, "mismatch")
    assert pair.near.identity == pair.far.identity == b""
    for channel in (pair.near, pair.far):
        with pytest.raises(ChannelLost):
            channel.send(b"secret")


def mixed(near, far, **more):
    """A transport whose ends have not the same folder."""
    made = Encrypted(far, **more)
    made.client = Credentials.of_client(str(near))
    return made


def test_an_authority_that_is_not_ours(folder, stranger):
    ours, theirs = folder(), folder(by=stranger)
    for near, far in ((ours, theirs), (theirs, ours)):
        pair = Ends(mixed(near, far))
        try:
            failure(pair, "certificate")
        finally:
            pair.close()


def test_a_client_without_a_certificate(host):
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(host / "ca-cert.pem")
    transport = Encrypted(host)
    transport.client = Credentials(bare)
    pair = Ends(transport)
    try:
        raised = []
        thread = threading.Thread(target=lambda: raised.extend(raised_by(lambda: pair.near.recv_into(bytearray(1)))))
        thread.start()
        with pytest.raises(ChannelLost, match="certificate"):
            pair.far.recv_into(bytearray(1))
        thread.join(LONG)
        assert "certificate required" in str(raised[0])
    finally:
        pair.close()


def test_certificates_of_the_wrong_end_and_of_another_time(authority, folder, ends):
    swapped = folder()
    for kind in ("cert", "key"):
        (swapped / f"client-{kind}.pem").write_bytes((swapped / f"server-{kind}.pem").read_bytes())
    failure(ends(swapped), "certificate")
    failure(ends(folder(age=30)), "certificate has expired")


def test_revoked(authority, folder, ends):
    here = folder(revoked=None)
    assert ends(here).shake_hands() == []
    authority.folder(here / "more", server=None)
    again = folder(revoked=None)
    made = authority.made
    authority.revoke(again, [made["client"]])
    failure(ends(again), "certificate revoked")


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"QEVM\0\0\0\3", bytes(5), b"\x16\x03\x01\xff\xff" + bytes(100)]
)
def test_what_is_no_tls(host, ends, said):
    pair = ends(host)
    pair.near.inner.send(said)
    pair.near.inner.end_writing()
    with pytest.raises(ChannelLost, match="TLS handshake"):
        pair.far.recv_into(bytearray(1))


def test_a_handshake_has_a_time(host, ends):
    pair = ends(host, seconds=0.05)
    with pytest.raises(ChannelLost, match=r"has not ended the TLS handshake within 0\.05 s.*handshake-timeout"):
        pair.far.recv_into(bytearray(1))
    with pytest.raises(ChannelLost):
        pair.far.send(b"x")


def test_a_close_ends_a_handshake(host, ends):
    pair = ends(host)
    raised = []

    def wait():
        try:
            pair.far.recv_into(bytearray(1))
        except ChannelError as exc:
            raised.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    pair.far.close()
    thread.join(LONG)
    assert isinstance(raised[0], ChannelClosed)


# ---------------------------------------------------------------------------------------------------- who is let in


@pytest.mark.parametrize(
    ("authz", "client"),
    [
        ("", "anybody"),
        ("here", "here"),
        ("there, here", "CN=here,O=Example,C=GB"),
        ("HERE", "here"),
        ("*.example.org", "a.b.example.org"),
    ],
)
def test_allowed(folder, ends, authz, client):
    assert ends(folder(client=client), authz=authz).shake_hands() == []


@pytest.mark.parametrize("authz", ["there", "her", "here.example.org", "*.here", "h?re", "[h]ere", "Example"])
def test_not_allowed(folder, ends, authz):
    pair = ends(folder(client="CN=here,O=Example"), authz=authz)
    failure(pair, "is 'CN=here,O=Example', which tls-authz does not allow to connect")
    with pytest.raises(ChannelLost, match="tls-authz"):
        pair.far.recv_into(bytearray(1))


@pytest.mark.parametrize(
    ("line", "fits"),
    [
        ("CN=here,O=Example,C=GB", True),
        ("CN=*,O=Example,C=GB", True),
        ("CN=here,O=Example", False),
        ("C=GB,O=Example,CN=here", False),
        ("cn=here,o=Example,c=GB", False),
        ("here", True),
        ("# here", False),
    ],
)
def test_a_file_of_names(folder, ends, tmp_path, line, fits):
    names = tmp_path / "names"
    names.write_text(f"# who may connect\n\nsomebody\n{line}\n")
    names.chmod(0o644)
    pair = ends(folder(client="CN=here,O=Example,C=GB"), authz=str(names))
    assert (pair.shake_hands() == []) is fits


@pytest.mark.parametrize(("authz", "words"), [(",", "names nobody"), ("./nowhere", "cannot be read")])
def test_lists_that_cannot_be(authz, words):
    with pytest.raises(ConfigError, match=words):
        AllowedNames.of(authz)


def test_a_list_that_others_can_change(tmp_path):
    names = tmp_path / "names"
    names.write_text("here\n")
    names.chmod(0o666)
    with pytest.raises(ConfigError, match="others can change"):
        AllowedNames.of(str(names))


# -------------------------------------------------------------------------------------------------------- the folder


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        Credentials.of_client(str(tmp_path / "nowhere"))
    for name, make in (
        ("ca-cert.pem", Credentials.of_client),
        ("client-cert.pem", Credentials.of_client),
        ("client-key.pem", Credentials.of_client),
        ("server-cert.pem", Credentials.of_server),
        ("server-key.pem", Credentials.of_server),
    ):
        here = folder()
        (here / name).unlink()
        with pytest.raises(ConfigError, match=f"there is no {name}"):
            make(str(here))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_keys_that_others_can_get_at(folder, mode):
    here = folder()
    (here / "client-key.pem").chmod(mode)
    with pytest.raises(ConfigError, match=r"others can get at the key .*; chmod 600"):
        Credentials.of_client(str(here))
    Credentials.of_server(str(here))


@pytest.mark.parametrize("name", ["ca-cert.pem", "client-cert.pem", "."])
def test_what_others_can_change(folder, name):
    here = folder()
    (here / name).chmod(0o775)
    with pytest.raises(ConfigError, match="others can change"):
        Credentials.of_client(str(here))


@pytest.mark.parametrize("name", ["ca-cert.pem", "client-cert.pem", "client-key.pem"])
def test_files_that_are_none(folder, name):
    here = folder()
    (here / name).write_text("nonsense")
    with pytest.raises(ConfigError, match="is not usable as"):
        Credentials.of_client(str(here))


def test_a_key_of_another_certificate(folder):
    here = folder()
    (here / "client-key.pem").write_bytes((here / "server-key.pem").read_bytes())
    with pytest.raises(ConfigError, match="key values mismatch"):
        Credentials.of_client(str(here))


def test_a_key_with_a_password(folder):
    from cryptography.hazmat.primitives import serialization

    here = folder()
    key = serialization.load_pem_private_key((here / "client-key.pem").read_bytes(), None)
    (here / "client-key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="has a password"):
        Credentials.of_client(str(here))
