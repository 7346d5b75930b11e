"""What malformed streams have done to others, and our check of each: one test a line.

The lines, and those that have no equivalent here, are in docs/concepts/hostile-input.md.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import sys
import threading
from pathlib import Path

import attrs
import numpy as np
import pytest
import zstandard

import whimbrel
from whimbrel import Machine, PluginManager, Settings, vmstate
from whimbrel.abc import SectionKind
from whimbrel.capture.taking import Capture
from whimbrel.errors import ChannelError, ConfigError, IncompatibleError, MigrationError, StreamError
from whimbrel.machine import BareMachine, RawImage
from whimbrel.migration import globalstate
from whimbrel.migration.lanes.arriving import Arriving
from whimbrel.migration.lanes.method import Method
from whimbrel.monitor import MonitorServer
from whimbrel.stream import Reader, Replay
from whimbrel.wire import block, description, multifd, order, ram, skeleton
from whimbrel_codecs.zstd import ZstdLaneCodec
from whimbrel_savevm.block import BlockHandler

from ..capture.streams import FROM_2_4, Device, small
from .conftest import PAGE, at_most, fed, head, ram_part, ram_start, section, word
from .test_limits import Sink, changed, connected, packet

U32_MAX, U64_MAX = 2**32 - 1, 2**64 - 1
MIB = 1 << 20


class Thing:
    """An object with whatever attributes a description wants."""

    def __init__(self, **values):
        self.__dict__.update(values)


def described(*fields, **more):
    return vmstate.VMStateDescription("thing", 1, fields=fields, **more)


def came(fields, obj, data, **more):
    """Parse and apply `data`; what is refused leaves `obj` as it was."""
    before = dict(vars(obj))
    try:
        return vmstate.apply(fed(vmstate.parse(described(*fields, **more), 1, obj), data + b"\x7e"), obj)
    except MigrationError:
        assert vars(obj) == before
        raise


def u32(number):
    return struct.pack(">I", number)


# ------------------------------------------------------------------------------------------------------ 2013 and 2014


@pytest.mark.parametrize("count", [7, 2**31, U32_MAX])
def test_cve_2013_4148_count_used_as_copy_length(count):
    """virtio-net copied as many bytes as a count from the stream said; a count here is bounded by the receiver's own
    declaration before anything is made or asked for, and a declared count can never be negative.
    """  # fmt: skip
    fields = vmstate.uint32("count"), vmstate.buffer("macs", count="count", maximum=6)
    with at_most(2 * MIB), pytest.raises(StreamError, match=f"at most 6, got {count}"):
        came(fields, Thing(count=0, macs=b""), u32(count) + b"x" * 64)
    with pytest.raises(ConfigError, match="can be negative"):
        described(vmstate.int32("count"), vmstate.buffer("macs", count="count", maximum=6))


def test_cve_2013_4149_buffer_smaller_than_count_times_size():
    """virtio-net counted elements and made room for bytes; a counted array here has elements of one declared size, and
    what is asked for is their product, once the count is known to be good.
    """  # fmt: skip
    thing = Thing(count=0, macs=[])
    description_ = described(vmstate.uint32("count"), vmstate.uint64("macs", count="count", maximum=6))
    parser = vmstate.parse(description_, 1, thing)
    assert next(parser) == 4
    assert parser.send(memoryview(u32(6))) == 6 * 8


def test_cve_2013_4150_more_queues_than_configured():
    """virtio-net indexed its queues by a number above those it had; a lane here whose number is not below
    multifd-channels is refused when it connects.
    """  # fmt: skip
    with pytest.raises(StreamError, match="lane 2 has come, expected 0 to 1"):
        connected([None, 2], lanes=2)


@pytest.mark.parametrize("count", [4, U32_MAX])
def test_cve_2013_4151_more_queues_than_there_can_be(count):
    """virtio loaded more queues than its table has; an array of structs here has a declared maximum."""
    queue = vmstate.VMStateDescription("queue", 1, fields=[vmstate.uint8("x")])
    fields = vmstate.uint32("count"), vmstate.struct("queues", queue, count="count", maximum=3)
    with pytest.raises(StreamError, match=f"at most 3, got {count}"):
        came(fields, Thing(count=0, queues=[Thing(x=0) for _ in range(3)]), u32(count) + b"x" * 64)


@pytest.mark.parametrize("ports", [0, 5, U32_MAX])
def test_cve_2013_4526_ports_other_than_the_receivers(ports):
    """AHCI took the number of its ports from the stream; a field declared equal must be what the receiver has."""
    with pytest.raises(IncompatibleError, match="the value that is here already"):
        came([vmstate.uint32("ports", equal=True)], Thing(ports=4), u32(ports))


@pytest.mark.parametrize("timers", [2, 33, U32_MAX])
def test_cve_2013_4527_number_of_timers(timers):
    """HPET used a number of timers that nobody had checked; a field here is held against its declared range."""
    with pytest.raises(StreamError, match=f"expected 3 to 32, got {timers}"):
        came([vmstate.uint32("timers", low=3, high=32)], Thing(timers=3), u32(timers))


@pytest.mark.parametrize("count", [9, U32_MAX])
def test_cve_2013_4529_log_longer_than_its_capacity(count):
    """PCIe AER read more log entries than its array holds; an array here must have room for its declared maximum when
    the device is added, and no more than that maximum comes.
    """  # fmt: skip
    log = np.zeros(8, np.uint32)
    fields = vmstate.uint32("count"), vmstate.uint32("log", count="count", maximum=8)
    with pytest.raises(StreamError, match=f"at most 8, got {count}"):
        came(fields, Thing(count=0, log=log), u32(count) + b"x" * 64)
    assert not log.any()
    with pytest.raises(ConfigError, match="room for 8"):
        vmstate.check_object(described(*fields), Thing(count=0, log=np.zeros(7, np.uint32)))


@pytest.mark.parametrize("heads", [(8, 0), (0, 8), (255, 255)])
def test_cve_2013_4530_heads_of_a_queue_as_indices(heads):
    """PL022 used the heads of its FIFOs as indices; each of them here has a range that is its FIFO's."""
    fields = vmstate.uint8("tx", low=0, high=7), vmstate.uint8("rx", low=0, high=7)
    with pytest.raises(StreamError, match="expected 0 to 7"):
        came(fields, Thing(tx=0, rx=0), bytes(heads))
    came(fields, Thing(tx=0, rx=0), b"\7\7")


