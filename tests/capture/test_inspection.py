"""What is in a stream: counted against what was written into it, cut at every byte, and damaged."""

import json
import random
import struct
import uuid
import zlib
from itertools import groupby

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whimbrel.capture import inspection
from whimbrel.capture.inspection import inspect
from whimbrel.errors import (
    ChannelLost,
    ConfigError,
    ConnectError,
    IncompatibleError,
    MigrationError,
    StreamError,
    WhimbrelError,
)
from whimbrel.stream import Replay

from . import streams
from .conftest import Crumbs
from .passes import expected_breakdown, random_passes
from .streams import EOS, FOOTER, PAGE, PART, SHAPES, Device, Script, page, str8, u16, u32, u64

DESCRIBED = [shape for shape in SHAPES if shape.description]


def look(stream, **more):
    return inspect(Replay(stream, peer="here"), **more)


def whole(shape):
    return streams.small(shape).finish()


def kinds(counts):
    return tuple(attrs.astuple(counts))


def sections_of(script):
    """The sections of a script as they are shown: (kind, how many, where the first one begins)."""
    marks = [(mark, offset) for offset, mark in script.marks if mark in ("START", "PART", "END", "FULL")]
    for mark, group in groupby(marks, key=lambda pair: pair[0]):
        members = list(group)
        if mark == "FULL":
            yield from ((mark, 1, offset) for _, offset in members)
        else:
            yield mark, len(members), members[0][1]


# ------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counted(shape):
    script = streams.small(shape)
    stream = script.finish()
    found = look(stream)
    assert found.error is None
    assert (found.size, found.source, found.behind, found.cut) == (len(stream), "here", 0, None)
    assert found.machine == (script.machine if shape.configuration else None)
    assert (found.configuration, found.footers) == (shape.configuration, shape.footers)
    assert found.description == (len(script.text) if shape.description else None)
    assert found.guessed == (not shape.footers and not shape.description)
    assert (found.ram, found.passes, found.times) == (3 * PAGE, 2, ((1, 2), (2, 1)))
    counts = [(b.name, b.pages, kinds(b.records), kinds(b.last), b.distinct, b.passes) for b in found.blocks]
    assert counts == [
        ("a", 2, (1, 2, 0, 0), (1, 1, 0, 0), 1, 2),
        ("b", 1, (0, 1, 0, 0), (0, 1, 0, 0), 0, 1),
    ]
    # Two words have names; then three times a word and a fill byte; the body of END names its block again.
    assert [block.bytes for block in found.blocks] == [(8 + 2 + PAGE) + 9 + (9 + 2), 9 + 2]
    assert found.breakdown.total == len(stream)
    assert (found.breakdown.pages, found.breakdown.zero, found.breakdown.unread) == (PAGE, 9 + 11 + 11, 0)
    names = [(d.name, d.instance_id, d.version_id, d.section_id, d.size) for d in found.devices]
    assert names == [("timer", 0, 1, 4, 4), ("twin", 0, 1, 5, 3), ("twin", 0, 3, 6, 5)]
    assert [(s.kind.name, s.count, s.offset) for s in found.sections] == list(sections_of(script))
    assert [s.name for s in found.sections] == ["ram"] * 3 + ["timer", "twin", "twin"]
    assert [s.size for s in found.sections if s.kind.name == "FULL"] == [4, 3, 5]
    if shape.description:
        assert [device.decoded.fields[0].value for device in found.devices] == [d.body for d in script.devices]
    else:
        assert all(device.decoded is None and "no description" in device.problem for device in found.devices)
        assert [device.body for device in found.devices] == [device.body for device in script.devices]


