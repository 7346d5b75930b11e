"""Lanes (multifd) between two whimbrels: each method and mode, live, cut anywhere, among strangers, set unlike."""

from __future__ import annotations

import socket
import threading
from contextlib import closing, contextmanager, suppress

import numpy as np
import pytest

from whimbrel import MigrationRefused, MigrationStatus, PluginManager, RunState, Settings, hookimpl
from whimbrel.abc import Codec, CodecSpec, TransportSpec
from whimbrel.errors import (
    ChannelError,
    ChannelLost,
    ConfigError,
    IncompatibleError,
    MigrationCancelled,
    MigrationError,
    PeerRefused,
    StreamError,
)
from whimbrel.migration import lanes as lanes_room
from whimbrel.migration.uri import resolve
from whimbrel.testing.faults import ChannelWrapper, Faults, FaultyChannel, FaultyTransport
from whimbrel.testing.pair import settle
from whimbrel.wire import handover, multifd, skeleton

LONG = 60.0
MODES = {"pc-i440fx-7.2": "each section", "pc-q35-8.1": "each round", "churning": "zero pages in packets"}
METHODS = ("none", "zlib", "zstd")


class Link:
    """A transport of two machines that counts its connections; the n-th of them has the n-th of `faults`."""

    def __init__(self, scheme="tcp", *, plain=True, several=True):
        self.faults, self.channels, self.plain = [], [], plain
        inner = PluginManager().transport(scheme)
        transport = FaultyTransport(inner.create(), on_connect=self.connected)
        self.spec = TransportSpec(name=scheme, summary="", create=lambda: transport, several=several)

    def connected(self, channel):
        number = len(self.channels)
        faults = self.faults[number] if number < len(self.faults) else None
        if faults is not None or not self.plain:
            channel = FaultyChannel(channel, faults or Faults())
        self.channels.append(channel)
        return channel

    @hookimpl
    def whimbrel_transports(self):
        return [self.spec]


class Two:
    """A source and a destination with lanes."""

    def __init__(self, build, settings, link, plugins=((), ()), destination_settings=None):
        self.link = link
        self.machines = []
        for each, more in zip((settings, destination_settings or settings.copy()), plugins, strict=True):
            manager = PluginManager(prefer={link.spec.name: "link"})
            manager.register(link, name="link")
            for plugin in more:
                manager.register(plugin)
            self.machines.append(build(settings=each, plugins=manager))
        self.source, self.destination = self.machines

    def migrate(self, uri):
        incoming = self.destination.incoming(uri)
        return incoming, self.source.migrate(incoming.uri)

    def run(self, uri):
        incoming, outgoing = self.migrate(uri)
        settle(outgoing, LONG)
        settle(incoming, LONG)
        return incoming, outgoing


@pytest.fixture
def two():
    """`two(build, settings, …)`: machines over `Link`, closed behind the test."""
    made = []

    def make(build, settings, link=None, **more):
        made.append(Two(build, settings, link or Link(), **more))
        return made[-1]

    yield make
    for pair in made:
        for machine in pair.machines:
            machine.close()


@pytest.fixture
def settings(settings):
    settings.capabilities.multifd = True
    settings.limits.header_timeout = 5.0
    return settings


@pytest.fixture
def build(churning):
    return churning({"a": 300, "b": 4})


def uri_of(scheme, folder):
    return "tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{folder}/link"


def arrived(pair, build, incoming, outgoing):
    """The machine has moved and runs on, with every byte as it was."""
    assert (outgoing.error, incoming.error) == (None, None)
    build.destination.wait_steps(3)
    pair.destination.stop()
    build.destination.check()
    return True


def stays(pair, build, incoming, outgoing):
    """The source's guest runs, and the destination is as it was before."""
    assert outgoing.status is MigrationStatus.FAILED
    assert outgoing.info.ownership == "owner"
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(3)
    assert incoming.error is not None
    assert not any(block.view.any() for block in build.destination.blocks.values())
    return True


