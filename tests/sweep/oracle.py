"""What judges: a file that is locked by whoever runs, and a line in another for each step that somebody has made.

Both are the kernel's and nothing of whimbrel's. Who runs holds the lock from start to stop, so a second one meets it.
Each line is (host, epoch, n): n is kept in the memory of the machine and grows by one with each step, the epoch with
each start. A machine that was started from an old image, or twice, repeats one of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from whimbrel.abc import Guest
from whimbrel.machine import BareMachine

PAGE = 4096
COUNTERS = 3 * PAGE
"""Where epoch and n are, in the first block."""


class Oracle:
    """Sees who runs. Its folder is new."""

    def __init__(self, folder: Path) -> None:
        self.lock_path, self._ledger_path = folder / "lock", folder / "ledger"
        self.lock_path.touch()
        self._ledger = os.open(self._ledger_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._read = 0
        self._last = (0, 0)
        self._frozen: bytes | None = None
        self._held = 0
        self.wrong: list[tuple[str, str]] = []  # ("both", "travel" or "torn", how)

    # ----------------------------------------------------------------------------------------- what guests call

    def enter(self, host: int) -> int:
        """Take the lock for `host`, and hold it by the descriptor that is returned."""
        lock = os.open(self.lock_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.wrong.append(("both", f"host {host} was started while another ran"))
        return lock

    def leave(self, lock: int, image: bytes) -> None:
        """Let go of the lock; the machine stands still as `image`."""
        self._frozen = image
        os.close(lock)

    def resumed(self, host: int, image: bytes) -> None:
        """`host` is about to run from `image`."""
        if self._frozen is not None and image != self._frozen:
            self.wrong.append(("torn", f"host {host} runs from another image than was frozen last"))

    def append(self, host: int, epoch: int, n: int) -> None:
        """Write down a step."""
        os.write(self._ledger, b"%d %d %d\n" % (host, epoch, n))

    # ------------------------------------------------------------------------------------------ what the sweep asks

    def running(self) -> bool:
        """Whether somebody holds the lock."""
        lock = os.open(self.lock_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def entries(self) -> list[tuple[int, int, int]]:
        """The lines since the last call; what is wrong with them is added to `wrong`."""
        data = os.pread(self._ledger, 1 << 20, self._read)
        self._read += len(data)
        entries = []
        for line in data.splitlines():
            host, epoch, n = map(int, line.split())
            last_epoch, last_n = self._last
            if n != last_n + 1 or epoch not in (last_epoch, last_epoch + 1):
                self.wrong.append(("travel", f"host {host} wrote ({epoch}, {n}) behind {self._last}"))
            self._last = (epoch, n)
            entries.append((host, epoch, n))
        return entries

    def take_wrong(self) -> list[tuple[str, str]]:
        """What is wrong since the last call."""
        wrong, self.wrong = self.wrong, []
        return wrong

    def close(self) -> None:
        """Let go of the files."""
        os.close(self._ledger)


class TinyGuest(Guest):
    """Runs as long as it holds the oracle's lock. It makes a step when it is started, and when it is told to `step`."""

    def __init__(self, oracle: Oracle, host: int, machine: BareMachine) -> None:
        self.host = host
        self.runs = False
        self._oracle, self._machine = oracle, machine
        self._block = machine.ram["tiny"]
        self._lock = -1

    @property
    def _counters(self) -> npt.NDArray[np.uint64]:
        # No view is kept: it would keep the memory of a machine that is closed.
        return self._block.view[COUNTERS : COUNTERS + 16].view(np.uint64)

    def power_on(self) -> None:
        """Every page has something in it but one."""
        pages = self._block.view.reshape(-1, PAGE)
        pages[:-1] = np.random.default_rng(7).integers(0, 256, pages[:-1].shape, np.uint8)
        self._counters[:] = 0

    def start(self) -> None:
        """Take the lock and make a step."""
        self._lock = self._oracle.enter(self.host)
        self.runs = True
        self._oracle.resumed(self.host, self.image())
        counters = self._counters
        counters[0] += np.uint64(1)
        self.step()

    def stop(self) -> None:
        """Let go of the lock."""
        self.runs = False
        self._oracle.leave(self._lock, self.image())
        self._lock = -1

    def step(self) -> None:
        """Make a step, which a page and a device know of."""
        counters = self._counters
        counters[1] += np.uint64(1)
        self._block.mark_dirty(COUNTERS, 16)
        self._machine.dial.turned += 1  # type: ignore[attr-defined]
        self._oracle.append(self.host, int(counters[0]), int(counters[1]))

    def image(self) -> bytes:
        """What the machine is now: memory and devices."""
        machine = self._machine
        seen = hashlib.blake2b(self._block.view.data, digest_size=16)
        seen.update(repr((machine.dial.turned, machine.lamp.colours)).encode())  # type: ignore[attr-defined]
        return seen.digest()
