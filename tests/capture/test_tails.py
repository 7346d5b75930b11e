"""Devices between, before and behind the RAM, bytes of theirs that look like something else, and what ends a stream."""

import json

import pytest

from whimbrel.errors import ChannelLost, IncompatibleError, StreamError

from .streams import (
    AT_2_3,
    COMMAND,
    EOF,
    FOOTED,
    FOOTER,
    FROM_2_4,
    FULL,
    PAGE,
    SHAPES,
    START,
    SUPPRESSED,
    TO_2_2,
    Device,
    Script,
    described,
    page,
    small,
    str8,
    u16,
    u32,
)

WITH_DESCRIPTION = (AT_2_3, FROM_2_4)


def begun(shape, blocks=None, **more):
    return Script(shape, blocks or {"a": 1}, **more).header().start()


def after_ram(shape, *devices):
    return begun(shape).end(("a", 0, page(3))).full(*devices)


# ------------------------------------------------------------------------------------------------------ few devices


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_machine_without_devices(load, check, shape):
    script = after_ram(shape)
    check(load(script.finish()), script)
    check(load(script.finish(), sizes=[1]), script)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_machine_without_memory(load, check, shape):
    script = Script(shape, {}).header().start().end().full(Device("d", 4, b"body"))
    check(load(script.finish()), script)


@pytest.mark.parametrize("shape", FOOTED, ids=str)
def test_a_stream_without_ram_is_refused(load, shape):
    for script in (Script(shape, {}).header(), Script(shape, {}).header().full(Device("d", 4, b"body"))):
        with pytest.raises(StreamError, match="the stream has no RAM"):
            load(script.finish())


# -------------------------------------------------------------------------------------------------- names and twins


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_name_and_instance_twice(load, check, shape):
    script = after_ram(shape, *(Device("isa-ide", 4 + n, bytes([n] * n)) for n in range(1, 5)))
    check(load(script.finish()), script)


@pytest.mark.parametrize("shape", FOOTED, ids=str)
def test_a_device_called_like_the_ram(load, check, shape):
    script = after_ram(shape, Device("ram", 7, b"no RAM", version=1))
    check(load(script.finish()), script)


@pytest.mark.parametrize("shape", FOOTED, ids=str)
def test_ids_in_any_order(load, check, shape):
    script = after_ram(shape, *(Device("d", n, b"x") for n in (2**20 - 1, 0, 70, 5)))
    check(load(script.finish()), script)


# ----------------------------------------------------------------------------------------------------- what is early


@pytest.mark.parametrize("shape", FOOTED, ids=str)
@pytest.mark.parametrize("sizes", [[1 << 30], [1], [11]])
def test_devices_before_and_between(load, check, shape, sizes):
    script = Script(shape, {"a": 2}).header().full(Device("early", 90, b"e"), Device("early", 91, b"f"))
    script.start().part(("a", 0, page(1))).full(Device("middle", 4, b"g")).part().full(Device("middle", 5, b""))
    script.part(("a", 1, 7)).end(("a", 0, 0)).full(Device("late", 6, b"h"))
    check(load(script.finish(), sizes=sizes), script)


@pytest.mark.parametrize("listed", [0, 1, 2, 3])
def test_an_early_device_that_is_not_described_is_kept(load, listed):
    """What the description does not know is a device all the same."""
    script = Script(FROM_2_4, {"a": 1}).header().full(Device("one", 90, b"1"), Device("two", 91, b"22"))
    script.start().end(("a", 0, 0)).full(Device("three", 4, b"333"))
    devices = json.loads(script.text)["devices"][:listed]
    script.said = json.dumps({"page_size": PAGE, "devices": devices}).encode()
    machine = load(script.finish())
    assert [(device.name, device.body) for device in machine.captured] == [
        ("one", b"1"),
        ("two", b"22"),
        ("three", b"333"),
    ]
    # One that leaves the last one out is none of these devices, and may be bytes of one.
    expected = devices if listed == 3 else []
    assert [device.described for device in machine.captured if device.described] == expected


def test_an_early_device_is_described_by_its_own_entry_alone(load):
    script = Script(FROM_2_4, {"a": 1}).header().full(Device("one", 90, b"1"))
    script.start().end(("a", 0, 0)).full(Device("two", 4, b"22"))
    devices = json.loads(script.text)["devices"]
    devices[0]["name"] = "another"
    script.said = json.dumps({"page_size": PAGE, "devices": devices}).encode()
    machine = load(script.finish())
    assert [device.described for device in machine.captured] == [None, devices[1]]


def test_ram_that_goes_on_again_and_again(load, check):
    """More than fits the reader's buffer is read too far, and is read once more; nothing of it gets lost."""
    pages = 520  # two MiB of them
    script = begun(FROM_2_4, {"a": pages})
    for turn in range(6):
        script.part(*(("a", number, page(turn * pages + number)) for number in range(0, pages, 2)))
        for number in range(3):
            script.full(Device("d", 10 + 3 * turn + number, bytes(400_001 * number)))
    script.end()
    check(load(script.finish()), script)
    check(load(script.finish(), sizes=[(1 << 20) - 3, 1 << 20, 5]), script)