# --------------------------------------------------------------------------------------------------- what moves


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_a_machine_moves_while_it_writes(two, build, settings, tmp_path, scheme, count):
    settings.parameters.multifd_channels = count
    pair = two(build, settings, Link(scheme))
    pair.source.start()
    incoming, outgoing = pair.run(uri_of(scheme, tmp_path))
    assert arrived(pair, build, incoming, outgoing)
    assert len(pair.link.channels) == 1 + count
    info = outgoing.info
    assert info.ram.multifd_bytes >= 150 * 4096
    assert info.ram.transferred > info.ram.multifd_bytes
    assert info.ram.as_qmp()["multifd-bytes"] == info.ram.multifd_bytes
    assert info.ram.normal + info.ram.duplicate >= 304


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("machine", MODES)
def test_each_method_in_each_mode(two, churning, settings, tmp_path, machine, method):
    build = churning({"a": 300, "b": 4}, name=machine)
    settings.parameters.multifd_compression = method
    pair = two(build, settings, Link("unix"))
    pair.source.start()
    assert arrived(pair, build, *pair.run(uri_of("unix", tmp_path)))


class Rounds:
    """Go on for some rounds, however little is left."""

    def __init__(self, rounds):
        self.rounds = rounds

    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        return round.number >= self.rounds


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("machine", MODES)
def test_pages_come_again_in_many_rounds(two, churning, settings, tmp_path, machine, method):
    """A guest that never rests, so that pages of one round are on their way while the next one sends them again."""
    build = churning({"a": 600}, name=machine, rest=0.0)
    settings.parameters.multifd_channels = 3
    settings.parameters.multifd_compression = method
    pair = two(build, settings, Link("unix"), plugins=((Rounds(4),), ()))
    pair.source.start()
    incoming, outgoing = pair.run(uri_of("unix", tmp_path))
    assert arrived(pair, build, incoming, outgoing)
    assert outgoing.info.rounds >= 4


@pytest.mark.parametrize("machine", MODES)
def test_channels_that_neither_gather_nor_scatter(two, churning, settings, tmp_path, machine):
    build = churning({"a": 300}, name=machine)
    pair = two(build, settings, Link(plain=False))
    pair.source.start()
    assert arrived(pair, build, *pair.run("tcp:127.0.0.1:0"))


