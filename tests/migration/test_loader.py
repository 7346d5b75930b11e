"""The loader alone, on bytes: a stream that is cut anywhere, or changed anyhow, ends in one error or none at all.

Whatever comes, there is no other exception than a MigrationError, it says where, memory stays bounded, and the machine
is as it was before and loads the next stream.
"""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections import Counter

import attrs
import numpy as np
import pytest

from whimbrel import Machine, PluginManager, Settings, vmstate
from whimbrel.errors import ChannelLost, IncompatibleError, MigrationError, StreamError
from whimbrel.machine.dirty import plugin as trackers
from whimbrel.migration.loader import StreamLoader
from whimbrel.stream import Reader
from whimbrel.testing.memory import ReplayChannel
from whimbrel.testing.pair import Pair
from whimbrel.wire import return_path
from whimbrel_savevm import block, devices, ram

PAGE = 4096
KIB, MIB = 1 << 10, 1 << 20


@attrs.define
class Inner:
    x: int = 0
    y: float = 0.0


@attrs.define
class Rich:
    """A device with a field of every kind."""

    small: int = 0
    flag: bool = False
    count: int = 0
    items: np.ndarray = attrs.field(factory=lambda: np.zeros(6, np.uint16))
    size: int = 0
    blob: bytes = b""
    fixed: bytes = bytes(3)
    inner: Inner = attrs.field(factory=Inner)
    many: list = attrs.field(factory=lambda: [Inner(), Inner()])
    ports: int = 4
    extra: int = 0


INNER = vmstate.VMStateDescription("inner", 1, fields=[vmstate.int32("x"), vmstate.float64("y")])
EXTRA = vmstate.VMStateDescription(
    "rich/extra", 1, fields=[vmstate.uint32("extra", high=9)], needed=lambda rich: rich.extra > 0
)
RICH = vmstate.VMStateDescription(
    "rich",
    3,
    minimum_version_id=2,
    fields=[
        vmstate.uint8("small", low=0, high=99),
        vmstate.bool_("flag"),
        vmstate.uint32("count", high=6),
        vmstate.uint16("items", count="count", maximum=6),
        vmstate.uint32("size", high=64),
        vmstate.buffer("blob", count="size", maximum=64),
        vmstate.buffer("fixed", size=3),
        vmstate.struct("inner", INNER),
        vmstate.struct("many", INNER, length=2),
        vmstate.uint8("ports", equal=True),
    ],
    subsections=[EXTRA],
)
PLAIN = vmstate.VMStateDescription("plain", 1, fields=[vmstate.uint64("x")])


@attrs.define
class Plain:
    x: int = 0


def build(settings, plugins):
    machine = Machine("tiny", settings=settings, plugins=plugins)
    machine.ram.add("a", 3 * PAGE)
    machine.ram.add("b", 4 * PAGE)
    machine.rich, machine.plain = Rich(), Plain()
    machine.devices.add("rich", machine.rich, RICH)
    machine.devices.add("plain", machine.plain, PLAIN)
    return machine


def fill(machine):
    machine.ram["b"].view[2 * PAGE : 3 * PAGE] = np.random.default_rng(3).integers(1, 255, PAGE, np.uint8)
    rich = machine.rich
    rich.small, rich.flag, rich.count, rich.size, rich.blob = 77, True, 4, 5, b"hello"
    rich.items[:4] = [1, 2, 3, 65535]
    rich.fixed, rich.inner, rich.many, rich.extra = b"xyz", Inner(-5, 2.5), [Inner(1, 1.0), Inner(2, -0.0)], 7
    machine.plain.x = 1 << 63


@pytest.fixture(scope="module")
def stream():
    """A whole stream of such a machine."""
    settings = Settings()
    settings.backends.dirty_tracker = "manual"
    with Pair(build, settings=settings, handover="proof") as pair:
        fill(pair.source)
        pair.source.start()
        pair.source.stop()
        incoming, outgoing = pair.run()
        assert (incoming.error, outgoing.error) == (None, None)
        return bytes(pair.recorded.sent)


