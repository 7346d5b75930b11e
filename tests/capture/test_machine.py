"""A captured machine as an object: what it can be asked, what it refuses, and what it can do twice."""

import attrs
import pytest

from whimbrel import LoopGuest, Settings
from whimbrel.abc import Patience, SaveVMSpec
from whimbrel.capture import CapturedDevices, CapturedMachine, walk
from whimbrel.capture.taking import Capture
from whimbrel.errors import (
    ChannelLost,
    ConfigError,
    ConnectError,
    MigrationRefused,
    StateError,
    StreamError,
    UnknownNameError,
    WhimbrelError,
)
from whimbrel.hookspecs import hookimpl
from whimbrel.plugins import PluginManager
from whimbrel.testing.memory import memory_pair
from whimbrel_savevm.ram import RamHandler

from .conftest import Crumbs, check
from .live import LONG
from .streams import FROM_2_4, SHAPES, SUPPRESSED, TO_2_2, Device, Script, small


@pytest.fixture
def machine(load):
    return load(small(FROM_2_4, uuid=bytes(range(16))).finish())


# ---------------------------------------------------------------------------------------------------------- devices


def test_devices_in_their_order(machine):
    assert [device.name for device in machine.captured] == ["timer", "twin", "twin"]
    assert len(machine.captured) == 3
    assert machine.captured[0].body == b"\x01\x02\x03\x04"
    assert machine.captured[-1].header.version_id == 3
    assert [device.body for device in machine.captured[1:]] == [b"one", b"other"]
    assert machine.captured[1] in machine.captured
    with pytest.raises(IndexError):
        machine.captured[3]


def test_devices_by_name(machine):
    assert machine.captured["timer"] is machine.captured[0]
    assert machine.captured["twin"] is machine.captured[1], "the first of a name"
    assert machine.captured.named("twin") == list(machine.captured[1:])
    assert machine.captured.named("twin", 0) == list(machine.captured[1:]), "a name and an instance may come twice"
    assert machine.captured.named("timer", 0) == [machine.captured[0]]


@pytest.mark.parametrize("wanted", [("tvin",), ("twin", 1), ("",), ("TWIN", 0)])
def test_devices_that_are_not_there(machine, wanted):
    with pytest.raises(UnknownNameError, match="timer, twin") as caught:
        machine.captured.named(*wanted)
    assert caught.value.known == ["timer", "twin"]
    with pytest.raises(UnknownNameError):
        machine.captured["tvin"]


def test_a_device_shows_no_bytes(machine):
    """Guest memory belongs into no log."""
    assert "4 bytes" in repr(machine.captured[0])
    assert "x01" not in repr(machine.captured[0])


# --------------------------------------------------------------------------------------------------------- decoding


def described(fields, body, **more):
    script = Script(FROM_2_4, {"a": 1}).header().start().end(("a", 0, 0))
    return script.full(Device("d", 4, body, fields=fields, **more))


def number(name, size, kind):
    return {"name": name, "type": kind, "size": size}


def test_a_device_decodes(load):
    fields = [number("a", 2, "uint16"), number("b", 4, "int32"), number("c", 1, "bool")]
    script = described(fields, b"\x01\x02\xff\xff\xff\xfe\x01")
    device = load(script.finish()).captured["d"]
    assert [(field["name"], field["value"]) for field in device.decode().as_dict()["fields"]] == [
        ("a", 0x102),
        ("b", -2),
        ("c", True),
    ]
    assert device.described["fields"] == fields


@pytest.mark.parametrize("shape", [SUPPRESSED, TO_2_2], ids=str)
def test_a_device_without_a_description_does_not_decode(load, shape):
    machine = load(small(shape).finish())
    for device in machine.captured:
        assert device.described is None
        with pytest.raises(StreamError, match=f"no description of '{device.name}', so its {len(device.body)} bytes"):
            device.decode()


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"fields": None},
        {"fields": [{}]},
        {"fields": [{"name": "a", "type": "uint16", "size": 3}]},
        {"fields": [{"name": "a", "type": "uint16", "size": -1}]},
        {"fields": [{"name": "a", "type": "uint64", "size": 8}]},
        {"fields": [{"name": "a", "type": "buffer", "size": 2**60}]},
        {"fields": [{"name": "a", "type": "buffer", "size": 1, "array_len": 2**31}]},
        {"fields": [], "subsections": [{}]},
        {"fields": "abc"},
    ],
)
def test_a_description_that_does_not_fit_the_bytes(load, entry):
    """The device was found by its footers; what is said of its inside is checked when it is asked for."""
    device = load(small(FROM_2_4).finish()).captured["timer"]
    wrong = attrs.evolve(device, described={"name": "timer", "instance_id": 0, **entry})
    try:
        decoded = wrong.decode()
    except StreamError:
        return
    assert decoded.as_dict()["fields"] == [], "there is nothing in it, and so nothing is wrong"


