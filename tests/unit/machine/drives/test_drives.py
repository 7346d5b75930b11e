"""Drives as the guest and the program see them, and what a machine lets be done with them in which state."""

import io
import threading
from typing import ClassVar

import numpy as np
import pytest

from whimbrel import LoopGuest
from whimbrel.errors import ConfigError, GuestError, StateError, UnknownNameError
from whimbrel.machine import RawImage, RunState
from whimbrel.machine.drives import CHUNK, DriveFile

MIB = 1 << 20


@pytest.fixture
def running(machine, image):
    """A machine that runs, with drive `d` of 3 MiB and 100 bytes."""
    one = machine(d=image(3 * MIB + 100))
    one.start()
    return one


# ----------------------------------------------------------------------------------------------------- adding them


def test_drives_are_found_by_name_and_kept_in_order(machine, image):
    one = machine(b=image(MIB), a=image(2 * MIB))
    assert [drive.name for drive in one.drives] == ["b", "a"]
    assert len(one.drives) == 2
    assert "a" in one.drives
    assert (one.drives["a"].size, one.drives["a"].chunks) == (2 * MIB, 2)
    with pytest.raises(UnknownNameError, match="a, b"):
        one.drives["c"]
    with pytest.raises(KeyError):
        one.drives["c"]


def test_names_that_are_taken_or_cannot_go_over_the_wire(machine, image):
    one = machine(a=image(MIB))
    for name in ("a", "", "ä", "x\n", "n" * 256):
        with pytest.raises(ConfigError):
            one.drives.add(name, image(MIB))
    assert len(one.drives) == 1


def test_none_are_added_to_a_machine_that_has_begun(running, image):
    with pytest.raises(StateError):
        running.drives.add("late", image(MIB))


def test_a_device_of_the_programs_own_is_closed_with_the_machine(machine, image):
    device = RawImage(image(MIB))
    one = machine()
    assert one.drives.add("own", device).device is device
    one.start()
    assert device.acquired
    one.close()
    with pytest.raises(StateError, match="closed"):
        device.next_extent(0)


def test_a_device_that_may_be_written_is_not_added_as_read_only(machine, image):
    with pytest.raises(ConfigError, match="not read-only"):
        machine().drives.add("own", RawImage(image(MIB)), read_only=True)


def test_those_that_take_part_are_writable_and_not_empty(machine, image):
    one = machine(a=image(MIB), empty=image(0))
    one.drives.add("base", image(MIB), read_only=True)
    assert [drive.name for drive in one.drives.writable] == ["a"]


# ------------------------------------------------------------------------------------------- reading and writing


def test_what_is_written_is_read(running):
    drive = running.drives["d"]
    drive.write(MIB - 2, b"across")
    drive.write(0, np.arange(4, dtype="<u2"))
    assert drive.read(MIB - 3, 8) == b"\0across\0"
    assert drive.read(0, 8) == b"\0\0\1\0\2\0\3\0"
    drive.discard(MIB, 1)
    assert drive.read(MIB - 2, 6) == b"ac\0oss"
    drive.flush()
    assert drive.read(drive.size, 0) == b""


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 3 * MIB + 101), (3 * MIB + 100, 1), (1 << 63, 1)])
def test_ranges_outside_of_the_drive(running, offset, size):
    drive = running.drives["d"]
    for action in (drive.read, drive.discard, lambda at, count: drive.write(at, bytes(count))):
        with pytest.raises(ValueError, match="not inside of drive 'd'"):
            action(offset, size)


def test_a_guest_writes_while_it_powers_on_and_while_it_runs_and_nobody_at_any_other_time(machine, image):
    one = machine(d=image(MIB))
    drive = one.drives["d"]
    stepped = threading.Event()

    def step():
        drive.write(1, b"s")
        stepped.set()
        return 0.01

    one.guest = LoopGuest(step, power_on=lambda: drive.write(0, b"p"))

    def refused():
        for action in (lambda: drive.write(9, b"x"), lambda: drive.discard(9, 1)):
            with pytest.raises(StateError, match="does not run"):
                action()
        return True

    assert refused()
    one.power_on()
    assert one.run_state is RunState.PAUSED
    assert refused()
    one.start()
    assert stepped.wait(30)
    one.stop()
    assert refused()
    before = one.freeze()
    assert refused()
    one.thaw(before)
    assert refused()
    one.start()
    drive.write(2, b"!")
    one.stop()
    assert drive.read(0, 4) == b"ps!\0"