def test_cve_2013_4531_array_length_below_zero():
    """ARM's list of registers had a signed length; a signed count must declare that it is never negative here, and
    is refused when it is.
    """  # fmt: skip
    fields = vmstate.int32("count", low=0), vmstate.uint64("registers", count="count", maximum=4)
    for count in (-1, -(2**31)):
        with pytest.raises(StreamError, match="expected at least 0"):
            came(fields, Thing(count=0, registers=[]), struct.pack(">i", count) + bytes(64))
    with pytest.raises(StreamError, match="at most 4"):
        came(fields, Thing(count=0, registers=[]), u32(2**31 - 1) + bytes(64))


@pytest.mark.parametrize(
    "device", ["stellaris_enet", "pxa2xx", "openpic", "ssi-sd", "ssd0323", "tsc210x", "zaurus"]
)  # CVE-2013-4532, -4533, -4534, -4537, -4538, -4539, -4540
def test_cve_2013_4532_to_4540_values_stored_unchecked_and_used_later(device):
    """Seven devices stored a level, a row or a mask that was used as an index later; post_load here sees all values
    before the device can run, and what it refuses leaves the device as it was.
    """  # fmt: skip

    def check(thing, version):
        if thing.level > len(thing.fifo):
            raise ValueError("the level is above the FIFO")

    thing = Thing(level=0, fifo=[0, 0])
    fields = vmstate.uint32("level"), vmstate.uint8("fifo", length=2)
    before = (thing.level, list(thing.fifo))
    with pytest.raises(IncompatibleError, match="post_load refused what came"):
        loaded = fed(vmstate.parse(described(*fields, post_load=check), 1, thing), u32(3) + b"\1\1\x7e")
        vmstate.apply(loaded, thing)
    assert (thing.level, thing.fifo) == before, device


