"""Workloads for the tests of `ProcessGuest`; run in its child."""

from __future__ import annotations

import os
import signal
import threading
import time

from whimbrel.abc import Guest
from whimbrel.errors import StateError
from whimbrel.machine import LoopGuest


def counting(memory, block="words", by=1):
    words = memory.array(block, 8, "uint64")

    def step():
        words[0] += by

    return LoopGuest(step)


def busy(memory):
    """Steps of a fifth of a second in pure Python."""
    words = memory.array("words", 8, "uint64")

    def step():
        words[0] = 1
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            pass
        words[1] += 1

    return LoopGuest(step)


def refusing(memory):
    raise LookupError("there is nothing to work on")


def nothing(memory):
    return memory


def unpowered(memory):
    def power_on():
        raise OSError("no power")

    return LoopGuest(lambda: None, power_on=power_on)


class Unstoppable(Guest):
    """Its stop raises, and it goes on."""

    def __init__(self, words):
        self.words = words
        self.thread = threading.Thread(target=self.run, daemon=True)

    def power_on(self):
        pass

    def start(self):
        self.thread.start()

    def run(self):
        while True:
            self.words[0] += 1

    def stop(self):
        raise RuntimeError("I do not stop")


def unstoppable(memory):
    return Unstoppable(memory.array("words", 8, "uint64"))


class Deaf(LoopGuest):
    """Never comes to an end when it is closed, nor when it is terminated."""

    def close(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)


def deaf(memory):
    return Deaf(lambda: time.sleep(0.001))


def exiting(memory):
    """Exits when it is told to by word 7."""
    words = memory.array("words", 8, "uint64")

    def step():
        if words[7]:
            os._exit(7)

    return LoopGuest(step)


def keeping(memory):
    """Writes to its drive all the time, on a thread that no safe point stops too."""
    words, drive = memory.array("words", 8, "uint64"), memory.drives["disk0"]

    def aside():
        while True:
            try:
                drive.write(4096, int(words[1]).to_bytes(8, "big"))
                words[1] += 1
            except StateError:  # the machine stands still
                words[2] += 1
                time.sleep(0.0005)

    threading.Thread(target=aside, daemon=True).start()

    def step():
        drive.write(0, int(words[0]).to_bytes(8, "big"))
        words[0] += 1

    return LoopGuest(step)


def telling(memory):
    """Writes down what it sees of its surroundings."""
    words = memory.array("words", 8, "uint64")
    words[:5] = (len(memory), memory.size("words"), "words" in memory, list(memory) == ["words", "more"], os.getppid())
    words[5] = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return LoopGuest(lambda: time.sleep(0.001))
