"""Every limit on what a peer may make us take: at the limit, one past it, and at the largest numbers there are."""

from __future__ import annotations

import struct
import threading
import zlib

import numpy as np
import pytest
import zstandard

from whimbrel import PluginManager, Settings, vmstate
from whimbrel.abc import Patience, SectionKind
from whimbrel.capture.taking import Capture
from whimbrel.errors import ChannelError, ConfigError, IncompatibleError, StreamError
from whimbrel.migration.lanes.arriving import Arriving
from whimbrel.migration.lanes.gathering import Gathering
from whimbrel.migration.lanes.method import Method
from whimbrel.settings import Limits, Parameters
from whimbrel.stream import Replay
from whimbrel.wire import commands, description, multifd, order, ram, return_path, skeleton
from whimbrel_codecs.xbzrle import XbzrleCodec
from whimbrel_codecs.zlib import ZlibCodec, ZlibLaneCodec
from whimbrel_codecs.zstd import WINDOW, ZstdLaneCodec

from ..capture.streams import FROM_2_4, Device, small
from .conftest import BLOCKS, PAGE, at_most, fed, head, ram_part, ram_start, section, word

U32_MAX, U64_MAX = 2**32 - 1, 2**64 - 1
MIB = 1 << 20


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("sections", 1, 1_000_000),
        ("blocks", 1, 1_000_000),
        ("description", 4096, 4 << 30),
        ("device-section", 4096, 4 << 30),
        ("device-sections", 4096, 4 << 30),
        ("zstd-window", 1024, 2 << 30),
    ],
)
def test_a_limit_itself_has_bounds(name, low, high):
    for value in (low, high):
        limits = Limits()
        limits.set(name, value)
        assert limits.as_dict()[name] == value
    for value in (low - 1, high + 1, U64_MAX, -1):
        with pytest.raises(ConfigError, match=name):
            Limits().set(name, value)


# ----------------------------------------------------------------------------------------------------------------- RAM


def test_ram_is_exactly_the_receivers(loading):
    only_ram = head(ram_start(), section(SectionKind.END, ram.EOS_RECORD), b"\0")
    assert "lacks what this machine has" in str(loading.load(only_ram))  # all RAM was taken
    for size in (4 * PAGE, 2 * PAGE):
        blocks = [ram.ListedBlock("a", size), BLOCKS[1]]
        loading.refuses(head(ram_start(blocks)), IncompatibleError, f"its 'a' is {size} bytes long")
    loading.refuses(head(ram_start(BLOCKS[:1])), IncompatibleError, "it lacks 'b'")
    loading.refuses(head(ram_start([*BLOCKS, ram.ListedBlock("c", PAGE)])), IncompatibleError, "has 'c'")


@pytest.mark.parametrize("size", [2**56 + PAGE, 2**63, 2**64 - PAGE])
def test_ram_of_a_size_that_no_machine_has(loading, size):
    with at_most(4 * MIB):
        body = word(size | 4) + b"\x01a" + word(size)
        error = loading.load(head(section(SectionKind.START, body + ram.EOS_RECORD)))
    assert type(error) is StreamError


@pytest.mark.parametrize("page", [3, 2**32 - 1, 2**52 - 1])
def test_a_page_behind_the_end_of_its_block(loading, page):
    for flags, payload in ((0x08, bytes(PAGE)), (0x02, b"\1"), (0x40, b"\1\0\3\0\1x")):
        record = word(page << 12 | flags) + b"\x01a" + payload
        loading.refuses(head(ram_start(), ram_part(record)), StreamError, "outside of block 'a'")


def test_the_last_page_of_a_block_is_inside(loading):
    good = head(ram_start(), ram_part(word(2 << 12 | 0x08) + b"\x01a" + b"\7" * PAGE))
    assert isinstance(loading.load(good), ChannelError)  # nothing is wrong but the end


def test_blocks_are_counted():
    def listed(count):
        blocks = [ram.ListedBlock(f"b{number}", PAGE) for number in range(count)]
        return fed(ram.parse_block_list(total_limit=1 << 40, blocks_limit=3), ram.block_list(blocks))

    assert len(listed(3)) == 3
    with pytest.raises(StreamError, match="more than 3 RAM blocks"):
        listed(4)


# ---------------------------------------------------------------------------------------------- sections, ids and names