def test_inside_of_one_process(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    assert arrived(pair, build, *pair.run())


def test_without_a_way_back(make_pair, build, settings):
    """Nobody says that the lanes are through: the source waits until they have sent, the destination for SYNCs."""
    pair = make_pair(build, duplex=False, settings=settings)
    pair.source.start()
    assert arrived(pair, build, *pair.run(start=True))


def test_a_codec_of_strangers_needs_a_way_back(make_pair, build, settings):
    settings.parameters.multifd_compression = "invert"
    pair = make_pair(build, duplex=False, settings=settings, plugins=[Stranger()])
    pair.source.start()
    with pytest.raises(MigrationRefused, match="'invert' needs a way back"):
        pair.source.migrate("memory:pair")


def test_crumbs(make_pair, churning, settings):
    build = churning({"a": 20})
    settings.parameters.multifd_compression = "zlib"
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(crumbs=7)
    pair.source.start()
    assert arrived(pair, build, *pair.run())


def test_a_limit_of_bandwidth_counts_lanes(two, build, settings):
    settings.parameters.max_bandwidth = 4 << 20
    pair = two(build, settings)
    pair.source.start()
    incoming, outgoing = pair.run("tcp:127.0.0.1:0")
    assert arrived(pair, build, incoming, outgoing)
    assert outgoing.info.bandwidth < 40 << 20, "600 KiB at 4 MiB/s, of which the first tenth of a second is granted"


def test_with_a_uuid(two, churning, settings):
    build = churning({"a": 20}, uuid="00112233-4455-6677-8899-aabbccddeeff")
    pair = two(build, settings)
    pair.source.start()
    assert arrived(pair, build, *pair.run("tcp:127.0.0.1:0"))


def test_of_another_machine(two, churning, settings):
    build = churning({"a": 20}, source={"uuid": "00112233-4455-6677-8899-aabbccddeeff"})
    pair = two(build, settings)
    pair.destination.settings.limits.header_timeout = 0.3
    pair.source.start()
    incoming, outgoing = pair.run("tcp:127.0.0.1:0")
    assert stays(pair, build, incoming, outgoing)
    assert isinstance(incoming.error, StreamError)
    assert "0 of 2 lanes have come within 0.3 s; another was hung up on: lane" in str(incoming.error)
    assert "00112233445566778899aabbccddeeff" in str(incoming.error)


def test_the_plan_names_the_codec(two, build, settings):
    plans = []

    class Judge:
        @hookimpl
        def whimbrel_check_migration(self, plan):
            plans.append(plan)
            return []

    settings.parameters.multifd_compression = "zstd"
    pair = two(build, settings, plugins=((Judge(),), ()))
    pair.source.start()
    pair.run("tcp:127.0.0.1:0")
    assert plans[0].codecs == ("zstd",)
    assert "multifd" in plans[0].capabilities


# ------------------------------------------------------------------------------------------- what is refused at once


@pytest.mark.parametrize("uri", ["exec:cat > /dev/null", "file:nowhere"])
def test_transports_that_connect_once(two, build, settings, uri):
    pair = two(build, settings)
    pair.source.start()
    with pytest.raises(MigrationRefused, match="makes one connection only"):
        pair.source.migrate(uri, handover="proof")
    with pytest.raises(ConfigError, match="makes one connection only"):
        pair.destination.incoming(uri)
    assert pair.source.run_state is RunState.RUNNING
    assert pair.destination.run_state is RunState.PRELAUNCH


@pytest.mark.parametrize("name", ["lz77", "xbzrle"])
def test_codecs_that_lanes_cannot_use(two, build, settings, name):
    settings.parameters.multifd_compression = name
    pair = two(build, settings)
    pair.source.start()
    refusal = f"Parameter 'multifd-compression' does not accept value '{name}'"
    with pytest.raises(MigrationRefused, match=refusal):
        pair.source.migrate("tcp:127.0.0.1:1")
    with pytest.raises(ConfigError, match=refusal):
        pair.destination.incoming("tcp:127.0.0.1:0")


# ----------------------------------------------------------------------------------------- both ends must be set alike


@pytest.mark.parametrize(("source", "destination"), [(1, 2), (2, 1), (7, 2), (2, 0), (0, 2)])
@pytest.mark.parametrize("machine", MODES)
def test_another_number_at_the_other_end(two, churning, settings, machine, source, destination):
    build = churning({"a": 60}, name=machine)
    there = settings.copy()
    there.limits.header_timeout = 0.3
    for each, count in ((settings, source), (there, destination)):
        each.capabilities.multifd = count > 0
        each.parameters.multifd_channels = max(count, 1)
    pair = two(build, settings, destination_settings=there)
    pair.source.start()
    incoming, outgoing = pair.run("tcp:127.0.0.1:0")
    assert stays(pair, build, incoming, outgoing)
    if 0 < source < destination:
        assert "multifd-channels" in str(incoming.error)
    if not source:
        assert "0 of 2 lanes have come within 0.3 s" in str(incoming.error)


def test_a_lane_where_none_is_expected(two, build, settings, caplog):
    settings.capabilities.multifd = False
    pair = two(build, settings)
    pair.source.start()
    incoming = pair.destination.incoming("tcp:127.0.0.1:0")
    with connected(incoming.uri) as lane:
        lane.sendall(multifd.encode_init(multifd.Init(bytes(16), 0)))
        assert hung_up(lane)
    assert "it is a lane of multifd; switch the capability multifd on here too" in caplog.text
    outgoing = pair.source.migrate(incoming.uri)
    settle(outgoing, LONG)
    settle(incoming, LONG)
    assert arrived(pair, build, incoming, outgoing)


@pytest.mark.parametrize(("source", "destination"), [("none", "zlib"), ("zlib", "none"), ("zstd", "zlib")])
def test_another_method_at_the_other_end(two, build, settings, source, destination):
    there = settings.copy()
    settings.parameters.multifd_compression = source
    there.parameters.multifd_compression = destination
    pair = two(build, settings, destination_settings=there)
    pair.source.start()
    incoming, outgoing = pair.run("tcp:127.0.0.1:0")
    assert stays(pair, build, incoming, outgoing)
    assert f"is {source}, expected {destination}" in str(incoming.error)
    assert "lane" in incoming.error.place.section
    assert isinstance(outgoing.error, PeerRefused | ChannelLost)


# ------------------------------------------------------------------------------------------------ a codec of strangers


class Inverting(Codec):
    """Turns every bit round; no compression, but nobody could take it for the pages."""

    def encode(self, pages):
        return (~pages).tobytes()

    def decode(self, data, into):
        if memoryview(data).nbytes != into.nbytes:
            raise StreamError("not as many bytes as pages")
        into[...] = ~np.frombuffer(data, np.uint8).reshape(into.shape)


class Stranger:
    @hookimpl
    def whimbrel_codecs(self):
        return [CodecSpec(name="invert", summary="", create=Inverting, create_for_lane=lambda parameters: Inverting())]


@pytest.mark.parametrize("machine", MODES)
def test_a_codec_that_both_ends_have(two, churning, settings, machine):
    build = churning({"a": 300}, name=machine)
    settings.parameters.multifd_compression = "invert"
    pair = two(build, settings, plugins=((Stranger(),), (Stranger(),)))
    pair.source.start()
    assert arrived(pair, build, *pair.run("tcp:127.0.0.1:0"))


@pytest.mark.parametrize("other", ["none", "zstd", "off"])
def test_a_codec_that_the_destination_is_not_set_to(two, build, settings, other):
    there = settings.copy()
    settings.parameters.multifd_compression = "invert"
    there.capabilities.multifd = other != "off"
    there.parameters.multifd_compression = "none" if other == "off" else other
    pair = two(build, settings, plugins=((Stranger(),), ()), destination_settings=there)
    pair.source.start()
    incoming, outgoing = pair.run("tcp:127.0.0.1:0")
    assert stays(pair, build, incoming, outgoing)
    assert isinstance(outgoing.error, IncompatibleError | ChannelError)
    if other != "off":
        assert "not agreed to multifd-compression 'invert'" in str(outgoing.error)
        assert isinstance(incoming.error, IncompatibleError)
        assert "multifd-compression 'invert'" in str(incoming.error)
    assert outgoing.info.ram.multifd_bytes == 0, "not a byte of RAM has moved"


def test_a_codec_that_nobody_answers_for(two, build, settings):
    settings.limits.idle_timeout = 0.2
    settings.parameters.multifd_compression = "invert"
    pair = two(build, settings, plugins=((Stranger(),), ()))
    pair.source.start()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        outgoing = pair.source.migrate(f"tcp:127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(ChannelLost, match="no byte and brought no answer"):
            outgoing.wait(LONG)
    assert outgoing.info.ram.multifd_bytes == 0
    assert pair.source.run_state is RunState.RUNNING


def test_a_codec_that_the_source_is_not_set_to(two, build, settings):
    there = settings.copy()
    there.parameters.multifd_compression = "invert"
    pair = two(build, settings, plugins=((), (Stranger(),)), destination_settings=there)
    pair.source.start()
    incoming, outgoing = pair.run("tcp:127.0.0.1:0")
    assert stays(pair, build, incoming, outgoing)
    assert "the source names no codec for lanes, and it is 'invert' here" in str(incoming.error)


def test_a_codec_with_a_bug(two, build, settings):
    class Broken(Inverting):
        def encode(self, pages):
            raise ZeroDivisionError("a bug of the codec's")

    class Other:
        @hookimpl
        def whimbrel_codecs(self):
            return [CodecSpec(name="invert", summary="", create=Broken, create_for_lane=lambda parameters: Broken())]

    settings.parameters.multifd_compression = "invert"
    pair = two(build, settings, plugins=((Other(),), (Stranger(),)))
    pair.source.start()
    incoming, outgoing = pair.run("tcp:127.0.0.1:0")
    assert stays(pair, build, incoming, outgoing)
    assert "a bug of the codec's" in str(outgoing.error)


# --------------------------------------------------------------------------------------------------- links that break

CUTS = (0, 10, 63, 64, 65, 1000, 64 + 1344, 64 + 1344 + 700, 40_000, 250_000)


@pytest.mark.parametrize("orderly", [False, True])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("machine", ["pc-i440fx-7.2", "churning"])
def test_a_lane_is_cut(two, churning, settings, machine, cut, orderly):
    """Both of them are, for a page goes over whichever is free."""
    build = churning({"a": 300, "b": 4}, name=machine)
    pair = two(build, settings)
    there = pair.destination.settings.limits
    there.header_timeout = 0.5
    pair.link.faults = [None, *[Faults(cut_sent=cut, orderly=orderly)] * 2]
    pair.source.start()
    incoming, outgoing = pair.run("tcp:127.0.0.1:0")
    assert stays(pair, build, incoming, outgoing)
    pair.link.faults, pair.link.channels = [], []
    assert arrived(pair, build, *pair.run("tcp:127.0.0.1:0"))


@pytest.mark.parametrize("cut", [0, 4, 8, 60, 150, 400])
@pytest.mark.parametrize("machine", ["pc-i440fx-7.2", "churning"])
def test_the_main_channel_is_cut(two, churning, settings, machine, cut):
    build = churning({"a": 300}, name=machine)
    pair = two(build, settings)
    pair.destination.settings.limits.header_timeout = 0.5
    pair.link.faults = [Faults(cut_sent=cut)]
    pair.source.start()
    incoming, outgoing = pair.migrate("tcp:127.0.0.1:0")
    settle(outgoing, LONG)
    if cut < len(skeleton.HEADER):
        assert incoming.status is MigrationStatus.SETUP, "nobody has come yet"
        assert incoming.cancel()
    settle(incoming, LONG)
    assert stays(pair, build, incoming, outgoing)


@pytest.mark.parametrize("stalled", [0, 1])
def test_cancel_while_a_link_stands_still(two, build, settings, stalled):
    pair = two(build, settings)
    pair.link.faults = [None, None]
    pair.link.faults[stalled] = Faults(stall_sent=200 if stalled == 0 else 20_000)
    settings.parameters.multifd_channels = pair.destination.settings.parameters.multifd_channels = 1
    pair.source.start()
    incoming, outgoing = pair.migrate("tcp:127.0.0.1:0")
    while len(pair.link.channels) <= stalled:
        assert not outgoing.status.finished
    assert pair.link.channels[stalled].stalled.wait(LONG)
    assert outgoing.cancel()
    with pytest.raises(MigrationCancelled):
        outgoing.wait(LONG)
    settle(incoming, LONG)
    assert isinstance(incoming.error, ChannelError)
    build.source.wait_steps(3)
    assert not any(block.view.any() for block in build.destination.blocks.values())


def test_cancel_at_the_destination(two, build, settings):
    settings.parameters.multifd_channels = 1
    pair = two(build, settings)
    pair.link.faults = [None, Faults(stall_sent=20_000)]
    pair.source.start()
    incoming, outgoing = pair.migrate("tcp:127.0.0.1:0")
    while len(pair.link.channels) <= 1:
        assert not outgoing.status.finished
    assert pair.link.channels[1].stalled.wait(LONG)
    assert incoming.cancel()
    with pytest.raises(MigrationCancelled):
        incoming.wait(LONG)
    settle(outgoing, LONG)
    assert outgoing.error is not None
    build.source.wait_steps(3)
    assert not any(block.view.any() for block in build.destination.blocks.values())


def test_flipped_bits_in_headers(two, churning, settings):
    """Whatever of a lane's first header is damaged: the machine arrives whole, or it stays whole."""
    for at in (64, 71, 72, 77, 82, 86, 90, 98, 130, 131, 386, 387):
        build = churning({"a": 300})
        pair = two(build, settings)
        pair.destination.settings.limits.header_timeout = 0.5
        pair.link.faults = [None, Faults(flip_sent={at: 0x80})]
        pair.source.start()
        incoming, outgoing = pair.run("tcp:127.0.0.1:0")
        assert outgoing.error is None or stays(pair, build, incoming, outgoing), at
        if outgoing.error is not None:
            assert isinstance(incoming.error, MigrationError)


# -------------------------------------------------------------------------------------------------------- strangers


@contextmanager
def connected(uri):
    host, _, port = uri.removeprefix("tcp:").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=LONG) as link:
        yield link


def test_strangers_who_say_nothing_keep_nobody_waiting(two, build, settings):
    pair = two(build, settings)
    pair.source.start()
    incoming = pair.destination.incoming("tcp:127.0.0.1:0")
    with connected(incoming.uri) as silent, connected(incoming.uri) as gone:
        gone.shutdown(socket.SHUT_RDWR)
        outgoing = pair.source.migrate(incoming.uri)
        settle(outgoing, LONG)
        settle(incoming, LONG)
        assert arrived(pair, build, incoming, outgoing)
        assert silent.recv(1) == b"", "he was hung up on"


class Elsewhere(Link):
    """The lanes of the source go to a listener that swallows them; the main channel goes where it should."""

    def __init__(self):
        super().__init__()
        manager = PluginManager()
        self.listener = manager.transport("tcp").create().listen("127.0.0.1:0")
        self.connector = resolve(self.listener.uri, manager).connector(Settings())
        self.swallowing = []

    def connected(self, channel):
        if self.channels:
            channel.close()
            channel = self.connector.connect(lanes_patience())
            self.swallowing.append(threading.Thread(target=self.swallow))
            self.swallowing[-1].start()
        self.channels.append(channel)
        return channel

    def swallow(self):
        with closing(self.listener.accept(lanes_patience())) as channel, suppress(ChannelError):
            while channel.recv_into(bytearray(1 << 20)):
                pass

    def close(self):
        for thread in self.swallowing:
            thread.join(LONG)
        self.listener.close()


@pytest.mark.parametrize("token", [b"", multifd.token_of(b"x" * 16)])
def test_lanes_that_are_all_of_a_stranger(two, build, settings, token):
    """He has said the machine's UUID and has taken every place; the source's own lanes lead nowhere."""
    there = settings.copy()
    there.limits.strangers = 8
    with closing(Elsewhere()) as link:
        pair = two(build, settings, link, destination_settings=there)
        pair.source.start()
        incoming = pair.destination.incoming("tcp:127.0.0.1:0")
        with connected(incoming.uri) as first, connected(incoming.uri) as second:
            for number, his in enumerate((first, second)):
                his.sendall(lane(number, token=token) + syncs(64))
            outgoing = pair.source.migrate(incoming.uri)
            settle(outgoing, LONG)
            settle(incoming, LONG)
            assert stays(pair, build, incoming, outgoing)
            assert incoming.error.message == "the lanes are not of the attempt that the main channel is of"
            assert outgoing.info.downtime is None, "the guest was never stopped"


class Wait:
    """A gathering of a source with two lanes, on a thread of its own."""

    def __init__(self, **more):
        self.listener = PluginManager().transport("tcp").create().listen("127.0.0.1:0")
        self.gathered = self.error = None
        about = {"lanes": 2, "uuid": bytes(16), "seconds": LONG, "strangers": 3, **more}
        self.gathering = lanes_room.Gathering(self.listener, lanes_patience(), **about)
        self.thread = threading.Thread(target=self.run)
        self.links = []

    def run(self):
        try:
            self.gathered = self.gathering.run()
        except MigrationError as exc:
            self.error = exc

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.listener.close()
        self.thread.join(LONG)
        if self.gathered is not None:
            self.gathered.bundle().close()
        for link in self.links:
            link.close()

    def connect(self, said=b""):
        host, _, port = self.listener.uri.removeprefix("tcp:").rpartition(":")
        link = socket.create_connection((host, int(port)), timeout=LONG)
        self.links.append(link)
        link.sendall(said)
        return link

    def came(self):
        """Whether the source has, of whose three connections each has said `b"+"` behind what it is."""
        self.thread.join(LONG)
        assert self.error is None
        for channel in (self.gathered.main, *self.gathered.lanes):
            first = bytearray(1)
            assert channel.recv_into(first) == 1
            assert bytes(first) == b"+"
        return True


def hung_up(link):
    try:
        return link.recv(1) == b""
    except ConnectionResetError:
        return True


def syncs(count):
    """The packets of a lane that has had nothing to bring in so many rounds."""
    stage, packets = multifd.PacketStage(), bytearray()
    for number in range(count):
        stage.sync(number)
        packets += stage.header.tobytes()
    return packets


def lane(number, uuid=bytes(16), token=b""):
    return multifd.encode_init(multifd.Init(uuid, number, token))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "it begins with 0x47455420"),
        (b"\x16\x03\x01\x02\0\1", "it speaks TLS: both ends need tls-creds"),
        (b"WHMB" + bytes(28), "it begins with 0x57484d42"),
        (skeleton.HEADER, "another source has come before it"),
        (lane(0), "lane 0 has come twice"),
        (lane(1, b"x" * 16), "UUID 7878"),
        (b"\x11\x22\x33\x44\0\0\0\2" + bytes(56), "a lane has version 2"),
    ],
)
def test_strangers_who_say_something_wrong(said, reason, caplog):
    with Wait() as wait:
        wait.connect(skeleton.HEADER + b"+")
        wait.connect(lane(0) + b"+")
        while wait.gathering._main is None or not any(wait.gathering._lanes.values()):
            assert wait.thread.is_alive()
        stranger = wait.connect(said)
        assert hung_up(stranger)
        assert reason in caplog.text
        wait.connect(lane(1) + b"+")
        assert wait.came()


