"""Guests: what runs in a machine (`whimbrel.abc.Guest` is the contract).

A guest stops at *safe points*, between two steps: `stop` returns when no step is running, and then nothing of the
guest touches the machine until `start`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from whimbrel.abc import Guest
from whimbrel.errors import StateError


class IdleGuest(Guest):
    """A guest that does nothing: for machines whose state is changed by the program around them."""

    def power_on(self) -> None:
        """Nothing to fill."""

    def start(self) -> None:
        """Nothing to run."""

    def stop(self) -> None:
        """Nothing to stop."""


class LoopGuest(Guest):
    """Calls `step()` again and again on a thread of its own while the machine runs.

    `power_on()` fills a fresh machine. `announce()` is called after an arrival. Between two steps is a safe point; a
    step should take milliseconds, since `stop` waits for its end, and the blackout contains that wait. A step that
    raises ends the guest: `failure` has the exception, `on_failure` is called with it on the guest's thread.
    """

    def __init__(
        self,
        step: Callable[[], object],
        *,
        power_on: Callable[[], object] | None = None,
        announce: Callable[[], object] | None = None,
    ) -> None:
        self._step, self._power_on, self._announce = step, power_on, announce
        self._changed = threading.Condition()
        self._wanted = False  # the machine runs
        self._parked = True  # no step is running
        self._closing = False
        self._throttle = 0
        self._took = 0.0  # seconds of the last step
        self._thread: threading.Thread | None = None
        self.steps = 0

    def power_on(self) -> None:
        """Fill the machine."""
        if self._power_on is not None:
            self._power_on()

    def announce(self) -> None:
        """Tell the network, if there is something to tell."""
        if self._announce is not None:
            self._announce()

    def start(self) -> None:
        """Run steps from now on."""
        with self._changed:
            if self.failure is not None:
                raise StateError(f"the guest failed and cannot be started again: {self.failure!r}")
            self._wanted = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="whimbrel-guest", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stop(self) -> None:
        """Return when no step is running and none will. Raises StateError from inside a step."""
        if threading.current_thread() is self._thread:
            raise StateError("a step cannot stop its own machine: it would wait for itself")
        with self._changed:
            self._wanted = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._parked)

    def throttle(self, percent: int) -> None:
        """After each step rest so long that the guest gets at most 100 - `percent` per cent of the time."""
        with self._changed:
            self._throttle = min(max(percent, 0), 99)
            self._changed.notify_all()

    def stopping_time(self) -> float:
        """As long as the last step took: `stop` waits for the end of one."""
        return self._took

    def close(self) -> None:
        """End the thread; the guest must be stopped."""
        with self._changed:
            self._closing = True
            self._wanted = False
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        while self._wait_until_wanted():
            began = time.perf_counter()
            try:
                self._step()
            except BaseException as exc:  # noqa: BLE001 - whatever the guest's own code raises, the machine must know
                self._fail(exc)
                return
            self.steps += 1
            self._took = time.perf_counter() - began
            if self._throttle:
                self._rest(self._took)

    def _wait_until_wanted(self) -> bool:
        # The common case costs no lock: a plain read, made safe by `stop` waiting for `_parked`.
        if self._wanted and not self._parked:
            return True
        with self._changed:
            self._parked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._wanted or self._closing)
            self._parked = self._closing
            return not self._closing

    def _rest(self, worked: float) -> None:
        with self._changed:
            share = self._throttle
            self._changed.wait_for(
                lambda: not self._wanted or self._throttle != share, timeout=worked * share / (100 - share)
            )

    def _fail(self, exc: BaseException) -> None:
        with self._changed:
            self.failure = exc
            self._wanted = False
            self._parked = True
            self._changed.notify_all()
        if self.on_failure is not None:
            self.on_failure(exc)