def test_cve_2013_4535_4536_scatter_lists_and_addresses_of_the_peers(loading):
    """virtio mapped as many pieces as the stream said, at addresses from it; a record here says a page of a block that
    is there, and inside of it, or is refused before a byte is written.
    """  # fmt: skip
    for record in (word(3 << 12 | 8) + b"\x01a", word(0x08) + b"\x01z", word(U64_MAX & ~0xFFF | 8) + b"\x01a"):
        loading.refuses(head(ram_start(), ram_part(record + b"x" * PAGE)), StreamError, "block")


def test_cve_2013_4541_length_and_index_each_and_their_sum():
    """USB checked neither the length of a setup packet nor its index; a run of a changed page here is held against what
    is left of the page, by the sum of all runs so far.
    """  # fmt: skip
    memory = np.zeros(3 * PAGE, np.uint8)
    for payload in (b"\xff\x1f\2xy", b"\x80\x10\1x" * 2 + b"\1\1x", b"\0\1x\xff\x1f\1x"):
        with pytest.raises(StreamError, match="into a page of 4096"):
            changed(payload, memory)
        assert not memory.any()


def test_cve_2013_4542_counts_in_a_saved_request():
    """virtio-scsi trusted the counts within a saved request; counts within structs are bounded as any here, and a
    description may have no more than 65536 structs altogether.
    """  # fmt: skip
    piece = vmstate.VMStateDescription("piece", 1, fields=[vmstate.uint32("address")])
    request = vmstate.VMStateDescription(
        "request", 1, fields=[vmstate.uint32("n"), vmstate.struct("pieces", piece, count="n", maximum=4, factory=Thing)]
    )
    thing = Thing(requests=[Thing(n=0, pieces=[]) for _ in range(2)])
    with pytest.raises(StreamError, match=r"requests\[1\].pieces.*at most 4, got 5"):
        came([vmstate.struct("requests", request, length=2)], thing, u32(0) + u32(5) + bytes(64))
    with pytest.raises(ConfigError, match="structs"):
        described(vmstate.struct("requests", request, length=20_000))


@pytest.mark.parametrize("selector", [64, 0xFFFF])
def test_cve_2013_6399_selector_out_of_range(selector):
    """virtio loaded a queue selector that later accesses used; a range here is checked at load, not at use."""
    with pytest.raises(StreamError, match=f"expected 0 to 63, got {selector}"):
        came([vmstate.uint16("selector", low=0, high=63)], Thing(selector=0), struct.pack(">H", selector))


@pytest.mark.parametrize("size", [61, U32_MAX])
def test_cve_2014_0182_more_configuration_than_ones_own(size):
    """virtio read as much configuration as the stream had into its own, which was smaller; a buffer here has a maximum,
    and more than that is refused.
    """  # fmt: skip
    fields = vmstate.uint32("size"), vmstate.buffer("config", count="size", maximum=60)
    with pytest.raises(StreamError, match=f"at most 60, got {size}"):
        came(fields, Thing(size=0, config=b""), u32(size) + bytes(80))


def test_cve_2014_3461_a_check_that_is_wrong_the_other_way():
    """The first check against CVE-2013-4541 refused good streams; each value of a byte is tried here, and exactly those
    within the range are taken.
    """  # fmt: skip
    field = vmstate.uint8("index", low=3, high=200)
    for value in range(256):
        thing = Thing(index=3)
        if 3 <= value <= 200:
            came([field], thing, bytes([value]))
            assert thing.index == value
        else:
            with pytest.raises(StreamError):
                came([field], thing, bytes([value]))


def test_cve_2014_5263_a_list_of_fields_without_an_end():
    """xHCI's list of fields lacked its terminator, and the loader ran past it; a description here is closed when it is
    made, takes nothing but fields, and cannot be changed.
    """  # fmt: skip
    for bad in (None, 0, "x"):
        with pytest.raises(ConfigError, match="is not a field"):
            vmstate.VMStateDescription("xhci", 1, fields=[vmstate.uint8("x"), bad])
    closed = described(vmstate.uint8("x"))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        closed.fields = ()
    assert isinstance(closed.fields, tuple)


