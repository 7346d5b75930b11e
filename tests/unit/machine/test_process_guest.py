"""A guest in a process of its own: what is special about that. What all guests have in common is in the suite."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from whimbrel.errors import ConfigError, GuestError, StateError, TrackerUnavailable
from whimbrel.machine import BareMachine, ProcessGuest
from whimbrel.machine.dirty import CompareTracker, kernel
from whimbrel.machine.dirty.plugin import whimbrel_dirty_trackers
from whimbrel.machine.drives import Drives
from whimbrel.machine.process import guest as module
from whimbrel.settings import Settings
from whimbrel.testing.guests import Probe, probe
from whimbrel.testing.trackers import Replica, tracking

LONG = 20.0
WORKLOADS = Path(__file__).parent / "process_workloads.py"


@pytest.fixture
def settings():
    settings = Settings()
    settings.backends.memory = "memfd"
    return settings


@pytest.fixture
def make(settings):
    """`make(workload)`: a machine with the words that the workloads use; closed after the test."""
    made = []

    def make(workload, **more):
        machine = BareMachine("words", settings=settings, tracker_specs=whimbrel_dirty_trackers)
        made.append(machine)
        machine.ram.array("words", 8, "uint64")
        machine.ram.add("more", 1 << 20)
        machine.guest = ProcessGuest(f"{WORKLOADS}:{workload}" if ":" not in workload else workload, **more)
        return machine

    yield make
    while made:
        machine = made.pop()
        machine.close()
        assert machine.guest.pid is None
    del machine
    gc.collect()  # with the descriptors of its memory
    assert "whimbrel-guest-watch" not in {thread.name for thread in threading.enumerate()}


def words(machine):
    return machine.ram["words"].array(8, "uint64")


def wait_until(condition):
    looks = threading.Event()
    for _ in range(int(LONG / 0.001)):
        if condition():
            return
        looks.wait(0.001)
    raise AssertionError("it does not come to it")


def wait_failed(machine):
    wait_until(lambda: machine.failure is not None)
    return machine.failure


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --------------------------------------------------------------------------------------------------- what it is given


def test_the_workload_sees_the_machines_memory_by_name(make):
    machine = make("telling")
    machine.start()
    assert words(machine)[:6].tolist() == [2, 4096, 1, 1, os.getpid(), 1]


def test_arguments_reach_the_factory(make):
    machine = make("counting", arguments={"by": 7})
    machine.start()
    wait_until(lambda: words(machine)[0] >= 70)
    machine.stop()
    assert words(machine)[0] % 7 == 0


def test_a_function_of_a_module_is_found_by_its_name():
    assert ProcessGuest(probe).workload == "whimbrel.testing.guests:probe"


@pytest.mark.parametrize("factory", [lambda memory: None, Probe.step], ids=["lambda", "method"])
def test_a_function_without_a_name_is_refused(factory):
    with pytest.raises(ConfigError, match="no name by which another process could find it"):
        ProcessGuest(factory)


def test_a_function_of_the_main_script_is_found_by_its_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import whimbrel

            def workload(memory):
                words = memory.array("words", 8, "uint64")
                def step():
                    words[0] += 1
                return whimbrel.LoopGuest(step)

            if __name__ == "__main__":
                settings = whimbrel.Settings()
                settings.backends.memory = "memfd"
                with whimbrel.Machine("words", settings=settings) as machine:
                    words = machine.ram.array("words", 8, "uint64")
                    machine.guest = whimbrel.ProcessGuest(workload)
                    machine.start()
                    while not words[0]:
                        pass
                    machine.stop()
                    print(machine.guest.workload)
            """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == (f"{script.resolve()}:workload", "")


def test_arguments_that_cannot_be_told_are_refused():
    with pytest.raises(ConfigError, match=r"arguments of a:b cannot be told"):
        ProcessGuest("a:b", arguments={"callback": print})


# ------------------------------------------------------------------------------------------------- what cannot begin


def test_memory_that_is_not_shared_is_refused(make, settings):
    settings.backends.memory = "anonymous"
    machine = make("counting")
    for begin in (machine.start, machine.expect_arrival):
        with pytest.raises(ConfigError, match=r"'words' is anonymous; set \[backends\] memory = \"memfd\""):
            begin()
    assert machine.run_state == "prelaunch"
    assert machine.guest.pid is None


