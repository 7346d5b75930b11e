"""Tails of device sections, split in each way there is: whole, cut at every byte, damaged, and as they come."""

import json

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.wire import description, fields, tail
from whimbrel.wire.tail import split_by_description, split_by_footers, split_by_headers

from . import tails
from .tails import EOF, plain_device, u32


def parsed(devices):
    return description.parse(tails.text(devices))


def shown(sections):
    return [(each.header.idstr, each.header.instance_id, each.header.section_id, each.body) for each in sections]


def wanted(devices):
    return [(each.name, each.instance, each.section_id, each.body) for each in devices]


def check_whole(split, devices, data, *, footers):
    assert split.error is None
    assert shown(split.sections) == wanted(devices)
    offset = 0
    for each, section in zip(devices, split.sections, strict=True):
        assert section.offset == offset
        assert section.header.version_id == each.version
        offset += len(each.whole) + 5 * footers
    assert split.end == offset
    assert data[split.end] == 0


# ---------------------------------------------------------------------------------------------------- by description


@given(tails.devices(), st.booleans(), st.sampled_from([EOF, b"\x08\0\x02\0\x04abcd\0"]), st.data())
def test_split_and_decoded(devices, footers, behind, data):
    behind = data.draw(st.sampled_from([EOF, tails.ending(devices), b"\x08\0\x02\0\x04abcd" + tails.ending(devices)]))
    stream = tails.tail(devices, footers=footers, behind=behind)
    split = split_by_description(stream, parsed(devices), footers=footers)
    assert split.error is None
    assert not split.guessed
    assert shown(split.sections) == wanted(devices)
    assert split.end == len(stream) - len(behind)
    for device, section in zip(devices, split.sections, strict=True):
        assert section.described == device.described
        found = fields.decode(section.described, section.body)
        assert found.as_dict()["fields"] == device.decoded["fields"]
    if behind == tails.ending(devices):
        found = description.find(stream)
        assert (found.eof_offset, found.end) == (split.end, len(stream))
        assert found.description == parsed(devices)


@settings(max_examples=20)
@given(tails.devices(most=3, depth=1), st.booleans())
def test_cut_at_every_byte(devices, footers):
    whole = tails.tail(devices, footers=footers)
    said = parsed(devices)
    for size in range(len(whole) + 1):
        split = split_by_description(whole[:size], said, footers=footers)
        at, count = 0, 0
        for each in devices:
            if at + len(each.whole) + 5 * footers > size:
                break
            at, count = at + len(each.whole) + 5 * footers, count + 1
        assert shown(split.sections) == wanted(devices)[:count]
        assert split.end == at
        if count == len(devices):
            assert split.error is None
        else:
            assert f"ends at byte {size}" in str(split.error)


@given(st.data(), st.booleans())
def test_damage(mutated, data, footers):
    devices = data.draw(tails.devices(most=3, depth=1, nasty=False))
    whole = tails.tail(devices, footers=footers, behind=tails.ending(devices))
    damaged = data.draw(mutated(whole))
    for split in (
        split_by_description(damaged, parsed(devices), footers=footers),
        split_by_footers(damaged),
        split_by_headers(damaged),
    ):
        assert 0 <= split.end <= len(damaged)
        at = 0
        for section in split.sections:
            assert section.offset >= at
            at = section.offset + len(section.body)
        assert at <= split.end
        if split.error:
            assert str(split.error)
    try:
        found = description.parse(data.draw(mutated(tails.text(devices))))
    except description.StreamError:
        return
    split_by_description(whole, found, footers=footers)


@pytest.mark.parametrize("footers", [True, False])
def test_name_and_instance_come_twice(footers):
    devices = [plain_device("isa-ide", 7, b"first"), plain_device("isa-ide", 8, b"second one")]
    whole = tails.tail(devices, footers=footers)
    check_whole(split_by_description(whole, parsed(devices), footers=footers), devices, whole, footers=footers)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("footers", [True, False])