class Loading:
    """One machine, into which stream after stream is loaded."""

    def __init__(self):
        plugins = PluginManager(load_entry_points=False)
        for plugin in (trackers, ram, block, devices):
            plugins.register(plugin)
        self.machine = build(Settings(), plugins)
        self.machine.expect_arrival()
        self.ends = Counter()

    def load(self, data, *, broken=False):
        """Load `data`; returns the error, or None, and leaves the machine as it was before."""
        registry, _ = self.machine._register()
        channel = ReplayChannel(data, broken=broken)
        loader = StreamLoader(
            self.machine,
            registry,
            Reader(channel, capacity=8 * KIB),
            lambda message: channel.send(return_path.encode(message)),
            on_prepared=lambda: None,
        )
        error = None
        try:
            loader.load_header()
            loader.load()
            self.loaded = True
            loader.load_description()
        except MigrationError as exc:
            error = exc
        if error is None:
            self.look_loaded()
        loader.rollback()
        registry.finish()
        self.ends[type(error).__name__] += 1
        return error

    def look_loaded(self):
        """What was loaded fits its description, whatever it is."""
        rich = self.machine.rich
        assert 0 <= rich.small <= 99
        assert 0 <= rich.count <= 6
        assert len(rich.blob) == rich.size <= 64
        assert (len(rich.fixed), rich.ports, len(rich.items), len(rich.many)) == (3, 4, 6, 2)

    def check_clean(self):
        """Memory is zero, and the devices are as they were made."""
        assert not any(block.view.any() for block in self.machine.ram)
        rich, fresh = self.machine.rich, Rich()
        assert not rich.items.any()
        assert attrs.evolve(rich, items=0) == attrs.evolve(fresh, items=0)
        assert self.machine.plain == Plain()

    def check_reusable(self, stream):
        """A whole stream is loaded, value for value."""
        registry, _ = self.machine._register()
        loader = StreamLoader(self.machine, registry, Reader(ReplayChannel(stream)), lambda m: None, on_prepared=int)
        loader.load_header()
        loader.load()
        loader.load_description()
        good = Machine("good")
        good.ram.add("b", 4 * PAGE)
        good.rich, good.plain = Rich(), Plain()
        good.ram.add("a", 3 * PAGE)
        fill(good)
        for ram_block in good.ram:
            assert np.array_equal(ram_block.view, self.machine.ram[ram_block.name].view)
        assert attrs.evolve(good.rich, items=0, extra=7) == attrs.evolve(self.machine.rich, items=0)
        assert self.machine.rich.items.tolist() == good.rich.items.tolist()
        assert self.machine.plain == good.plain
        good.close()
        loader.rollback()
        registry.finish()
        self.check_clean()


@pytest.fixture(scope="module")
def loading():
    loading = Loading()
    yield loading
    loading.machine.close()


def judge(error):
    """One MigrationError of a definite kind, which says where."""
    assert type(error) in {ChannelLost, StreamError, IncompatibleError}, repr(error)
    assert error.place.section
    assert error.place.offset is not None
    assert f"section {error.place.section}" in str(error)
    assert len(str(error)) < 2000


def test_the_whole_stream_loads(loading, stream):
    assert 5_000 < len(stream) < 8_000
    assert loading.load(stream) is None
    loading.check_clean()
    loading.check_reusable(stream)


@pytest.mark.parametrize("broken", [False, True], ids=["ended", "broken"])
@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.long)])
def test_a_stream_that_is_cut_all_along(loading, stream, walk, broken, step):
    """About the ends of all elements, and at every so many bytes."""
    elements = walk(stream)
    ends = {end + near for one in elements for end in (one.offset, one.end) for near in (-1, 0, 1)}
    for cut in (cut for cut in range(len(stream)) if cut % step == 0 or cut in ends):
        error = loading.load(stream[:cut], broken=broken)
        assert type(error) is ChannelLost, cut
        judge(error)
        assert error.place.offset <= cut
        # It names the section in which it happened, except where that could not be known yet.
        inside = next((one for one in elements if one.offset <= cut < one.end), None)
        if inside is not None and inside.name in {"ram", "rich", "plain"} and cut > inside.offset + 30:
            assert inside.name in error.place.section, cut
        if cut % (64 * step) == 0:
            loading.check_clean()
    loading.check_reusable(stream)


# ------------------------------------------------------------------------------------------------------------ mutations


