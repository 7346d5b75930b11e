"""The bare machine: what may be done in which run state, and what the guest does meanwhile."""

from __future__ import annotations

import threading
from uuid import UUID

import attrs
import pytest

from whimbrel import vmstate
from whimbrel.abc import Guest
from whimbrel.errors import ConfigError, GuestError, StateError
from whimbrel.events import GuestStarted, GuestStopped, RunStateChanged
from whimbrel.machine import BareMachine, LoopGuest, RunState

S = RunState
LONG = 20.0


class NotedGuest(Guest):
    """Writes down what it is told, and raises where it is told to."""

    def __init__(self, faulty=()):
        self.calls = []
        self.faulty = set(faulty)

    def _note(self, name):
        self.calls.append(name)
        if name in self.faulty:
            raise OSError(f"{name} does not work")

    def power_on(self):
        self._note("power_on")

    def start(self):
        self._note("start")

    def stop(self):
        self._note("stop")

    def close(self):
        self._note("close")


@pytest.fixture(autouse=True)
def _no_thread_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(LONG)
        assert not thread.is_alive(), thread.name


@pytest.fixture
def machine():
    machine = BareMachine("m")
    machine.guest = NotedGuest()
    yield machine
    machine.close()


def told(machine):
    events = []
    machine.notifiers.add(events.append)
    return events


def in_state(machine, state):
    """Bring the machine into `state` by legal ways."""
    ways = {
        S.PRELAUNCH: (),
        S.INMIGRATE: (machine.expect_arrival,),
        S.RUNNING: (machine.start,),
        S.PAUSED: (machine.start, machine.stop),
        S.FINISH_MIGRATE: (machine.start, machine.freeze),
        S.POSTMIGRATE: (machine.start, machine.freeze, machine.let_go),
        S.SHUTDOWN: (machine.close,),
    }
    if state is S.INTERNAL_ERROR:
        machine.start()
        machine.guest.failure = ZeroDivisionError("oops")
        machine._guest_failed(machine.guest.failure)
    else:
        for step in ways[state]:
            step()
    assert machine.run_state is state
    machine.guest.calls.clear()


# What each call makes of each state; anything else is a StateError that changes nothing.
OUTCOMES = {
    "start": {S.PRELAUNCH: S.RUNNING, S.RUNNING: S.RUNNING, S.PAUSED: S.RUNNING},
    "stop": {state: state for state in S if state is not S.FINISH_MIGRATE}
    | {S.RUNNING: S.PAUSED, S.PRELAUNCH: S.PAUSED},
    "reclaim": {S.POSTMIGRATE: S.PAUSED},
    "expect_arrival": {S.PRELAUNCH: S.INMIGRATE, S.INMIGRATE: S.INMIGRATE},
    "freeze": {S.RUNNING: S.FINISH_MIGRATE, S.PAUSED: S.FINISH_MIGRATE},
    "let_go": {S.FINISH_MIGRATE: S.POSTMIGRATE},
    "close": dict.fromkeys(S, S.SHUTDOWN),
}


@pytest.mark.parametrize("state", list(S))
@pytest.mark.parametrize("call", list(OUTCOMES))
def test_every_call_in_every_state(machine, call, state):
    in_state(machine, state)
    events = told(machine)
    expected = OUTCOMES[call].get(state)
    if expected is None:
        with pytest.raises((StateError, GuestError)):
            getattr(machine, call)()
        expected = state
    else:
        getattr(machine, call)()
    assert machine.run_state is expected
    assert machine.notifiers.drain(LONG)
    moves = [(event.old, event.new) for event in events if isinstance(event, RunStateChanged)]
    if (call, state) == ("start", S.PRELAUNCH):
        assert moves == [(S.PRELAUNCH, S.PAUSED), (S.PAUSED, S.RUNNING)]  # powered on, and then started
    else:
        assert moves == ([] if expected is state else [(state, expected)])
    running = {S.RUNNING}
    assert ("start" in machine.guest.calls) == (expected in running and state not in running)
    assert ("stop" in machine.guest.calls) == (state in running and expected not in running)
    assert any(isinstance(event, GuestStarted) for event in events) == ("start" in machine.guest.calls)
    assert any(isinstance(event, GuestStopped) for event in events) == ("stop" in machine.guest.calls)


