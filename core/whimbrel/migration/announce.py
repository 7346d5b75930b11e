"""Lets a guest that has arrived tell its network, several times with growing pauses (QEMU's self-announce)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from whimbrel.abc import Guest
from whimbrel.settings import Parameters

_log = logging.getLogger("whimbrel")


def pauses(parameters: Parameters) -> Iterator[float]:
    """The pause before each round in seconds: none before the first, then initial, growing by step, at most max."""
    for number in range(parameters.announce_rounds):
        if number == 0:
            yield 0.0
        else:
            grown = parameters.announce_initial + (number - 1) * parameters.announce_step
            yield min(grown, parameters.announce_max) / 1000


class Announcer:
    """Calls `guest.announce()` once at each of `pauses`, on a thread of its own, until done or closed.

    `wait(seconds)` returns True to end early; it is the announcer's own flag unless a test injects one.
    """

    def __init__(self, guest: Guest, parameters: Parameters, *, wait: Callable[[float], bool] | None = None) -> None:
        self._guest, self._parameters = guest, parameters
        self._closed = threading.Event()
        self._wait = wait or self._closed.wait
        self._thread = threading.Thread(target=self._run, name="whimbrel-announce", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End, in the middle of a pause if need be."""
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        for pause in pauses(self._parameters):
            if self._wait(pause):
                return
            try:
                self._guest.announce()
            except Exception:  # noqa: BLE001 - the guest runs; that it cannot say so is no reason to harm it
                _log.exception("the guest failed to announce itself; it is not asked again")
                return