def test_an_empty_set_of_devices():
    assert list(CapturedDevices()) == []
    with pytest.raises(UnknownNameError, match="none"):
        CapturedDevices().named("d")


# -------------------------------------------------------------------------------------------------- what it refuses


def test_it_cannot_run(machine):
    for _ in range(2):
        with pytest.raises(StateError, match="cannot run here"):
            machine.start()
    assert machine.run_state == "prelaunch"
    machine.stop()
    with pytest.raises(StateError, match="cannot run here"):
        machine.start()


def test_it_cannot_receive(machine):
    with pytest.raises(StateError, match="has its state already"):
        machine.incoming("tcp:127.0.0.1:0")
    assert machine.run_state == "prelaunch"
    assert machine.migration is None


def test_nothing_can_be_loaded_into_it(machine):
    registry, _ = machine._leaving()
    with pytest.raises(StreamError, match="has its state already"):
        registry.full[0].handler.load(None, None, 1)
    registry.finish()


def test_without_a_handler_of_ram_nothing_is_taken(load):
    """No plugin is asked for it: said before a page is read."""
    settings = Settings()
    settings.plugins.savevm = ("devices",)
    with pytest.raises(MigrationRefused, match="no plugin offers a savevm handler for 'ram'"):
        load(small(FROM_2_4).finish(), settings=settings)


class Counting(RamHandler):
    """RAM's handler, with a note of what is asked of it."""

    def __init__(self, machine, calls):
        super().__init__(machine)
        self._calls = calls

    def load(self, reader, kind, version_id):
        self._calls.append(kind.name)
        super().load(reader, kind, version_id)

    def commit(self):
        self._calls.append("commit")
        super().commit()

    def rollback(self):
        self._calls.append("rollback")
        super().rollback()

    def finish(self):
        self._calls.append("finish")
        super().finish()


class Offering:
    """A plugin with that handler; `calls` are those of all machines."""

    def __init__(self):
        self.calls = []

    @hookimpl
    def whimbrel_savevm_handlers(self, machine):
        return [SaveVMSpec(name="counted", summary="RAM, counted", create=lambda: [Counting(machine, self.calls)])]


@pytest.fixture
def offering():
    offering = Offering()
    offering.plugins = PluginManager()
    offering.plugins.register(offering)
    offering.settings = Settings()
    offering.settings.plugins.savevm = ("counted",)
    return offering


@pytest.mark.parametrize(
    ("cut", "calls"),
    [
        (None, ["START", "PART", "END", "commit", "finish"]),
        ("START", []),
        ("PART", ["START", "rollback", "finish"]),
        ("END", ["START", "PART", "rollback", "finish"]),
        ("EOF", ["START", "PART", "END", "rollback", "finish"]),
    ],
)
def test_a_handler_of_ram_is_asked_as_its_contract_says(offering, cut, calls):
    """Each once, in that order, however it ends; any plugin's will do."""
    script = small(FROM_2_4)
    stream = script.finish()
    channel = Crumbs(stream[: script.at(cut)] if cut else stream, [1 << 30])
    try:
        CapturedMachine.load(channel, plugins=offering.plugins, settings=offering.settings).close()
    except ChannelLost:
        assert cut
    assert offering.calls == calls


def test_a_machine_that_is_not_kept_finishes_once(offering):
    def keep(machine):
        raise StreamError("no")

    channel = Crumbs(small(FROM_2_4).finish(), [1 << 30])
    with pytest.raises(StreamError):
        Capture(channel, plugins=offering.plugins, settings=offering.settings, keep=keep).run()
    assert offering.calls == ["START", "PART", "END", "commit", "finish"]


# ------------------------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_form(load, shape):
    script = small(shape, uuid=bytes(range(16)))
    machine = load(script.finish())
    form = machine.form()
    assert (form.footers, form.description) == (shape.footers, shape.description)
    assert (machine.uuid is None) == (not shape.configuration)
    if shape.configuration:
        assert machine.uuid.bytes == bytes(range(16))
    assert machine.ram.total == 3 * 4096