def test_every_kind_of_record():
    script = Script(streams.FROM_2_4, {"a": 5}).header().start()
    script.part(("a", 0, page(1)), ("a", 1, page(2)), ("a", 2, 0))
    packed = zlib.compress(bytes(PAGE))
    records = [
        u64(1 * PAGE | 0x060) + b"\1" + u16(3) + b"\0\1\xed",
        u64(1 * PAGE | 0x060) + b"\1" + u16(0),
        u64(3 * PAGE | 0x120) + u32(len(packed)) + packed,
    ]
    script.data += PART + u32(script.ram_id) + b"".join(records) + EOS + FOOTER + u32(script.ram_id)
    found = look(script.end().full().finish())
    (block,) = found.blocks
    assert kinds(block.records) == (2, 1, 2, 1)
    assert kinds(block.last) == (1, 1, 1, 1)
    assert (block.distinct, block.came, block.pages, block.passes) == (1, 4, 5, 3)
    assert found.times == ((0, 1), (1, 3), (3, 1))
    spent = found.breakdown
    assert (spent.xbzrle, spent.compressed, spent.pages) == (3, len(packed), 2 * PAGE)
    # A word with a name and one without, the heads of encoded pages, and the ends of four bodies.
    assert spent.record_heads == 10 + 8 + 2 * 11 + 12 + 4 * 8


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.sampled_from(SHAPES), st.sampled_from([None, 1 << 16, 5000, 4103]))
def test_counts_equal_a_perfect_copys(seed, shape, pieces):
    """Over several passes, with records of all kinds, and whatever pieces the stream comes in."""
    script, count = random_passes(random.Random(seed), shape)
    stream = script.finish()
    found = look(stream) if pieces is None else inspect(Crumbs(stream, [pieces]))
    assert found.error is None
    blocks = [
        (b.name, attrs.asdict(b.last), b.distinct, b.passes, attrs.asdict(b.records), b.bytes) for b in found.blocks
    ]
    assert blocks == list(count.blocks())
    assert found.times == tuple(count.how_often())
    assert found.passes == max(max(times) for times in count.times.values())
    assert attrs.asdict(found.breakdown) == expected_breakdown(script, count)
    assert found.breakdown.total == found.size == len(stream)
    assert [(s.kind.name, s.count, s.offset) for s in found.sections] == list(sections_of(script))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SHAPES), st.booleans())
def test_random_streams(seed, shape, return_path):
    script = streams.random_stream(random.Random(seed), shape, return_path=return_path)
    stream = script.finish()
    found = look(stream)
    assert found.error is None
    assert found.size == found.breakdown.total == len(stream)
    assert found.return_path == return_path
    assert [(b.name, b.size) for b in found.blocks] == [(n, p.nbytes) for n, p in script.ram.items()]
    assert [b.guest_address for b in found.blocks] == [(script.addresses or {}).get(name) for name in script.ram]
    assert found.uuid == (None if script.uuid is None else uuid.UUID(bytes=script.uuid))
    assert found.capabilities == tuple(script.capabilities)
    spent = attrs.asdict(found.breakdown)
    if shape.footers or shape.description:
        bodies = [(device.name, device.instance_id, device.version_id, device.size) for device in found.devices]
        assert bodies == [(d.name, d.instance, d.version, len(d.body)) for d in script.devices]
        assert [(s.kind.name, s.count, s.offset) for s in found.sections] == list(sections_of(script))
        expected = expected_breakdown(script, attrs.make_class("None_", ["spent"])({}))
        of_records = ("record_heads", "pages", "zero", "xbzrle", "compressed")
        assert {**spent, **dict.fromkeys(of_records, 0)} == expected
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_does_not_matter_in_what_pieces_it_comes(shape):
    script = streams.small(shape)
    stream = script.finish()
    for cut in (len(stream), len(stream) - 3, script.at("EOF") - 2, script.at("END") + 2, script.at("PART") + 300):
        everything = inspect(Crumbs(stream[:cut], [1 << 20])).as_dict()
        for pieces in ([1], [7], [4096, 1]):
            assert inspect(Crumbs(stream[:cut], pieces)).as_dict() == everything