@pytest.mark.parametrize("described", [4, 1, 9])
def test_an_array_of_pointers_whose_first_is_null(footers, described, last):
    """It is described by its first element alone, and so its size is wrong; what stands behind tells."""
    wrong = {"name": "p", "type": "nullptr", "array_len": 3, "size": described}
    devices = [
        plain_device("one", 3, b"123"),
        plain_device("odd", 4, b"0" + b"\x7e\0\0\0\4\0" + b"ab", fields=[wrong]),
        *([] if last else [plain_device("three", 5, b"345")]),
    ]
    whole = tails.tail(devices, footers=footers, behind=tails.ending(devices))
    split = split_by_description(whole, parsed(devices), footers=footers)
    check_whole(split, devices, whole, footers=footers)
    with pytest.raises(description.StreamError):
        fields.decode(split.sections[1].described, split.sections[1].body)


def test_what_is_behind_a_wrong_size_must_be_the_next_device():
    wrong = {"name": "p", "type": "nullptr", "size": 1}
    footer = b"\x7e" + u32(4)
    body = b"ab" + footer + EOF + footer + b"\x04" + u32(9) + b"\x05other" + u32(0) + u32(1) + footer
    devices = [plain_device("odd", 4, body, fields=[wrong]), plain_device("three", 5, b"345")]
    whole = tails.tail(devices)
    assert shown(split_by_description(whole, parsed(devices), footers=True).sections) == wanted(devices)


@pytest.mark.parametrize("footers", [True, False])
def test_another_device_than_described(footers):
    devices = [plain_device("a1", 3, b"1"), plain_device("b2", 4, b"22"), plain_device("c3", 5, b"333")]
    whole = tails.tail(devices, footers=footers)
    for changes, says in [
        ({"name": "b3"}, "begins section .*idstr='b2'.*, and the description says 'b3'"),
        ({"instance_id": 1}, "the description says 'b2', instance 1"),
        ({"version": 9}, "version 9"),
    ]:
        other = attrs.evolve(devices[1], described=devices[1].described | changes)
        split = split_by_description(whole, parsed([devices[0], other, devices[2]]), footers=footers)
        # Without footers the wrong one is missed where it should stand, behind the first.
        assert shown(split.sections) == wanted(devices)[: 1 if footers else 0]
        if footers:
            with pytest.raises(description.StreamError, match=says):
                raise split.error


@pytest.mark.parametrize("footers", [True, False])
def test_more_or_fewer_devices_than_described(footers):
    devices = [plain_device(f"d{i}", i, b"x" * i) for i in range(1, 5)]
    fewer = split_by_description(tails.tail(devices[:3], footers=footers), parsed(devices), footers=footers)
    assert "'d4' was to begin" in str(fewer.error) or "must stand there" in str(fewer.error)
    more = split_by_description(tails.tail(devices, footers=footers), parsed(devices[:3]), footers=footers)
    assert "is not in the description" in str(more.error) or "must stand there" in str(more.error)


def test_early_devices_and_then_the_rest():
    """Some come before the RAM; the description has all of them, in order."""
    devices = [plain_device(f"d{i}", i, b"x" * i) for i in range(10, 14)]
    early = tails.tail(devices[:1], behind=b"\x01" + u32(2) + b"\x03ram" + u32(0) + u32(4))
    split = split_by_description(early, parsed(devices), footers=True)
    assert (split.error, shown(split.sections)) == (None, wanted(devices[:1]))
    assert early[split.end] == 1
    rest = b"????" + tails.tail(devices[1:], behind=tails.ending(devices))
    split = split_by_description(rest, parsed(devices), footers=True, start=4, first=1, seen=[2, 10])
    assert (split.error, shown(split.sections)) == (None, wanted(devices[1:]))
    again = split_by_description(rest, parsed(devices), footers=True, start=4, first=1, seen=[11])
    assert "'d11' was to begin at byte 4" in str(again.error)


