"""Images, machines with a drive, and processes that hold locks."""

import subprocess
import sys

import pytest

from whimbrel import LoopGuest, Machine
from whimbrel.machine import RawImage

HOLDER = """
import sys
from whimbrel.machine import RawImage
image = RawImage(sys.argv[1])
image.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def image(tmp_path):
    """`image(size, data=b"")`: the path of a sparse file that begins with `data`."""
    made = []

    def make(size, data=b"", name=None):
        path = tmp_path / (name or f"{len(made)}.img")
        path.write_bytes(data)
        with path.open("r+b") as file:
            file.truncate(size)
        made.append(path)
        return path

    return make


@pytest.fixture
def raw(image):
    """`raw(size, data=b"")`: a RawImage that holds its lock, closed after the test."""
    made = []

    def make(size, data=b"", *, acquired=True, **more):
        device = RawImage(image(size, data), **more)
        made.append(device)
        if acquired:
            device.acquire()
        return device

    yield make
    for device in made:
        device.close()


@pytest.fixture
def machine():
    """`machine(**drives)`: a machine with drives of those names and paths and a guest that does nothing."""
    made = []

    def make(**drives):
        one = Machine("driven")
        made.append(one)
        one.guest = LoopGuest(lambda: 0.01)
        for name, path in drives.items():
            one.drives.add(name, path)
        return one

    yield make
    for one in made:
        one.close()


@pytest.fixture
def held():
    """`held(path)`: another process that holds the lock of an image; close its stdin, and it lets go."""
    running = []

    def hold(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in running:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()
