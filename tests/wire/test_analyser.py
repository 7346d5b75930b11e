"""A complete stream, as an independent reader of files takes it apart: by its description alone, without our parsers.

The stream comes from a real migration over a transport without a way back, so that there are no commands in it.
"""

import io
import json
import struct

import attrs
import numpy as np
import pytest

import whimbrel
from whimbrel import vmstate
from whimbrel.abc import Channel, Transport, TransportSpec
from whimbrel.settings import Backends

PAGE = 4096


# ------------------------------------------------------------------------------------------------- the analyser


class Refused(Exception):
    """The analyser does not understand the stream."""


@attrs.define
class Analysis:
    """What a stream holds. `sections` are (kind, id) in order; `devices` are (name, instance id) to their fields."""

    machine: str = ""
    ram: dict = attrs.field(factory=dict)
    devices: dict = attrs.field(factory=dict)
    sections: list = attrs.field(factory=list)
    records: list = attrs.field(factory=list)  # per body of RAM: how many pages, how many zero pages


class Analyser:
    """Reads a seekable stream; uses the struct module and the JSON, and nothing of whimbrel's."""

    def __init__(self, file):
        self.file = file
        self.found = Analysis()
        self.current = None  # the RAM block that goes on
        self.names = {}  # of sections, by id

    def run(self):
        description = self.description()
        self.devices = {(entry["name"], entry["instance_id"]): entry for entry in description["devices"]}
        if description["page_size"] != PAGE:
            raise Refused("another page size")
        self.file.seek(0)
        if self.numbers(">II") != (0x5145564D, 3):
            raise Refused("no migration stream of version 3")
        while (kind := self.number(1)) != 0:
            if kind == 7:
                self.found.machine = self.take(self.number(4)).decode()
            elif kind in (1, 2, 3, 4):
                self.section(kind)
            else:
                raise Refused(f"element {kind:#x} at {self.file.tell() - 1:#x}")
        return self.found

    def description(self):
        """Find the JSON from the end: the first brace behind the last NUL, with a mark and its length before it."""
        data = self.file.read()
        brace = data.index(b"{", data.rindex(b"\0"))
        mark, length = struct.unpack(">BI", data[brace - 5 : brace])
        if mark != 6 or length != len(data) - brace:
            raise Refused("no description at the end")
        return json.loads(data[brace:])

    def section(self, kind):
        number = self.number(4)
        self.found.sections.append((kind, number))
        if kind in (1, 4):
            name = self.name()
            self.names[number] = (name, *self.numbers(">II"))
        name, instance, version = self.names[number]
        if name == "ram":
            if version != 4:
                raise Refused("another version of RAM")
            self.ram()
        else:
            entry = self.devices[name, instance]
            if entry["version"] != version:
                raise Refused("the section and its description differ in version")
            self.found.devices[name, instance] = self.structure(entry)
        if self.numbers(">BI") != (0x7E, number):
            raise Refused(f"no footer of section {number} ({name}) before {self.file.tell():#x}")

    def ram(self):
        pages = zeros = 0
        while True:
            word = self.number(8)
            flags, offset = word % PAGE, word // PAGE * PAGE
            if flags == 0x10:
                break
            if flags == 0x04:
                while offset > 0:
                    name, length = self.name(), self.number(8)
                    self.found.ram[name] = bytearray(length)
                    offset -= length
            elif flags & ~0x20 in (0x02, 0x08):
                if not flags & 0x20:
                    self.current = self.found.ram[self.name()]
                if flags & 0x08:
                    self.current[offset : offset + PAGE] = self.take(PAGE)
                    pages += 1
                else:
                    self.current[offset : offset + PAGE] = self.take(1) * PAGE
                    zeros += 1
            else:
                raise Refused(f"RAM flags {flags:#x}")
        self.found.records.append((pages, zeros))

    def structure(self, entry):
        values = {}
        for field in entry["fields"]:
            many = field.get("array_len", 1)
            read = [self.value(field) for _ in range(many)]
            if many > 1:
                values[field["name"]] = read
            elif "index" in field:
                assert field["index"] == len(values.setdefault(field["name"], []))
                values[field["name"]] += read
            else:
                values[field["name"]] = read[0]
        for part in entry.get("subsections", ()):
            if (self.number(1), self.name(), self.number(4)) != (5, part["vmsd_name"], part["version"]):
                raise Refused(f"subsection {part['vmsd_name']} is not there")
            values[part["vmsd_name"]] = self.structure(part)
        return values

    def value(self, field):
        began = self.file.tell()
        if field["type"] == "struct":
            value = self.structure(field["struct"])
            if self.file.tell() - began != field["size"]:
                raise Refused(f"struct {field['name']} has another size than it says")
            return value
        data = self.take(field["size"])
        if field["type"] == "bool":
            return bool(data[0])
        if field["type"] in ("float32", "float64"):
            return struct.unpack({4: ">f", 8: ">d"}[len(data)], data)[0]
        if field["type"].startswith(("int", "uint")):
            return int.from_bytes(data, "big", signed=field["type"].startswith("int"))
        return data

    def name(self):
        return self.take(self.number(1)).decode()

    def number(self, size):
        return int.from_bytes(self.take(size), "big")

    def numbers(self, layout):
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def take(self, size):
        data = self.file.read(size)
        if len(data) != size:
            raise Refused(f"the stream ends at {self.file.tell():#x}")
        return data


