"""Whole migrations over TLS, what is refused without it, and TCP that finds out when a peer's host is gone."""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import suppress

import pytest

from whimbrel import Machine, Settings
from whimbrel.abc import Patience
from whimbrel.errors import ChannelLost, ConfigError, MigrationCancelled, MigrationError
from whimbrel.migration.lanes import Gathering
from whimbrel.migration.uri import resolve
from whimbrel.plugins import PluginManager
from whimbrel.wire import multifd, skeleton

LONG = 30.0
OUTSIDE = "192.0.2.1"  # an address for documents, which nobody has


@pytest.fixture
def machines():
    """`machines(source, destination)`: two with some memory and these settings."""
    made = []

    def make(*settings):
        for each in settings:
            machine = Machine("secured", settings=each)
            machine.ram.add("a", 1 << 20)
            made.append(machine)
        made[-2].ram["a"].view[::4096] = 7
        return made[-2:]

    yield make
    for machine in made:
        machine.close()


def settings_of(folder, lanes=0, **parameters):
    settings = Settings()
    settings.parameters.tls_creds = str(folder)
    settings.parameters.update(parameters)
    settings.capabilities.multifd = lanes > 0
    settings.parameters.multifd_channels = max(lanes, 1)
    return settings


@pytest.mark.parametrize("lanes", [0, 3])
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_a_machine_moves(machines, folder, tmp_path, scheme, lanes):
    here = folder()
    more = {"tls_hostname": "localhost"} if scheme == "unix" else {}
    source, destination = machines(settings_of(here, lanes, **more), settings_of(here, lanes, tls_authz="client"))
    incoming = destination.incoming("tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path}/link")
    outgoing = source.migrate(incoming.uri)
    outgoing.wait(LONG)
    incoming.wait(LONG)
    assert destination.ram["a"].view[::4096].tolist() == [7] * 256
    assert (outgoing.info.ownership, incoming.info.ownership) == ("done", "owner")


@pytest.mark.parametrize("fault", ["authority", "name", "permission", "plaintext source", "plaintext destination"])
def test_a_machine_stays(machines, folder, stranger, caplog, fault):
    here = folder()
    near = settings_of(folder(by=stranger) if fault == "authority" else here)
    far = settings_of(here, tls_authz="somebody" if fault == "permission" else "")
    near.parameters.tls_hostname = "elsewhere" if fault == "name" else ""
    near.parameters.tls_creds = "" if fault == "plaintext source" else near.parameters.tls_creds
    far.parameters.tls_creds = "" if fault == "plaintext destination" else far.parameters.tls_creds
    far.limits.header_timeout = near.limits.handshake_timeout = 1.0
    source, destination = machines(near, far)
    incoming = destination.incoming("tcp:127.0.0.1:0")
    outgoing = source.migrate(incoming.uri)
    with pytest.raises(MigrationError):
        outgoing.wait(LONG)
    while "was hung up on, and the source is waited for" not in caplog.text:
        assert not incoming.status.finished
    assert incoming.cancel()
    with pytest.raises(MigrationCancelled):
        incoming.wait(LONG)
    assert outgoing.info.ownership == "owner"
    assert not destination.ram["a"].view.any()


@pytest.mark.parametrize("first", ["main", "lane"])
def test_a_lane_with_another_certificate(folder, caplog, first):
    """It is of the same authority, and so may connect; it is not the source, whose own lane is waited for."""
    here, other = folder(), folder(client="other")
    plugins = PluginManager()
    listener = resolve("tcp:127.0.0.1:0", plugins).listen(settings_of(here))
    gathered = []
    gathering = Gathering(listener, Patience(LONG), lanes=1, uuid=None, seconds=LONG, strangers=2)
    thread = threading.Thread(target=lambda: gathered.append(gathering.run()))
    thread.start()
    source, stranger = (resolve(listener.uri, plugins).connector(settings_of(each)) for each in (here, other))
    lane = multifd.encode_init(multifd.Init(bytes(16), 0))

    def come(connector, said):
        channel = connector.connect(Patience(LONG))
        channel.send(said)
        return channel

    if first == "main":
        main, false = come(source, skeleton.HEADER), come(stranger, lane)
    else:
        false = come(stranger, lane)
        while not gathering._lanes:
            assert thread.is_alive()
        main = come(source, skeleton.HEADER)
    with suppress(ChannelLost):
        assert false.recv_into(bytearray(1)) == 0
    assert "another certificate" in caplog.text
    true = come(source, lane + b"+")
    thread.join(LONG)
    came = bytearray(1)
    assert gathered[0].lanes[0].recv_into(came) == 1
    assert bytes(came) == b"+"
    gathered[0].bundle().close()
    for channel in (main, false, true):
        channel.close()