@pytest.mark.parametrize("said", [b"", b"QE", skeleton.HEADER[:7], lane(0)[:63]])
def test_strangers_who_say_not_enough(said, caplog):
    with Wait(seconds=0.2) as wait:
        silent, gone = wait.connect(said), wait.connect(said)
        gone.shutdown(socket.SHUT_RDWR)
        assert hung_up(silent)
        while "no stream header within 0.2 s; [limits] header-timeout says how long to wait" not in caplog.text:
            assert wait.thread.is_alive()
        while "it hung up before it said what it is" not in caplog.text:
            assert wait.thread.is_alive()
        for bytes_ in (lane(1), skeleton.HEADER, lane(0)):
            wait.connect(bytes_ + b"+")
        assert wait.came()


def test_a_lane_that_nobody_comes_for(caplog):
    with Wait(seconds=0.2) as wait:
        assert hung_up(wait.connect(lane(0) + b"-"))
        assert "no main channel has come within 0.2 s" in caplog.text
        for bytes_ in (lane(0), skeleton.HEADER, lane(1)):
            wait.connect(bytes_ + b"+")
        assert wait.came()


@pytest.mark.parametrize("said", [(lane(2), skeleton.HEADER), (skeleton.HEADER, lane(2))])
def test_a_source_with_more_lanes(said):
    """Its settings are wrong, and a QEMU might stand still for good if it had but that lane hung up on."""
    with Wait() as wait:
        for bytes_ in said:
            wait.connect(bytes_)
        wait.thread.join(LONG)
        assert "lane 2 has come, expected 0 to 1; multifd-channels must be the same" in str(wait.error)