@pytest.mark.parametrize("page", [3, 2**31, 2**52 - 1])
def test_cve_2014_7840_a_page_anywhere(loading, page):
    """RAM records said where to write, and nobody checked; a page here is a whole number of pages, inside of its block,
    on whichever way it comes.
    """  # fmt: skip
    for record in (word(page << 12 | 8) + b"\x01a" + bytes(PAGE), word(page << 12 | 2) + b"\x01a\1"):
        loading.refuses(head(ram_start(), ram_part(record)), StreamError, "outside of block 'a'")
    with pytest.raises(StreamError, match="outside of block 'a'"):
        multifd.parse_packet(memoryview(packet(1, offsets=[page << 12])), 0).check_inside(3 * PAGE)


# ---------------------------------------------------------------------------------------------------------------- later


@pytest.mark.parametrize("values", [(255, 0, 0), (0, 255, 0), (0, 0, 17)])
def test_cve_2017_16845_pointers_and_a_count(values):
    """PS/2 loaded the pointers and the count of its queue unchecked; each has its range here, and post_load checks what
    they mean together.
    """  # fmt: skip

    def agree(thing, version):
        if (thing.wptr - thing.rptr) % 16 != thing.count % 16:
            raise ValueError("the pointers and the count disagree")

    fields = [vmstate.uint8(name, high=15) for name in ("rptr", "wptr")] + [vmstate.uint8("count", high=16)]
    with pytest.raises(StreamError):
        came(fields, Thing(rptr=0, wptr=0, count=0), bytes(values), post_load=agree)
    came(fields, Thing(rptr=0, wptr=0, count=0), b"\1\5\4", post_load=agree)
    thing = Thing(rptr=0, wptr=0, count=0)
    with pytest.raises(IncompatibleError, match="disagree"):
        came(fields, thing, b"\1\5\3", post_load=agree)


def test_cve_2017_15118_a_name_longer_than_its_room():
    """An NBD export's name of 4096 bytes went into 256; a drive's name here has a length of one byte, and is looked for
    among those that are there.
    """  # fmt: skip
    with pytest.raises(StreamError, match="there is none to load it into"):
        fed(block.parse_record({"disk": MIB}), block.chunk("x" * 255, 0))
    with pytest.raises(ValueError, match="1 to 255"):
        block.chunk("x" * 256, 0)


def test_cve_2024_7409_a_client_that_holds_its_socket_while_the_server_ends():
    """An NBD server crashed when a client kept its socket open at the end; a monitor here lets go of its clients,
    whatever they do, and ends.
    """  # fmt: skip
    machine = Machine("monitored")
    server = MonitorServer(machine, "tcp:127.0.0.1:0")
    server.start()
    host, _, port = server.address.removeprefix("tcp:").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port))) as client:
        assert client.recv(3) == b'{"Q'
        closer = threading.Thread(target=server.close)
        closer.start()
        closer.join(20)
        assert not closer.is_alive()
    machine.close()


def test_cve_2025_54566_54567_what_is_derived_comes_from_what_was_loaded():
    """SR-IOV registered functions although the loaded register says that they are off; post_load here runs when all
    values are in place, and again when they are taken back, so what is derived follows them.
    """  # fmt: skip

    def derive(thing, version):
        thing.functions = thing.count if thing.enabled else 0

    thing = Thing(enabled=True, count=2, functions=2)
    description_ = described(vmstate.bool_("enabled"), vmstate.uint8("count"), post_load=derive)
    undo = vmstate.apply(fed(vmstate.parse(description_, 1, thing), b"\0\7\x7e"), thing)
    assert (thing.count, thing.functions) == (7, 0)
    undo()
    assert (thing.count, thing.functions) == (2, 2)