def test_sections_are_counted():
    sections = order.SectionOrder(3)
    for number in (0, U32_MAX, 7):  # any id is an id
        sections.accept(SectionKind.FULL, skeleton.SectionHeader(number, "d", 0, 1))
    with pytest.raises(StreamError, match="more than 3 sections"):
        sections.accept(SectionKind.FULL, skeleton.SectionHeader(8, "d", 0, 1))


def test_a_section_comes_once(loading):
    start = ram_start()
    loading.refuses(head(start, start), StreamError, "may not come now")
    again = section(SectionKind.START, b"", number=2)
    loading.refuses(head(start, again), StreamError, "came twice")
    loading.refuses(head(section(SectionKind.PART, b"", number=U32_MAX)), StreamError, "may not come now")


@pytest.mark.parametrize("length", [1, 255])
def test_names_up_to_255_bytes(length):
    name = "x" * length
    header = skeleton.SectionHeader(1, name, 0, 1)
    data = skeleton.section_header(SectionKind.FULL, header)[1:]
    assert fed(skeleton.parse_section_header(SectionKind.FULL), data) == header
    config = skeleton.Configuration(name)
    assert fed(skeleton.parse_configuration(), skeleton.configuration(config)[1:] + b"\0") == config


@pytest.mark.parametrize("length", [0, 256, 2**31, U32_MAX])
def test_a_machine_name_of_another_length(length):
    with at_most(3 * MIB), pytest.raises(StreamError, match=f"name is {length} bytes long"):
        fed(skeleton.parse_configuration(), struct.pack(">I", length) + b"x" * 300)


@pytest.mark.parametrize("name", [b"\xff", b"a\0", b"\x7f", b"caf\xc3\xa9", b"\n"])
def test_names_are_printable_ascii_and_no_error_shows_the_bytes(name):
    secret = b"guest secret"
    data = struct.pack(">IB", 1, len(secret + name)) + secret + name + bytes(8)
    with pytest.raises(StreamError, match="expected printable ASCII") as caught:
        fed(skeleton.parse_section_header(SectionKind.FULL), data)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("count", "good"), [(64, True), (65, False), (U32_MAX, False)])
def test_capabilities_of_a_configuration_are_counted(count, good):
    data = b"\0\0\0\1m\x05\x1aconfiguration/capabilities\0\0\0\1" + struct.pack(">I", count) + b"\x01c" * 64 + b"\0"
    if good:
        assert len(fed(skeleton.parse_configuration(), data).capabilities) == 64
        return
    with pytest.raises(StreamError, match=f"lists {count} capabilities"):
        fed(skeleton.parse_configuration(), data)


# ---------------------------------------------------------------------------------------------------- device sections


def nested(levels):
    inner = vmstate.VMStateDescription("d0", 1, fields=[vmstate.uint8("x")])
    for level in range(1, levels + 1):
        inner = vmstate.VMStateDescription(f"d{level}", 1, fields=[vmstate.uint8("x"), vmstate.struct("s", inner)])
    return inner


def test_structs_nest_16_deep():
    assert nested(16).depth == vmstate.MAXIMUM_NESTING == 16
    with pytest.raises(ConfigError, match="nested 17 deep"):
        nested(17)


def test_subsections_nest_16_deep():
    def chain(levels, name="s"):
        inside = [chain(levels - 1, f"{name}/x")] if levels else []
        return vmstate.VMStateDescription(name, 1, fields=[vmstate.uint8("x")], subsections=inside)

    assert chain(16).depth == 16
    with pytest.raises(ConfigError, match="nested 17 deep"):
        chain(17)


@pytest.mark.parametrize("size", [16 * MIB + 1, U32_MAX, U64_MAX])
def test_one_device_declares_16_mib_at_most(size):
    def declared(size):
        return vmstate.VMStateDescription("big", 1, fields=[vmstate.buffer("data", size=size)])

    assert declared(16 * MIB).maximum_size == 16 * MIB
    with pytest.raises(ConfigError):
        declared(size)


class Counted:
    def __init__(self):
        self.count, self.data = 0, b""


COUNTED = vmstate.VMStateDescription(
    "counted", 1, fields=[vmstate.uint64("count"), vmstate.buffer("data", count="count", maximum=100)]
)


@pytest.mark.parametrize("count", [101, U32_MAX, 2**63, U64_MAX])
def test_a_count_is_held_against_its_declaration(count):
    loaded = fed(vmstate.parse(COUNTED, 1, Counted()), word(100) + b"x" * 100 + b"\x7e")
    assert loaded.values["count"] == 100
    parser = vmstate.parse(COUNTED, 1, Counted())
    assert next(parser) == 8
    with pytest.raises(StreamError, match=f"at most 100, got {count}"):
        parser.send(memoryview(word(count)))  # and not a byte more was asked for