class Mutator:
    """Makes streams that are almost right. The number of one is its seed: `mutated(n)` is always the same."""

    def __init__(self, stream, elements):
        self.stream = stream
        self.elements = [bytes(stream[one.offset : one.end]) for one in elements]
        self.header = stream[:8]
        page = stream.index(np.random.default_rng(3).integers(1, 255, PAGE, np.uint8).tobytes())
        # Where something has a meaning: everything but the inside of the page, and what is only skipped.
        end = elements[-1].offset + 5
        self.structure = [at for at in range(end) if not page <= at < page + PAGE]
        self.strategies = [
            self.flip, self.flip_structure, self.replace, self.extreme, self.extreme, self.nudge, self.insert,
            self.delete, self.duplicate, self.swap, self.elements_shuffled, self.element_repeated,
            self.element_dropped, self.overwrite, self.cut_and_garbage, self.random_bytes,
        ]  # fmt: skip

    def mutated(self, number):
        dice = random.Random(number)
        data = bytearray(self.stream)
        for _ in range(dice.choice([1, 1, 1, 1, 2, 3])):
            data = dice.choice(self.strategies)(dice, data)
        return bytes(data)

    def at(self, dice, data):
        return min(dice.choice(self.structure), len(data) - 1) if data else 0

    def flip(self, dice, data):
        for _ in range(dice.randint(1, 8)):
            if data:
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        return data

    def flip_structure(self, dice, data):
        if data:
            data[self.at(dice, data)] ^= 1 << dice.randrange(8)
        return data

    def replace(self, dice, data):
        if data:
            data[self.at(dice, data)] = dice.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 0x7E, 0x7F, 0x80, 0xFE, 0xFF])
        return data

    def extreme(self, dice, data):
        width, at = dice.choice([1, 2, 4, 8]), self.at(dice, data)
        top = 1 << (8 * width)
        value = dice.choice(
            [0, 1, 2, top - 1, top - 2, top // 2, top // 2 - 1, top // 2 + 1, PAGE % top, (1 << 20) % top]
        )
        data[at : at + width] = value.to_bytes(width, "big")
        return data

    def nudge(self, dice, data):
        width, at = dice.choice([1, 2, 4, 8]), self.at(dice, data)
        value = int.from_bytes(data[at : at + width], "big") + dice.choice([-1, 1, 8, -8, PAGE, -PAGE, 3])
        data[at : at + width] = (value % (1 << (8 * width))).to_bytes(width, "big")
        return data

    def insert(self, dice, data):
        at = self.at(dice, data)
        data[at:at] = dice.randbytes(dice.choice([1, 2, 4, 8, 9, 100]))
        return data

    def delete(self, dice, data):
        at = self.at(dice, data)
        del data[at : at + dice.choice([1, 2, 4, 8, 9, 100, PAGE])]
        return data

    def duplicate(self, dice, data):
        at, size = self.at(dice, data), dice.choice([1, 4, 8, 9, 50, 200, PAGE + 8])
        data[at:at] = data[at : at + size]
        return data

    def swap(self, dice, data):
        one, other, size = self.at(dice, data), self.at(dice, data), dice.choice([1, 2, 4, 8, 30])
        first, second = bytes(data[one : one + size]), bytes(data[other : other + size])
        data[one : one + size], data[other : other + size] = second, first
        return data

    def overwrite(self, dice, data):
        at, source, size = self.at(dice, data), self.at(dice, data), dice.choice([1, 4, 5, 8, 9, 13, 60])
        data[at : at + size] = self.stream[source : source + size]
        return data

    def cut_and_garbage(self, dice, data):
        return data[: self.at(dice, data)] + dice.randbytes(dice.choice([0, 1, 16, 5000]))

    def random_bytes(self, dice, data):
        at = self.at(dice, data)
        size = dice.choice([4, 16, 64])
        data[at : at + size] = dice.randbytes(size)
        return data

    def elements_shuffled(self, dice, data):
        parts = list(self.elements)
        one, other = dice.randrange(len(parts)), dice.randrange(len(parts))
        parts[one], parts[other] = parts[other], parts[one]
        return bytearray(self.header + b"".join(parts))

    def element_repeated(self, dice, data):
        parts = list(self.elements)
        parts.insert(dice.randrange(len(parts)), dice.choice(parts))
        return bytearray(self.header + b"".join(parts))

    def element_dropped(self, dice, data):
        parts = list(self.elements)
        del parts[dice.randrange(len(parts))]
        return bytearray(self.header + b"".join(parts))


@pytest.fixture(scope="module")
def mutator(stream, walk):
    return Mutator(stream, walk(stream))


def load_mutated(loading, mutator, stream, numbers):
    """Load the mutated streams of `numbers`; returns how many came to which end."""
    before = loading.ends.copy()
    for number in numbers:
        try:
            error = loading.load(mutator.mutated(number))
            if error is not None:
                judge(error)
            if number % 16 == 0:
                loading.check_clean()
        except BaseException as exc:
            exc.add_note(f"mutated stream number {number}")
            raise
    loading.check_reusable(stream)
    return loading.ends - before


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(10))
def test_ten_thousand_mutated_streams(loading, mutator, stream, thousand):
    ends = load_mutated(loading, mutator, stream, range(thousand * 1000, thousand * 1000 + 1000))
    # They are not all refused for the same reason, nor at the first byte.
    assert sum(ends.values()) == 1000
    assert ends["StreamError"] > 200
    assert ends["IncompatibleError"] > 20
    assert ends["ChannelLost"] > 20
    assert ends["NoneType"] > 20


