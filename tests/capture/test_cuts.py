"""Streams that end before their time, at every byte: one error that says where, and nothing left; never half a machine.

Two kinds of prefixes are machines all the same, since nothing is missing as far as anybody can tell:

* with footers, a stream that ends with its EOF, or in its description's text (`FROM_2_4` below): all devices are there;
* without footers, one that ends with a zero byte within or behind its devices. Machine types up to 2.2 have nothing but
  that byte to end with. It is said of such a machine that its devices were guessed.
"""

import os

import pytest

from whimbrel.capture import CapturedMachine
from whimbrel.capture.taking import Capture
from whimbrel.errors import ChannelLost, ConnectError, ProtocolError, WhimbrelError
from whimbrel.settings import Settings

from .conftest import Crumbs
from .streams import AT_2_3, FROM_2_4, SHAPES, SUPPRESSED, TO_2_2, Device, Script, page, small

WHOLE = [1 << 30]


def full_of_everything(shape):
    """A stream of few bytes with one of each element and record."""
    more = {"addresses": {"a": 0, "b": 4096}, "capabilities": ("x-ignore-shared",), "uuid": bytes(range(16))}
    script = Script(shape, {"a": 2, "b": 1}, **(more if shape.configuration else {})).header()
    script.open_return_path().ping()
    if shape.footers:
        script.full(Device("early", 40, b"\x00e\x00"))
    script.start().ping(2).part(("b", 0, 0), ("a", 1, 9)).part(("a", 1, 0, "again"))
    if shape.footers:
        script.full(Device("between", 41, b""))
    script.end(("a", 0, page(1)))
    script.full(Device("timer", 4, b"\x01\x00\x03"), Device("twin", 5, b"\0"), Device("twin", 6, b"", version=3))
    return script


def whole(script, length):
    """Whether the first `length` bytes of the stream are a machine; see the module's first lines."""
    stream = script.finish()
    if length == len(stream):
        return True
    if script.shape.footers:
        end = script.at("EOF") + 1
        return script.shape.description and (length == end or length >= end + 7)
    first = next(device for device in script.devices)
    begin = script.at("FULL") + len(first.head)
    return length > begin and stream[length - 1] == 0


def try_to_load(data, plugins, settings, **more):
    """The captured machine, or the error and the machine that was begun."""
    capture = Capture(Crumbs(data, WHOLE, **more), settings=settings, plugins=plugins, max_ram=1 << 20)
    try:
        return capture.run(), None
    except WhimbrelError as exc:
        if capture.machine is not None:
            assert capture.machine.run_state == "shutdown", "what was begun is still there"
        return None, exc


def check_cut(script, length, plugins, settings):
    stream = script.finish()
    machine, error = try_to_load(stream[:length], plugins, settings)
    if machine is None:
        assert not whole(script, length), f"{length} of {len(stream)} bytes are a machine: {error}"
        assert isinstance(error, (ProtocolError, ChannelLost))
        assert error.place.offset is not None, error
        assert error.place.offset <= length
        assert error.place.section, error
        assert error.place.peer == "replay"
        return
    with machine:
        assert whole(script, length), f"{length} of {len(stream)} bytes passed for a machine"
        assert machine.form().description == (length == len(stream) and script.shape.description)
        for name, pages in script.ram.items():
            assert machine.ram[name].view.tobytes() == pages.tobytes()
        devices = [(*key[:3],) for key in (device.key for device in script.devices)]
        found = [(each.header.idstr, each.header.instance_id, each.header.version_id) for each in machine.captured]
        if script.shape.footers:
            assert [device.body for device in machine.captured] == [device.body for device in script.devices]
        assert found == devices[: len(found)]
        assert machine.guessed == (not script.shape.footers and not machine.form().description)


def interesting(script):
    """Offsets of all bytes but those within a page and a description's text, of which a few are enough."""
    stream = script.finish()
    begin = stream.index(page(1))
    dull = [range(begin + 20, begin + 4096 - 20)]
    if script.shape.description:
        dull.append(range(len(stream) - len(script.text) + 20, len(stream) - 20))
    return [n for n in range(len(stream) + 1) if n % 101 == 0 or not any(n in stretch for stretch in dull)]


@pytest.mark.parametrize("make", [small, full_of_everything])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cut_at_every_byte(plugins, settings, shape, make):
    script = make(shape)
    for length in interesting(script):
        check_cut(script, length, plugins, settings)


@pytest.mark.long
@pytest.mark.parametrize("make", [small, full_of_everything])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cut_at_really_every_byte(plugins, settings, shape, make):
    script = make(shape)
    for length in range(len(script.finish()) + 1):
        check_cut(script, length, plugins, settings)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_link_that_breaks_is_no_end(plugins, settings, shape):
    """A channel that breaks, and does not end, never makes a machine: but for one that is whole before it breaks."""
    script = small(shape)
    stream = script.finish()
    for length in [*interesting(script)[:: 1 if shape is FROM_2_4 else 5], len(stream)]:
        machine, error = try_to_load(stream[:length], plugins, settings, broken=True)
        if shape.description and length == len(stream):
            machine.close()
            continue
        assert isinstance(error, ChannelLost), length
        assert error.place.offset is not None


def test_which_prefixes_are_machines():
    """So that nobody widens the exceptions by accident: these and no others, counted from the streams' ends."""
    found = {}
    for shape in SHAPES:
        script = small(shape)
        size, end = len(script.finish()), script.at("EOF") + 1
        tail = script.at("FULL")
        found[shape] = [n for n in range(size + 1) if whole(script, n)]
        if shape.footers:
            assert all(n >= end for n in found[shape])
        else:
            assert all(n > tail + len(script.devices[0].head) for n in found[shape])
    script = small(FROM_2_4)
    size, end = len(script.finish()), script.at("EOF") + 1
    assert found[FROM_2_4] == [end, *range(end + 7, size + 1)]
    assert found[SUPPRESSED] == [len(small(SUPPRESSED).finish())]
    stream = small(TO_2_2).finish()
    zeros = [n for n in range(len(stream) + 1) if n and stream[n - 1] == 0 and n > small(TO_2_2).at("FULL") + 19]
    assert found[TO_2_2] == zeros
    assert found[AT_2_3][-1] == len(small(AT_2_3).finish())


@pytest.mark.parametrize("length", [0, 7, 100, 4200, -40, -1])
def test_a_file_that_was_cut(tmp_path, plugins, length):
    file = tmp_path / "stream"
    file.write_bytes(small(SUPPRESSED).finish()[:length])
    with pytest.raises(ChannelLost) as caught:
        CapturedMachine.load(file, plugins=plugins)
    assert caught.value.place.peer == f"file:{file}"


@pytest.mark.parametrize("what", ["nothing there", "folder", "pipe", "link"])
def test_what_is_no_file(tmp_path, plugins, what):
    file = tmp_path / "stream"
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "link":
        (tmp_path / "other").write_bytes(small(FROM_2_4).finish())
        file.symlink_to("other")
    with pytest.raises(WhimbrelError) as caught:
        CapturedMachine.load(file, plugins=plugins)
    if what == "nothing there":
        assert isinstance(caught.value, ConnectError)
    assert caught.value.code in ("config", "connect")


def test_what_is_no_stream(tmp_path, plugins):
    file = tmp_path / "stream"
    file.write_bytes(b"#!/bin/sh\nexit 1\n")
    with pytest.raises(ProtocolError, match="begins with 0x23212f62, expected 0x5145564d"):
        CapturedMachine.load(file, plugins=plugins, settings=Settings())