@pytest.mark.parametrize("extra", [0, 1, MIB])
def test_a_captured_device_section_has_a_limit(extra):
    settings = Settings()
    settings.limits.device_section = 8192
    stream = small(FROM_2_4).full(Device("long", 50, bytes(8192 + extra))).finish()
    capture = Capture(Replay(stream), settings=settings, plugins=PluginManager(), max_ram=MIB)
    if not extra:
        capture.run().close()
        return
    with pytest.raises((StreamError, ChannelError)) as caught:
        capture.run()
    assert caught.value.place.section == "devices" or "long" in str(caught.value)


# ------------------------------------------------------------------------------------------------------ the description


@pytest.mark.parametrize(("length", "good"), [(4096, True), (4097, False), (2**31, False), (U32_MAX, False)])
def test_the_description_is_skipped_unread(length, good):
    data = b"\x06" + struct.pack(">I", length) + b"\xff{" * 2048
    if good:
        assert fed(description.parse_and_skip(4096), data) == 4096
        return
    with at_most(3 * MIB), pytest.raises(StreamError, match=f"{length} bytes long, at most 4096"):
        fed(description.parse_and_skip(4096), data)


def text(devices):
    return b'{"page_size": 4096, "devices": [' + devices + b"]}"


def device(inside):
    return b'{"name": "d", "instance_id": 0, "fields": [], "x": ' + inside + b"}"


def test_a_description_that_is_parsed_nests_64_deep():
    assert description.parse(text(device(b"[" * 61 + b"]" * 61)))
    for depth in (62, 10_000, MIB):
        with pytest.raises(StreamError, match=f"nested {depth + 3} deep, at most 64"):
            description.parse(text(device(b"[" * depth + b"]" * depth)))


def test_a_description_that_is_parsed_has_a_million_nodes():
    base = 1 + text(device(b"[]")).count(b"[") + text(device(b"[]")).count(b"{") + text(device(b"[]")).count(b",")
    left = description.NODES_MAX - base
    assert description.NODES_MAX == 1 << 20
    assert description.parse(text(device(b"[" + b"0," * left + b"0]")))
    with pytest.raises(StreamError, match="at most 1048576"):
        description.parse(text(device(b"[" + b"0," * (left + 1) + b"0]")))


def test_a_description_that_is_parsed_has_16_mib():
    def padded(size):
        return text(b"").ljust(size)

    assert description.parse(padded(16 * MIB))
    with pytest.raises(StreamError, match="at most 16777216"):
        description.parse(padded(16 * MIB + 1))


@pytest.mark.parametrize("number", [b"1" * 5000, b"-1", b"18446744073709551615", b"1e400", b"NaN"])
def test_numbers_of_a_description(number):
    with pytest.raises(StreamError):
        description.parse(b'{"page_size": ' + number + b', "devices": []}')


# ----------------------------------------------------------------------------------------------------- xbzrle, multifd


@pytest.mark.parametrize(("length", "good"), [(PAGE, True), (PAGE + 1, False), (0xFFFF, False)])
def test_an_encoded_page_is_no_longer_than_a_page(length, good):
    record = word(0x60) + b"\1" + struct.pack(">H", length) + bytes(length)
    if good:
        assert ram.read_run(memoryview(record)).size == len(record)
        return
    with pytest.raises(StreamError, match=f"{length} bytes long, expected 0 to 4096"):
        ram.read_run(memoryview(record))


def changed(payload, memory=None):
    memory = np.zeros(3 * PAGE, np.uint8) if memory is None else memory
    data = np.frombuffer(payload, np.uint8)
    XbzrleCodec().decode(data, np.array([0]), np.array([len(data)]), memory, np.array([PAGE]))
    return memory


def test_the_runs_of_a_change_stay_in_their_page():
    assert changed(b"\xff\x1f\1x")[2 * PAGE - 1] == ord("x")  # 4095 as before, and one
    for payload in (b"\x80\x20\1x", b"\xff\x1f\2xy", b"\xff\x7f\1x"):
        memory = np.zeros(3 * PAGE, np.uint8)
        with pytest.raises(StreamError, match="bytes into a page of 4096"):
            changed(payload, memory)
        assert not memory.any()