def test_sizes_beyond_everything():
    device = plain_device("a", 1, b"12")
    for field in (
        {"name": "x", "type": "buffer", "size": 2**40, "array_len": 2**32 - 1},
        {"name": "x", "type": "buffer", "size": -1},
        {"name": "x"},
        "x",
    ):
        said = parsed([attrs.evolve(device, described=device.described | {"fields": [field]})])
        split = split_by_description(tails.tail([device], behind=b"\0rest"), said, footers=True)
        assert split.sections == ()
        assert split.error is not None
        assert split.error.place.section == "'a' (id 1)"


def test_a_body_has_a_limit():
    for size in (99, 100, 101):
        devices = [plain_device("aa", 1, b"x" * size), plain_device("bb", 2)]
        whole = tails.tail(devices)
        for split in (
            split_by_description(whole, parsed(devices), footers=True, body_limit=100),
            split_by_description(tails.tail(devices, footers=False), parsed(devices), footers=False, body_limit=100),
            split_by_footers(whole, body_limit=100),
            split_by_headers(tails.tail(devices, footers=False), body_limit=100),
        ):
            assert (split.error is None) == (size <= 100)
            assert len(split.sections) == (2 if size <= 100 else 0)


# ------------------------------------------------------------------------------------------------------- by footers


@given(tails.devices(), st.data())
def test_split_by_footers_alone(devices, data):
    behind = data.draw(st.sampled_from([EOF, b"", b"\x08\0\x02\0\x04abcd", tails.ending(devices), b"\x02" + u32(999)]))
    whole = tails.tail(devices, behind=behind)
    split = split_by_footers(whole, started=[999])
    assert split.error is None
    assert shown(split.sections) == wanted(devices)
    assert split.end == len(whole) - len(behind)
    assert all(section.described is None for section in split.sections)


@settings(max_examples=20)
@given(tails.devices(most=3, depth=1))
def test_cut_at_every_byte_by_footers(devices):
    whole = tails.tail(devices, behind=tails.ending(devices))
    ends, at = [], 0
    for each in devices:
        at += len(each.whole) + 5
        ends.append(at)
    for size in range(ends[-1] + 10):
        split = split_by_footers(whole[:size])
        count = len(split.sections)
        certain = wanted(devices)[:count]
        if split.end not in (0, *ends):  # a footer in a body, with the cut behind it, or behind what may follow it
            assert size - split.end in (0, 1)
            assert split.sections[-1].body == devices[count - 1].body[: len(split.sections[-1].body)]
            count, certain = count - 1, certain[:-1]
        assert shown(split.sections)[:count] == certain
        assert count >= sum(end + 30 < size for end in ends), "a header is no longer than that"
        if split.error:
            assert f"ends at byte {size}" in str(split.error)


@pytest.mark.parametrize(
    "behind",
    [
        b"\0",
        b'\0\x06\0\0\x10\0{"page',
        b"\x04" + u32(9) + b"\x01x" + u32(0) + u32(1),
        b"\x01" + u32(9) + b"\x01x" + u32(0) + u32(1),
        b"\x02" + u32(2),
        b"\x03" + u32(2),
        b"\x08\0\x01\0\0",
        b"\x08\0\x02\0\x04....",
        b"\x08\0\x03\0\x10" + bytes(16),
        b"\x08\0\x03\0\0",
        b"\x08\0\x04\0\0",
        b"\x08\0\x05\0\0",
        b"\x08\0\x06\0\x14" + bytes(20),
        b"\x08\0\x07\0\x04" + u32(77),
        b"\x08\0\x0a\0\x02\x01x",
        b"\x08\0\x0b\0\0",
    ],
    ids=lambda data: data[:6].hex(),
)
def test_what_may_stand_behind_a_footer(behind):
    device = plain_device("a", 1, b"body")
    split = split_by_footers(tails.tail([device], behind=behind), started=[2])
    assert shown(split.sections)[:1] == wanted([device])
    assert split.sections[0].offset == 0