def test_the_drives_of_a_guest_that_failed_stay_as_they_are(machine, image):
    one = machine(d=image(MIB))
    failed = threading.Event()
    one.notifiers.add(lambda event: failed.set() if getattr(event, "new", None) == RunState.INTERNAL_ERROR else None)

    def step():
        raise RuntimeError("broken")

    one.guest = LoopGuest(step)
    one.start()
    assert failed.wait(30)
    with pytest.raises(StateError, match="does not run"):
        one.drives["d"].write(0, b"x")


def test_a_guest_that_does_not_start_leaves_the_drives_closed(machine, image):
    one = machine(d=image(MIB))

    class Broken(LoopGuest):
        def start(self):
            raise RuntimeError("no")

    one.guest = Broken(lambda: None)
    with pytest.raises(GuestError):
        one.start()
    with pytest.raises(StateError, match="does not run"):
        one.drives["d"].write(0, b"x")


def test_stopping_waits_for_writes_that_are_under_way(machine, image):
    class Slow(RawImage):
        begun, go_on = threading.Event(), threading.Event()

        def write(self, offset, data):
            self.begun.set()
            assert self.go_on.wait(30)
            super().write(offset, data)

    one = machine()
    drive = one.drives.add("slow", Slow(image(MIB)))
    one.start()
    writer = threading.Thread(target=drive.write, args=(0, b"late"))
    writer.start()
    assert Slow.begun.wait(30)
    stopped = threading.Thread(target=one.stop)
    stopped.start()
    stopped.join(0.05)
    assert stopped.is_alive()
    Slow.go_on.set()
    stopped.join(30)
    assert drive.read(0, 4) == b"late"
    writer.join(30)


# ------------------------------------------------------------------------------------------------------- the locks


def test_a_machine_locks_its_drives_when_it_starts_and_keeps_them(machine, image):
    path = image(MIB)
    one, other = machine(d=path), machine(d=path)
    assert not one.drives["d"].device.acquired
    one.start()
    one.stop()
    with pytest.raises(StateError, match="in use"):
        other.start()
    assert other.run_state is RunState.PRELAUNCH
    one.close()
    other.start()
    assert other.run_state is RunState.RUNNING


def test_all_drives_are_locked_or_none(machine, image, held):
    free, taken = image(MIB), image(MIB)
    process = held(taken)
    one = machine(free=free, taken=taken)
    with pytest.raises(StateError, match=f"process {process.pid}"):
        one.start()
    assert not one.drives["free"].device.acquired
    process.stdin.close()
    process.wait(30)
    one.start()


def test_a_read_only_drive_may_be_had_by_many(machine, image):
    path = image(MIB, b"base")
    machines = [machine(), machine()]
    for one in machines:
        drive = one.drives.add("base", path, read_only=True)
        one.start()
        assert drive.read(0, 4) == b"base"
        with pytest.raises(StateError, match="read-only"):
            drive.write(0, b"x")


def test_an_image_that_is_not_whole_is_not_used(machine, image):
    path = image(MIB)
    marker = path.with_name(path.name + ".whimbrel-incomplete")
    marker.write_text("")
    one = machine(d=path)
    for action in (one.start, lambda: one.drives["d"].read(0, 1), lambda: one.drives["d"].open().read(1)):
        with pytest.raises(StateError, match=r"not whole.*remove the marker"):
            action()
    assert one.run_state is RunState.PRELAUNCH
    assert not one.drives["d"].device.acquired
    marker.unlink()
    one.start()
    assert one.drives["d"].read(0, 1) == b"\0"


