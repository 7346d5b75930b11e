"""The child's side: maps the machine's RAM, has its drives, makes the workload's guest, and does as it is told.

Orders are obeyed on the main thread, one after the other, each with an answer: what came of it, or what went wrong. The
answer to `stop` is sent when the guest's own `stop` has returned and no write to a drive is under way, so it proves
that nothing of the guest runs. A guest that fails says so at once over the other socket.

The end of the orders means that the machine's process is gone, and then so is this one, whatever it is at.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from whimbrel.abc import Guest
from whimbrel.errors import ConfigError, WhimbrelError
from whimbrel.machine.dirty.kernel import open_descriptors
from whimbrel.machine.factories import find_factory
from whimbrel.machine.process.link import LIMIT, Link, close_all
from whimbrel.machine.process.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from whimbrel.machine.process.link import Letter

_SWITCH_INTERVAL: Final = 100e-6
"""Seconds. An order waits at most so long for the interpreter's lock, and the guest stands still no longer for it. It
costs nothing while no order comes: then no other thread wants the lock."""


def main(orders: int, reports: int, parent: int) -> int:
    """Be the child of process `parent` until it says so or ends; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # somebody at the terminal means the machine, which decides
    for descriptor in (orders, reports):
        os.set_inheritable(descriptor, False)
    try:
        peer = os.pidfd_open(parent)
    except ProcessLookupError:
        return 1
    if os.getppid() != parent:
        return 1  # it has ended already, and somebody else has its number
    sys.setswitchinterval(_SWITCH_INTERVAL)
    child = Child(
        Link(socket.socket(fileno=orders), peer),
        Link(socket.socket(fileno=reports), peer),
    )
    if child.serve():
        return 0
    # Nobody is there to say anything to, and the guest may be at work on memory that is nobody's any more.
    os._exit(1)


class Child:
    """Obeys orders. One thread; the guest has its own."""

    def __init__(self, orders: Link, reports: Link) -> None:
        self._orders, self._reports = orders, reports
        self._memory = GuestMemory()
        self._guest: Guest | None = None
        self._runs = False

    def serve(self) -> bool:
        """Obey until told to end, which is True; or until nobody is there to obey."""
        while (came := self._orders.receive()) is not None:
            letter, descriptors = came
            if letter["do"] == "end":
                self._end()
                return True
            try:
                answer, opened = self._obey(letter, descriptors)
            except BaseException as exc:  # noqa: BLE001 - whatever the workload's code raises, the machine must know
                answer, opened = {"error": described(exc)}, ()
            try:
                self._orders.send(answer, opened)
            except OSError:
                return False
            finally:
                close_all(opened)
        return False

    def _obey(self, letter: Letter, descriptors: list[int]) -> tuple[Letter, tuple[int, ...]]:
        match letter:
            case {"do": "map", "name": name, "size": size, "backing": backing}:
                return {"address": self._memory.attach(name, descriptors[0], size, backing)}, ()
            case {"do": "drive", "name": name, "place": place, "read_only": read_only}:
                image, marks = descriptors
                self._memory.drives.borrow(name, place, image, marks, read_only=read_only)
            case {"do": "build", "workload": workload, "arguments": arguments, "path": path}:
                sys.path[:] = path
                self._guest = self._built(workload, arguments)
                self._guest.on_failure = self._failed
                self._guest.prepare(self._memory.regions())
            case {"do": "power-on"}:
                with self._writing():
                    self._existing().power_on()
            case {"do": "start"}:
                self._start()
            case {"do": "stop"}:
                self._runs = False
                guest = self._existing()
                guest.stop()
                self._memory.drives.bar()
                if guest.failure is not None:
                    return {"failure": described(guest.failure)}, ()
            case {"do": "throttle", "percent": percent}:
                self._existing().throttle(percent)
            case {"do": "announce"}:
                self._existing().announce()
            case {"do": "track"}:
                return {}, open_descriptors()
            case _:
                raise ConfigError(f"the guest's process knows no order {letter['do']!r}")
        return {}, ()

    def _start(self) -> None:
        self._memory.drives.admit()
        try:
            self._existing().start()
        except BaseException:
            self._memory.drives.bar()
            raise
        self._runs = True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Let the guest write to the drives for the length of a `with`."""
        self._memory.drives.admit()
        try:
            yield
        finally:
            self._memory.drives.bar()

    def _built(self, workload: str, arguments: Mapping[str, Any]) -> Guest:
        factory = find_factory(workload, kind="workload", makes="a guest")
        made = factory(self._memory, **arguments)
        if not isinstance(made, Guest):
            a = "None" if made is None else f"a {type(made).__name__}"
            raise ConfigError(f"{workload} returned {a}, expected a guest, such as a whimbrel.LoopGuest")
        return made

    def _existing(self) -> Guest:
        assert self._guest is not None, "the machine's side builds before anything else"
        return self._guest

    def _failed(self, exc: BaseException) -> None:
        self._memory.drives.bar()
        with suppress(OSError):  # then nobody is there to hear it
            self._reports.send({"failure": described(exc)})

    def _end(self) -> None:
        """Let the guest release what it has. If that does not come to an end, it is brought about from outside."""
        if self._guest is not None:
            if self._runs and self._guest.failure is None:
                self._guest.stop()
            self._guest.close()


def described(exc: BaseException) -> Letter:
    """What went wrong, for a letter."""
    text = "".join(traceback.format_exception(exc))
    half = LIMIT // 16  # a character may take six bytes, and both ends of a long text tell something
    if len(text) > 2 * half:
        text = f"{text[:half]}\n…\n{text[-half:]}"
    known = isinstance(exc, WhimbrelError)
    message = str(exc) if known else f"{type(exc).__name__}: {exc}"
    return {"code": exc.code if isinstance(exc, WhimbrelError) else "", "message": message[:half], "traceback": text}
