"""`ProcessGuest`, the machine's side of a guest in a process of its own.

Two locks: `_asking` is held from an order to its answer, `_deciding` while it is settled how the guest has failed.
A thread, `whimbrel-guest-watch`, hears what the child reports and waits for its end; it alone calls `on_failure`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from whimbrel.abc import DirtyTrackerSpec, Guest
from whimbrel.errors import ConfigError, GuestError, StateError, TrackerUnavailable, WhimbrelError
from whimbrel.machine.dirty.kernel import Userfault
from whimbrel.machine.dirty.remote import RemoteTracker
from whimbrel.machine.factories import name_of
from whimbrel.machine.process.link import Link, close_all, is_there, wait_for_end

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from whimbrel.abc import LendableDrive, MemoryRegion
    from whimbrel.machine.process.link import Letter

GRACE: Final = 3.0
"""Seconds that the child has to end when it is told to, and again when it is terminated."""

_ERRORS: Final[Mapping[str, type[WhimbrelError]]] = {
    "config": ConfigError,
    "unknown-name": ConfigError,
    "state": StateError,
    "tracker": TrackerUnavailable,
}


class ProcessGuest(Guest):
    """Runs a workload in a child process with the same RAM, so that neither side's interpreter lock slows the other.

    `workload` names a factory, as `module:factory` or `path.py:factory`, or is one: a function that a module defines.
    In the child it is called with a `GuestMemory` and with `arguments` (by keyword, what JSON can carry) and returns a
    guest, normally a `LoopGuest`, which does there what this one is told. All that is to move must be in the machine's
    RAM; its devices may be views into it. `announce` is called here after an arrival, behind the guest's own.

    The memory must be shared: `[backends] memory = "memfd"`, or a file. The child starts when the machine is first
    started or begins to wait for another, in this process's folder and with its `sys.path`; it ends with `close`, and
    with this process. The workload may use threads, but processes that it forks must not write to the machine's RAM,
    since nobody sees it.

    What the workload raises is a GuestError here, with the child's traceback as a note; a child that ends by itself is
    one too. Methods as `whimbrel.abc.Guest` says.
    """

    def __init__(
        self,
        workload: str | Callable[..., Guest],
        *,
        arguments: Mapping[str, object] | None = None,
        announce: Callable[[], object] | None = None,
    ) -> None:
        self.workload = workload if isinstance(workload, str) else name_of(workload)
        self._arguments = dict(arguments or {})
        try:
            json.dumps(self._arguments)
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"the arguments of {self.workload} cannot be told to another process: {exc}") from exc
        self._announce = announce
        self._child: _Child | None = None
        self._asking = threading.Lock()
        self._deciding = threading.Lock()
        self._watch: threading.Thread | None = None
        self._closed = False
        self._told = False  # on_failure was called; the watching thread's alone
        self._throttle = 0
        self._addresses: dict[str, int] = {}
        self._drives: tuple[LendableDrive, ...] = ()

    @property
    def pid(self) -> int | None:
        """The child's process id, None before it was started and after it was closed."""
        child = self._child
        return None if child is None else child.process.pid

    def use_drives(self, drives: Sequence[LendableDrive]) -> None:
        """Lend these to the child when it starts."""
        self._drives = tuple(drives)

    def prepare(self, regions: Sequence[MemoryRegion]) -> None:
        """Start the child and make the workload's guest in it: some tenths of a second.

        Raises ConfigError for memory that is not shared and for a workload that is not there, GuestError for one that
        fails; the child has ended then.
        """
        if self._closed or self._child is not None:
            raise StateError("a guest runs in one machine, once")
        for region in regions:
            if region.fd is None:
                raise ConfigError(
                    f"a guest in a process of its own needs memory to share, and RAM block {region.name!r} is "
                    f"{region.backing}",
                    hint='set [backends] memory = "memfd" (settings.backends.memory) before the machine is made',
                )
        self._child = child = _Child()
        try:
            for region in regions:
                assert region.fd is not None
                mapping = {"do": "map", "name": region.name, "size": region.size, "backing": region.backing}
                self._addresses[region.name] = self._ask(mapping, [region.fd])["address"]
            for drive in self._drives:
                if (lent := drive.lend()) is not None:
                    about = {"do": "drive", "name": drive.name, "place": drive.place, "read_only": drive.read_only}
                    self._ask(about, lent)
            self._ask(
                {"do": "build", "workload": self.workload, "arguments": self._arguments, "path": [*map(str, sys.path)]}
            )
            if self._throttle:
                self._ask({"do": "throttle", "percent": self._throttle})
        except BaseException:
            self._child = None
            child.end()
            child.release()
            raise
        self._watch = threading.Thread(target=self._hear, args=(child,), name="whimbrel-guest-watch", daemon=True)
        self._watch.start()

    def dirty_tracker(self) -> DirtyTrackerSpec | None:
        """The tracker of what the child writes, as its kernel sees it; None once the child writes no more."""
        if self._child is None or not is_there(self._child.pidfd):
            return None
        return DirtyTrackerSpec(
            name="guest",
            summary="the kernel notes what the guest's process writes (Linux 6.7 and later)",
            create=lambda: RemoteTracker(self._open_there, dict(self._addresses)),
            probe=self._probe,
        )

    def power_on(self) -> None:
        """Have the child's guest fill a fresh machine. Raises GuestError."""
        self._ask({"do": "power-on"})

    def start(self) -> None:
        """Have the child's guest run. Raises StateError if it has failed before, GuestError."""
        if self.failure is not None:
            raise StateError(f"the guest failed and cannot be started again: {self.failure!r}")
        self._ask({"do": "start"})

    def stop(self) -> None:
        """Return when the child has said that its guest runs no more, or has ended; `failure` is set then.

        A child whose guest raises instead of stopping is killed.
        """
        try:
            answer = self._ask({"do": "stop"})
        except WhimbrelError as exc:
            self._settle_on(exc)
            # A guest that could not be stopped might go on: with its process it certainly ends.
            if self._child is not None:
                self._child.kill()
        else:
            if "failure" in answer:
                self._settle_on(_error(answer["failure"]))

    def throttle(self, percent: int) -> None:
        """Have the child's guest throttled, now or when there is one."""
        self._throttle = percent
        with suppress(GuestError):
            self._ask({"do": "throttle", "percent": percent})

    def announce(self) -> None:
        """Have the child's guest tell the network, and then whoever is to be called here."""
        self._ask({"do": "announce"})
        if self._announce is not None:
            self._announce()

    def close(self) -> None:
        """End the child and the thread: it is told to, then terminated, then killed. Twice is fine."""
        with self._deciding:
            self._closed = True
            child, self._child = self._child, None
        if child is None:
            return
        child.end()
        if self._watch is not None and self._watch is not threading.current_thread():
            self._watch.join()
        with self._asking:  # whoever was waiting for an answer has seen the end, and let go of the sockets
            child.release()

    # ---------------------------------------------------------------------------------------- internals

    def _ask(self, order: Mapping[str, Any], descriptors: Sequence[int] = ()) -> Letter:
        answer, opened = self._ask_with_descriptors(order, descriptors)
        close_all(opened)
        return answer

    def _ask_with_descriptors(self, order: Mapping[str, Any], given: Sequence[int]) -> tuple[Letter, list[int]]:
        """Give an order and wait for the answer. Raises what it tells of, and GuestError if there is none."""
        with self._asking:
            child = self._child
            if child is None:
                raise GuestError("the guest's process is not there")
            try:
                child.orders.send(order, given)
            except OSError:
                raise child.fate() from None
            came = child.orders.receive()
            if came is None:
                raise child.fate()
        answer, opened = came
        if "error" in answer:
            close_all(opened)
            raise _error(answer["error"])
        return answer, opened

    def _open_there(self) -> tuple[int, int]:
        """Have the child open a userfaultfd and its pagemap. Raises TrackerUnavailable."""
        try:
            _, opened = self._ask_with_descriptors({"do": "track"}, ())
        except GuestError as exc:
            raise TrackerUnavailable(exc.message) from exc
        if len(opened) != 2:
            close_all(opened)
            raise TrackerUnavailable("not all descriptors from the guest's process arrived; there may be too many")
        return opened[0], opened[1]

    def _probe(self, _: Sequence[MemoryRegion]) -> str | None:
        try:
            Userfault(self._open_there()).close()
        except TrackerUnavailable as exc:
            return f"in the guest's process: {exc.message}"
        return None

    def _hear(self, child: _Child) -> None:
        """Wait for reports and then for the child's end; on a thread of its own."""
        while (came := child.reports.receive()) is not None:
            letter, descriptors = came
            close_all(descriptors)
            self._tell(_error(letter["failure"]))
            if self._closed:
                return
        fate = child.fate()
        if not self._closed:
            self._tell(fate)

    def _tell(self, exc: WhimbrelError) -> None:
        """Make a failure known, once: a child that ends behind it is no further one."""
        if self._told:
            return
        self._told = True
        self._settle_on(exc)
        if self.on_failure is not None and self.failure is not None:
            self.on_failure(self.failure)

    def _settle_on(self, exc: WhimbrelError) -> None:
        with self._deciding:
            if self.failure is None:
                self.failure = exc


