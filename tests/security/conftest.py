"""An authority, folders of what hosts have of it, and channels that are encrypted with that."""

from __future__ import annotations

import itertools
import threading

import pytest

from whimbrel.abc import Listener, Patience, Transport
from whimbrel.plugins import PluginManager
from whimbrel.stream.tls import TlsChannel
from whimbrel.stream.tls_credentials import Credentials

from .authority import Authority, shared

LONG = 30.0


@pytest.fixture(scope="session")
def authority():
    return shared()


@pytest.fixture
def folder(authority, tmp_path):
    """`folder(…)`: what a host has, as `Authority.folder` takes it; of another authority with `by`."""
    numbers = itertools.count()

    def make(by=None, **names):
        names.setdefault("names", ("localhost", "127.0.0.1", "::1"))
        return (by or authority).folder(tmp_path / f"host-{next(numbers)}", **names)

    return make


@pytest.fixture(scope="session")
def stranger():
    """Another authority."""
    return Authority("somebody else")


def raised_by(action):
    """What it raised: one exception, or none."""
    try:
        action()
    except Exception as exc:
        return [exc]
    return []


class Encrypted(Transport):
    """A transport with TLS round each of its channels."""

    def __init__(self, folder, scheme="tcp", *, authz="", hostname="localhost", seconds=LONG, context=None,
                 eager=False):  # fmt: skip
        self.eager = eager
        self.inner = PluginManager().transport(scheme).create()
        self.server = Credentials.of_server(str(folder), authz)
        self.client = Credentials.of_client(str(folder))
        self.hostname, self.seconds = hostname, seconds
        if context is not None:
            context(self.client.context)

    def connect(self, address, patience):
        inner = self.inner.connect(address, patience)
        return self.begun(TlsChannel(inner, self.client, hostname=self.hostname, seconds=self.seconds))

    def begun(self, channel):
        """For whoever uses both ends on one thread: neither could wait there for the other's handshake."""
        if self.eager:
            threading.Thread(target=lambda: raised_by(channel.shake_hands)).start()
        return channel

    def listen(self, address):
        return EncryptedListener(self, self.inner.listen(address))


class EncryptedListener(Listener):
    def __init__(self, transport, inner):
        self.transport, self.inner, self.uri = transport, inner, inner.uri

    def accept(self, patience):
        inner = self.inner.accept(patience)
        transport = self.transport
        return transport.begun(TlsChannel(inner, transport.server, hostname=None, seconds=transport.seconds))

    def close(self):
        self.inner.close()


class Ends:
    """Both ends of an encrypted connection, and the plain channels below."""

    def __init__(self, transport, scheme="tcp", address="127.0.0.1:0"):
        self.listener = transport.listen(address)
        self.near = transport.connect(self.listener.uri.partition(":")[2], Patience(LONG))
        self.far = self.listener.accept(Patience(LONG))

    def shake_hands(self):
        """Both at once; what either of them raised."""
        raised = []
        threads = [
            threading.Thread(target=lambda each=each: raised.extend(raised_by(each.shake_hands)))
            for each in (self.near, self.far)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        assert not any(thread.is_alive() for thread in threads)
        return raised

    def close(self):
        for each in (self.near, self.far, self.listener):
            each.close()


@pytest.fixture
def ends():
    made = []

    def make(*args, **more):
        made.append(Ends(Encrypted(*args, **more)))
        return made[-1]

    yield make
    for each in made:
        each.close()
