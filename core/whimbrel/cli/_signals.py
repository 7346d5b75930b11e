"""Signals as events: SIGINT, SIGTERM and SIGHUP are handed to a function, on a thread.

A handler in Python only runs when the main thread gets to it, and a signal that comes just before that thread blocks is
not heard until something else wakes it. The byte that the interpreter writes for each signal is there at once.

SIGHUP says that the terminal is gone. It comes more than once then, from the system and from the shell, so it is never
taken for somebody's impatience; a process that was started to outlive its terminal (nohup) does not hear of it.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Calls `heard` with the first signal; the second ends the process at once. Entered by the main thread."""

    def __init__(self, heard: Callable[[signal.Signals], object]) -> None:
        self._heard = heard
        self._near, self._far = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="whimbrel-signals", daemon=True)
        self._before: dict[signal.Signals, Any] = {}
        self._fd_before = -1

    def __enter__(self) -> Self:
        self._far.setblocking(False)
        self._thread.start()
        self._fd_before = signal.set_wakeup_fd(self._far.fileno(), warn_on_full_buffer=False)
        heeded = [number for number in SIGNALS if number is not signal.SIGHUP or not _outlives()]
        self._before = {number: signal.signal(number, _pass) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._far.close()
        self._thread.join()
        self._near.close()

    def _listen(self) -> None:
        heard = False
        while byte := self._near.recv(1):
            if byte[0] not in SIGNALS:
                continue  # one that the program in the machine handles
            if heard and byte[0] == signal.SIGHUP:
                continue
            if heard:
                os._exit(128 + byte[0])
            heard = True
            self._heard(signal.Signals(byte[0]))


def _outlives() -> bool:
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def _pass(*_: object) -> None:
    """Handle a signal: by its byte alone."""