def test_memory_stays_bounded(loading, mutator, stream):
    """Nothing is allocated because a stream said so: with lengths at their extremes the peak is that of any stream."""
    gc.collect()
    loading.load(stream)
    dice = random.Random(4)
    tracemalloc.start()
    try:
        loading.load(stream)
        _, usual = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for at in mutator.structure[::3]:
            for width in (4, 8):
                data = bytearray(stream)
                top = 1 << (8 * width)
                value = dice.choice([top - 1, top // 2, top // 2 - 1, 1 << 31, (1 << 24) - 1, 1 << 30])
                data[at : at + width] = (value % top).to_bytes(width, "big")
                error = loading.load(bytes(data))
                if error is not None:
                    judge(error)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < usual + 1 * MIB
    loading.check_reusable(stream)


# ------------------------------------------------------------------------------------------------------ streams by hand


def element(stream, walk, name):
    """The bytes of the element of that name."""
    (one,) = [one for one in walk(stream) if f"{one.element} {one.name}".strip() == name]
    return stream[one.offset : one.end]


def test_a_stream_without_a_configuration_is_that_of_an_old_machine(loading, stream, walk):
    """QEMU's machine types up to 2.3 send none (wire format, section 1.5)."""
    assert loading.load(stream.replace(element(stream, walk, "CONFIGURATION"), b"", 1)) is None
    loading.check_clean()


def test_a_footer_is_not_left_out(loading, stream, walk):
    plain = element(stream, walk, "SECTION_FULL plain")
    error = loading.load(stream.replace(plain, plain[:-5], 1))
    judge(error)
    assert "footer" in str(error)


def test_capabilities_of_the_source_that_are_unknown_here(loading, stream, walk):
    config = element(stream, walk, "CONFIGURATION")
    more = b"\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\x0fx-ignore-shared"
    error = loading.load(stream.replace(config, config + more, 1))
    judge(error)
    assert "x-ignore-shared" in str(error)
    assert error.place.section == "configuration"


def test_a_section_that_comes_again_under_another_id(loading, stream, walk):
    plain = element(stream, walk, "SECTION_FULL plain")
    again = plain[:1] + b"\0\0\0\x63" + plain[5:-4] + b"\0\0\0\x63"
    error = loading.load(stream.replace(plain, plain + again, 1))
    judge(error)
    assert "'plain' with instance id 0 came twice" in str(error)


def test_a_device_that_comes_in_rounds_and_ram_that_does_not(loading, stream, walk):
    plain = element(stream, walk, "SECTION_FULL plain")
    error = loading.load(stream.replace(plain, b"\x01" + plain[1:], 1))
    judge(error)
    assert "'plain' came as START, expected FULL" in str(error)
    start = element(stream, walk, "SECTION_START ram")
    error = loading.load(stream.replace(start, b"\x04" + start[1:], 1))
    judge(error)
    assert "the RAM section came as FULL" in str(error)


def test_versions_that_are_not_known(loading, stream, walk):
    for name, version in (("rich", 4), ("rich", 1), ("plain", 2), ("plain", 0)):
        device = element(stream, walk, f"SECTION_FULL {name}")
        at = 1 + 4 + 1 + len(name) + 4
        error = loading.load(stream.replace(device, device[:at] + version.to_bytes(4, "big") + device[at + 4 :], 1))
        judge(error)
        assert f"'{name}'" in error.place.section
        assert "version" in str(error)


def test_a_return_path_where_there_is_none(loading, stream):
    registry, _ = loading.machine._register()
    loader = StreamLoader(loading.machine, registry, Reader(ReplayChannel(stream)), None, on_prepared=int)
    loader.load_header()
    with pytest.raises(StreamError, match="no way back") as caught:
        loader.load()
    judge(caught.value)
    loader.rollback()
    registry.finish()


def test_ends_with_a_section_still_open(loading, stream, walk):
    error = loading.load(stream.replace(element(stream, walk, "SECTION_END ram"), b"", 1))
    judge(error)
    assert "the stream lacks what this machine has: ram" in str(error)


def test_a_proof_is_asked_for_twice(loading, stream, walk):
    """The second PING is answered like the first, and changes nothing."""
    ping = element(stream, walk, "COMMAND PING 0x77686d62")
    assert loading.load(stream.replace(ping, ping + ping, 1)) is None
    loading.check_clean()