def test_march_2026_virtio_net_rss_an_empty_table():
    """virtio-net took a table of no entries, and derived a flag after its check; a range here may begin at 1, and an
    outer post_load runs behind those of its parts, so it checks what they have derived.
    """  # fmt: skip
    order_ = []
    inner = vmstate.VMStateDescription(
        "table", 1, fields=[vmstate.uint16("length", low=1, high=128)], post_load=lambda *_: order_.append("derived")
    )
    thing = Thing(rss=Thing(length=1))
    fields = [vmstate.struct("rss", inner)]
    for length in (0, 129, 0xFFFF):
        with pytest.raises(StreamError, match="expected 1 to 128"):
            came(fields, thing, struct.pack(">H", length))
    came(fields, thing, b"\0\x80", post_load=lambda *_: order_.append("checked"))
    assert order_ == ["derived", "checked"]


def test_march_2026_multifd_truncated_anywhere():
    """A truncated multifd file gave a NULL dereference; a lane here that ends at any byte is a ChannelLost, unless it
    ends where it may: behind a SYNC.
    """  # fmt: skip
    whole = packet(1, number=0) + b"\7" * PAGE + packet(flags=1, number=1)
    cuts = [*range(0, 1400, 7), *range(len(whole) - 1400, len(whole), 7), 1343, 1344, 1345, len(whole) - 1, len(whole)]
    for cut in cuts:
        lanes = Arriving([Replay(whole[:cut])], Method(), on_failure=lambda: None)
        lanes.begin(Sink())
        try:
            if cut == len(whole):
                lanes.sync()
                continue
            with pytest.raises(ChannelError):
                lanes.sync()
        finally:
            lanes.close()


def test_older_multifd_three_numbers_that_were_not_checked():
    """An older QEMU took a channel's number equal to the count, more pages than the packet has offsets for, and offsets
    that are no whole pages; all three are refused here.
    """  # fmt: skip
    with pytest.raises(StreamError, match="lane 2 has come"):
        connected([None, 2], lanes=2)
    for fields in ({"pages": 129}, {"pages": 1, "offsets": [PAGE - 1]}):
        with pytest.raises(StreamError):
            multifd.parse_packet(memoryview(packet(**fields)), 0)


def test_criu_2738_a_length_that_overflows_when_summed(loading):
    """CRIU multiplied a peer's count into a length that wrapped; the sizes of blocks here are taken off a total, each
    checked against what is left of it, and never summed.
    """  # fmt: skip
    size = 2**64 - PAGE
    for total, sizes in ((2 * PAGE, (size, 3 * PAGE)), (size, (size, PAGE)), (PAGE, (2 * PAGE,))):
        listed = b"".join(b"\x01" + bytes([97 + n]) + word(each) for n, each in enumerate(sizes))
        loading.refuses(
            head(section(SectionKind.START, word(total | 4) + listed + ram.EOS_RECORD)), StreamError, "bytes"
        )


@pytest.mark.parametrize("number", [0, 5, U32_MAX])
def test_criu_a_peers_number_is_looked_up(loading, number):
    """CRIU's page server used a peer's task id without looking whether there is one; the id of a PART or END here must
    have been given by a START.
    """  # fmt: skip
    for kind in (SectionKind.PART, SectionKind.END):
        loading.refuses(head(section(kind, b"", number=number)), StreamError, "may not come now")


@pytest.mark.parametrize("length", [17 * MIB, U32_MAX])
def test_cloud_hypervisor_a_buffer_as_large_as_the_peer_says(length):
    """Cloud Hypervisor makes buffers as large as a peer's number says; a length here is checked before anything is
    asked for, and what is then asked for is 64 KiB at most.
    """  # fmt: skip
    parser = description.parse_and_skip(16 * MIB)
    assert (next(parser), parser.send(memoryview(b"\6"))) == (1, 4)
    with at_most(MIB), pytest.raises(StreamError, match=f"{length} bytes long"):
        parser.send(memoryview(u32(length)))
    longest = description.parse_and_skip(16 * MIB)
    next(longest)
    longest.send(memoryview(b"\6"))
    assert longest.send(memoryview(u32(16 * MIB))) == 1 << 16


