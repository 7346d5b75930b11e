"""rdma: over each provider of verbs, and over one of the tests' own: the conformance suite, and what is its own."""

from __future__ import annotations

import pytest

from whimbrel.plugins import PluginManager
from whimbrel.testing.transports import TransportConformance
from whimbrel_transports.rdma import RdmaTransport

from .loopback_verbs import Offers


class _Rdma(TransportConformance):
    several_peers = False  # the second of a source's connections is its way back
    bad_addresses = ("", "host", "host:", ":", ":-1", ":65536", "h:0x10", "::1:4444", "[::1]", "[h]:1", "[::1:5")

    def address(self, tmp_path):
        return "127.0.0.1:0"


class TestRdmaOverSharedMemory(_Rdma):
    def make(self):
        return RdmaTransport(PluginManager(verbs_provider="shared"))


class TestRdmaOverSockets(_Rdma):
    def make(self):
        return RdmaTransport(PluginManager(verbs_provider="socket"))


class TestRdmaOfAStranger(_Rdma):
    def make(self):
        return RdmaTransport(Offers())
