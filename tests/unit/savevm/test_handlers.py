"""The handlers as the engine sees them."""

import attrs
import pytest

from whimbrel import vmstate
from whimbrel.abc import IterableHandler, SectionKind
from whimbrel.errors import IncompatibleError
from whimbrel.machine import BareMachine
from whimbrel.machine.dirty import plugin as trackers
from whimbrel.settings import Backends, Settings
from whimbrel.stream import Reader, Writer
from whimbrel_savevm import devices, ram

PAGE = 4096


def machine_with(tracker):
    machine = BareMachine(
        "m",
        settings=Settings(backends=Backends(dirty_tracker=tracker)),
        tracker_specs=trackers.whimbrel_dirty_trackers,
    )
    machine.ram.add("a", 3 * PAGE)
    return machine


@pytest.fixture
def handler():
    made = []

    def make(tracker="manual"):
        made.append(ram.RamHandler(machine_with(tracker)))
        return made[-1]

    yield make
    for handler in made:
        handler.finish()


def test_the_offer():
    machine = machine_with("manual")
    (spec,) = ram.whimbrel_savevm_handlers(machine)
    assert spec.name == "ram"
    (one,), (other,) = spec.create(), spec.create()
    assert one is not other, "a handler is made anew for every migration"
    assert isinstance(one, IterableHandler)
    assert (one.idstr, one.instance_id, one.version_id, one.statistics_key) == ("ram", 0, 4, "ram")
    assert one.progress.total == 3 * PAGE


def test_a_migration_through_the_handlers(bench, handler):
    source, destination = handler(), handler()
    machine, other = source._machine, destination._machine
    machine.ram["a"].view[PAGE] = 7
    assert source.problems() == ()
    assert source.progress.tracker == "manual"
    tape = bench.Tape()
    out = Writer(tape)
    source.save_start(out)
    source.sync()
    assert source.pending() == 3 * PAGE
    source.save_part(out, bench.Budget(out, 1 << 20))
    machine.ram["a"].view[0] = 9
    machine.ram["a"].mark_dirty(0, 1)
    assert source.pending() == 0
    source.sync()
    assert source.pending() == PAGE
    source.save_end(out)
    out.flush()
    reader = Reader(tape)
    for kind in (SectionKind.START, SectionKind.PART, SectionKind.END):
        destination.load(reader, kind, 4)
    destination.commit()
    assert (machine.ram["a"].view == other.ram["a"].view).all()
    destination.rollback()
    assert not other.ram["a"].view.any()


def test_a_tracker_that_does_not_work_is_a_problem(handler):
    (problem,) = handler("sundial").problems()
    assert "sundial" in problem
    assert "manual" in problem


@pytest.mark.parametrize("version", [0, 1, 3, 5, 2**32 - 1])
def test_any_other_version_is_refused(bench, handler, version):
    with pytest.raises(IncompatibleError, match=f"version {version}, expected 4"):
        handler().load(Reader(bench.Tape()), SectionKind.START, version)


def test_ends_before_any_beginning_are_fine(handler):
    one = handler()
    one.rollback()
    one.finish()
    one.finish()


@attrs.define
class Clock:
    step: int = 0


CLOCK = vmstate.VMStateDescription("clock", 2, minimum_version_id=1, fields=[vmstate.uint64("step")])


def test_each_device_has_a_handler():
    machine = machine_with("manual")
    machine.devices.add("clock", Clock(5), CLOCK)
    machine.devices.add("clock", Clock(6), CLOCK, instance_id=3)
    (spec,) = devices.whimbrel_savevm_handlers(machine)
    made = spec.create()
    assert spec.name == "devices"
    assert [(one.idstr, one.instance_id, one.version_id, one.iterable) for one in made] == [
        ("clock", 0, 2, False),
        ("clock", 3, 2, False),
    ]
    assert all(one is not other for one, other in zip(made, spec.create(), strict=True))


def test_a_device_goes_through_its_handler(bench):
    machines = machine_with("manual"), machine_with("manual")
    for machine, step in zip(machines, (2**63, 1), strict=True):
        machine.devices.add("clock", Clock(step), CLOCK)
    ours, theirs = ((devices.whimbrel_savevm_handlers(machine)[0].create()[0]) for machine in machines)
    tape = bench.Tape()
    out = Writer(tape)
    described = ours.save(out)
    out.flush()
    assert bytes(tape.data) == bytes.fromhex("80 00 00 00 00 00 00 00")
    tape.data += b"\x7e"  # what follows shows that there is no subsection
    assert (described["name"], described["instance_id"], described["vmsd_name"]) == ("clock", 0, "clock")
    theirs.load(Reader(tape), SectionKind.FULL, 2)
    clock = machines[1].devices["clock"].obj
    assert clock.step == 1, "nothing is applied before the commit"
    theirs.commit()
    assert clock.step == 2**63
    theirs.rollback()
    assert clock.step == 1


def test_a_machine_without_devices_is_fine():
    (spec,) = devices.whimbrel_savevm_handlers(machine_with("manual"))
    assert spec.create() == []
