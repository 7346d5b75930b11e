"""What the tests of rdma: share: ways to move a machine over it, two machines that move, and what can go wrong there.

`Way` names a transport, a provider of verbs and whether all memory is pinned. `Meeting` sees each control message that
either end sends, over the bundled providers where they post a SEND, over a stranger's where it delivers one.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path

import attrs

from whimbrel import PluginManager
from whimbrel.abc import TransportSpec
from whimbrel.hookspecs import hookimpl
from whimbrel.testing.pair import settle
from whimbrel.wire.rdma import ControlType
from whimbrel_transports import _verbs_pair
from whimbrel_transports._rdma_transport import PIN_ALL, RdmaTransport

from ..plugins.loopback_verbs import Break, Domain, Loopback, Offers

LONG = 60.0
STRANGER = "a stranger's"


class Link:
    """rdma: over one provider."""

    def __init__(self, offers):
        self.offers = offers

    def transport(self, capabilities=frozenset()):
        return RdmaTransport(self.offers, pin_all=PIN_ALL in capabilities)

    @hookimpl
    def whimbrel_transports(self):
        return [TransportSpec(name="rdma", summary="", create=self.transport, create_for=self.transport, several=False)]


@functools.cache
def link_over(provider):
    """The Link over a provider by its name, or over the tests' own."""
    return Link(Offers() if provider == STRANGER else PluginManager(verbs_provider=provider))


@attrs.frozen
class Way:
    """How a machine moves; over TCP, in the stream, without a provider."""

    provider: str | None
    pin_all: bool = False

    def __str__(self):
        if self.provider is None:
            return "tcp"
        return f"{self.provider}, {'pinned' if self.pin_all else 'chunk by chunk'}"

    @property
    def uri(self):
        return "tcp:127.0.0.1:0" if self.provider is None else "rdma:127.0.0.1:0"


BUNDLED = [Way(provider, pin_all) for provider in ("shared", "socket") for pin_all in (False, True)]
OTHERS = [Way(None), Way(STRANGER), Way(STRANGER, pin_all=True)]


class Two:
    """A source and a destination that `build` makes, joined by real sockets; with `link`, over its provider."""

    def __init__(self, build, settings, link=None, destination_settings=None, *, plugins=(), uri="rdma:127.0.0.1:0"):
        self.build, self.link, self.plugins, self.uri = build, link, plugins, uri
        self.machines = []
        self.source = self.make(settings)
        self.destination = self.make(destination_settings or settings.copy())

    def make(self, settings):
        """One more machine."""
        manager = PluginManager(prefer={} if self.link is None else {"rdma": "link"})
        if self.link is not None:
            manager.register(self.link, name="link")
        for plugin in self.plugins:
            manager.register(plugin)
        self.machines.append(self.build(settings=settings, plugins=manager))
        return self.machines[-1]

    def migrate(self, *, start=None, **how):
        incoming = self.destination.incoming(self.uri, start=start)
        return incoming, self.source.migrate(incoming.uri, **how)

    def run(self, **how):
        incoming, outgoing = self.migrate(**how)
        return self.settle(incoming, outgoing)

    def settle(self, incoming, outgoing):
        settle(outgoing, LONG)
        settle(incoming, LONG)
        return incoming, outgoing

    def move_on(self):
        """Put the source away: the destination takes its place, and there is a fresh one."""
        self.source.close()
        self.source = self.destination
        self.destination = self.make(self.source.settings.copy())

    def close(self):
        for machine in self.machines:
            machine.close()


def mapped():
    """The shared memory that this process has mapped, by what the kernel calls it; how often."""
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.partition("/memfd:")[2]
        if name:
            found[name] = found.get(name, 0) + 1
    return found


# ------------------------------------------------------------------------------------------------- failure anywhere


class Meeting:
    """What happens to the n-th control message of a kind that one side sends; `seen` are all, in order.

    `fault(end, data)` returns what goes in place of `data`, or raises Break: then the connection dies.
    """

    def __init__(self, monkeypatch, side=None, kind=None, number=0, fault=None):
        self.seen, self.ends = [], set()
        self.left, self.wanted, self.fault = number, (side, kind), fault
        self._counting = threading.Lock()
        monkeypatch.setattr(Loopback, "meet", staticmethod(self._of_the_strangers))
        post_send = _verbs_pair.Pair.post_send

        def meeting(pair, address, length, lkey, wr_id, **more):
            connection = pair.on_end.__self__
            side = "destination" if connection._asked else "source"
            try:
                data = self._meet(connection, side, ctypes.string_at(address, length))
            except Break:
                pair._line.hang_up()  # without a word, as when its host dies
                data = ctypes.string_at(address, length)
            ctypes.memmove(address, data, len(data))
            post_send(pair, address, len(data), lkey, wr_id, **more)

        monkeypatch.setattr(_verbs_pair.Pair, "post_send", meeting)

    @property
    def happened(self):
        """Whether such a message was met."""
        return self.left < 0

    def regions(self):
        """How many regions are still registered at either end."""
        return sum(
            len(end.context.regions.alive())
            if hasattr(end.context, "regions")
            else sum(len(made.regions) for made in end.context.made if isinstance(made, Domain))
            for end in self.ends
        )

    def _of_the_strangers(self, sender, data):
        self.ends.add(sender.other)
        return self._meet(sender, "destination" if sender.listener is None else "source", data)

    def _meet(self, end, side, data):
        this = (side, ControlType(int.from_bytes(data[4:8], "big")))
        with self._counting:
            self.ends.add(end)
            self.seen.append(this)
            if this != self.wanted:
                return data
            self.left -= 1
            if self.left != -1:
                return data
        return self.fault(end, data)


def breaks(end, data):
    """The connection dies in place of the message."""
    raise Break


def is_nonsense(end, data):
    """The message is of no kind that there is."""
    return data[:4] + (99).to_bytes(4, "big") + data[8:]


def is_cut(end, data):
    """The message is a byte shorter than it says."""
    return data[:-1]


FAULTS = [breaks, is_nonsense, is_cut]
