"""Raw images: contents, holes, the lock and the marker."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whimbrel.errors import ConfigError, StateError
from whimbrel.machine import RawImage, libc

KIB, MIB = 1 << 10, 1 << 20


def read(device, offset, size):
    data = bytearray(size)
    device.read_into(offset, data)
    return bytes(data)


def extents(device):
    found, position = [], 0
    while (extent := device.next_extent(position)) is not None:
        found.append(extent)
        position = extent[1]
    return found


def blocks(device):
    return Path(device.place).stat().st_blocks


# ---------------------------------------------------------------------------------------------------------- opening


def test_a_folder_a_pipe_and_nothing_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe", "missing", "a\0b"):
        with pytest.raises(ConfigError):
            RawImage(f"{tmp_path}/{name}")


def test_a_read_only_image_is_never_written(raw):
    device = raw(MIB, b"here", acquired=False, read_only=True)
    assert read(device, 0, 5) == b"here\0"
    for action in (lambda: device.write(0, b"x"), lambda: device.discard(0, 4), device.acquire, device.begin_load):
        with pytest.raises(StateError, match="read-only"):
            action()
    assert read(device, 0, 4) == b"here"


def test_a_closed_image_is_closed(raw):
    device = raw(MIB)
    device.close()
    device.close()
    assert not device.acquired
    with pytest.raises(StateError, match="closed"):
        read(device, 0, 1)


def test_an_image_that_became_shorter_is_an_error_and_not_zeros(raw):
    device = raw(MIB)
    os.truncate(device.place, 1000)
    with pytest.raises(OSError) as caught:
        read(device, 900, 200)
    assert caught.value.errno == errno.EIO


# --------------------------------------------------------------------------------------------------------- contents

SIZE = 64 * KIB
RANGES = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)
ACTIONS = st.lists(st.tuples(st.sampled_from(("write", "zeros", "discard")), RANGES, st.integers(1, 255)), max_size=8)


@given(ACTIONS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_holds_what_a_bytearray_would(raw, actions):
    device, model = raw(SIZE), bytearray(SIZE)
    for action, (start, end), value in actions:
        match action:
            case "write":
                device.write(start, bytes([value]) * (end - start))
                model[start:end] = bytes([value]) * (end - start)
            case "zeros":
                device.write(start, bytes(end - start))
                model[start:end] = bytes(end - start)
            case "discard":
                device.discard(start, end - start)
                model[start:end] = bytes(end - start)
    found = read(device, 0, SIZE)
    assert next((i for i in range(SIZE) if found[i] != model[i]), None) is None
    holes = bytearray(model)
    for start, end in extents(device):
        holes[start:end] = bytes(end - start)
    assert not any(holes), "what is not allocated must read as zeros"
    device.close()


def test_zeros_over_a_hole_leave_it_and_over_data_write_them(raw):
    device = raw(8 * MIB)
    device.write(2 * MIB, b"x" * MIB)
    before = blocks(device)
    device.write(4 * MIB, bytes(2 * MIB))
    assert blocks(device) == before
    assert extents(device) == [(2 * MIB, 3 * MIB)]
    device.write(2 * MIB + 5, bytes(8 * KIB))
    assert read(device, 2 * MIB, 6) == b"xxxxx\0"


def test_what_is_discarded_takes_no_room(raw):
    device = raw(8 * MIB, b"x" * (4 * MIB))
    device.flush()
    before = blocks(device)
    device.discard(MIB, 2 * MIB)
    assert before - blocks(device) == 2 * MIB // 512
    assert extents(device) == [(0, MIB), (3 * MIB, 4 * MIB)]
    device.discard(MIB, 0)
    assert Path(device.place).stat().st_size == 8 * MIB


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_where_no_holes_can_be_made_zeros_are_written(raw, monkeypatch, number):
    device = raw(4 * MIB, b"x" * (4 * MIB))
    monkeypatch.setattr(libc, "fallocate", lambda *_: number)
    device.discard(MIB - 1, MIB + 3)
    assert read(device, MIB - 2, 3) == b"x\0\0"
    assert read(device, 2 * MIB, 4) == b"\0\0xx"
    assert not any(read(device, MIB - 1, MIB + 3))


def test_what_is_in_memory_is_read_at_once_and_what_might_not_be_is_not(raw, monkeypatch):
    device = raw(MIB)
    device.acquire()
    device.write(100, b"in the cache")
    into = bytearray(12)
    assert device.read_at_once(100, into)
    assert into == b"in the cache"
    assert not device.read_at_once(device.size - 6, into), "it ends before"
    for number in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EIO):
        monkeypatch.setattr(os, "preadv", _failing(number))
        assert not device.read_at_once(100, into)


def _failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_disk_that_fails_is_told(raw, monkeypatch):
    device = raw(MIB, b"x" * MIB)
    monkeypatch.setattr(libc, "fallocate", lambda *_: errno.EIO)
    with pytest.raises(OSError) as caught:
        device.discard(0, MIB)
    assert caught.value.errno == errno.EIO


# --------------------------------------------------------------------------------------------------------- the lock


def test_only_who_holds_the_lock_may_write(raw):
    device = raw(MIB, acquired=False)
    for action in (lambda: device.write(0, b"x"), lambda: device.discard(0, 4), device.begin_load, device.end_load):
        with pytest.raises(StateError, match="lock is not held"):
            action()
    device.acquire()
    device.acquire()
    device.write(0, b"x")
    device.release()
    device.release()
    with pytest.raises(StateError, match="lock is not held"):
        device.write(0, b"y")
    assert read(device, 0, 1) == b"x"


def test_two_of_one_process_exclude_each_other(raw):
    first = raw(MIB)
    second = RawImage(first.place)
    assert second.in_use()
    assert not first.in_use()
    with pytest.raises(StateError, match="this process holds its lock"):
        second.acquire()
    assert not second.acquired
    first.release()
    assert not second.in_use()
    second.acquire()
    second.close()
    first.acquire()


def test_another_process_is_named_and_its_end_ends_its_lock(image, held):
    path = image(MIB)
    process = held(path)
    device = RawImage(path)
    with pytest.raises(StateError, match=f"process {process.pid} "):
        device.acquire()
    process.kill()
    process.wait(30)
    device.acquire()
    device.close()


def test_a_child_of_the_process_that_locked_may_not_write(raw):
    device = raw(MIB)
    child = os.fork()
    if not child:
        refused = 1
        try:
            device.write(0, b"child")
        except StateError:
            refused = 0
        finally:
            os._exit(refused)
    assert os.waitpid(child, 0)[1] == 0
    assert read(device, 0, 5) == bytes(5)
    assert device.acquired


def test_a_locked_image_has_no_links_around_it(raw, tmp_path):
    device = raw(MIB)
    (tmp_path / "link").symlink_to(device.place)
    (tmp_path / "hard").hardlink_to(device.place)
    for name in ("link", "hard"):
        with pytest.raises(StateError, match="in use"):
            RawImage(tmp_path / name).acquire()


# ------------------------------------------------------------------------------------------------------- the marker


def test_the_marker_is_there_from_begin_to_end_and_outlives_everything_else(raw):
    device = raw(MIB)
    marker = Path(f"{device.place}.whimbrel-incomplete")
    assert not device.incomplete
    device.begin_load()
    device.begin_load()
    assert device.incomplete
    assert b"remove this file" in marker.read_bytes()
    device.close()
    again = RawImage(device.place)
    assert again.incomplete
    again.acquire()
    again.end_load()
    again.end_load()
    assert not marker.exists()
    again.close()


def test_the_marker_lies_beside_the_file_and_not_beside_the_link(raw, tmp_path):
    device = raw(MIB)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.img"
    link.symlink_to(device.place)
    device.begin_load()
    assert RawImage(link).incomplete
    assert [path.name for path in link.parent.iterdir()] == ["link.img"]


def test_a_link_to_nowhere_is_a_marker_too(raw):
    device = raw(MIB)
    Path(f"{device.place}.whimbrel-incomplete").symlink_to("nowhere/at/all")
    assert device.incomplete


def test_an_image_beside_which_no_marker_fits_is_not_loaded_into(image):
    device = RawImage(image(MIB, name="n" * 245))  # with what marks it the name would be too long
    device.acquire()
    with pytest.raises(OSError, match="too long"):
        device.begin_load()
    assert not device.incomplete
    device.close()


@pytest.mark.slow
def test_a_block_special_file_is_an_image_too(image, tmp_path):
    """Where this process may make loop devices, which few may."""
    path = image(4 * MIB, b"x" * MIB)
    made = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True)
    if made.returncode:
        pytest.skip("no loop devices here")
    try:
        device = RawImage(made.stdout.strip())
        assert device.size == 4 * MIB
        device.acquire()
        device.write(100, b"hello")
        device.discard(0, 4 * KIB)
        device.discard(5000, 100)
        device.invalidate()
        assert read(device, 0, 4 * KIB) == bytes(4 * KIB)
        assert read(device, 5000, 101) == bytes(100) + b"x"
        assert extents(device)
        device.close()
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