# -------------------------------------------------------------------------------------------------- the machine


class Recorder(Channel):
    """A channel that goes one way, into memory."""

    peer = "recorder"
    duplex = False

    def __init__(self):
        self.stream = bytearray()
        self.ended = False

    def send(self, data):
        assert not self.ended
        self.stream += memoryview(data).cast("B")

    def recv_into(self, buffer):
        raise AssertionError("nothing comes back")

    def end_writing(self):
        self.ended = True

    def close(self):
        self.ended = True


class Recording(Transport):
    """A plugin that offers `record:` and keeps what is sent; it makes the migration go at least `rounds` rounds."""

    def __init__(self, rounds):
        self.channel = Recorder()
        self.rounds = rounds
        self.between = lambda: None

    @whimbrel.hookimpl
    def whimbrel_transports(self):
        return [TransportSpec(name="record", summary="into memory", create=lambda: self, duplex=False)]

    @whimbrel.hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002 - its name in the specification
        self.between()
        return round.number >= self.rounds

    def connect(self, address, patience):
        return self.channel

    def listen(self, address):
        raise AssertionError("nobody listens to a recorder")


@attrs.define
class Pin:
    level: bool = False
    delay: int = 0


@attrs.define
class Gadget:
    mode: int = -3
    wide: int = 2**64 - 2
    heat: float = 36.6
    on: bool = True
    serial: bytes = b"\0{}\xff no. 7"
    counts: list = attrs.field(factory=lambda: [1, 2**32 - 1, 3])
    main: Pin = attrs.field(factory=lambda: Pin(True, -1))
    pins: list = attrs.field(factory=lambda: [Pin(True, 5), Pin(False, 2**15 - 1)])
    extra: int = 9


PIN = vmstate.VMStateDescription("pin", 1, fields=[vmstate.bool_("level"), vmstate.int16("delay")])
EXTRA = vmstate.VMStateDescription(
    "gadget/extra", 3, fields=[vmstate.uint8("extra")], needed=lambda gadget: gadget.extra != 0
)
GADGET = vmstate.VMStateDescription(
    "gadget",
    2,
    fields=[
        vmstate.int8("mode"),
        vmstate.uint64("wide"),
        vmstate.float64("heat"),
        vmstate.bool_("on"),
        vmstate.buffer("serial", size=10),
        vmstate.uint32("counts", length=3),
        vmstate.struct("main", PIN),
        vmstate.struct("pins", PIN, length=2),
    ],
    subsections=[EXTRA],
)