@pytest.mark.parametrize("payload", [b"\x80\x80\x01\1x", b"\xff\xff\xff\xff\x0f\1x", b"\0\x81\x80\x00x"])
def test_a_length_of_more_than_two_bytes(payload):
    with pytest.raises(StreamError, match="expected two bytes of 7 bits"):
        changed(payload)


def test_a_change_needs_a_page_that_came(loading):
    change = b"\1\0\3\0\1x"
    came = word(0x08) + b"\x01a" + bytes([7]) * PAGE
    assert isinstance(loading.load(head(ram_start(), ram_part(came + word(0x60) + change))), ChannelError)
    record = word(0x40) + b"\x01a" + change
    loading.refuses(head(ram_start(), ram_part(record)), StreamError, "has not come in this stream")


def packet(pages=0, *, flags=0, allocated=128, size=None, number=0, zeros=0, offsets=()):
    size = pages * PAGE if size is None else size
    fields = struct.pack(">IIIIIIQI28x256s", 0x11223344, 1, flags, allocated, pages, size, number, zeros, b"a")
    offsets = offsets or [page * PAGE for page in range(128)]
    return fields + b"".join(word(offset) for offset in offsets).ljust(1024, b"\0")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pages": 129, "allocated": 129}, "room for 129"),
        ({"pages": 129}, "has 129 pages"),
        ({"pages": 128, "zeros": 1}, "128 pages and 1 zero pages"),
        ({"pages": U32_MAX, "size": 0}, f"has {U32_MAX} pages"),
        ({"zeros": U32_MAX}, f"{U32_MAX} zero pages"),
        ({"allocated": U32_MAX}, f"room for {U32_MAX}"),
        ({"pages": 1, "size": PAGE + 1}, "expected 4096"),
        ({"pages": 1, "size": U32_MAX}, "bytes follow"),
        ({"pages": 1, "offsets": [1]}, "not of a whole page"),
        ({"pages": 1, "offsets": [U64_MAX]}, "not of a whole page"),
    ],
)
def test_a_packet_has_128_pages_at_most_all_of_them_whole(fields, words):
    good = multifd.parse_packet(memoryview(packet(128)), 0)
    assert len(good.pages) == 128
    with pytest.raises(StreamError, match=words):
        multifd.parse_packet(memoryview(packet(**fields)), 0)


def test_an_encoded_payload_has_a_limit():
    zlib_bits = multifd.METHODS["zlib"]
    most = multifd.PAYLOAD_MAX
    assert multifd.parse_packet(memoryview(packet(1, flags=zlib_bits, size=most)), zlib_bits).size == most
    for size in (most + 1, U32_MAX):
        with pytest.raises(StreamError, match=f"at most {most}"):
            multifd.parse_packet(memoryview(packet(1, flags=zlib_bits, size=size)), zlib_bits)


@pytest.mark.parametrize("page", [4, 2**32 - 1, 2**52 - 1])
def test_a_packets_pages_are_inside_of_their_block(page):
    for numbers in ({"pages": 1}, {"zeros": 1}):
        multifd.parse_packet(memoryview(packet(**numbers, offsets=[3 * PAGE])), 0).check_inside(4 * PAGE)
        with pytest.raises(StreamError, match="outside of block 'a'"):
            multifd.parse_packet(memoryview(packet(**numbers, offsets=[page * PAGE])), 0).check_inside(4 * PAGE)


class Sink:
    def __init__(self):
        self.view = np.ones(4 * PAGE, np.uint8)

    def memory(self, block):
        return self.view

    def arriving(self, block, indices):
        pass

    def zeros(self, block, indices):
        self.view.reshape(-1, PAGE)[indices] = 0


def lane(*packets):
    """What a lane of these packets ends with."""
    failed = threading.Event()
    arriving = Arriving([Replay(b"".join(packets))], Method(), on_failure=failed.set)
    arriving.begin(Sink())
    try:
        while True:
            arriving.sync()
    except (StreamError, ChannelError) as exc:
        return exc
    finally:
        arriving.close()


@pytest.mark.parametrize("number", [0, 1, 2**32 - 1, 2**63, U64_MAX])
def test_a_packets_number_is_fresh(number):
    sync = 1
    before = [packet(zeros=1, number=number), packet(zeros=0, number=number)]  # the second says nothing, as QEMU's do
    if number < U64_MAX:
        later = lane(*before, packet(flags=sync, number=number + 1))
        assert isinstance(later, ChannelError), later
    for again in (number, 0):
        error = lane(*before, packet(flags=sync, number=again))
        assert isinstance(error, StreamError)
        assert f"packet {again} came behind packet {number}" in str(error)