def test_memory_in_files_is_shared_too(make, settings, tmp_path):
    settings.backends.memory = f"file:{tmp_path}"
    machine = make("counting")
    machine.start()
    wait_until(lambda: words(machine)[0])
    machine.stop()


@pytest.mark.parametrize(
    ("workload", "error", "message"),
    [
        ("there.is.none:such", ConfigError, "there is no module 'there'"),
        (f"{WORKLOADS}:non", ConfigError, "unknown factory"),
        (f"{WORKLOADS}:nothing", ConfigError, "returned a GuestMemory, expected a guest"),
        (f"{WORKLOADS}:refusing", GuestError, "LookupError: there is nothing to work on"),
        (f"{WORKLOADS}:counting", ConfigError, "unknown RAM block 'wards'; did you mean 'words'"),
    ],
    ids=["module", "factory", "no guest", "raises", "block"],
)
def test_a_workload_that_cannot_be_made_is_said_so(make, workload, error, message):
    machine = make(workload, arguments={"block": "wards"} if "counting" in workload else None)
    with pytest.raises(error, match=message) as caught:
        machine.start()
    assert "Traceback" in caught.value.__notes__[0]
    assert machine.run_state == "prelaunch"
    assert machine.guest.pid is None, "the child was to be ended"


def test_a_second_machine_cannot_have_it(make):
    machine, other = make("counting"), make("counting")
    machine.start()
    other.guest.close()
    with pytest.raises(StateError, match="runs in one machine, once"):
        machine.guest.prepare(list(other.ram))


def test_a_power_on_that_raises_leaves_the_machine_fresh(make):
    machine = make("unpowered")
    with pytest.raises(GuestError, match="no power"):
        machine.start()
    assert machine.run_state == "prelaunch"


# ---------------------------------------------------------------------------------------------------------- its end


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_is_killed_fails_the_machine(make, number):
    machine = make("counting")
    machine.start()
    wait_until(lambda: words(machine)[0])
    pid = machine.guest.pid
    os.kill(pid, number)
    assert f"process {pid} was killed by {number.name}" in str(wait_failed(machine))
    assert machine.run_state == "internal-error"
    assert not is_there(pid), "it was not waited for"


@pytest.fixture
def keeping(make, tmp_path):
    """A machine that runs, whose child writes to its drive all the time."""
    image = tmp_path / "disk0"
    image.write_bytes(bytes(1 << 20))
    machine = make("keeping")
    machine.drives.add("disk0", image)
    machine.start()
    wait_until(lambda: words(machine)[0] and words(machine)[1])
    return machine


def test_no_thread_of_the_child_writes_drives_while_the_machine_stands_still(keeping):
    """Whoever tries is refused there, and may go on when the machine does."""
    for _ in range(5):
        keeping.stop()
        refused, before = int(words(keeping)[2]), keeping.drives["disk0"].read(0, 8192)
        wait_until(lambda refused=refused: words(keeping)[2] > refused + 2)
        unchanged = keeping.drives["disk0"].read(0, 8192) == before
        assert unchanged, "written after stop had returned"
        written = int(words(keeping)[1])
        keeping.start()
        wait_until(lambda written=written: words(keeping)[1] > written)


def test_a_child_that_is_killed_while_it_writes_a_drive_leaves_it_to_the_machine(keeping):
    """It writes no more, and nobody else may: the machine has the lock until it is closed."""
    drive, place = keeping.drives["disk0"], keeping.drives["disk0"].place
    os.kill(keeping.guest.pid, signal.SIGKILL)
    wait_failed(keeping)
    assert keeping.run_state == "internal-error"
    with pytest.raises(StateError, match="does not run"):
        drive.write(0, b"x")
    other = Drives(lambda: None)
    other.add("disk0", place)
    with pytest.raises(StateError, match="in use"):
        other.acquire()
    keeping.close()
    other.acquire()
    other.close()