# ---------------------------------------------------------------------------------------------------------- cut


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cut_at_every_byte(shape):
    """Everything before the cut is told, and that it is cut."""
    script = streams.small(shape)
    stream = script.finish()
    begin = script.at("START")
    eof = script.at("EOF")
    page_bytes = range(script.at("PART") + 50, script.at("PART") + PAGE)  # of which a few will do
    text = range(script.at("EOF") + 20, len(stream) - 3)  # has a test of its own
    for size in range(len(stream)):
        if (size in page_bytes and size % 197) or (size in text and size % 13):
            continue
        try:
            found = look(stream[:size])
        except ChannelLost:
            assert size <= begin, "from the first element on there is something to show"
            continue
        assert found.size == found.breakdown.total == size
        if found.error is None:
            assert found.cut is None
            assert found.breakdown.unread == 0
        else:
            assert found.cut.offset == found.error.place.offset == size
            assert isinstance(found.error, ChannelLost)
            assert "cut" in str(found.error)
            assert found.cut.expected
            assert (found.cut.section, found.cut.block) == (found.error.place.section, found.error.place.block)
        if size == eof + 1:
            assert found.error is None, "that there is to be more cannot be told"
        elif shape.footers:
            assert found.error is not None
        starts = [offset for offset, mark in script.marks if mark in ("START", "PART", "END")]
        bodies = sum(section.count for section in found.sections if section.kind.name != "FULL")
        assert bodies <= sum(offset < size for offset in starts)
        if shape.footers:
            heads = [offset for offset, mark in script.marks if mark == "FULL"]
            assert len(found.devices) <= sum(offset < size for offset in heads)
            assert len(found.devices) >= sum(offset + 60 < size for offset in heads)
        json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("mark", "more", "section", "block", "expected"),
    [
        ("START", 3, "head", None, "the head of the next section or the end of the stream"),
        ("START", 30, "'ram' (id 2)", None, "the rest of the list of RAM blocks"),
        ("PART", -3, "'ram' (id 2)", None, "the footer of this section"),
        ("PART", 5, "'ram' (id 2)", None, "another record or the end of this body"),
        ("PART", 5 + 3, "'ram' (id 2)", None, "at least 5 more bytes of a record"),
        ("PART", 5 + 10 + 96, "'ram' (id 2)", None, "at least 4000 more bytes of a record"),
        ("PART", 5 + 10 + PAGE, "'ram' (id 2)", "a", "another record or the end of this body"),
        ("PART", 5 + 10 + PAGE + 8, "'ram' (id 2)", "a", "at least 1 more bytes of a record"),
        ("END", 0, "head", None, "the head of the next section or the end of the stream"),
        ("FULL", 4, "devices", None, "a device section or the end of the stream"),
        ("FULL", 20, "'timer' (id 4)", None, "the rest of this section"),
        ("EOF", 0, "devices", None, "a device section or the end of the stream"),
        ("description", 6, "'twin' (id 6)", None, "the rest of this section"),  # whose footer that may not be
        ("description", 7, "description", None, "{} more bytes of it"),
        ("description", 100, "description", None, "{} more bytes of it"),
    ],
)
def test_where_it_is_cut_and_what_was_expected(mark, more, section, block, expected):
    script = streams.small(streams.FROM_2_4)
    stream = script.finish()
    at = script.at(mark) + more
    found = look(stream[:at])
    assert (found.cut.offset, found.cut.section, found.cut.block) == (at, section, block)
    assert found.cut.expected == expected.format(len(stream) - at)
    shown = found.as_dict()
    assert shown["cut"] == {"offset": at, "section": section, "block": block, "expected": found.cut.expected}
    assert shown["error-code"] == "lost"


@pytest.mark.parametrize("shape", DESCRIBED, ids=str)
def test_a_description_that_is_cut(shape):
    """The devices are told apart without it, and what is missing of it is said."""
    script = streams.small(shape)
    stream = script.finish()
    begin = script.at("description") + 5
    for size in range(begin + 2, len(stream)):
        found = look(stream[:size])
        assert found.error.message == f"the description is cut: {size - begin} of {len(script.text)} bytes came"
        assert found.cut.expected == f"{len(stream) - size} more bytes of it"
        assert (found.breakdown.description, found.breakdown.unread, found.behind) == (5 + size - begin, 0, 0)
        assert found.breakdown.commands == 0
        assert [(device.name, device.body) for device in found.devices] == [(d.name, d.body) for d in script.devices]
        assert found.description is None
        assert found.guessed != shape.footers


def test_devices_that_came_early_are_there_whatever_comes_behind():
    script = Script(streams.FROM_2_4, {"a": 2}).header().full(Device("early", 7, b"12345")).start()
    at = len(script.data)
    script.part(("a", 1, page(1))).end().full(Device("late", 8, b"123"))
    stream = script.finish()
    for size in (at, at + 3, at + 5, at + 999):
        found = look(stream[:size])
        assert found.error is not None
        assert [(device.name, device.body) for device in found.devices] == [("early", b"12345")]
        assert [section.name for section in found.sections][:2] == ["early", "ram"]
        assert found.breakdown.devices == 5
        assert found.breakdown.total == size
    damaged = bytearray(stream)
    damaged[at] = 0x55
    found = look(bytes(damaged))
    assert isinstance(found.error, StreamError)
    assert [device.name for device in found.devices] == ["early"]
    assert found.cut is None