@pytest.mark.parametrize("size", [1, 15, PAGE - 1, PAGE + 16])
def test_cloud_hypervisor_a_table_that_does_not_divide(loading, size):
    """Cloud Hypervisor asserts that a table's length divides; what a peer sends is refused here, and never asserted
    on.
    """  # fmt: skip
    body = word(3 * PAGE | 4) + b"\x01a" + word(size) + ram.EOS_RECORD
    loading.refuses(head(section(SectionKind.START, body)), StreamError, "expected whole pages")


def test_silo_a_packet_of_four_gibibytes():
    """Silo allocates as much as each packet's length of 32 bits says; a packet here is held against its pages before a
    byte is asked for.
    """  # fmt: skip
    for method in ("none", "zlib"):
        bits = multifd.method_bits(method)
        with at_most(MIB), pytest.raises(StreamError, match="bytes follow"):
            multifd.parse_packet(memoryview(packet(1, flags=bits, size=U32_MAX)), bits)


def test_firecracker_a_cap_on_state():
    """Firecracker caps a machine's state at 10 MB; [limits] device-section and device-sections do it here."""
    settings = Settings()
    settings.limits.device_sections = 1 << 14
    settings.limits.description = 4096
    stream = small(FROM_2_4).full(Device("long", 50, bytes(1 << 15))).finish()
    with pytest.raises(StreamError, match="longer than 16384 bytes"):
        Capture(Replay(stream), settings=settings, plugins=PluginManager(), max_ram=MIB).run()


# ----------------------------------------------------------------------------------------------------------------- zstd


def decode(data):
    into = np.full((1, PAGE), 0xAA, np.uint8)
    ZstdLaneCodec().decode(data, into)
    return into


def test_zstd_a_frame_that_declares_64_mib():
    """Decompressing with a limit gave 64 MiB when the frame declared them; the reader here makes what it was asked for
    and a byte more, whatever a frame says.
    """  # fmt: skip
    bomb = zstandard.compress(bytes(1 << 26))
    assert zstandard.frame_content_size(bomb) == 1 << 26
    with at_most(4 * MIB), pytest.raises(StreamError, match="more than the 4096 bytes"):
        decode(bomb)


def test_zstd_a_header_that_declares_a_tebibyte():
    """A header that declared 2^40 bytes raised MemoryError; nothing is made of that number here."""
    header = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40)
    with at_most(4 * MIB), pytest.raises(StreamError):
        decode(header + b"\x01\0\0")


def test_zstd_a_stream_without_a_size():
    """Without a declared size a library's limit worked; so does ours, both ways."""
    stream = zstandard.ZstdCompressor(write_content_size=False)
    assert not decode(stream.compress(bytes(PAGE))).any()
    for size in (PAGE - 1, PAGE + 1, 1 << 26):
        with pytest.raises(StreamError):
            decode(stream.compress(bytes(size)))


def test_zstd_empty_frames_do_not_hold_us():
    """A packet may be nothing but frames and skippable frames of no bytes; it is refused as too short, in order."""
    empty = zstandard.ZstdCompressor().compress(b"")
    for data in (empty * 5000, b"\x50\x2a\x4d\x18\0\0\0\0" * 5000, b""):
        with pytest.raises(StreamError):
            decode(data)


# ------------------------------------------------------------------------------------------------- rules for our loader


def test_rule_3_lengths_are_checked_before_they_are_multiplied(loading):
    """The largest numbers there are, wherever there is a number: no sum and no product of them is made."""
    largest = word(U64_MAX)
    for body in (largest, word(U64_MAX & ~0xFFF | 4) + b"\x01a" + largest):
        with at_most(4 * MIB):
            assert isinstance(loading.load(head(section(SectionKind.START, body + ram.EOS_RECORD))), StreamError)