def test_what_was_read_too_far_twice(load, check):
    """More is given back than the reader can take at once; and before it has taken the rest, there is more to give."""
    script = begun(FROM_2_4, {"a": 600}).full(Device("one", 10, b"1"))
    part = len(script.data)
    script.part(("a", 0, 1)).full(Device("two", 11, b"2")).part(*(("a", n, page(n)) for n in range(600)))
    script.end().full(Device("three", 12, b"3"))
    # The first piece ends where nobody can tell yet what stands behind the device, and the next is all that fits.
    check(load(script.finish(), sizes=[part + 2, 1 << 20]), script)


# ------------------------------------------------------------------------------------------------------- lookalikes


def whole_description(**more):
    return EOF + described(json.dumps({"page_size": PAGE, "devices": [], **more}).encode())


def liar(section_id, shape):
    """Bytes of a device that are a section's end, a fine one, and all that comes behind it."""
    footer = FOOTER + u32(section_id)
    return {
        "a description": whole_description(),
        "an end and a description": footer + whole_description(),
        "an end and a cut description": footer + EOF + b'\x06\0\0\x10\0{"page_size": 4096, ',
        "another device": footer + FULL + u32(900) + str8("no") + u32(0) + u32(1),
        "another RAM": footer + START + u32(901) + str8("ram") + u32(0) + u32(4),
        "another RAM of rounds": footer + START + u32(902) + str8("block") + u32(0) + u32(1),
        "a PING": footer + COMMAND + u16(2) + u16(4) + u32(1),
        "a way back": footer + COMMAND + u16(1) + u16(0),
        "all of it": whole_description() * 3 + footer + whole_description() + footer + EOF,
    }


@pytest.mark.parametrize("what", liar(0, FROM_2_4))
@pytest.mark.parametrize("shape", WITH_DESCRIPTION, ids=str)
@pytest.mark.parametrize("piece", ["whole", "byte by byte", "that ends with it", "that ends before it"])
def test_a_device_whose_bytes_lie(load, check, shape, what, piece):
    """The real description knows better, whatever came first, and however it was cut into pieces."""
    lie = liar(5, shape)[what]
    script = after_ram(shape, Device("one", 4, b"1"), Device("liar", 5, b"begin" + lie + b"end"), Device("x", 6, b""))
    stream = script.finish()
    at = stream.index(lie) + (len(lie) if piece == "that ends with it" else 0)
    sizes = {"whole": [1 << 30], "byte by byte": [1]}.get(piece, [at, 1 << 30])
    if piece == "that ends with it" and what == "a description" and shape is AT_2_3:
        sizes = [at - 1, 1 << 30]
    check(load(stream, sizes=sizes), script)


@pytest.mark.parametrize("what", ["a description", "an end and a cut description", "an end and a description"])
def test_without_a_description_a_lie_is_no_machine(load, check, what):
    """Footers alone: either the lie is seen through, or the stream is refused; never is there less of a machine."""
    script = after_ram(SUPPRESSED, Device("liar", 5, b"begin" + liar(5, SUPPRESSED)[what] + b"end" * 999))
    if what == "a description":
        check(load(script.finish()), script)
    else:
        with pytest.raises((StreamError, ChannelLost)):
            load(script.finish())


def test_so_many_descriptions_are_none(load):
    script = after_ram(FROM_2_4, Device("liar", 5, whole_description() * 8))
    assert len(load(script.finish()).captured) == 1
    script = after_ram(FROM_2_4, Device("liar", 5, whole_description() * 9))
    with pytest.raises(StreamError):
        load(script.finish())


# ------------------------------------------------------------------------------------------------ wrong descriptions


def wrong(script, change):
    """The stream with a description that was changed."""
    value = json.loads(script.text)
    change(value["devices"])
    script.said = json.dumps(value).encode()
    return script.finish()