def record(*, rounds=3, guest=None):
    """Migrate a small machine into a recorder; returns the stream and the machine, which is still to be closed."""
    recording = Recording(rounds)
    plugins = whimbrel.PluginManager()
    plugins.register(recording)
    backends = Backends(dirty_tracker="compare")
    machine = whimbrel.Machine("bench-7.2", settings=whimbrel.Settings(backends=backends), plugins=plugins)
    random = np.random.default_rng(2)
    plate = machine.ram.array("plate", (40, PAGE), "u1")
    plate[::3] = random.integers(0, 256, plate[::3].shape, np.uint8)
    machine.ram.array("n" * 100, 7, "u8")[:] = np.arange(7)
    machine.ram.add("empty", 5 * PAGE)
    machine.devices.add("gadget", Gadget(), GADGET)
    machine.devices.add("gadget", Gadget(mode=5, extra=0), GADGET, instance_id=1)
    if guest is not None:
        recording.between = lambda: guest(machine, plate)
    machine.start()
    machine.migrate("record:").wait(30)
    assert recording.channel.ended
    return bytes(recording.channel.stream), machine


@pytest.fixture
def recorded():
    machines = []

    def recorded(**options):
        stream, machine = record(**options)
        machines.append(machine)
        return stream, machine

    yield recorded
    for machine in machines:
        machine.close()


def plain(value):
    """An object's state as the analyser shows it."""
    if attrs.has(type(value)):
        return {field.name: plain(getattr(value, field.name)) for field in attrs.fields(type(value))}
    return [plain(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------- the tests


def test_ram_and_devices_are_recovered(recorded):
    writes = []

    def guest(machine, plate):
        """Writes between the rounds: into a page that was sent, one that was zero, and one that becomes zero."""
        number = len(writes)
        plate[3, number] = 0xA0 + number
        plate[number + 1, 5] += 1
        plate[9 * number] = 0
        machine.ram["empty"].view[number * PAGE] = 1
        writes.append(number)

    stream, machine = recorded(rounds=3, guest=guest)
    assert len(writes) >= 3
    found = Analyser(io.BytesIO(stream)).run()
    assert found.machine == "bench-7.2"
    assert list(found.ram) == ["plate", "n" * 100, "empty"]
    for block in machine.ram:
        assert bytes(found.ram[block.name]) == block.view.tobytes(), block.name
    one, other = (plain(device.obj) for device in machine.devices)
    extra = one.pop("extra")
    other.pop("extra")
    assert list(found.devices) == [("gadget", 0), ("gadget", 1), ("globalstate", 0)]
    assert found.devices["gadget", 0] == {**one, "gadget/extra": {"extra": extra}}
    assert found.devices["gadget", 1] == other
    assert found.devices["globalstate", 0] == {"size": 8, "runstate": b"running".ljust(100, b"\0")}


def test_the_order_is_that_of_the_format(recorded):
    stream, _ = recorded(rounds=2)
    found = Analyser(io.BytesIO(stream)).run()
    kinds = [kind for kind, _ in found.sections]
    assert kinds == [1, *[2] * (len(kinds) - 5), 3, 4, 4, 4]
    ids = [number for _, number in found.sections]
    assert ids == [*[ids[0]] * (len(ids) - 3), ids[0] + 1, ids[0] + 2, ids[0] + 3]


def test_rounds_are_seen(recorded):
    def guest(machine, plate):
        plate[:4] += 1

    stream, _ = recorded(rounds=3, guest=guest)
    found = Analyser(io.BytesIO(stream)).run()
    assert found.records[0] == (0, 0)
    assert sum(map(sum, found.records[1:])) >= 46 + 2 * 4, "pages that were written again came again"
    pages, zeros = map(sum, zip(*found.records, strict=True))
    assert pages >= 15
    assert zeros >= 26 + 5


@pytest.mark.parametrize("flip", [0, 9, 0x40])
def test_the_analyser_notices_damage(recorded, flip):
    """So that its word counts: a stream that was changed is not what the machine had."""
    stream, machine = recorded(rounds=1)
    damaged = bytearray(stream)
    damaged[flip] ^= 0x11
    try:
        found = Analyser(io.BytesIO(damaged)).run()
    except (Refused, LookupError, UnicodeDecodeError):
        return
    assert found.machine != "bench-7.2" or list(found.ram) != [block.name for block in machine.ram]
