"""How much a stream may make us take: at the limit, one beyond it, and with the largest numbers there are."""

import struct
import tracemalloc

import pytest

from whimbrel import Settings
from whimbrel.capture.taking import Capture, half_of_ram
from whimbrel.errors import ChannelLost, ConfigError, IncompatibleError, StreamError
from whimbrel.machine import memory

from .conftest import Crumbs
from .streams import (
    AT_2_3,
    EOS,
    FROM_2_4,
    FULL,
    PAGE,
    SHAPES,
    START,
    SUPPRESSED,
    TO_2_2,
    Device,
    Script,
    page,
    small,
    str8,
    u32,
    u64,
)


@pytest.fixture
def mapped(monkeypatch):
    """The sizes of what is mapped, as it is."""
    sizes = []
    area = memory.MemoryArea.__init__

    def count(self, size, *more, **named):
        sizes.append(size)
        return area(self, size, *more, **named)

    monkeypatch.setattr(memory.MemoryArea, "__init__", count)
    return sizes


def listed(total, blocks, *, addresses=False):
    """The beginning of a stream, up to the end of a list of blocks that says whatever it likes."""
    script = Script(SUPPRESSED, {}).header()
    data = bytes(script.data) + START + u32(2) + str8("ram") + u32(0) + u32(4) + u64(total | 4)
    for name, size in blocks:
        data += name + u64(size)
    return data + EOS


# -------------------------------------------------------------------------------------------------------------- RAM


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_much_ram_as_may_be(load, check, mapped, shape):
    script = small(shape)
    check(load(script.finish(), max_ram=3 * PAGE), script)
    assert mapped == [2 * PAGE, PAGE]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limit", [3 * PAGE - 1, 2 * PAGE, 0])
def test_more_ram_than_may_be(load, mapped, shape, limit):
    with pytest.raises(IncompatibleError, match="12 KiB of RAM, and at most") as caught:
        load(small(shape).finish(), max_ram=limit)
    assert "max_ram" in str(caught.value)
    assert caught.value.place.section == "'ram' (id 2)"
    assert mapped == []


def test_half_of_the_host_by_default(load, mapped):
    assert half_of_ram() > 1 << 20
    over = half_of_ram() // PAGE * PAGE + PAGE
    with pytest.raises(IncompatibleError, match="max_ram"):
        load(listed(over, [(str8("a"), over)]))
    assert mapped == []


HUGE = [2**63, 2**63 - PAGE, 2**64 - PAGE, 1 << 56, (1 << 56) + PAGE]


@pytest.mark.parametrize("size", HUGE)
def test_as_much_ram_as_a_number_can_say(load, mapped, size):
    """No product, no sum and no mapping is made of it."""
    for total, of_block in [(size, size), (size, PAGE), (PAGE, size)]:
        with pytest.raises((StreamError, IncompatibleError)):
            load(listed(total, [(str8("a"), of_block)]))
    assert mapped == []


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, 2**64 - 1, 3 * PAGE])
def test_blocks_that_are_no_whole_pages_or_too_large(load, mapped, size):
    with pytest.raises(StreamError, match="bytes long, expected whole pages"):
        load(listed(2 * PAGE, [(str8("a"), size)]))
    assert mapped == []


@pytest.mark.parametrize("name", [b"\0", b"\x02a\0", b"\x02\xc3\xa9", b"\x01\n", b"\x03a\x7fb"])
def test_blocks_whose_names_are_none(load, mapped, name):
    with pytest.raises(StreamError, match="the name of a RAM block"):
        load(listed(PAGE, [(name, PAGE)]))
    assert mapped == []


def test_a_name_that_is_listed_twice(load, mapped):
    with pytest.raises(StreamError, match="listed twice"):
        load(listed(2 * PAGE, [(str8("a"), PAGE), (str8("a"), PAGE)]))
    assert mapped == []