CHANGES = {
    "a device too many": lambda devices: devices.append(devices[0]),
    "a device less": lambda devices: devices.pop(),
    "none": lambda devices: devices.clear(),
    "another name": lambda devices: devices[1].update(name="no"),
    "another instance": lambda devices: devices[0].update(instance_id=5),
    "another version": lambda devices: devices[1].update(version=77),
    "another order": lambda devices: devices.reverse(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_description_of_other_devices(load, change):
    """With footers the devices are known without it; where nothing else tells them apart, nothing is guessed."""
    two = Device("one", 4, b"first"), Device("two", 5, b"second")
    machine = load(wrong(after_ram(FROM_2_4, *two), CHANGES[change]))
    assert [(device.name, device.body, device.described) for device in machine.captured] == [
        ("one", b"first", None),
        ("two", b"second", None),
    ]
    assert not machine.form().description
    with pytest.raises(StreamError):
        load(wrong(after_ram(AT_2_3, *two), CHANGES[change]))


def test_a_description_of_other_sizes(load):
    """Some arrays are described shorter than they are: footers and headers tell where their device ends."""
    devices = Device("one", 4, b"first"), Device("two", 5, b"second"), Device("three", 6, b"")

    def shorter(devices):
        devices[0]["fields"][0]["size"] = 2

    for shape in WITH_DESCRIPTION:
        machine = load(wrong(after_ram(shape, *devices), shorter))
        assert [device.body for device in machine.captured] == [b"first", b"second", b""]


# ---------------------------------------------------------------------------------------------------- what is behind


@pytest.mark.parametrize("garbage", [b"\0", b"\xff" * 3, b"garbage" * 1000, b"\0\x06\0\0\0\x02{}", bytes(3 << 20)])
@pytest.mark.parametrize("shape", WITH_DESCRIPTION, ids=str)
@pytest.mark.parametrize("sizes", [[1 << 30], [1000, 77, 3000]])
def test_garbage_behind_a_description(load, check, shape, garbage, sizes, caplog):
    """A QEMU would not look at it; nor do we, but we say so."""
    script = small(shape)
    check(load(script.finish() + garbage, sizes=sizes), script)
    assert f"{len(garbage)} bytes came behind the end of the stream" in caplog.text


@pytest.mark.parametrize("garbage", [b"\xff", b"garbage" * 1000, bytes(1 << 20), b"\x06\0\0\0\x02{}" * 2])
def test_garbage_without_a_description(load, garbage):
    """Nothing tells that the devices end there, so nothing is claimed."""
    with pytest.raises((StreamError, ChannelLost)):
        load(small(SUPPRESSED).finish() + garbage)


@pytest.mark.parametrize("garbage", [b"\xff", b"garbage"])
def test_garbage_where_all_is_guessed(load, garbage):
    with pytest.raises(ChannelLost):
        load(small(TO_2_2).finish() + garbage)


# ---------------------------------------------------------------------------------------------------------- the RAM


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_second_section_of_ram(load, shape):
    script = begun(shape).part(("a", 0, page(1)))
    script.ram, script.ram_id = {"b": script.ram["a"]}, 9
    with pytest.raises(StreamError, match="a second section 'ram' begins, with id 9") as caught:
        load(script.start().end().finish())
    assert caught.value.place.section == "head"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ram_that_begins_twice(load, shape):
    with pytest.raises(StreamError, match="may not come now"):
        load(begun(shape).start().finish())


@pytest.mark.parametrize("kind", [b"\x02", b"\x03"])
def test_ram_that_goes_on_and_did_not_begin(load, kind):
    script = Script(FROM_2_4, {}).header()
    with pytest.raises(StreamError, match="may not come now"):
        load(bytes(script.data) + kind + u32(2))


def test_ram_that_goes_on_behind_its_end(load):
    with pytest.raises(StreamError, match="may not come now"):
        load(begun(FROM_2_4).end().part(("a", 0, 0)).finish())


def test_what_else_is_saved_in_rounds(load):
    script = Script(FROM_2_4, {}).header()
    with pytest.raises(IncompatibleError, match="'dirty-bitmap'"):
        load(bytes(script.data) + START + u32(1) + str8("dirty-bitmap") + u32(0) + u32(1))
    with pytest.raises(IncompatibleError, match="--drive NAME=IMAGE"):
        load(bytes(script.data) + START + u32(1) + str8("block") + u32(0) + u32(1))


def test_ram_of_another_version(load):
    stream = small(FROM_2_4).finish().replace(str8("ram") + u32(0) + u32(4), str8("ram") + u32(0) + u32(3))
    with pytest.raises(IncompatibleError, match="version 3, expected 4"):
        load(stream)


@pytest.mark.parametrize("element", [5, 6, 7, 0x7E, 9, 0xFF])
def test_an_element_that_has_no_place_there(load, element):
    with pytest.raises(StreamError, match=f"unknown section type {element:#04x}") as caught:
        load(bytes(begun(FROM_2_4).data) + bytes([element]) * 50)
    assert caught.value.place.offset == len(begun(FROM_2_4).data)
    assert caught.value.place.section == "head"


# --------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_commands_that_nobody_answers(load, check, shape):
    """A recording of a stream that went over a link with a way back has its commands in it."""
    script = Script(shape, {"a": 1}).header().open_return_path().ping().open_return_path()
    script.start().ping(5).part(("a", 0, page(1))).ping(6).end().ping(7)
    script.full(Device("d", 4, b"body"))
    if shape.footers:
        script.ping(0x77686D62).ping(8)
    check(load(script.finish()), script)
    check(load(script.finish(), sizes=[1]), script)


def test_a_flood_of_commands(load, check):
    script = Script(FROM_2_4, {"a": 1}).header()
    for number in range(30_000):
        script.ping(number)
    script.start().end().full(Device("d", 4, b"body"))
    for number in range(3_000):
        script.ping(number)
    check(load(script.finish()), script)


@pytest.mark.parametrize("number", [0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0xFFFF])
def test_commands_of_another_time(load, number):
    script = Script(FROM_2_4, {"a": 1}).header()
    with pytest.raises(StreamError, match="command") as caught:
        load(bytes(script.data) + COMMAND + u16(number) + u16(0) + bytes(100))
    assert caught.value.place.section == "command"
