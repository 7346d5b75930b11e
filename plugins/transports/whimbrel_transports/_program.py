"""A program that runs in a process group of its own, and what it leaves behind: a status and its last words.

The rules it lives by:

* **Its leader is not reaped before its group is gone.** Until then the group's number is ours, and no signal can reach
  a stranger who got it.
* **What it says on standard error is read whenever somebody waits for it**, and only its end is kept: it can neither
  fill our memory nor be held up for long by nobody listening.
* What it starts that leaves the group (a daemon) is its own business.
"""

from __future__ import annotations

import logging
import os
import select
import shlex
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from whimbrel_transports._sockets import SLICE

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Program"]

GRACE: Final = 0.5  # seconds that a group has to end by itself when it is told to
KILLING: Final = 2.0  # seconds that a group that was killed may take to be gone
LONGEST_TAIL: Final = 4096  # bytes kept of what it says
LAST_LINES: Final = 3  # of them in an error
LONGEST_WORDS: Final = 500  # characters of those, and of a command

_log = logging.getLogger("whimbrel.transports.exec")


class Program:
    """Starts `words` with the descriptors `stdin` and `stdout`, which stay the caller's. Raises OSError.

    One thread at a time, but for `end`, which comes last.
    """

    def __init__(self, words: Sequence[str], *, stdin: int, stdout: int) -> None:
        name = shlex.join(words)
        self.name = name if len(name) <= LONGEST_WORDS else f"{name[:LONGEST_WORDS]}…"
        self._tail = bytearray()
        self._status: int | None = None
        self._stderr, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.set_blocking(theirs, True)
            self._process = subprocess.Popen(
                words, stdin=stdin, stdout=stdout, stderr=theirs, close_fds=True, start_new_session=True
            )
        except BaseException:
            os.close(self._stderr)
            raise
        finally:
            os.close(theirs)
        self._group = self._process.pid
        self._handle = -1
        try:
            self._handle = os.pidfd_open(self._process.pid)
        except BaseException:
            self.end()
            raise

    def wait(self, seconds: float, descriptor: int | None = None, events: int = 0) -> None:
        """Wait until `descriptor` is ready for `events`, the program says something or ends, or the time is up."""
        poller = select.poll()
        if descriptor is not None:
            poller.register(descriptor, events)
        if self._stderr >= 0:
            poller.register(self._stderr, select.POLLIN)
        if self._status is None and self._handle >= 0:
            poller.register(self._handle, select.POLLIN)
        ready = {number for number, _ in poller.poll(seconds * 1000)}
        if self._stderr in ready:
            self._listen()
        if self._handle in ready:
            self._ask()

    @property
    def status(self) -> int | None:
        """How it ended, as far as was noticed: its exit status, or the negative number of a signal."""
        return self._status

    def describe(self, *, early: bool = True) -> str:
        """Say how it ended, `early` or not, and what it said last."""
        if self._stderr >= 0:
            self._listen()
        words = _last_words(bytes(self._tail))
        said = f"; it said: {words}" if words else ""
        too_early = " before it had taken everything" if early and self._status == 0 else ""
        return f"the command `{self.name}` {_ending(self._status)}{too_early}{said}"

    def end(self) -> None:
        """End every process of the group, with force if a word does not do, and forget it. Must not raise."""
        for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, KILLING)):
            if not self._alive():
                break
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, number)
                os.killpg(self._group, signal.SIGCONT)  # one that is stopped would not hear of it
            self._wait_gone(time.monotonic() + seconds)
        for descriptor in (self._handle, self._stderr):
            if descriptor >= 0:
                os.close(descriptor)
        self._handle = self._stderr = -1
        if self._alive():
            # It may not be signalled (it became another user's), or the kernel does not let go of it.
            _log.warning(
                "the command `%s` (process %d) does not end, or left one that does not", self.name, self._group
            )
        if self._gone():
            self._process.wait()
        else:
            threading.Thread(target=self._process.wait, name="whimbrel-reaper", daemon=True).start()

    # ---------------------------------------------------------------------------------------- internals

    def _listen(self) -> None:
        while True:
            try:
                data = os.read(self._stderr, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                os.close(self._stderr)
                self._stderr = -1
                return
            self._tail += data
            del self._tail[:-LONGEST_TAIL]

    def _ask(self) -> None:
        """Learn how the leader ended, and leave it to be reaped."""
        try:
            found = os.waitid(os.P_PID, self._group, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:  # somebody else in this process reaps whatever child there is
            self._status = _UNKNOWN
            return
        if found is not None:
            self._status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def _gone(self) -> bool:
        """Whether the leader has ended."""
        if self._status is None:
            self._ask()
        return self._status is not None

    def _alive(self) -> bool:
        return not self._gone() or bool(_members(self._group))

    def _wait_gone(self, deadline: float) -> None:
        while (left := deadline - time.monotonic()) > 0 and not self._gone():
            self.wait(min(left, SLICE))
        pause = threading.Event()
        while time.monotonic() < deadline and self._alive():
            pause.wait(0.005)


_UNKNOWN: Final = 1 << 16  # no exit status is so large


def _ending(status: int | None) -> str:
    if status is None:
        return "runs on, but takes no more"
    if status == _UNKNOWN:
        return "has ended, and another part of this process has taken its exit status"
    if status < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
        return f"was killed by signal {-status}"
    return f"ended with status {status}"


def _members(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with suppress(OSError):  # gone meanwhile
            state, _, its_group = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:3]
            if int(its_group) == group and state not in (b"Z", b"X"):
                found.append(int(entry.name))
    return found


def _last_words(tail: bytes) -> str:
    text = "".join(letter if letter.isprintable() else "\n" for letter in tail.decode(errors="replace"))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    words = " / ".join(lines[-LAST_LINES:])
    return words if len(words) <= LONGEST_WORDS else f"…{words[-LONGEST_WORDS:]}"