def test_rule_4_names_are_looked_up_and_never_imported(loading):
    """A section's name is a key of the machine's own registry, whatever it looks like."""
    before = set(sys.modules)
    for name in ("os", "whimbrel.cli.demo", "antigravity", "__import__('os')", "../../etc/passwd", "ram\\0"):
        header = section(SectionKind.FULL, b"", name=name, number=9)
        loading.refuses(head(ram_start(), header), IncompatibleError, "this machine has no")
    assert set(sys.modules) == before
    words = ("pickle", "marshal", "shelve", "eval(", "exec(", "compile(")
    for folder in (Path(whimbrel.__file__).parent / room for room in ("wire", "vmstate", "stream", "capture")):
        for path in folder.rglob("*.py"):
            text = path.read_text(encoding="utf-8").replace("re.compile(", "")
            assert not [word for word in words if word in text], path


def test_rule_5_nothing_is_applied_before_all_is_parsed(loading):
    """A device that came whole is not touched while the next is parsed."""
    body, _ = vmstate.save(loading.machine.devices["rich"].description, loading.machine.devices["rich"].obj)
    good = section(SectionKind.FULL, bytes(body), name="rich", number=5, version=3)
    end = section(SectionKind.END, ram.EOS_RECORD)
    loading.refuses(
        head(ram_start(), end, good, section(SectionKind.FULL, b"", name="none", number=6)),
        IncompatibleError, "this machine has no 'none'",
    )  # fmt: skip


def test_rule_6_a_linter_wants_each_range():
    """`vmstate.lint` names each number that declares no range, in structs and subsections too."""
    inner = vmstate.VMStateDescription("inner", 1, fields=[vmstate.float64("y", low=0.0), vmstate.bool_("b")])
    more = vmstate.VMStateDescription("thing/more", 1, fields=[vmstate.int16("z", low=-1, high=1)])
    open_ = described(
        vmstate.uint32("x"), vmstate.uint8("n", high=3), vmstate.struct("s", inner), vmstate.uint8("p", equal=True),
        vmstate.buffer("raw", size=3), subsections=[more],
    )  # fmt: skip
    assert vmstate.lint(open_) == (
        "thing.x (uint32) declares no low and no high: any value a peer sends is taken",
        "thing.n (uint8) declares no low: any value a peer sends is taken",
        "thing.s.y (float64) declares no high: any value a peer sends is taken",
    )
    closed = described(vmstate.uint32("x", low=0, high=U32_MAX), vmstate.float64("f", low=-math.inf, high=math.inf))
    assert vmstate.lint(closed) == ()


def test_rule_6_our_own_descriptions_declare_each_range():
    """Whatever whimbrel itself declares passes its linter."""
    assert vmstate.lint(globalstate.DESCRIPTION) == ()


def test_rule_8_order_and_duplicates_are_a_tables_business():
    """Each pair of a section's state and what comes is either in the table or refused."""
    for before in order.SectionState:
        for kind in SectionKind:
            sections = order.SectionOrder(9)
            steps = {
                order.SectionState.UNKNOWN: [],
                order.SectionState.STARTED: [SectionKind.START],
                order.SectionState.ENDED: [SectionKind.START, SectionKind.END],
                order.SectionState.FULL: [SectionKind.FULL],
            }[before]
            for step in steps:
                sections.accept(step, _header_of(step))
            if (before, kind) in order.MOVES:
                sections.accept(kind, _header_of(kind))
            else:
                with pytest.raises(StreamError, match="may not come now"):
                    sections.accept(kind, _header_of(kind))


def _header_of(kind):
    return skeleton.SectionHeader(3, "d", 0, 1) if kind in (SectionKind.START, SectionKind.FULL) else 3


def test_an_image_of_a_drive_stays_in_its_bounds(tmp_path):
    """A chunk behind a drive's end, of a drive that is not there, or of another kind, reaches no image."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(PAGE))
    os.truncate(path, MIB)
    machine = BareMachine("driven")
    machine.drives.add("disk", RawImage(path))
    machine.expect_arrival()
    try:
        for number in (1, 2**31, (1 << 43) // 2048):
            handler = BlockHandler(machine)
            data = block.chunk("disk", number) + b"x" * MIB
            with pytest.raises(StreamError):
                handler.load(Reader(Replay(data)), SectionKind.START, 1)
            handler.rollback()
            handler.finish()
        assert not path.read_bytes().strip(b"\0")
        assert path.stat().st_size == MIB
    finally:
        machine.close()
