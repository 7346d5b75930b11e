"""What is in a stream: counted against what was written into it, cut at every byte, and damaged."""

import json
import random
import struct
import uuid
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whimbrel.capture import inspection
from whimbrel.capture.inspection import inspect
from whimbrel.errors import ConfigError, ConnectError, IncompatibleError, MigrationError, StreamError, WhimbrelError
from whimbrel.stream import Replay

from . import streams
from .streams import EOS, FOOTER, PAGE, PART, SHAPES, Device, Script, page, str8, u16, u32, u64


def look(stream, **more):
    return inspect(Replay(stream, peer="here"), **more)


def whole(shape):
    return streams.small(shape).finish()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counted(shape):
    script = streams.small(shape)
    stream = script.finish()
    found = look(stream)
    assert found.error is None
    assert (found.size, found.source, found.behind) == (len(stream), "here", 0)
    assert found.machine == (script.machine if shape.configuration else None)
    assert (found.configuration, found.footers) == (shape.configuration, shape.footers)
    assert found.description == (len(script.text) if shape.description else None)
    assert found.guessed == (not shape.footers and not shape.description)
    assert (found.bodies, found.ram) == (3, 3 * PAGE)
    counts = [(b.name, b.pages, b.normal, b.zero, b.distinct, b.records) for b in found.blocks]
    assert counts == [("a", 2, 1, 2, 2, 3), ("b", 1, 0, 1, 1, 1)]
    names = [(d.name, d.instance_id, d.version_id, d.section_id, d.size) for d in found.devices]
    assert names == [("timer", 0, 1, 4, 4), ("twin", 0, 1, 5, 3), ("twin", 0, 3, 6, 5)]
    if shape.description:
        assert [device.decoded.fields[0].value for device in found.devices] == [d.body for d in script.devices]
    else:
        assert all(device.decoded is None and "no description" in device.problem for device in found.devices)


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
    (block,) = look(script.end().full().finish()).blocks
    assert (block.normal, block.zero, block.xbzrle, block.compressed) == (2, 1, 2, 1)
    assert block.encoded_bytes == 3 + len(packed)
    assert (block.records, block.distinct, block.pages) == (6, 4, 5)


@given(st.integers(0, 2**32), st.sampled_from(SHAPES), st.booleans())
def test_random_streams(seed, shape, return_path):
    script = streams.random_stream(random.Random(seed), shape, return_path=return_path)
    stream = script.finish()
    found = look(stream)
    assert found.error is None
    assert found.size == len(stream)
    assert found.return_path == return_path
    assert [(b.name, b.size) for b in found.blocks] == [(n, p.nbytes) for n, p in script.ram.items()]
    assert [b.guest_address for b in found.blocks] == [(script.addresses or {}).get(name) for name in script.ram]
    assert found.uuid == (None if script.uuid is None else uuid.UUID(bytes=script.uuid))
    assert found.capabilities == tuple(script.capabilities)
    assert found.bodies == sum(mark in ("START", "PART", "END") for _, mark in script.marks)
    if shape.footers or shape.description:
        bodies = [(device.name, device.instance_id, device.version_id, device.size) for device in found.devices]
        assert bodies == [(d.name, d.instance, d.version, len(d.body)) for d in script.devices]
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cut_at_every_byte(shape):
    """Everything before the cut is told, and that it is cut."""
    script = streams.small(shape)
    stream = script.finish()
    begin = script.at("START")
    eof = script.at("EOF")
    page_bytes = range(script.at("PART") + 50, script.at("PART") + PAGE)  # of which a few will do
    for size in (size for size in range(len(stream)) if size not in page_bytes or size % 197 == 0):
        try:
            found = look(stream[:size])
        except MigrationError:
            assert size <= begin, "from the first element on there is something to show"
            continue
        assert size - PAGE - 20 < found.size <= size if found.error is not None else found.size == size
        if size <= eof:
            assert found.error is not None or not shape.footers
        else:
            assert found.error is not None or found.guessed or found.behind == size - eof - 1
        starts = [offset for offset, mark in script.marks if mark in ("START", "PART", "END")]
        assert found.bodies <= sum(offset < size for offset in starts)
        if shape.footers:
            heads = [offset for offset, mark in script.marks if mark == "FULL"]
            assert len(found.devices) <= sum(offset < size for offset in heads)
            assert len(found.devices) >= sum(offset + 60 < size for offset in heads)
        json.dumps(found.as_dict(), allow_nan=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    assert (found.ram, found.blocks[0].zero, found.blocks[0].distinct) == (3 << 53, 1, None)


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
    assert shown[-2]["fields"][0]["value"] == b"1".hex()
    assert "problem" not in shown[-2]
    assert "fields" not in found.as_dict(values=False)["devices"][-2]


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
    assert found.as_dict()["error-code"] == found.error.code


def test_what_is_no_stream_at_all():
    with pytest.raises(StreamError, match="this is not a migration stream"):
        look(b"GIF89a..")
    with pytest.raises(MigrationError):
        look(b"")


def test_files(tmp_path):
    path = tmp_path / "stored"
    path.write_bytes(whole(streams.FROM_2_4))
    steps = []
    found = inspect(path, progress=steps.append)
    assert found.error is None
    assert found.source == f"file:{path}"
    assert steps
    assert steps == sorted(steps)
    assert steps[-1] <= found.size == path.stat().st_size
    with pytest.raises((ConfigError, ConnectError)):
        inspect(tmp_path / "none")


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
    for limit, distinct in [(3 * PAGE, 2), (3 * PAGE - 1, None)]:
        monkeypatch.setattr(inspection, "TRACKED_MAX", limit)
        assert look(stream).blocks[0].distinct == distinct