class _Child:
    """The child process, its sockets and its pidfd. Raises GuestError if it cannot be started; nothing is left then."""

    def __init__(self) -> None:
        orders, orders_there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reports, reports_there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            there = (orders_there.fileno(), reports_there.fileno())
            self.process = subprocess.Popen(
                # -P: what lies in the current folder must not stand in for what the child is made of.
                [sys.executable, "-P", "-m", "whimbrel.machine.process", *map(str, there), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=there,
                process_group=0,  # Ctrl-C in the terminal reaches the machine's process alone
            )
        except OSError as exc:
            orders.close()
            reports.close()
            raise GuestError(f"the guest's process cannot be started: {exc}") from exc
        finally:
            orders_there.close()
            reports_there.close()
        self.pidfd = os.pidfd_open(self.process.pid)
        self.orders, self.reports = Link(orders, self.pidfd), Link(reports, self.pidfd)

    def fate(self) -> GuestError:
        """How it ended. One that says nothing more and does not end is killed: it would be of no use."""
        if not wait_for_end(self.pidfd, GRACE):
            self.process.kill()
        status = self.process.wait()
        how = f"was killed by {_signal(-status)}" if status < 0 else f"ended with status {status}"
        return GuestError(f"the guest's process {self.process.pid} {how}")

    def kill(self) -> None:
        """End it at once. It may have ended before."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """End it, nicely if it can be had, and collect its status."""
        with suppress(OSError):
            self.orders.send({"do": "end"})
        if not wait_for_end(self.pidfd, GRACE):
            self.process.terminate()
            if not wait_for_end(self.pidfd, GRACE):
                self.process.kill()
        self.process.wait()

    def release(self) -> None:
        """Close what belongs to it. It has ended, and nobody uses it any more."""
        self.orders.close()
        self.reports.close()
        os.close(self.pidfd)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _error(told: Mapping[str, str]) -> WhimbrelError:
    """The error that the child has told of, with the traceback from there as a note."""
    error = _ERRORS.get(told["code"], GuestError)(told["message"])
    error.add_note(f"in the guest's process:\n{told['traceback']}")
    return error
