"""Damages streams in every way it can think of, and loads them, in a process of its own with little memory.

Run as `python mutating.py FIRST STOP`: a mutation for each seed from FIRST up to STOP. What comes of each must be a
machine or one error of ours; anything else is printed with its seed, and the exit status says whether there was any.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import random
import resource
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

from streams import FOOTED, PROOF, SHAPES, random_stream

from whimbrel import Settings
from whimbrel.capture.taking import Capture, CaptureUndecided
from whimbrel.errors import WhimbrelError
from whimbrel.plugins import PluginManager
from whimbrel.testing.memory import ReplayChannel

MAX_RAM = 1 << 20
ROOM = 192 << 20  # bytes that a load may take beside what the process has when it begins
SECONDS = 60.0  # a load takes milliseconds; only a hang takes so long

NUMBERS = [
    *(0, 1, 2, 3, 4, 5, 6, 7, 8, 0x10, 0x7E, 0x7F, 0x80, 0xFF, 0x100, 0xFFF, 0x1000, 0x1001, 4095, 4097, 0xFFFF),
    *(0x10000, MAX_RAM, MAX_RAM + 1, MAX_RAM + 4096, (16 << 20) - 1, 16 << 20, (16 << 20) + 1, 64 << 20),
    *(2**31 - 1, 2**31, 2**32 - 4096, 2**32 - 1, 2**32, 2**52, 2**56, 2**63 - 1, 2**63, 2**64 - 4096, 2**64 - 1),
]


class Pieces(ReplayChannel):
    """Gives the stream in pieces of random sizes."""

    def __init__(self, data, dice, *, duplex, broken):
        super().__init__(data, duplex=duplex, broken=broken)
        self._dice, self._most = dice, dice.choice([1, *[300, 5000] * 4, *[1 << 20] * 8])

    def recv_into(self, buffer):
        return super().recv_into(memoryview(buffer)[: self._dice.randint(1, self._most)])


def flip(dice, data):
    for _ in range(dice.choice([1, 1, 1, 2, 8])):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def overwrite(dice, data):
    at = dice.randrange(len(data))
    data[at : at + 1] = dice.choice([dice.randbytes(1), b"\0", b"\xff", b"\x7e", b"\x04", b"\x08", b"\x06"])


def insert(dice, data):
    at = dice.randrange(len(data) + 1)
    data[at:at] = dice.choice([dice.randbytes(dice.choice([1, 2, 4, 9, 4096])), bytes(dice.choice([1, 4, 8, 5000]))])


def remove(dice, data):
    at = dice.randrange(len(data))
    del data[at : at + dice.choice([1, 2, 4, 8, 9, 17, 100, 4096, 4104])]


def repeat(dice, data):
    at = dice.randrange(len(data))
    span = data[at : at + dice.choice([1, 5, 9, 30, 200, 4104, len(data)])]
    data[at:at] = span * dice.choice([1, 1, 2, 5])


def number(dice, data):
    size = dice.choice([1, 2, 4, 8])
    at = dice.randrange(len(data))
    value = dice.choice(NUMBERS) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, dice.choice(["big", "big", "little"]))


def cut(dice, data):
    del data[dice.randrange(len(data)) :]


FINE = ("machine", "stream", "incompatible", "lost", "undecided")

WAYS = [flip, flip, flip, overwrite, insert, remove, repeat, number, number, number, cut]


def make(dice):
    """A whole stream, and whether its source listens."""
    heard = dice.random() < 0.4
    script = random_stream(dice, dice.choice([*SHAPES, *FOOTED]), return_path=heard)
    if heard and script.shape.footers and dice.random() < 0.5:
        script.ping(PROOF)
    return script, heard


def mutate(dice, script):
    data = bytearray(script.finish())
    if dice.random() < 0.1:
        other = make(dice)[0].finish()
        data[dice.randrange(len(data)) :] = other[dice.randrange(len(other)) :]
    # What stands between the pages is what counts, and most bytes are in pages.
    for _ in range(dice.choice([1, 1, 1, 2, 3, 10])):
        way = dice.choice(WAYS)
        if not data:
            break
        if dice.random() < 0.7:
            begin = min(dice.choice(script.marks)[0], len(data) - 1)
            part = data[begin : begin + dice.choice([16, 64, 300])]
            way(dice, part)
            data[begin : begin + len(part)] = part
        else:
            way(dice, data)
    return bytes(data)


def look_into(machine):
    for device in machine.captured:
        if device.described is not None:
            with suppress(WhimbrelError):
                device.decode()


def load(seed, plugins):
    """What came of mutation `seed`: an error's code, "machine", or what is wrong."""
    dice = random.Random(seed)
    script, heard = make(dice)
    data = mutate(dice, script)
    channel = Pieces(data, dice, duplex=heard, broken=dice.random() < 0.1)
    capture = Capture(channel, settings=Settings(), plugins=plugins, max_ram=MAX_RAM)
    try:
        machine = capture.run()
    except CaptureUndecided as exc:
        exc.machine.close()
        return exc.code
    except WhimbrelError as exc:
        if exc.code not in FINE:
            return f"{exc!r}, because of {exc.__cause__!r}"
        if capture.machine is not None and capture.machine.run_state != "shutdown":
            return "a machine is left"
        return exc.code
    with machine:
        look_into(machine)
        if machine.ram.total > MAX_RAM:
            return "more RAM than may be"
    return "machine"


def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(first, stop):
    logging.disable(logging.CRITICAL)
    plugins = PluginManager()
    for seed in range(-20, 0):
        load(seed, plugins)  # what is imported late, and thread stacks
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + ROOM, resource.RLIM_INFINITY))
    came = Counter()
    for seed in range(first, stop):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            what = load(seed, plugins)
        except BaseException as exc:
            what = f"{type(exc).__name__}: {exc}"
        came[what if what in FINE else "wrong"] += 1
        if what not in FINE:
            print(f"seed {seed}: {what}")
    faulthandler.cancel_dump_traceback_later()
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(5)
    left = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    if left:
        print(f"threads are left behind: {left}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{stop - first} mutations, {peak} MiB at most: {json.dumps(came)}")
    return 1 if came["wrong"] or left else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