# ------------------------------------------------------------------------------------------------------- plaintext


@pytest.mark.parametrize(
    "uri", ["tcp:0.0.0.0:0", "tcp:[::]:0", f"tcp:{OUTSIDE}:0", "tcp:[::ffff:0.0.0.0]:0", "rdma:0.0.0.0:0"]
)
def test_waiting_where_others_can_come(machines, uri):
    source, destination = machines(Settings(), Settings())
    with pytest.raises(ConfigError, match=r"without TLS is refused.*--insecure-plaintext"):
        destination.incoming(uri)
    with pytest.raises(ConfigError, match="without TLS is refused"):
        source.migrate(f"{uri.rpartition(':')[0]}:4444")


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "tcp:localhost:0", "tcp::0", "tcp:127.9.9.9:0"])
def test_waiting_where_nobody_else_can_come(machines, uri):
    _, destination = machines(Settings(), Settings())
    destination.incoming(uri)


def test_a_name_with_an_address_outside(machines, monkeypatch):
    """It is looked up once, and any of its addresses may be taken."""

    def found(host, port, **more):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in ("127.0.0.1", OUTSIDE)]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    _, destination = machines(Settings(), Settings())
    with pytest.raises(ConfigError, match="without TLS is refused"):
        destination.incoming("tcp:here.example.org:0")


def test_plaintext_is_logged_each_time(machines, caplog):
    settings = Settings()
    settings.security.insecure_plaintext = True
    source, destination = machines(settings.copy(), settings.copy())
    with caplog.at_level(logging.WARNING, "whimbrel.security"):
        incoming = destination.incoming("tcp:0.0.0.0:0")
        source.migrate(incoming.uri.replace("0.0.0.0", "127.0.0.1")).wait(LONG)
        incoming.wait(LONG)
    assert [record.message.partition(" ")[0] for record in caplog.records] == ["waiting"]


@pytest.mark.parametrize(
    ("parameters", "uri", "words"),
    [
        ({"tls_authz": "x"}, "tcp:127.0.0.1:0", "tls-authz is set, and tls-creds is not"),
        ({"tls_hostname": "x"}, "tcp:127.0.0.1:0", "tls-hostname is set, and tls-creds is not"),
        ({"tls_creds": "/nowhere"}, "tcp:127.0.0.1:0", "is no folder"),
        ({"tls_creds": "/nowhere"}, "file:somewhere", "cannot have TLS"),
    ],
)
def test_what_was_to_be_encrypted_never_goes_in_the_clear(machines, parameters, uri, words):
    settings = Settings()
    settings.parameters.update(parameters)
    _, destination = machines(settings.copy(), settings.copy())
    with pytest.raises(ConfigError, match=words):
        destination.incoming(uri)


def test_a_path_names_no_host(machines, folder, tmp_path):
    source, _ = machines(settings_of(folder()), Settings())
    with pytest.raises(ConfigError, match="set tls-hostname"):
        source.migrate(f"unix:{tmp_path}/link")


# ------------------------------------------------------------------------------------------------------- dead peers


def test_tcp_looks_after_its_peer():
    settings = Settings()
    settings.limits.keepalive, settings.limits.peer_timeout = 7.0, 30.0
    plugins = PluginManager()
    listener = resolve("tcp:127.0.0.1:0", plugins).listen(settings)
    near = resolve(listener.uri, plugins).connector(settings).connect(Patience(LONG))
    far = listener.accept(Patience(LONG))
    for channel in (near, far):
        options = channel._socket
        assert options.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        told = [
            options.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        ]
        assert told == [7, 5, 6, 30_000]
        channel.close()
    listener.close()