def test_bytes_behind_the_end():
    stream = whole(streams.FROM_2_4)
    found = look(stream + b"\xff")
    assert found.error is None
    assert (found.behind, found.breakdown.behind, found.breakdown.total) == (1, 1, len(stream) + 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cut_before_there_is_anything_to_show(shape):
    script = streams.small(shape)
    stream = script.finish()
    for size in range(script.at("START")):
        if size == 8 and not shape.configuration:
            continue
        with pytest.raises(ChannelLost, match="the stream is cut: it ends here, expected a stream's header") as caught:
            look(stream[:size])
        assert caught.value.place.offset == size


def test_a_connection_that_breaks_is_no_end():
    class Breaking(Replay):
        def recv_into(self, buffer):
            count = super().recv_into(memoryview(buffer)[:1000])
            if not count:
                raise ChannelLost("the disk is on fire")
            return count

    script = streams.small(streams.FROM_2_4)
    found = inspect(Breaking(script.finish()[: script.at("END")], peer="here"))
    assert found.error.message == "the disk is on fire"
    assert found.cut is None
    assert found.breakdown.total == found.size


# ------------------------------------------------------------------------------------------------------ damaged


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SHAPES), st.data())
def test_damaged(seed, shape, data):
    """Bits flip, and there is a result or an error of ours."""
    stream = bytearray(streams.random_stream(random.Random(seed), shape).finish())
    for _ in range(data.draw(st.integers(1, 4))):
        # Most of a stream are pages, and what is in them does not matter here.
        at = data.draw(
            st.integers(0, min(300, len(stream) - 1)) | st.integers(1, min(600, len(stream))).map(int.__neg__)
        )
        stream[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = look(bytes(stream))
    except WhimbrelError:
        return
    json.dumps(found.as_dict(), allow_nan=False)
    assert found.size <= len(stream)
    assert found.breakdown.total == found.size
    assert all(count >= 0 for count in attrs.astuple(found.breakdown))


def test_a_machine_of_any_size():
    """What a stream says of its RAM costs nothing until pages come."""
    script = Script(streams.FROM_2_4, {}).header()
    sizes = {"huge": 1 << 54, "more": 1 << 53}
    script.data += b"\x01" + u32(2) + str8("ram") + u32(0) + u32(4) + u64(sum(sizes.values()) | 4)
    for name, size in sizes.items():
        script.data += str8(name) + u64(size)
    script.data += EOS + FOOTER + u32(2)
    script.data += b"\x03" + u32(2) + u64((1 << 54) - PAGE | 0x002) + str8("huge") + b"\0" + EOS + FOOTER + u32(2)
    found = look(script.full(Device("timer", 4, b"1234")).finish())
    assert found.error is None
    assert (found.ram, found.blocks[0].records.zero, found.tracked) == (3 << 53, 1, False)
    for block in found.blocks:
        assert (block.last, block.came, block.distinct, block.passes) == (None, None, None, None)
    assert (found.passes, found.times) == (None, ())
    shown = found.as_dict()
    assert [shown["blocks"][0][key] for key in ("zero", "normal", "distinct", "came", "passes")] == [None] * 5


def test_a_device_that_is_not_as_described():
    odd = Device(
        "odd", 4, b"1234", fields=[{"name": "n", "type": "uint32", "size": 3}, {"name": "b", "type": "x", "size": 1}]
    )
    found = look(streams.small(streams.FROM_2_4).full(Device("fine", 7, b"1"), attrs_id(odd, 9)).finish())
    assert found.error is None
    assert [device.problem for device in found.devices[:-1]] == [""] * 4
    assert "described as 3 bytes long, expected 4" in found.devices[-1].problem
    shown = found.as_dict()["devices"]
    assert shown[-1]["problem"] == found.devices[-1].problem
    assert "fields" not in shown[-1]
    assert shown[-1]["body"] == b"1234".hex()
    assert shown[-2]["fields"][0]["value"] == b"1".hex()
    assert "problem" not in shown[-2]
    assert "body" not in shown[-2]


def attrs_id(device, section_id):
    device.section_id = section_id
    return device


@pytest.mark.parametrize(
    ("at", "change", "kind", "says"),
    [
        ("PART", struct.pack(">BIQ", 2, 2, PAGE | 0x200), StreamError, "MULTIFD_FLUSH"),
        ("PART", struct.pack(">BIQ", 2, 2, 0x008) + b"\1c", StreamError, "names RAM block 'c', which is not there"),
        ("PART", struct.pack(">BIQ", 2, 2, 2 * PAGE | 0x008) + b"\1a", StreamError, "outside of block 'a'"),
        ("PART", struct.pack(">BI", 2, 3), StreamError, "PART of section id 3 may not come now"),
        ("START", b"\x01" + u32(2) + str8("ram") + u32(0) + u32(3), IncompatibleError, "has version 3, expected 4"),
        ("START", b"\x55", StreamError, "unknown section type 0x55"),
    ],
)
def test_what_is_wrong_is_told_with_what_came_before(at, change, kind, says):
    script = streams.small(streams.FROM_2_4)
    stream = bytearray(script.finish())
    offset = script.at(at)
    stream[offset : offset + len(change)] = change
    found = look(bytes(stream))
    assert isinstance(found.error, kind)
    assert says in str(found.error)
    assert offset <= found.error.place.offset <= offset + 60
    assert found.machine == "bench-1"
    assert [block.name for block in found.blocks] == (["a", "b"] if at == "PART" else [])
    assert found.cut is None
    assert found.size == found.breakdown.total
    assert found.as_dict()["error-code"] == found.error.code


def test_what_is_no_stream_at_all():
    with pytest.raises(StreamError, match="this is not a migration stream"):
        look(b"GIF89a..")
    with pytest.raises(MigrationError):
        look(b"")


def test_files(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "TOLD_EVERY", 100)
    path = tmp_path / "stored"
    path.write_bytes(whole(streams.FROM_2_4))
    steps = []
    found = inspect(path, progress=steps.append)
    assert found.error is None
    assert found.source == f"file:{path}"
    assert steps
    assert all(before + 100 <= step for before, step in zip([0, *steps], steps, strict=False))
    assert steps[-1] <= found.size == path.stat().st_size
    (tmp_path / "link").symlink_to(path)
    assert inspect(str(tmp_path / "link")).as_dict() == found.as_dict()
    with pytest.raises(ConnectError, match="cannot be read: No such file or directory"):
        inspect(tmp_path / "none")
    with pytest.raises(ConfigError, match="is a folder, expected a file"):
        inspect(tmp_path)


def test_the_channel_is_closed():
    closed = []

    class Closing(Replay):
        def close(self):
            closed.append(self.peer)

    inspect(Closing(whole(streams.FROM_2_4), peer="one"))
    with pytest.raises(StreamError):
        inspect(Closing(b"GIF89a..", peer="two"))
    assert closed == ["one", "two"]


def test_pages_are_told_apart_up_to_a_limit(monkeypatch):
    stream = whole(streams.FROM_2_4)
    for limit, distinct in [(3 * PAGE, 1), (3 * PAGE - 1, None)]:
        monkeypatch.setattr(inspection, "TRACKED_MAX", limit)
        found = look(stream)
        assert (found.blocks[0].distinct, found.tracked) == (distinct, distinct is not None)
        assert kinds(found.blocks[0].records) == (1, 2, 0, 0)
        assert found.breakdown.total == len(stream)


def test_the_keys_for_programs():
    """They are part of the API."""
    shown = look(whole(streams.FROM_2_4)).as_dict()
    assert list(shown) == [
        *("source", "size", "machine", "configuration", "capabilities", "uuid", "return_path", "footers"),
        *(
            "description",
            "sections",
            "breakdown",
            "blocks",
            "drives",
            "tracked",
            "times",
            "devices",
            "guessed",
            "behind",
        ),
        "cut",
        *("ram", "passes"),
    ]
    assert list(shown["blocks"][0]) == [
        *("name", "size", "guest_address", "pages", "came", "normal", "zero", "xbzrle", "compressed", "distinct"),
        *("passes", "records", "bytes"),
    ]
    assert list(shown["sections"][0]) == [
        *("kind", "name", "instance_id", "version_id", "section_id", "offset", "size", "count"),
    ]
    assert list(shown["devices"][0]) == [
        *("name", "instance_id", "version_id", "section_id", "size", "fields", "subsections"),
    ]
    assert shown["sections"][0]["kind"] == "START"
    assert shown["times"] == [{"times": 1, "pages": 2}, {"times": 2, "pages": 1}]
    assert sum(shown["breakdown"].values()) == shown["size"]