def test_lanes_of_two_sources_are_not_mixed():
    """Whoever waits for a machine that it does not know yet takes the lanes that are all of one."""
    with Wait(uuid=None) as wait:
        for bytes_ in (lane(0, b"y" * 16) + b"-", skeleton.HEADER + b"+", lane(0) + b"+", lane(1) + b"+"):
            wait.connect(bytes_)
        assert wait.came()


@pytest.mark.parametrize("first", [lane(1, token=b"!" * 32), lane(1)])
def test_a_lane_of_another_attempt_takes_no_place(first):
    with Wait() as wait:
        wait.connect(first + b"-")
        for number in (0, 1):
            wait.connect(lane(number, token=b"t" * 32) + b"+")
        wait.connect(skeleton.HEADER + b"+")
        assert wait.came()
        assert wait.gathered.token == b"t" * 32


def test_a_word_about_ownership_while_a_source_is_waited_for():
    word = handover.encode(handover.Word(handover.WordKind.COMMIT, b"m" * 16, 7))
    heard = []

    def on_word(channel, said):
        heard.append(said)
        channel.send(b"answer")
        channel.close()

    with Wait(on_word=on_word) as wait:
        for part in (word, word):
            asking = wait.connect(part)
            assert asking.recv(6) == b"answer"
            assert hung_up(asking)
        for bytes_ in (skeleton.HEADER, lane(0), lane(1)):
            wait.connect(bytes_ + b"+")
        assert wait.came()
    assert heard == [word, word]


