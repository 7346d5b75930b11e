"""What the transport suite works with: calls that cannot hang a test, and a look at what they leave behind."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

import attrs

from whimbrel.abc import Channel, Listener, Patience, Transport
from whimbrel.errors import ConnectError
from whimbrel.testing._bytes import receive

__all__ = ["Bench", "Task", "address_of", "nothing_left", "raises"]

P = ParamSpec("P")
T = TypeVar("T")

_KNOCK = b"knock"  # what an end that nobody connects to is woken with


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
    ends: Callable[[], tuple[str, str]] | None = None
    """Makes two fresh addresses that lead to one another, where a connect and a listener do not meet at one."""
    close_abandons: bool = False
    nobody: str = ""
    _near: dict[Listener, str] = attrs.field(factory=dict, init=False)
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
        near = None
        if address is None:
            near, address = (None, self.address) if self.ends is None else self.ends()
        listener = self.run(self.transport.listen, address)
        self._made.append(listener)
        if near is not None:
            self._near[listener] = near
        return listener

    def address_to(self, listener: Listener) -> str:
        """What leads to a listener: its own address, or that of the other end, which is to be used once."""
        return address_of(listener) if self.ends is None else self._near.pop(listener)

    def connect(self, listener: Listener) -> tuple[Channel, Channel]:
        """Both ends of a new connection: the one that connected, the one that was accepted."""
        accepting = self.start(listener.accept, self.patience())
        near = self.run(self.transport.connect, self.address_to(listener), self.patience())
        self._made.append(near)
        if self.ends is not None:
            near.send(_KNOCK)
        far = accepting.result()
        self._made.append(far)
        if self.ends is not None:
            knocked = self.run(receive, far, len(_KNOCK))
            if knocked != _KNOCK:
                raise AssertionError(f"{knocked!r} arrived, {_KNOCK!r} was sent")
        return near, far

    def open(self, call: Callable[P, Channel], *args: P.args, **kwargs: P.kwargs) -> Channel:
        """Make a channel by a call that could block."""
        channel = self.run(call, *args, **kwargs)
        self._made.append(channel)
        return channel

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
        for near in self._near.values():  # an address may be a thing of its own, such as a descriptor
            with suppress(ConnectError):
                self.open(self.transport.connect, near, self.patience())
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
    """AssertionError if there are descriptors, threads or children afterwards that were not there before."""
    files, threads, children = _descriptors(), set(threading.enumerate()), _children()
    yield
    deadline = time.monotonic() + timeout
    while left := _left(files, threads, children):
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


def _children() -> set[str]:
    """The processes that this one has started, and those of them that nobody has waited for."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                found.add(path.parent.name)
    return found


def _left(files: dict[str, str], threads: set[threading.Thread], children: set[str]) -> list[str]:
    left = [f"descriptor {number} of {what}" for number, what in _descriptors().items() if files.get(number) != what]
    left += [f"thread {thread.name}" for thread in set(threading.enumerate()) - threads]
    return left + [f"process {number}" for number in _children() - children]


def same(came: bytes, sent: bytes) -> None:
    """Assert that what came is what was sent, however long it is: a diff of a mebibyte takes minutes."""
    if came != sent:
        shorter = min(len(came), len(sent))
        at = next((at for at in range(shorter) if came[at] != sent[at]), shorter)
        raise AssertionError(f"{len(came)} bytes came of {len(sent)}, and byte {at} is the first that is not as sent")
