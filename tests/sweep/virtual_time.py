"""Time that passes only when nothing else can happen.

Inside of `VirtualTime` all threads that are started, and the one that entered, take part. As long as one of them runs
or may run, no time-out of theirs ends. When all of them wait, the clock jumps to where the first time-out does. So a
black hole of two seconds costs no time at all, none of them ends too early because the machine is busy, and no test
sleeps.

What waits is `threading.Condition` and all that is made of it (events, queues), `Thread.join` and `Timer`. A lock is
not: whoever holds one is expected to let go of it by himself. Threads outside of it are left as they are.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

import attrs

from whimbrel.abc import Patience

_REAL_WAIT = threading.Condition.wait
_REAL_NOTIFY = threading.Condition.notify
_REAL_START = threading.Thread.start
_REAL_JOIN = threading.Thread.join
_REAL_TIMER = threading.Timer
_REAL_MONOTONIC = time.monotonic
_REAL_PATIENCE = Patience.__init__

HANG: Final = 120.0  # real seconds after which a wait says that nothing happens any more


@attrs.define(eq=False)
class _Wait:
    """Somebody who waits; `until` is when that ends by itself."""

    lock: Any
    until: float | None
    timed_out: bool = False


class _Timer:
    """`threading.Timer`, which has a thread only once its time has come."""

    def __init__(
        self,
        interval: float,
        function: Callable[..., object],
        args: Sequence[object] | None = None,
        kwargs: Mapping[str, object] | None = None,
    ) -> None:
        self.interval = interval
        self.name, self.daemon = "timer", False
        self.function = functools.partial(function, *(args or ()), **(kwargs or {}))
        self.until: float | None = None
        self.cancelled = False

    def start(self) -> None:
        clock = VirtualTime.current
        assert clock is not None, "a timer of a time that is over"
        clock.add_timer(self)

    def cancel(self) -> None:
        self.cancelled = True
        if (clock := VirtualTime.current) is not None:
            clock.drop_timer(self)

    def is_alive(self) -> bool:
        return self.until is not None and not self.cancelled

    def join(self, timeout: float | None = None) -> None:
        """It has no thread of its own."""


class VirtualTime:
    """A context manager; one at a time in a process. `jumps` counts how often the clock was set forward."""

    current: VirtualTime | None = None

    def __init__(self) -> None:
        self.jumps = 0
        self._lock = threading.Lock()
        self._offset = 0.0
        self._running = 0
        self._members: set[int] = set()  # thread idents
        self._ended: dict[threading.Thread, threading.Condition] = {}
        self._waits: dict[int, _Wait] = {}  # by the id of the lock that is waited for
        self._timers: set[_Timer] = set()

    # -------------------------------------------------------------------------------------------- going in and out

    def __enter__(self) -> Self:
        assert VirtualTime.current is None, "there is one time only"
        VirtualTime.current = self
        self._members.add(threading.get_ident())
        self._running = 1
        threading.Condition.wait = _wait  # type: ignore[method-assign]
        threading.Condition.notify = _notify  # type: ignore[method-assign]
        threading.Thread.start = _start  # type: ignore[method-assign]
        threading.Thread.join = _join  # type: ignore[method-assign]
        threading.Timer = _Timer  # type: ignore[assignment, misc]
        time.monotonic = threading._time = self.now  # type: ignore[attr-defined]
        Patience.__init__ = _patience  # type: ignore[method-assign]
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        threading.Condition.wait = _REAL_WAIT  # type: ignore[method-assign]
        threading.Condition.notify = _REAL_NOTIFY  # type: ignore[method-assign]
        threading.Thread.start = _REAL_START  # type: ignore[method-assign]
        threading.Thread.join = _REAL_JOIN  # type: ignore[method-assign]
        threading.Timer = _REAL_TIMER  # type: ignore[misc]
        time.monotonic = threading._time = _REAL_MONOTONIC  # type: ignore[attr-defined]
        Patience.__init__ = _REAL_PATIENCE  # type: ignore[method-assign]
        VirtualTime.current = None
        assert exc is not None or not self._ended, f"threads are left: {[each.name for each in self._ended]}"

    def now(self) -> float:
        """Seconds, in the time of those who take part; others have the real one."""
        return _REAL_MONOTONIC() + (self._offset if threading.get_ident() in self._members else 0.0)

    @property
    def pending(self) -> list[str]:
        """The timers that have not ended."""
        return [timer.name for timer in self._timers]

    # --------------------------------------------------------------------------------------------------- members

    def takes_part(self) -> bool:
        return threading.get_ident() in self._members

    def begins(self, thread: threading.Thread) -> None:
        with self._lock:
            self._running += 1
            self._ended[thread] = threading.Condition()

    def entered(self) -> None:
        self._members.add(threading.get_ident())

    def ends(self, thread: threading.Thread) -> None:
        with self._lock:
            ended = self._ended.pop(thread)
        with ended:
            ended.notify_all()
        with self._lock:
            self._members.discard(threading.get_ident())
            self._running -= 1
            start = self._jump_if_all_wait()
        self._start(start)

    def ended(self, thread: threading.Thread) -> threading.Condition | None:
        return self._ended.get(thread)

    def has(self, thread: threading.Thread) -> bool:
        return thread in self._ended

    # ---------------------------------------------------------------------------------------------------- waiting

    def waits(self, lock: Any, timeout: float | None) -> _Wait:
        wait = _Wait(lock, None if timeout is None else self.now() + timeout)
        with self._lock:
            self._waits[id(lock)] = wait
            self._running -= 1
            start = self._jump_if_all_wait()
        self._start(start)
        return wait

    def woken(self, lock: Any) -> None:
        """Somebody who waits for `lock` is about to be woken by another; the condition's own lock is held."""
        if id(lock) not in self._waits:
            return
        with self._lock:
            if self._waits.pop(id(lock), None) is not None:
                self._running += 1

    def add_timer(self, timer: _Timer) -> None:
        with self._lock:
            timer.until = self.now() + timer.interval
            if not timer.cancelled:
                self._timers.add(timer)

    def drop_timer(self, timer: _Timer) -> None:
        with self._lock:
            self._timers.discard(timer)

    def _jump_if_all_wait(self) -> threading.Thread | None:
        """If nothing else can happen, end the first time-out; returns the thread to start for it, if it needs one."""
        if self._running:
            return None
        waits = [wait for wait in self._waits.values() if wait.until is not None]
        due: list[_Wait | _Timer] = [*waits, *self._timers]
        if not due:
            return None  # who waits for a thread from outside may still be woken
        first = min(due, key=lambda each: each.until or 0.0)
        assert first.until is not None
        self._offset += max(0.0, first.until - (_REAL_MONOTONIC() + self._offset)) + 1e-6
        self.jumps += 1
        self._running += 1
        if isinstance(first, _Wait):
            del self._waits[id(first.lock)]
            first.timed_out = True
            first.lock.release()
            return None
        self._timers.discard(first)
        thread = threading.Thread(target=first.function, name=first.name, daemon=True)
        self._ended[thread] = threading.Condition()
        return thread

    def _start(self, thread: threading.Thread | None) -> None:
        if thread is not None:
            start_within(self, thread)