def test_a_word_that_fails_ends_nothing(caplog):
    def on_word(channel, said):
        raise ZeroDivisionError("a bug")

    with Wait(lanes=0, on_word=on_word) as wait:
        assert hung_up(wait.connect(b"WHMB" + bytes(28)))
        assert "came to nothing: a bug" in caplog.text
        wait.connect(skeleton.HEADER + b"+")
        assert wait.came()


def test_too_many_strangers(caplog):
    """Three may be there beside the source's own three connections; a further one is hung up on at once."""
    with Wait() as wait:
        silent = [wait.connect() for _ in range(6)]
        assert hung_up(wait.connect())
        assert "6 connections are here that may be the source's" in caplog.text
        for link in silent[:3]:
            link.close()
        while len(wait.gathering._readers) > 3:
            assert wait.thread.is_alive()
        for bytes_ in (lane(0), skeleton.HEADER, lane(1)):
            wait.connect(bytes_ + b"+")
        assert wait.came()
        assert all(map(hung_up, silent[3:]))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_connections_in_any_order(order):
    """The main channel is number 0, lanes are 1 and 2 here."""
    said = [skeleton.HEADER, lane(0), lane(1)]
    with Wait() as wait:
        for number in order:
            wait.connect(said[number] + bytes([number]))
        wait.thread.join(LONG)
        assert wait.gathered.head == skeleton.HEADER
        for number, channel in enumerate((wait.gathered.main, *wait.gathered.lanes)):
            first = bytearray(1)
            assert channel.recv_into(first) == 1
            assert first[0] == number