@pytest.mark.parametrize("name", [" ", "/", "..", "../../etc/passwd", "a" * 255, "%2F", "'; rm -rf ~;'", "{}", "\\"])
def test_strange_names(load, check, tmp_path, name):
    """They are names, whatever they look like, also where blocks are files."""
    script = Script(FROM_2_4, {name: 1, "b": 1}).header().start().end((name, 0, page(4)))
    check(load(script.full(Device(name, 4, b"body")).finish()), script)
    folder = tmp_path / "memory"
    folder.mkdir()
    settings = Settings()
    settings.backends.memory = f"file:{folder}"
    if len(name) == 255 and "%" not in name:
        check(load(script.finish(), settings=settings), script)
    else:
        check(load(script.finish(), settings=settings), script)
        assert len(list(folder.iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


def test_what_cannot_be_mapped(plugins, tmp_path):
    """A host that has no memory for it says so, and what was mapped already is gone."""
    settings = Settings()
    settings.backends.memory = f"file:{tmp_path / 'one'}"
    capture = Capture(Crumbs(small(FROM_2_4).finish(), [1 << 30]), settings=settings, plugins=plugins)
    with pytest.raises(ConfigError, match="there already"):
        capture.run()
    assert capture.machine.run_state == "shutdown"
    assert list(tmp_path.iterdir()) == []


def test_as_many_blocks_as_may_be(load, check):
    script = Script(FROM_2_4, {f"block {number}": 1 for number in range(4096)}).header().start()
    script.end(*((name, 0, number % 256) for number, name in enumerate(script.ram)))
    check(load(script.finish()), script)


def test_a_block_too_many(load, mapped):
    with pytest.raises(StreamError, match="more than 4096 RAM blocks"):
        load(listed(4097 * PAGE, [(str8(f"{number}"), PAGE) for number in range(4097)]))
    settings = Settings()
    settings.limits.blocks = 1
    with pytest.raises(StreamError, match="more than 1 RAM blocks"):
        load(small(FROM_2_4).finish(), settings=settings)
    assert mapped == []


@pytest.mark.parametrize("at", [1, 2**52 - 1])
def test_a_page_outside_of_its_block(load, at):
    script = Script(FROM_2_4, {"a": 1}).header().start()
    data = bytes(script.data) + b"\x02" + u32(2) + struct.pack(">Q", at * PAGE | 2) + str8("a") + b"\0" + EOS
    with pytest.raises(StreamError, match="outside of block 'a'") as caught:
        load(data)
    assert caught.value.place.block == "a"


def test_more_records_than_there_are_pages(load):
    script = Script(FROM_2_4, {"a": 2}).header().start()
    script.part(("a", 0, 1), ("a", 1, 1)).part(("a", 0, 2), ("a", 0, 3), ("a", 0, 4))
    with pytest.raises(StreamError, match="more page records than the 2"):
        load(script.end().finish())


# --------------------------------------------------------------------------------------------------------- sections


def with_devices(shape, count, *, early=0):
    script = Script(shape, {"a": 1}).header().start()
    for number in range(early):
        script.full(Device("e", 1000 + number)).part()
    return script.end(("a", 0, 0)).full(*(Device("dd", 10 + number) for number in range(count)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_many_sections_as_may_be(load, check, shape):
    settings = Settings()
    settings.limits.sections = 21
    check(load(with_devices(shape, 20).finish(), settings=settings), with_devices(shape, 20))
    with pytest.raises(StreamError, match="more than 21 sections") as caught:
        load(with_devices(shape, 21).finish(), settings=settings)
    assert caught.value.place.section == "devices"


def test_early_sections_count_too(load, check):
    settings = Settings()
    settings.limits.sections = 21
    script = with_devices(FROM_2_4, 10, early=10)
    check(load(script.finish(), settings=settings), script)
    for count, early in ((10, 11), (11, 10), (0, 21), (0, 500)):
        with pytest.raises(StreamError, match="more than 21 sections"):
            load(with_devices(FROM_2_4, count, early=early).finish(), settings=settings)


def test_the_default_of_sections(load, check):
    script = with_devices(SUPPRESSED, 4095)
    check(load(script.finish()), script)
    with pytest.raises(StreamError, match="more than 4096"):
        load(with_devices(SUPPRESSED, 4096).finish())
    with pytest.raises(StreamError, match="more than 4096"):
        load(with_devices(SUPPRESSED, 4097).finish())


# ---------------------------------------------------------------------------------------------------- the description


@pytest.mark.parametrize("shape", [AT_2_3, FROM_2_4], ids=str)
def test_as_long_a_description_as_may_be(load, check, shape):
    script = small(shape)
    script.said = script.text.ljust(4096)
    settings = Settings()
    settings.limits.description = 4096
    machine = load(script.finish(), settings=settings)
    assert machine.form().text == script.said
    script = small(shape)
    script.said = script.text.ljust(4097)
    with pytest.raises((StreamError, ChannelLost)) as caught:
        load(script.finish(), settings=settings)
    if shape.footers:
        assert "the description is 4097 bytes long, at most 4096" in str(caught.value)


@pytest.mark.parametrize("length", [2**31, 2**32 - 1, 17 << 20])
def test_as_long_a_description_as_a_number_can_say(load, length):
    script = small(FROM_2_4).eof()
    with pytest.raises((StreamError, ChannelLost)):
        load(bytes(script.data) + b"\x06" + u32(length) + b'{"page_size": 4096, "devices": [')


# ------------------------------------------------------------------------------------------------ the devices' bytes


@pytest.fixture
def short_tails():
    settings = Settings()
    settings.limits.device_sections = 1 << 16
    settings.limits.description = 4096
    return settings


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_long_a_tail_as_may_be(load, check, short_tails, shape):
    """The bytes of all device sections, headers and footers too, in whatever pieces they come."""
    used = len(small(shape).full(Device("long", 50, b"")).data) - small(shape).at("FULL")
    fits = small(shape).full(Device("long", 50, bytes((1 << 16) - used)))
    over = small(shape).full(Device("long", 50, bytes((1 << 16) - used + 1)))
    far_over = small(shape).full(Device("long", 50, bytes(1 << 17)))
    for sizes in (None, [5000]):
        check(load(fits.finish(), settings=short_tails, sizes=sizes), fits)
        for script in (over, far_over):
            with pytest.raises(StreamError, match="longer than 65536 bytes, which is more than") as caught:
                load(script.finish(), settings=short_tails, sizes=sizes)
            assert caught.value.place.section == "devices"


def test_early_devices_are_bounded_too(plugins, short_tails):
    """However many times RAM goes on in between: all of them together are kept, and no more than may be."""
    script = Script(SUPPRESSED, {"a": 1}).header().start()
    for number in range(400):
        script.full(Device("d", 100 + number, bytes(1000))).part()
    stream = script.end().full(Device("d", 99, b"")).finish()
    capture = Capture(Crumbs(stream, [3000]), settings=short_tails, plugins=plugins)
    with pytest.raises(StreamError, match="longer than 65536"):
        capture.run()
    assert capture.received < 90_000 < len(stream)


def test_an_endless_tail(plugins):
    """One device that never ends costs as much memory as the limit says, and no more."""

    class Endless(Crumbs):
        given = 0

        def recv_into(self, buffer):
            count = super().recv_into(buffer)
            if count == 0:
                memoryview(buffer)[:] = bytes(len(buffer))
                count = len(buffer)
            self.given += count
            return count

    script = Script(TO_2_2, {"a": 1}).header().start().end(("a", 0, 0))
    channel = Endless(bytes(script.data) + FULL + u32(4) + str8("d") + u32(0) + u32(1), [1 << 30])
    tracemalloc.start()
    try:
        with pytest.raises(StreamError, match="more than any machine has"):
            Capture(channel, settings=Settings(), plugins=plugins).run()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (80 << 20) < channel.given < (84 << 20)
    assert peak < 300 << 20