def start_within(clock: VirtualTime, thread: threading.Thread) -> None:
    """Start a thread that was counted already."""
    run = thread.run

    def taking_part() -> None:
        clock.entered()
        try:
            run()
        finally:
            clock.ends(thread)

    thread.run = taking_part  # type: ignore[method-assign]
    # `start` waits for the thread to have begun, over which no time passes.
    _inside.real = True
    try:
        _REAL_START(thread)
    finally:
        _inside.real = False


_inside = threading.local()


def _taking_part() -> VirtualTime | None:
    clock = VirtualTime.current
    if clock is None or getattr(_inside, "real", False) or not clock.takes_part():
        return None
    return clock


def _start(self: threading.Thread) -> None:
    clock = _taking_part()
    if clock is None:
        _REAL_START(self)
        return
    clock.begins(self)
    start_within(clock, self)


def _join(self: threading.Thread, timeout: float | None = None) -> None:
    clock = _taking_part()
    ended = None if clock is None else clock.ended(self)
    if clock is not None and ended is not None:
        with ended:
            if not ended.wait_for(lambda: not clock.has(self), timeout):
                return
        timeout = None
    _REAL_JOIN(self, timeout)


def _wait(self: threading.Condition, timeout: float | None = None) -> bool:
    clock = _taking_part()
    if clock is None:
        return _REAL_WAIT(self, timeout)
    if not self._is_owned():  # type: ignore[attr-defined]
        raise RuntimeError("cannot wait on un-acquired lock")
    lock: Any = threading.Lock()
    lock.acquire()
    waiters: Any = self._waiters  # type: ignore[attr-defined]
    waiters.append(lock)
    if timeout is not None and timeout <= 0:
        saved = self._release_save()  # type: ignore[attr-defined]
        woken = lock.acquire(blocking=False)
    else:
        wait = clock.waits(lock, timeout)  # before the condition is let go of: nobody may wake us uncounted
        saved = self._release_save()  # type: ignore[attr-defined]
        if not lock.acquire(timeout=HANG):
            raise AssertionError(f"nothing happens any more: {threading.enumerate()}")
        woken = not wait.timed_out
    self._acquire_restore(saved)  # type: ignore[attr-defined]
    if not woken and lock in waiters:
        waiters.remove(lock)
    return woken


def _notify(self: threading.Condition, n: int = 1) -> None:
    clock = VirtualTime.current
    if clock is not None:
        for lock in list(self._waiters)[:n]:  # type: ignore[attr-defined]
            clock.woken(lock)
    _REAL_NOTIFY(self, n)


def _patience(self: Patience, *args: Any, **kwargs: Any) -> None:
    """It has taken the clock for its start from where it was when the class was made."""
    _REAL_PATIENCE(self, *args, **kwargs)
    self._started = time.monotonic()