def lanes_patience():
    from whimbrel.abc import Patience

    return Patience(LONG)


# ------------------------------------------------------------------------------------------------------ what comes late


class Late(ChannelWrapper):
    """A lane whose first sends wait until somebody lets them go."""

    def __init__(self, inner, gate):
        super().__init__(inner)
        self.gate = gate
        self.sends = 0

    def send(self, data):
        self.sends += 1
        if self.sends > 1:
            assert self.gate.wait(LONG)
        super().send(data)


@pytest.mark.parametrize("machine", MODES)
def test_the_proof_waits_for_the_slowest_lane(two, churning, settings, machine):
    build = churning({"a": 300}, name=machine)
    gate = threading.Event()
    link = Link()
    plain = link.connected

    def connected(channel):
        channel = plain(channel)
        return Late(channel, gate) if len(link.channels) == 3 else channel

    link.spec.create().on_connect = connected
    pair = two(build, settings, link)
    pair.source.start()
    incoming, outgoing = pair.migrate("tcp:127.0.0.1:0")
    with pytest.raises(TimeoutError):
        outgoing.wait(0.2)
    assert incoming.info.ownership == "loading"
    gate.set()
    settle(outgoing, LONG)
    settle(incoming, LONG)
    assert arrived(pair, build, incoming, outgoing)


def test_what_the_main_channel_holds_back_is_sent_before_anybody_waits_for_lanes(two, churning, settings, tmp_path):
    """Bodies of half a MiB, far more of them than the queue and the sockets hold: each lane waits for each EOS."""

    class Slowly:
        @hookimpl
        def whimbrel_choose_switchover(self, round):  # noqa: A002
            return True

    build = churning({"a": 20_000}, name="pc-i440fx-7.2")
    settings.parameters.max_bandwidth = 400 << 20
    pair = two(build, settings, Link("unix"), plugins=((Slowly(),), ()))
    pair.source.start()
    assert arrived(pair, build, *pair.run(uri_of("unix", tmp_path)))
