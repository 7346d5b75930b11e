"""What is refused before anything was touched, and what it says."""

from __future__ import annotations

import pytest

from whimbrel import Machine, MigrationRefused, PluginManager, RunState, Settings, hookimpl, vmstate
from whimbrel.abc import SaveVMHandler, SaveVMSpec
from whimbrel.errors import ConfigError, ConnectError, GuestError, StateError, UnknownNameError
from whimbrel.testing.faults import Faults

LONG = 60.0


@pytest.fixture
def build(churning):
    return churning({"a": 20})


def untouched(pair, state=RunState.RUNNING):
    """Nothing was touched: no migration, no event, the same state."""
    assert pair.source.run_state is state
    assert pair.source.migration is None
    assert pair.recorded is None
    return True


def test_blockers_refuse_with_every_reason(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    pair.source.blockers.add("a device is passed through")
    pair.source.blockers.add("a snapshot is being taken")
    with pytest.raises(MigrationRefused, match="a device is passed through; a snapshot is being taken"):
        pair.migrate()
    assert untouched(pair)
    pair.source.blockers.remove("a device is passed through")
    with pytest.raises(MigrationRefused, match=r"^a snapshot is being taken$"):
        pair.migrate()
    pair.source.blockers.remove("a snapshot is being taken")
    _, outgoing = pair.run()
    assert outgoing.error is None


def test_a_blocker_leaves_a_migration_alone_that_runs_already(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=20_000)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    pair.source.blockers.add("too late")
    channel.release()
    outgoing.wait(LONG)
    incoming.wait(LONG)


def test_a_device_declared_unmigratable_refuses_by_its_name(settings):
    description = vmstate.VMStateDescription("gpu", 1, fields=[vmstate.uint8("x")], unmigratable=True)

    class Gpu:
        x = 0

    with Machine("m", settings=settings) as machine:
        machine.devices.add("gpu0", Gpu(), description)
        machine.start()
        with pytest.raises(MigrationRefused, match="device 'gpu0' cannot be migrated"):
            machine.migrate("tcp:127.0.0.1:1")
        assert machine.run_state is RunState.RUNNING
        assert machine.migration is None


def test_a_second_migrate_is_refused_and_the_first_goes_on(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=20_000)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    with pytest.raises(StateError, match="There's a migration process in progress"):
        pair.source.migrate("memory:other")
    assert pair.source.migration is outgoing
    channel.release()
    outgoing.wait(LONG)
    incoming.wait(LONG)


def test_a_machine_that_waits_cannot_be_migrated_nor_wait_twice(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.destination.incoming("memory:pair")
    with pytest.raises(StateError, match="Guest is waiting for an incoming migration"):
        pair.destination.migrate("memory:other")
    with pytest.raises(StateError, match="The incoming migration has already been started"):
        pair.destination.incoming("memory:other")
    with pytest.raises(StateError, match="waiting for an incoming migration"):
        pair.destination.start()


@pytest.mark.parametrize("state", ["running", "paused"])
def test_only_a_fresh_machine_can_wait(make_pair, build, settings, state):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    if state == "paused":
        pair.source.stop()
    with pytest.raises(StateError, match=f"only a fresh machine can be the destination; this one is {state}"):
        pair.source.incoming("memory:pair")


def test_a_machine_that_arrived_cannot_wait_again(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    pair.run()
    with pytest.raises(StateError, match="only a fresh machine"):
        pair.destination.incoming("memory:pair")


@pytest.mark.parametrize("call", ["migrate", "incoming"])
def test_an_unknown_scheme_lists_those_there_are(make_pair, build, settings, call):
    pair = make_pair(build, settings=settings)
    for uri, named in (("pigeon:loft", "'pigeon'"), ("tpc:host:1", "did you mean 'tcp'")):
        with pytest.raises(UnknownNameError, match=r"memory.*tcp.*unix") as caught:
            getattr(pair.source, call)(uri)
        assert named in str(caught.value)
        assert uri in str(caught.value)
    assert untouched(pair, RunState.PRELAUNCH)


@pytest.mark.parametrize("uri", ["", "tcp", ":x", "/a/path"])
def test_what_is_no_uri_says_what_one_is(make_pair, build, settings, uri):
    pair = make_pair(build, settings=settings)
    with pytest.raises(ConfigError, match=r"SCHEME:ADDRESS.*schemes there are: .*memory.*tcp"):
        pair.source.migrate(uri, handover="proof")
    assert untouched(pair, RunState.PRELAUNCH)


def test_an_address_that_cannot_be_listened_on_leaves_the_machine_fresh(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    with pytest.raises(ConfigError):
        pair.destination.incoming("tcp:nonsense")
    with pytest.raises(ConnectError):
        pair.destination.incoming("unix:/nonexistent/socket")
    assert pair.destination.run_state is RunState.PRELAUNCH
    assert pair.destination.migration is None


@pytest.mark.parametrize(
    "capability", ["compress", "postcopy_ram", "dirty_bitmaps", "zero_copy_send", "postcopy_preempt"]
)
def test_capabilities_of_later_are_refused_in_a_sentence(capability):
    settings = Settings()
    with pytest.raises(ConfigError, match="not available in this version of whimbrel yet"):
        setattr(settings.capabilities, capability, True)
    assert not getattr(settings.capabilities, capability)


@pytest.mark.parametrize("capability", ["return_path", "switchover_ack"])
def test_capabilities_that_need_a_way_back_refuse_a_transport_without(make_pair, build, settings, capability):
    settings.capabilities.update({"return_path": True, capability: True})
    pair = make_pair(build, settings=settings, duplex=False)
    pair.source.start()
    with pytest.raises(MigrationRefused, match="way back") as caught:
        pair.migrate()
    assert capability.replace("_", "-") in str(caught.value)
    assert untouched(pair)


def test_a_tracker_that_does_not_exist_or_work_refuses(make_pair, build, settings):
    settings.backends.dirty_tracker = "telepathy"
    pair = make_pair(build, settings=settings)
    pair.source.start()
    with pytest.raises(MigrationRefused, match="telepathy"):
        pair.migrate()
    assert untouched(pair)


class Checks:
    def __init__(self, *problems):
        self.problems = problems
        self.plans = []

    @hookimpl
    def whimbrel_check_migration(self, plan):
        self.plans.append(plan)
        if self.problems == ("raise",):
            raise ZeroDivisionError("a bug of the check's")
        return list(self.problems)


def test_checks_are_heard_all_together_with_the_blockers(make_pair, build, settings):
    pair = make_pair(build, settings=settings, plugins=[Checks("the moon is full", "it is Friday")])
    pair.source.start()
    pair.source.blockers.add("a blocker")
    with pytest.raises(MigrationRefused, match="a blocker; the moon is full; it is Friday"):
        pair.migrate()
    assert untouched(pair)


def test_a_check_sees_the_plan_and_may_have_nothing_against_it(make_pair, build, settings):
    settings.capabilities.events = True
    checks = Checks()
    pair = make_pair(build, settings=settings, plugins=[checks])
    pair.source.start()
    _, outgoing = pair.run()
    assert outgoing.error is None
    (plan,) = checks.plans
    assert (plan.uri, plan.scheme, plan.duplex, plan.machine) == ("memory:pair", "memory", True, "churning")
    assert plan.capabilities == {"events"}
    assert plan.ram == {"a": 20 * 4096}
    assert plan.sections == ("ram", "counter", "dial", "globalstate")
    assert plan.parameters["downtime-limit"] == 300


def test_a_check_that_raises_is_a_problem_that_names_it(make_pair, build, settings):
    pair = make_pair(build, settings=settings, plugins=[Checks("raise")])
    pair.source.start()
    with pytest.raises(MigrationRefused, match=r"Checks.*could not check the migration.*a bug of the check's"):
        pair.migrate()
    assert untouched(pair)


class Handler(SaveVMHandler):
    idstr = "extra"

    def __init__(self, problems, ended):
        self._problems, self._ended = problems, ended

    def problems(self):
        return self._problems

    def load(self, reader, kind, version_id):
        reader.window(1)

    def save(self, out):
        return None

    def finish(self):
        self._ended.append(self)


class Extra:
    def __init__(self, *problems):
        self.problems = problems
        self.ended = []

    @hookimpl
    def whimbrel_savevm_handlers(self, machine):
        return [SaveVMSpec(name="extra", summary="", create=lambda: [Handler(self.problems, self.ended)])]


def test_handlers_of_a_refused_migration_are_finished(make_pair, build, settings):
    extra = Extra("the extra part is stuck")
    pair = make_pair(build, settings=settings, plugins=[extra])
    pair.source.start()
    with pytest.raises(MigrationRefused, match="the extra part is stuck"):
        pair.source.migrate("memory:pair")
    assert len(extra.ended) == 1


def test_two_handlers_of_one_name_are_a_mistake_of_the_program(settings):
    plugins = PluginManager()
    plugins.register(Extra())

    class Device:
        x = 0

    with Machine("m", settings=settings, plugins=plugins) as machine:
        description = vmstate.VMStateDescription("extra", 1, fields=[vmstate.uint8("x")])
        machine.devices.add("extra", Device(), description)
        with pytest.raises(ConfigError, match="two savevm handlers want section 'extra'"):
            machine.migrate("tcp:127.0.0.1:1")


def test_a_guest_that_does_not_power_on_is_not_migrated(make_pair, build, settings):
    def power_on():
        raise OSError("no power")

    pair = make_pair(build, settings=settings)
    pair.source.guest._power_on = power_on
    with pytest.raises(GuestError, match="no power"):
        pair.source.migrate("memory:pair")
    assert untouched(pair, RunState.PRELAUNCH)


@pytest.mark.parametrize("state", ["shutdown", "internal-error"])
def test_a_machine_that_is_done_for_is_not_migrated(make_pair, build, settings, state):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    if state == "shutdown":
        pair.source.close()
    else:
        build.source.fail()
    with pytest.raises(MigrationRefused, match=f"a machine in {state} cannot be migrated"):
        pair.source.migrate("memory:pair")
