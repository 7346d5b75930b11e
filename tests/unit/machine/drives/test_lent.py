"""What a machine lends of a drive, and what its guest's process makes of it; both in this process here."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from whimbrel.errors import StateError, UnknownNameError
from whimbrel.machine.drives import CHUNK, Drives, GuestDrives

SIZE = 3 * CHUNK + 512


@pytest.fixture
def lent(tmp_path):
    """The machine's drives, a writable one and a read-only one, and the guest's."""
    ours, theirs = Drives(lambda: None), GuestDrives()
    for name, read_only in (("a", False), ("fixed", True)):
        path = tmp_path / name
        path.touch()
        os.truncate(path, SIZE)
        drive = ours.add(name, path, read_only)
        image, marks = drive.lend()
        theirs.borrow(name, drive.place, os.dup(image), os.dup(marks), read_only=read_only)
    ours.acquire()
    yield ours, theirs
    for drive in theirs:
        drive.close()
    ours.close()


def test_what_one_writes_the_other_reads_and_a_migration_sees(lent):
    ours, theirs = lent
    theirs.admit()
    theirs["a"].write(0, b"before it is tracked")
    ours["a"].track()
    assert not ours["a"].collect().any()
    theirs["a"].write(CHUNK - 1, b"xy")
    theirs["a"].write(SIZE - 1, b"z")
    ours["a"].mark_dirty(2 * CHUNK, 1)
    assert ours["a"].read(CHUNK - 1, 2) + ours["a"].read(SIZE - 1, 1) == b"xyz"
    assert ours["a"].collect().tolist() == [True, True, True, True]
    assert not ours["a"].collect().any()
    theirs["a"].discard(0, 4096)
    assert ours["a"].collect().tolist() == [True, False, False, False]
    with theirs["a"].open() as file:
        file.seek(2 * CHUNK)
        file.write(b"as a file")
    assert ours["a"].collect().tolist() == [False, False, True, False]
    ours["a"].untrack()


def test_a_chunk_is_marked_before_it_is_written_and_behind_it(lent, monkeypatch):
    """Whoever reads it in between, or finds that the guest's process has died there, sends it again."""
    ours, theirs = lent
    device, seen = theirs["a"].device, []
    ours["a"].track()

    def write(offset, data):
        seen.append(ours["a"].collect().tolist())

    monkeypatch.setattr(device, "write", write)
    theirs.admit()
    theirs["a"].write(CHUNK, b"x")
    assert seen == [[False, True, False, False]], "not marked before"
    assert ours["a"].collect().tolist() == [False, True, False, False], "not marked behind"


def test_no_mark_is_lost_between_two_that_set_and_take_them(lent):
    """Each byte that is written is in the copy, though the marks are taken all the time."""
    ours, theirs = lent
    drive, copy = ours["a"], bytearray(SIZE)
    theirs.admit()
    drive.track()
    done = threading.Event()

    def write():
        dice = np.random.default_rng(3)
        for number, at in enumerate(dice.integers(0, SIZE - 4, 3000).tolist()):
            theirs["a"].write(at, number.to_bytes(4, "big"))
        done.set()

    def catch_up():
        for number in np.flatnonzero(drive.collect()).tolist():
            start = number * CHUNK
            copy[start : start + CHUNK] = drive.read(start, min(CHUNK, SIZE - start))

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        catch_up()
    writer.join()
    catch_up()
    different = np.flatnonzero(np.frombuffer(copy, np.uint8) != np.frombuffer(drive.read(0, SIZE), np.uint8))
    assert not different.size, f"byte {different[0]} was written and not told of"


def test_what_may_not_be_written_is_not(lent):
    _, theirs = lent
    with pytest.raises(StateError, match="does not run"):
        theirs["a"].write(0, b"too early")
    theirs.admit()
    with pytest.raises(ValueError, match="not inside of drive 'a'"):
        theirs["a"].write(SIZE - 1, b"xy")
    with pytest.raises(StateError, match="read-only"):
        theirs["fixed"].write(0, b"x")
    with pytest.raises(UnknownNameError, match="disk9"):
        theirs["disk9"]
    theirs.bar()
    with pytest.raises(StateError, match="does not run"):
        theirs["a"].write(0, b"too late")
    assert "a" in theirs
    assert [drive.name for drive in theirs] == ["a", "fixed"]
    assert len(theirs) == 2
    assert not any(theirs["a"].read(0, 512))


def test_the_gate_is_closed_only_when_no_write_is_under_way(lent, monkeypatch):
    _, theirs = lent
    begun, go_on = threading.Event(), threading.Event()

    def write(offset, data):
        begun.set()
        assert go_on.wait(60)

    monkeypatch.setattr(theirs["a"].device, "write", write)
    theirs.admit()
    writer = threading.Thread(target=theirs["a"].write, args=(0, b"x"))
    closer = threading.Thread(target=theirs.bar)
    writer.start()
    assert begun.wait(60)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive(), "closed while a write was under way"
    go_on.set()
    closer.join(60)
    writer.join(60)
    assert not closer.is_alive()


def test_the_machine_lets_go_of_the_lock_for_both(lent, tmp_path):
    """It is that of the open file: the guest's descriptor neither ends it nor keeps it."""
    ours, theirs = lent
    other = Drives(lambda: None)
    other.add("a", tmp_path / "a")
    theirs["a"].device.release()
    with pytest.raises(StateError, match="in use"):
        other.acquire()
    ours.release()
    other.acquire()
    other.close()


def test_a_device_without_a_descriptor_is_not_lent(tmp_path, monkeypatch):
    drives = Drives(lambda: None)
    path = tmp_path / "a"
    path.write_bytes(bytes(CHUNK))
    drive = drives.add("a", path)
    monkeypatch.setattr(type(drive.device), "fd", None)
    assert drive.lend() is None
    drives.close()