def test_its_memory_can_be_looked_at_and_changed(load, plugins, check, tmp_path):
    from whimbrel.capture.receiving import save

    script = small(FROM_2_4)
    machine = load(script.finish())
    machine.ram["b"].view[:4] = [1, 2, 3, 4]
    machine.settings.parameters.max_bandwidth = 0
    save(machine, tmp_path / "file")
    again = load((tmp_path / "file").read_bytes())
    assert again.ram["b"].view[:5].tolist() == [1, 2, 3, 4, 0]


def test_it_is_a_machine_like_any_other(machine):
    assert machine.guest is not None
    machine.guest = LoopGuest(lambda: None)
    machine.close()
    machine.close()
    assert machine.run_state == "shutdown"
    with pytest.raises(WhimbrelError):
        machine.migrate("memory:nowhere")


def test_closed_with_its_block(plugins):
    with CapturedMachine.load(Crumbs(small(FROM_2_4).finish(), [1 << 30]), plugins=plugins) as machine:
        view = machine.ram["a"].view
        assert view.any()
    assert machine.run_state == "shutdown"


# -------------------------------------------------------------------------------------------------------- sent again


def test_migrating_twice_after_a_failed_attempt(machine, plugins, network):
    """To a wrong address, to nobody, to one that hangs up at once, twice; and then to one that takes it."""
    script = small(FROM_2_4)
    with pytest.raises(ConfigError):
        machine.migrate("nonsense")
    with pytest.raises(ConnectError):
        machine.migrate("memory:nobody").wait(LONG)
    for _ in range(2):
        listener = network.listen("there")
        migration = machine.migrate("memory:there")
        channel = listener.accept(Patience(LONG))
        with pytest.raises(StateError, match="in progress"):
            machine.migrate("memory:there")
        channel.close()
        listener.close()
        with pytest.raises(WhimbrelError):
            migration.wait(LONG)
        assert machine.run_state == "paused"
        with pytest.raises(StateError, match="cannot run here"):
            machine.start()
    listener = network.listen("there")
    migration = machine.migrate("memory:there")
    again = CapturedMachine.load(listener.accept(Patience(LONG)), plugins=plugins)
    listener.close()
    migration.wait(LONG)
    with again:
        script.uuid = bytes(range(16))
        check(again, script, ids=False)
    assert machine.run_state == "postmigrate"
    with pytest.raises(StateError, match="previous migration"):
        machine.migrate("memory:there")
    machine.reclaim()
    with pytest.raises(ConnectError):
        machine.migrate("memory:there").wait(LONG)


def test_a_migration_of_it_is_cancelled(machine, network):
    listener = network.listen("there")
    migration = machine.migrate("memory:there")
    channel = listener.accept(Patience(LONG))
    assert machine.cancel_migration()
    with pytest.raises(WhimbrelError, match="cancelled"):
        migration.wait(LONG)
    assert machine.run_state == "paused"
    channel.close()
    listener.close()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_from_capture_to_capture(load, plugins, network, settings, monkeypatch, shape):
    """Over a link with a way back, as often as one likes: it stays the same machine, to the last byte."""
    monkeypatch.setattr(walk, "GRACE", 0.05)
    script = small(shape)
    machine = load(script.finish(), settings=settings)
    for hop in range(3):
        listener = network.listen(f"hop {hop}")
        # Up to 2.2 nothing tells where the devices end, and without footers nothing shows the question for the proof.
        timing = "proof" if shape.footers else "qemu"
        migration = machine.migrate(f"memory:hop {hop}", handover=timing)
        channel = listener.accept(Patience(LONG))
        listener.close()
        if shape is TO_2_2:
            monkeypatch.setattr(walk, "SILENCE", 0.1)
            with pytest.raises(StreamError, match="silent"):
                CapturedMachine.load(channel, plugins=plugins, settings=settings)
            with pytest.raises(WhimbrelError):
                migration.wait(LONG)
            return
        following = CapturedMachine.load(channel, plugins=plugins, settings=settings)
        try:
            migration.wait(LONG)
            check(following, script, ids=False)
        except BaseException:
            following.close()
            raise
        if hop:
            machine.close()
        machine = following
    machine.close()


def test_a_channel_is_closed_at_the_end(plugins):
    near, far = memory_pair(duplex=False)
    script = small(FROM_2_4)
    near.send(script.finish())
    near.close()
    with CapturedMachine.load(far, plugins=plugins), pytest.raises(WhimbrelError):
        far.recv_into(bytearray(1))
    near, far = memory_pair(duplex=False)
    near.send(b"nonsense")
    with pytest.raises(StreamError):
        CapturedMachine.load(far, plugins=plugins)
    with pytest.raises(WhimbrelError):
        far.recv_into(bytearray(1))