# -------------------------------------------------------------------------------------------------------- as a file


def test_a_drive_is_a_file_of_fixed_size(running):
    with running.drives["d"].open() as file:
        assert isinstance(file, DriveFile)
        assert (file.readable(), file.writable(), file.seekable()) == (True, True, True)
        assert file.write(b"hello") == 5
        assert file.tell() == 5
        assert file.seek(-2, io.SEEK_CUR) == 3
        assert file.read(4) == b"lo\0\0"
        assert file.seek(-3, io.SEEK_END) == 3 * MIB + 97
        assert file.write(b"12345") == 3
        assert file.read(1) == b""
        with pytest.raises(OSError, match="ends at"):
            file.write(b"x")
        assert file.write(b"") == 0
        file.seek(10 * MIB)
        assert file.read() == b""
        for offset, whence in ((-1, 0), (-4 * MIB, 2), (0, 9)):
            with pytest.raises(ValueError):
                file.seek(offset, whence)
    with pytest.raises(ValueError, match="closed"):
        file.write(b"x")


def test_it_can_be_buffered_and_read_by_whatever_reads_files(running):
    with io.BufferedRandom(running.drives["d"].open()) as file:
        for number in range(1000):
            file.write(b"%06d\n" % number)
        file.seek(7 * 500)
        assert file.readline() == b"000500\n"
    assert running.drives["d"].read(7 * 999, 8) == b"000999\n\0"


def test_a_read_only_drive_is_a_read_only_file(machine, image):
    drive = machine().drives.add("base", image(MIB), read_only=True)
    file = drive.open()
    assert not file.writable()
    with pytest.raises(io.UnsupportedOperation):
        file.write(b"x")


# --------------------------------------------------------------------------------------------------------- tracking


def marked(drive):
    return np.flatnonzero(drive.collect()).tolist()


def test_writes_are_noted_from_the_moment_that_somebody_wants_to_know(running):
    drive = running.drives["d"]
    drive.write(0, b"before")
    drive.track()
    assert marked(drive) == []
    drive.write(CHUNK - 1, b"xx")
    assert marked(drive) == [0, 1]
    assert marked(drive) == []
    drive.discard(2 * CHUNK, 1)
    with drive.open() as file:
        file.seek(3 * CHUNK)
        file.write(b"last")
    assert marked(drive) == [2, 3]
    drive.write(5, b"")
    assert marked(drive) == []
    drive.untrack()
    drive.untrack()
    drive.write(0, b"after")


def test_a_write_that_failed_may_have_written(machine, image):
    class Failing(RawImage):
        def write(self, offset, data):
            super().write(offset, memoryview(data)[:1])
            raise OSError("the disk is gone")

    one = machine()
    drive = one.drives.add("bad", Failing(image(4 * MIB)))
    one.start()
    drive.track()
    with pytest.raises(OSError, match="gone"):
        drive.write(CHUNK, b"xyz")
    assert marked(drive) == [1]


def test_a_device_may_tell_of_writes_by_other_ways(machine, image):
    class Elsewhere(RawImage):
        told: ClassVar = []

        def track(self):
            self.told.append("track")

        def collect(self, dirty, granularity):
            assert granularity == CHUNK
            dirty[2] = True

        def untrack(self):
            self.told.append("untrack")

    one = machine()
    drive = one.drives.add("e", Elsewhere(image(4 * MIB)))
    one.start()
    drive.track()
    drive.write(0, b"x")
    assert marked(drive) == [0, 2]
    drive.untrack()
    assert Elsewhere.told == ["track", "untrack"]


def test_chunks_with_anything_allocated(machine, image):
    path = image(6 * MIB + 10)
    with path.open("r+b") as file:
        for offset in (0, 3 * MIB - 4096, 3 * MIB, 6 * MIB):
            file.seek(offset)
            file.write(b"x")
    drive = machine(d=path).drives["d"]
    assert drive.allocated().tolist() == [True, False, True, True, False, False, True]