def test_a_child_that_exits_fails_the_machine(make):
    machine = make("exiting")
    machine.start()
    words(machine)[7] = 1
    assert "ended with status 7" in str(wait_failed(machine))
    assert machine.run_state == "internal-error"


def test_a_child_that_dies_while_the_machine_is_paused_cannot_be_started(make):
    machine = make("counting")
    machine.start()
    machine.stop()
    os.kill(machine.guest.pid, signal.SIGKILL)
    wait_failed(machine)
    assert machine.run_state == "paused"
    with pytest.raises(StateError, match=r"failed and cannot be started again: .*SIGKILL"):
        machine.start()


def test_a_child_that_has_died_is_noticed_by_stop(make):
    """Whoever hears of it first: a machine that is frozen for a migration must not take it for a guest that stands."""
    machine = make("counting")
    machine.start()
    with machine.lock:  # so that nobody is told yet
        os.kill(machine.guest.pid, signal.SIGKILL)
        with pytest.raises(GuestError, match="SIGKILL"):
            machine.freeze()
        assert machine.run_state == "internal-error"


def test_a_guest_that_cannot_be_stopped_is_ended(make):
    machine = make("unstoppable")
    machine.start()
    wait_until(lambda: words(machine)[0])
    pid = machine.guest.pid
    machine.stop()
    assert not is_there(pid)
    assert machine.run_state == "internal-error"
    assert "I do not stop" in str(machine.guest.failure)


def test_a_child_that_does_not_end_is_killed(make, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.1)
    machine = make("deaf")
    machine.start()
    pid = machine.guest.pid
    machine.close()
    assert not is_there(pid)


def test_the_machine_may_be_closed_from_on_failure(make):
    machine = make("exiting")
    closed = threading.Event()
    machine.guest.on_failure = lambda exc: (machine.guest.close(), closed.set())
    machine.start()
    words(machine)[7] = 1
    assert closed.wait(LONG)
    wait_until(lambda: "whimbrel-guest-watch" not in {thread.name for thread in threading.enumerate()})