def connected(numbers, *, lanes):
    """What a gathering of `lanes` lanes ends with when lanes of these numbers connect."""
    plugins = PluginManager()
    transport = plugins.transport("tcp").create()
    listener = transport.listen("127.0.0.1:0")
    gathering = Gathering(listener, Patience(20.0), lanes=lanes, uuid=bytes(16), seconds=20.0, strangers=8)
    made = []

    def call():
        for number in numbers:
            channel = transport.connect(listener.uri.partition(":")[2], Patience(20.0))
            made.append(channel)
            channel.send(skeleton.HEADER if number is None else multifd.encode_init(multifd.Init(bytes(16), number)))

    caller = threading.Thread(target=call)
    caller.start()
    try:
        gathered = gathering.run()
        for each in (gathered.main, *gathered.lanes):
            each.close()
        return len(gathered.lanes)
    finally:
        caller.join()
        for channel in made:
            channel.close()


def test_lanes_are_as_many_as_was_agreed_each_once():
    assert connected([None, 0, 1], lanes=2) == 2
    for number in (2, 255):
        with pytest.raises(StreamError, match=f"lane {number} has come, expected 0 to 1"):
            connected([None, number], lanes=2)


# --------------------------------------------------------------------------------------------------------------- codecs


@pytest.mark.parametrize("make", [ZlibCodec, ZlibLaneCodec, ZstdLaneCodec])
@pytest.mark.parametrize("size", [PAGE, PAGE - 1, PAGE + 1, 2 * PAGE, 0])
def test_output_is_exactly_the_pages(make, size):
    into = np.full((1, PAGE), 0xAA, np.uint8)
    payload = bytes(make().encode(np.full(size, 7, np.uint8)))
    if size == PAGE:
        make().decode(payload, into)
        assert (into == 7).all()
        return
    with pytest.raises(StreamError):
        make().decode(payload, into)
    assert (into == 0xAA).all()


def windowed(log):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(bytes(PAGE)) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


def test_a_window_of_8_mib_unless_the_limit_says_otherwise():
    into = np.empty((1, PAGE), np.uint8)
    assert WINDOW == Limits().zstd_window == 1 << 23
    ZstdLaneCodec().decode(windowed(23), into)
    for log in (24, 27, 31):
        with pytest.raises(StreamError, match="zstd-window says how much") as caught:
            ZstdLaneCodec().decode(windowed(log), into)
        assert caught.value.place.offset is None
    settings = Settings()
    settings.limits.zstd_window = 1 << 25
    method = Method.of(Parameters(multifd_compression="zstd"), PluginManager(), settings.limits)
    method.new_codec().decode(windowed(25), into)
    with pytest.raises(StreamError):
        method.new_codec().decode(windowed(26), into)


def test_our_own_streams_want_no_more_at_any_level():
    for level in (1, 19, 20):
        frame = zstandard.get_frame_parameters(bytes(ZstdLaneCodec(level).encode(np.zeros((1, PAGE), np.uint8))))
        assert frame.window_size <= WINDOW


@pytest.mark.parametrize("size", [1 << 26, 1 << 28])
def test_a_bomb_makes_a_page_and_a_byte(size):
    for make, bomb in ((ZstdLaneCodec, zstandard.compress(bytes(size))), (ZlibCodec, zlib.compress(bytes(1 << 26)))):
        into = np.empty((1, PAGE), np.uint8)
        decoder = make()
        with at_most(8 * MIB), pytest.raises(StreamError, match="more than the 4096"):
            decoder.decode(bomb, into)


# --------------------------------------------------------------------------------------- commands and the return path


@pytest.mark.parametrize("module", [commands, return_path])
def test_messages_have_one_length_each(module):
    kinds = module.Command if module is commands else module.MessageType
    parse = module.parse_command if module is commands else module.parse_message
    for kind in kinds:
        for length in (0, 4, 5, 0xFFFF):
            if module.LENGTHS.get(kind) == length:
                continue
            with pytest.raises(StreamError):
                fed(parse(), struct.pack(">HH", kind, length) + bytes(8))
    for number in (0, 100, 0xFFFF):
        with pytest.raises(StreamError, match="unknown"):
            fed(parse(), struct.pack(">HH", number, 4) + bytes(8))