@pytest.mark.parametrize("to", [S.RUNNING, S.PAUSED])
@pytest.mark.parametrize("state", list(S))
@pytest.mark.parametrize("call", ["thaw", "arrive"])
def test_what_the_engine_resumes(machine, call, state, to):
    in_state(machine, state)
    legal = to in {S.FINISH_MIGRATE: (S.RUNNING, S.PAUSED), S.INMIGRATE: (S.RUNNING, S.PAUSED)}.get(state, ())
    if legal:
        getattr(machine, call)(to)
        assert machine.run_state is to
        assert machine.guest.calls == (["start"] if to is S.RUNNING else [])
    elif to not in {S.RUNNING, S.PAUSED} or state in {S.POSTMIGRATE, S.SHUTDOWN, S.INTERNAL_ERROR}:
        if (state, to) in {(S.POSTMIGRATE, S.PAUSED), (S.INTERNAL_ERROR, S.PAUSED)}:
            return  # an operator's way, by `reclaim`
        with pytest.raises(StateError):
            getattr(machine, call)(to)
        assert machine.run_state is state


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (S.INMIGRATE, "waiting for an incoming migration"),
        (S.FINISH_MIGRATE, "Migration is not finalized yet"),
        (S.POSTMIGRATE, "reclaim"),
    ],
)
def test_a_start_that_must_not_be_says_why(machine, state, words):
    in_state(machine, state)
    with pytest.raises(StateError, match=words):
        machine.start()
    assert not machine.guest.calls


def test_a_stop_while_it_is_handed_over_says_why(machine):
    in_state(machine, S.FINISH_MIGRATE)
    with pytest.raises(StateError, match="Migration is not finalized yet"):
        machine.stop()


# ------------------------------------------------------------------------------------------------------- power on


def test_a_fresh_machine_is_powered_on_once(machine):
    for _ in range(3):
        machine.start()
        machine.stop()
    machine.power_on()
    assert machine.guest.calls == ["power_on", "start", "stop", "start", "stop", "start", "stop"]


def test_a_machine_that_was_only_paused_is_powered_on_at_its_first_start(machine):
    machine.stop()
    assert machine.guest.calls == []
    machine.start()
    assert machine.guest.calls == ["power_on", "start"]


@pytest.mark.parametrize("to", [S.RUNNING, S.PAUSED])
def test_a_machine_that_arrived_is_never_powered_on(machine, to):
    machine.expect_arrival()
    machine.arrive(to)
    machine.stop()
    machine.start()
    machine.power_on()
    assert "power_on" not in machine.guest.calls


def test_a_guest_that_does_not_power_on_leaves_the_machine_fresh(machine):
    machine.guest.faulty = {"power_on"}
    with pytest.raises(GuestError, match=r"failed to power on.*does not work"):
        machine.start()
    assert machine.run_state is S.PRELAUNCH
    machine.guest.faulty.clear()
    machine.start()
    assert machine.guest.calls == ["power_on", "power_on", "start"]


# --------------------------------------------------------------------------------------------------- a guest that fails


def test_a_guest_that_does_not_start_leaves_the_machine_paused(machine):
    machine.guest.faulty = {"start"}
    with pytest.raises(GuestError, match=r"failed to start.*does not work") as caught:
        machine.start()
    assert isinstance(caught.value.__cause__, OSError)
    assert machine.run_state is S.PAUSED
    machine.guest.faulty.clear()
    machine.start()
    assert machine.run_state is S.RUNNING


@pytest.mark.parametrize("call", ["thaw", "arrive"])
def test_a_guest_that_does_not_start_again_never_hangs_between_two_states(machine, call):
    in_state(machine, S.FINISH_MIGRATE if call == "thaw" else S.INMIGRATE)
    machine.guest.faulty = {"start"}
    with pytest.raises(GuestError, match="failed to start"):
        getattr(machine, call)(S.RUNNING)
    assert machine.run_state is S.PAUSED
    machine.guest.faulty.clear()
    machine.start()
    assert machine.run_state is S.RUNNING
    assert "power_on" not in machine.guest.calls


@pytest.mark.parametrize("call", ["start", "thaw", "arrive"])
def test_a_guest_that_wants_to_leave_leaves_the_machine_paused(machine, call):
    in_state(machine, {"start": S.PAUSED, "thaw": S.FINISH_MIGRATE, "arrive": S.INMIGRATE}[call])

    def start():
        raise SystemExit(3)

    machine.guest.start = start
    with pytest.raises(SystemExit):
        machine.start() if call == "start" else getattr(machine, call)(S.RUNNING)
    assert machine.run_state is S.PAUSED


def failing_machine(gate, entered):
    def step():
        entered.set()
        assert gate.wait(LONG)
        raise ZeroDivisionError("a bug of the guest's")

    machine = BareMachine("m")
    machine.guest = LoopGuest(step)
    return machine


def test_a_failing_step_is_an_internal_error():
    gate, changed = threading.Event(), threading.Event()
    with failing_machine(gate, threading.Event()) as machine:
        events = []
        machine.notifiers.add(lambda event: (events.append(event), "internal" in str(event) and changed.set()))
        machine.start()
        gate.set()
        assert changed.wait(LONG)
        assert machine.run_state is S.INTERNAL_ERROR
        assert isinstance(machine.failure, GuestError)
        assert isinstance(machine.failure.__cause__, ZeroDivisionError)
        assert sum(isinstance(event, GuestStopped) for event in events) == 1
        with pytest.raises(StateError):
            machine.start()
        with pytest.raises(GuestError, match="a bug of the guest's"):
            machine.freeze()
        assert machine.run_state is S.INTERNAL_ERROR