def test_the_child_ends_with_the_machines_process(tmp_path):
    """Even if that is killed, and somebody whom it has forked off holds its end of the socket."""
    script = f"""
import os, sys, whimbrel
settings = whimbrel.Settings()
settings.backends.memory = "memfd"
machine = whimbrel.Machine("words", settings=settings)
machine.ram.array("words", 8, "uint64")
machine.guest = whimbrel.ProcessGuest({str(WORKLOADS) + ":counting"!r})
machine.start()
forked = os.fork()
if not forked:
    sys.stdin.read()  # until the test has ended
    os._exit(0)
print(machine.guest.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert parent.wait(LONG) == -signal.SIGKILL
            assert module.wait_for_end(child, LONG), "the guest's process has outlived the machine's"
        finally:
            os.close(child)
            parent.stdin.close()


def test_orders_wait_for_the_step_and_not_for_the_lock(make):
    """A step in pure Python has the lock nearly all the time; it is let finish, and no other begins."""
    machine = make("busy")
    machine.start()
    wait_until(lambda: words(machine)[0])
    before = int(words(machine)[1])
    machine.stop()
    assert int(words(machine)[1]) - before <= 1


# --------------------------------------------------------------------------------------------------------- tracking


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ("auto", "userfaultfd+guest"),
        ("userfaultfd", "userfaultfd+guest"),
        ("manual", "manual+guest"),
        ("compare", "compare"),
    ],
)
def test_the_trackers_name_says_who_tracks(make, settings, chosen, named):
    settings.backends.dirty_tracker = chosen
    machine = make("counting")
    machine.start()
    name, tracker = machine.new_dirty_tracker()
    assert name == named
    with tracking(tracker, list(machine.ram)) as (replica, more):
        for number in range(20):
            before = int(words(machine)[0])
            wait_until(lambda: words(machine)[0] > before)  # noqa: B023 - called at once
            machine.ram["more"].view[number * 9001] = number + 1  # and this process writes as well
            machine.ram["more"].mark_dirty(number * 9001, 1)  # for the tracker that lives by it
            assert replica.round() > 0
            assert more.round() > 0
        machine.stop()
        replica.settle()
        more.settle()


def without_userfaultfd_there(monkeypatch):
    def refuse(self):
        raise TrackerUnavailable("userfaultfd is not permitted here")

    monkeypatch.setattr(ProcessGuest, "_open_there", refuse)


def test_where_the_child_has_no_userfaultfd_memory_is_compared(make, monkeypatch):
    without_userfaultfd_there(monkeypatch)
    machine = make("counting")
    machine.start()
    name, tracker = machine.new_dirty_tracker()
    assert name == "compare"
    assert isinstance(tracker, CompareTracker)


@pytest.mark.parametrize("chosen", ["userfaultfd", "manual"])
def test_and_what_would_lose_its_writes_is_refused(make, settings, monkeypatch, chosen):
    without_userfaultfd_there(monkeypatch)
    settings.backends.dirty_tracker = chosen
    machine = make("counting")
    machine.start()
    with pytest.raises(TrackerUnavailable, match="in the guest's process: userfaultfd is not permitted here"):
        machine.new_dirty_tracker()


def test_a_child_that_has_gone_is_not_taken_for_one_that_writes_nothing(make):
    """The kernel finds nothing written in memory that is no more."""
    machine = make("counting")
    machine.start()
    _, tracker = machine.new_dirty_tracker()
    block = machine.ram["words"]
    with tracking(tracker, list(machine.ram)) as (replica, _):
        replica.round()
        os.kill(machine.guest.pid, signal.SIGKILL)
        wait_failed(machine)
        with pytest.raises(TrackerUnavailable, match="writes to 'words' has gone"):
            tracker.collect(block, np.zeros(1, np.bool_))


def test_a_machine_whose_guest_has_gone_before_is_tracked_alone(make):
    machine = make("counting")
    machine.start()
    machine.stop()
    os.kill(machine.guest.pid, signal.SIGKILL)
    wait_failed(machine)
    assert machine.new_dirty_tracker()[0] == "userfaultfd"


def test_pages_that_nobody_has_written_are_known_to_be_zero(make):
    machine = make("counting")
    machine.start()
    wait_until(lambda: words(machine)[0])
    _, tracker = machine.new_dirty_tracker()
    tracker.start(list(machine.ram))
    try:
        assert not tracker.untouched(machine.ram["words"]).any()
        assert tracker.untouched(machine.ram["more"]).all()
    finally:
        tracker.stop()


def test_tracking_ends_and_begins_again(make):
    machine = make("counting")
    machine.start()
    for _ in range(3):
        _, tracker = machine.new_dirty_tracker()
        with tracking(tracker, list(machine.ram)) as (replica, _):
            before = int(words(machine)[0])
            wait_until(lambda: words(machine)[0] > before)  # noqa: B023 - called at once
            assert replica.round() > 0
        with pytest.raises(StateError):
            tracker.collect(machine.ram["words"], np.zeros(1, np.bool_))


def test_a_tracker_that_sends_a_copy_and_sees_one_side_is_refused(make):
    """It would send what it has copied when this process wrote, whatever the guest wrote since."""
    import attrs

    from whimbrel.machine.dirty import with_guests

    machine = make("counting")
    machine.start()
    compare = next(spec for spec in whimbrel_dirty_trackers() if spec.name == "compare")
    wrong = attrs.evolve(compare, sees_other_processes=False)
    (spec,) = with_guests([wrong], machine.guest.dirty_tracker())
    tracker = spec.create()
    with pytest.raises(TrackerUnavailable, match="sends from a copy"):
        tracker.start(list(machine.ram))
    machine.stop()
    replica = Replica(tracker, machine.ram["words"])
    with pytest.raises(StateError):
        replica.collect()


def test_descriptors_that_are_not_used_are_closed(make):
    machine = make("counting")
    machine.start()
    holders = (Path("/proc/self/fd"), Path(f"/proc/{machine.guest.pid}/fd"))
    before = [len(list(holder.iterdir())) for holder in holders]
    for _ in range(3):
        opened = machine.guest._open_there()
        kernel.Userfault(opened).close()
        machine.new_dirty_tracker()
    # The child closes its own when its answer has gone; that it obeys again shows that it has.
    machine.guest.throttle(0)
    assert [len(list(holder.iterdir())) for holder in holders] == before
