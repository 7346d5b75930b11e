"""Delivers events to notifiers: in order, on a thread of their own, and never inside the downtime window.

The thread exists only while there is something to deliver, so an idle machine owns none. A notifier that raises is
logged, muted from then on and listed in `failures`; a slow one delays the next notice and nothing else.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from whimbrel.events import Event

Notifier: TypeAlias = Callable[[Event], object]

_log = logging.getLogger("whimbrel")


class Notices:
    """The notifiers of one machine. All methods from any thread."""

    def __init__(self) -> None:
        self._notifiers: list[Notifier] = []
        self._queue: deque[Event] = deque()
        self._changed = threading.Condition()
        self._held = 0
        self._delivering = False
        self._thread: threading.Thread | None = None
        self.failures: list[str] = []

    def add(self, notifier: Notifier) -> None:
        """Tell `notifier` every event from now on. Adding it twice tells it once."""
        with self._changed:
            if notifier not in self._notifiers:
                self._notifiers.append(notifier)

    def remove(self, notifier: Notifier) -> None:
        """Tell `notifier` nothing more; one that is not there is fine."""
        with self._changed:
            if notifier in self._notifiers:
                self._notifiers.remove(notifier)

    def emit(self, event: Event) -> None:
        """Queue `event` for delivery and return at once."""
        with self._changed:
            if not self._notifiers:
                return
            self._queue.append(event)
            self._deliver_if_possible()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Deliver nothing inside this context; what was emitted follows at its end, in order."""
        with self._changed:
            self._held += 1
            self._changed.wait_for(lambda: not self._delivering, timeout=0.05)
        try:
            yield
        finally:
            with self._changed:
                self._held -= 1
                self._deliver_if_possible()

    def drain(self, timeout: float) -> bool:
        """Wait until everything emitted so far was delivered; False if that takes longer than `timeout` seconds."""
        if threading.current_thread() is self._thread:
            return False
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._thread is None, timeout)

    def _deliver_if_possible(self) -> None:
        if self._queue and not self._held and self._thread is None:
            self._thread = threading.Thread(target=self._deliver, name="whimbrel-notices", daemon=True)
            self._thread.start()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._delivering = False
                if not self._queue or self._held:
                    self._thread = None
                    self._changed.notify_all()
                    return
                event = self._queue.popleft()
                notifiers = list(self._notifiers)
                self._delivering = True
            for notifier in notifiers:
                self._tell(notifier, event)

    def _tell(self, notifier: Notifier, event: Event) -> None:
        try:
            notifier(event)
        except BaseException as exc:  # noqa: BLE001 - a notifier of anybody's must not harm the machine, nor end this thread
            name = getattr(notifier, "__qualname__", repr(notifier))
            _log.exception("notifier %s failed at %s and is told no more", name, type(event).__name__)
            self.failures.append(f"{name}: {exc}")
            self.remove(notifier)
