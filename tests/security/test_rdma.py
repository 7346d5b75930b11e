"""rdma: goes in the clear, and says so: off the host it is refused, and it cannot have TLS."""

from __future__ import annotations

import pytest

from whimbrel import Machine, Settings
from whimbrel.errors import ConfigError
from whimbrel.plugins import PluginManager
from whimbrel_transports.rdma import is_exposed_at


@pytest.fixture
def machine():
    """`machine(settings)`: one with some memory."""
    made = []

    def make(settings):
        made.append(Machine("written", settings=settings))
        made[-1].ram.add("a", 1 << 20)
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("uri", ["rdma:0.0.0.0:0", "rdma:[::]:0", "rdma:192.0.2.1:0", "rdma:a-name.example.org:0"])
def test_where_others_can_come_it_is_refused_at_either_end(machine, uri):
    with pytest.raises(ConfigError, match=r"waiting at rdma.*without TLS is refused.*--insecure-plaintext"):
        machine(Settings()).incoming(uri)
    with pytest.raises(ConfigError, match=r"sending to rdma.*without TLS is refused"):
        machine(Settings()).migrate(f"{uri.rpartition(':')[0]}:4444")


def test_where_others_can_come_it_waits_if_it_is_asked_to(machine, caplog):
    settings = Settings()
    settings.security.insecure_plaintext = True
    with caplog.at_level("WARNING", "whimbrel.security"):
        machine(settings).incoming("rdma:0.0.0.0:0").close()
    assert "waiting at rdma:0.0.0.0:" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", ""])
def test_where_nobody_else_can_come_it_waits(machine, host):
    machine(Settings()).incoming(f"rdma:{host}:0").close()


def test_it_cannot_have_tls(machine, folder):
    """Said at either end, before anything is connected."""
    settings = Settings()
    settings.parameters.tls_creds = str(folder())
    with pytest.raises(ConfigError, match="transport 'rdma' cannot have TLS"):
        machine(settings.copy()).incoming("rdma:127.0.0.1:0")
    with pytest.raises(ConfigError, match="transport 'rdma' cannot have TLS"):
        machine(settings).migrate("rdma:127.0.0.1:4444")


def test_it_declares_both():
    spec = PluginManager().transport("rdma")
    assert not spec.tls
    assert spec.exposed_at is is_exposed_at
    assert is_exposed_at("not an address")  # what cannot be told is taken for the worst