@pytest.mark.parametrize("behind", tails.lookalikes(1)[:-1], ids=lambda data: data[5:9].hex())
def test_what_may_not(behind):
    """Nothing of this ends a section, and none of it hides the end that comes behind."""
    device = plain_device("a", 1, b"body" + behind + b"more" + behind)
    whole = tails.tail([device], behind=EOF)
    split = split_by_footers(whole)
    check_whole(split, [device], whole, footers=True)
    cut = split_by_footers(whole[: len(device.whole)])
    assert cut.sections == ()
    assert "before this section's footer" in str(cut.error)
    assert cut.error.place.section == "'a' (id 1)"


def test_ids_that_were_taken():
    whole = tails.tail([plain_device("a", 1), plain_device("b", 2)])
    assert len(split_by_footers(whole).sections) == 2
    assert "neither a new section" in str(split_by_footers(whole, seen=[1]).error)
    assert "before this section's footer" in str(split_by_footers(whole, seen=[2]).error)


def test_sections_have_a_limit():
    devices = [plain_device("a", number) for number in range(tail.SECTIONS_MAX + 1)]
    assert split_by_footers(tails.tail(devices[:-1])).error is None
    split = split_by_footers(tails.tail(devices))
    assert len(split.sections) == tail.SECTIONS_MAX
    assert "more than 4096" in str(split.error)


@pytest.mark.parametrize("split", [split_by_footers, split_by_headers])
@pytest.mark.parametrize(
    "data", [b"", b"\x04", b"\x04\0\0\0\1\0", b"\x05", b"\xff" * 9, b"\x04\0\0\0\1\2\1\1" + bytes(8)]
)
def test_no_section_at_all(split, data):
    assert split(data).sections == ()
    assert split_by_description(data, parsed([plain_device("a", 1)]), footers=True).error is not None


# ------------------------------------------------------------------------------------------------------- by headers


@given(tails.devices(depth=1, nasty=False))
def test_headers_are_guessed(devices):
    for each in devices:
        each.body = each.body.replace(b"\x04", b"\x03")
    whole = tails.tail(devices, footers=False)
    split = split_by_headers(whole)
    assert split.guessed
    check_whole(split, devices, whole, footers=False)


def test_a_guess_takes_the_higher_ids_first_too():
    devices = [
        plain_device("bridge", 64, b"\4\0\0\0"),
        plain_device("timer", 0, bytes(24)),
        plain_device("dma", 4, b""),
    ]
    whole = tails.tail(devices, footers=False)
    check_whole(split_by_headers(whole), devices, whole, footers=False)
    assert len(split_by_headers(whole, seen=[0]).sections) == 2


def test_a_guess_of_a_cut_tail():
    devices = [plain_device("one", 1, b"\xff" * 8), plain_device("two", 2, b"\xff" * 8)]
    split = split_by_headers(tails.tail(devices, footers=False, behind=b""))
    assert shown(split.sections) == wanted(devices[:1])
    assert "not with the end of a stream" in str(split.error)
    assert split.end == len(devices[0].whole)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer(kind):
    devices = [plain_device("one", 1, b"11"), plain_device("two", 2, b"222")]
    whole = kind(tails.tail(devices, behind=tails.ending(devices)))
    for split in (split_by_description(whole, parsed(devices), footers=True), split_by_footers(whole)):
        assert shown(split.sections) == wanted(devices)
        assert all(type(each.body) is bytes for each in split.sections)
    assert description.find(whole).description.devices == tuple(
        json.loads(json.dumps(each.described)) for each in devices
    )


@pytest.mark.parametrize("footers", [True, False])
def test_a_machine_without_devices(footers):
    nothing = tails.ending([])
    assert split_by_description(nothing, parsed([]), footers=footers).error is None
    assert split_by_footers(nothing).error is None
    one = plain_device("aa", 1, b"1")
    split = split_by_description(tails.tail([one], footers=footers), parsed([]), footers=footers)
    assert "is not in the description" in str(split.error)
    early = split_by_description(nothing, parsed([one]), footers=footers, first=1)
    assert (early.sections, early.error) == ((), None)
