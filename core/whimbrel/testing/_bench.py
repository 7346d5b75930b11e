"""What the transport suite works with: calls that cannot hang a test, and a look at what they leave behind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

import attrs

from whimbrel.abc import Channel, Listener, Patience, Transport

__all__ = ["Bench", "Task", "address_of", "nothing_left", "raises"]

P = ParamSpec("P")
T = TypeVar("T")


class Task(threading.Thread, Generic[T]):
    """A call on a thread of its own, so that one that blocks for ever is a failure and no hang."""

    def __init__(self, call: Callable[[], T], what: str, timeout: float) -> None:
        super().__init__(name=f"whimbrel-test-{what}", daemon=True)
        self._call, self._what, self._timeout = call, what, timeout
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Make the call and keep what came of it."""
        try:
            self._results.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            self._error = error

    def result(self) -> T:
        """What the call returned, or raise what it raised; AssertionError if it does not end in time."""
        self.join(self._timeout)
        if self.is_alive():
            raise AssertionError(f"{self._what} still blocks after {self._timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._results[0]

    def wait_until_blocked(self) -> None:
        """Return when the call seems to wait for something, or has ended.

        It may be mistaken, so whatever a test concludes must hold either way; this makes the interesting case likely.
        """
        asleep = 0
        while self.is_alive() and asleep < 3:
            asleep = asleep + 1 if self._sleeps() else 0
            self.join(0.005)

    def _sleeps(self) -> bool:
        try:
            status = Path(f"/proc/self/task/{self.native_id}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] == "S"


@attrs.define(eq=False)
class Bench:
    """A transport on trial: makes listeners, channels and tasks for one check and puts them away after it."""

    transport: Transport
    address: str
    timeout: float = 20.0
    prompt: float = 2.0
    bad_addresses: tuple[str, ...] = ("",)
    several_peers: bool = True
    duplex: bool = True
    _made: list[Listener | Channel] = attrs.field(factory=list, init=False)
    _tasks: list[threading.Thread] = attrs.field(factory=list, init=False)

    def patience(self, seconds: float | None = None) -> Patience:
        """As long as a check may take, or `seconds`."""
        return Patience(self.timeout if seconds is None else seconds)

    def start(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Task[T]:
        """Make a call on a thread of its own."""
        task = Task(lambda: call(*args, **kwargs), getattr(call, "__qualname__", repr(call)), self.timeout)
        self._tasks.append(task)
        return task

    def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call that could block, and wait for what it returns."""
        return self.start(call, *args, **kwargs).result()

    def listen(self, address: str | None = None) -> Listener:
        """A listener at the check's address, or another."""
        listener = self.run(self.transport.listen, self.address if address is None else address)
        self._made.append(listener)
        return listener

    def connect(self, listener: Listener) -> tuple[Channel, Channel]:
        """Both ends of a new connection: the one that connected, the one that was accepted."""
        accepting = self.start(listener.accept, self.patience())
        near = self.run(self.transport.connect, address_of(listener), self.patience())
        self._made.append(near)
        far = accepting.result()
        self._made.append(far)
        return near, far

    def pair(self) -> tuple[Channel, Channel]:
        """Both ends of a connection over a listener of its own."""
        return self.connect(self.listen())

    def directions(self, near: Channel, far: Channel) -> list[tuple[Channel, Channel]]:
        """Who can send to whom."""
        return [(near, far), (far, near)] if self.duplex else [(near, far)]

    def close_promptly(self, closing: Channel | Listener) -> None:
        """Close something on a thread of its own, which must not take long."""
        started = time.monotonic()
        self.run(closing.close)
        taken = time.monotonic() - started
        if taken > self.prompt:
            raise AssertionError(f"close took {taken:.2f} s")

    def close(self) -> None:
        """Close all that was made, which must also end every call that still blocks."""
        while self._made:
            self.run(self._made.pop().close)
        for task in self._tasks:
            task.join(self.timeout)
            if task.is_alive():
                raise AssertionError(f"{task.name} still blocks although everything is closed")


def address_of(listener: Listener) -> str:
    """What to connect to: the listener's URI without its scheme."""
    scheme, _, address = listener.uri.partition(":")
    if not scheme or not address:
        raise AssertionError(f"the listener's uri is {listener.uri!r}; expected SCHEME:ADDRESS")
    return address


@contextmanager
def raises(expected: type[BaseException]) -> Iterator[None]:
    """AssertionError unless `expected` is raised inside; other exceptions pass through."""
    try:
        yield
    except expected:
        return
    raise AssertionError(f"nothing was raised; expected {expected.__name__}")


@contextmanager
def nothing_left(timeout: float) -> Iterator[None]:
    """AssertionError if there are descriptors or threads afterwards that were not there before."""
    files, threads = _descriptors(), set(threading.enumerate())
    yield
    deadline = time.monotonic() + timeout
    while left := _left(files, threads):
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind: {', '.join(left)}")
        gc.collect()
        threading.Event().wait(0.01)


def _descriptors() -> dict[str, str]:
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists
            found[path.name] = str(path.readlink())
    return found


def _left(files: dict[str, str], threads: set[threading.Thread]) -> list[str]:
    left = [f"descriptor {number} of {what}" for number, what in _descriptors().items() if files.get(number) != what]
    return left + [f"thread {thread.name}" for thread in set(threading.enumerate()) - threads]