@pytest.mark.parametrize("call", ["stop", "freeze"])
def test_a_step_that_fails_while_it_is_stopped_is_an_internal_error_too(call):
    gate, entered, stopping = threading.Event(), threading.Event(), threading.Event()
    with failing_machine(gate, entered) as machine:
        machine.start()
        assert entered.wait(LONG)
        stop = machine.guest.stop
        machine.guest.stop = lambda: (stopping.set(), gate.set(), stop())[-1]
        if call == "freeze":
            with pytest.raises(GuestError, match="a bug of the guest's"):
                machine.freeze()
        else:
            machine.stop()
        assert stopping.is_set()
        assert machine.run_state is S.INTERNAL_ERROR


# ----------------------------------------------------------------------------------------------------------- the rest


def test_freeze_tells_where_to_thaw_to(machine):
    machine.start()
    assert machine.freeze() is S.RUNNING
    machine.thaw(S.RUNNING)
    machine.stop()
    assert machine.freeze() is S.PAUSED
    machine.thaw(S.PAUSED)
    assert machine.run_state is S.PAUSED


def test_only_one_thread_at_a_time_moves_it():
    steps = []
    with BareMachine("m") as machine:
        machine.guest = LoopGuest(lambda: steps.append(machine.run_state))
        gate = threading.Barrier(4)

        def shake():
            gate.wait()
            for _ in range(100):
                machine.start()
                machine.stop()

        shakers = [threading.Thread(target=shake) for _ in range(4)]
        for shaker in shakers:
            shaker.start()
        for shaker in shakers:
            shaker.join()
        machine.stop()
        assert machine.run_state is S.PAUSED
        assert machine.guest.failure is None


def test_parts_are_fixed_from_the_first_start_on(machine):
    machine.ram.add("a", 4096)
    for state in (S.INMIGRATE, S.RUNNING):
        fresh = BareMachine("m")
        fresh.guest = NotedGuest()
        in_state(fresh, state)
        with pytest.raises(StateError, match="fixed"):
            fresh.ram.add("b", 4096)
        with pytest.raises(StateError, match="fixed"):
            fresh.guest = NotedGuest()
        with pytest.raises(StateError, match="fixed"):
            fresh.devices.add("d", object(), DESCRIPTION)
        fresh.close()


@attrs.define
class Clock:
    step: int = 0


DESCRIPTION = vmstate.VMStateDescription("clock", 1, fields=[vmstate.uint64("step")])


def test_devices_are_named_once_and_fit_their_description(machine):
    clock = Clock()
    device = machine.devices.add("clock", clock, DESCRIPTION)
    machine.devices.add("clock", Clock(), DESCRIPTION, instance_id=1)
    assert machine.devices["clock"] is device
    assert len(machine.devices) == 2
    assert [item.instance_id for item in machine.devices] == [0, 1]
    with pytest.raises(ConfigError, match="already a device 'clock' with instance id 1"):
        machine.devices.add("clock", Clock(), DESCRIPTION, instance_id=1)
    with pytest.raises(ConfigError):
        machine.devices.add("other", object(), DESCRIPTION)
    for name in ("", "ü", "x" * 256, "a\n"):
        with pytest.raises(ConfigError, match="printable ASCII"):
            machine.devices.add(name, Clock(), DESCRIPTION)
    assert len(machine.devices) == 2


@pytest.mark.parametrize("name", ["", "ü", "x" * 256, "a\0"])
def test_a_machine_has_a_name_that_fits_into_a_stream(name):
    with pytest.raises(ConfigError, match="printable ASCII"):
        BareMachine(name)


def test_a_uuid_may_be_text():
    text = "00112233-4455-6677-8899-aabbccddeeff"
    assert BareMachine("m", uuid=text).uuid == BareMachine("m", uuid=UUID(text)).uuid == UUID(text)
    with pytest.raises(ValueError, match="UUID"):
        BareMachine("m", uuid="nonsense")


def test_blockers_stand_until_each_was_removed(machine):
    machine.blockers.add("a")
    machine.blockers.add("b")
    machine.blockers.add("a")
    machine.blockers.remove("a")
    assert machine.blockers.reasons() == ("b", "a")
    machine.blockers.remove("a")
    with pytest.raises(KeyError):
        machine.blockers.remove("a")
    assert machine.blockers.reasons() == ("b",)


@pytest.mark.parametrize("state", list(S))
def test_close_stops_what_runs_and_twice_is_fine(machine, state):
    in_state(machine, state)
    machine.close()
    machine.close()
    assert machine.run_state is S.SHUTDOWN
    assert machine.guest.calls == {S.RUNNING: ["stop", "close"], S.SHUTDOWN: []}.get(state, ["close"])
