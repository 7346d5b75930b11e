"""A real QEMU as the other side of a migration, and as the judge of what whimbrel says and does.

::

    with Qemu(64, guest=guests.sweep(64)) as source, Qemu(64, incoming="defer") as destination:
        source.wait_started()
        destination.execute("migrate-incoming", uri=(uri := destination.uri("stream")))
        source.migrate(uri)
        assert source.wait_status("completed", "failed") == "completed"

Rules of this module:

* A process is killed, by its pid, when its `Qemu` is closed, when its time is over, and when whoever started it dies.
* Nothing is waited for longer than `PATIENCE`, which only a hang ever reaches; then TimeoutError says what came so far.
* Nothing sleeps: events are waited for on the monitor, the guest on its serial port, a run state, of which QEMU tells
  in no event, by asking again and again.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from .qmp import PATIENCE, Monitored, Qmp, spell

__all__ = ["Qemu", "Serial", "capture", "feed", "migrating", "missing", "version"]

PROGRAM: Final = "qemu-system-x86_64"
TIME_LIMIT: Final = 300.0  # seconds that a process may live
CHUNK: Final = 1 << 20


def missing() -> str:
    """Why there is no QEMU here; empty if there is one."""
    for program in (PROGRAM, "qemu-img"):
        if shutil.which(program) is None:
            return f"there is no {program}; as root on Debian, tools/make-qemu installs it"
    return ""


def version() -> str:
    """What the QEMU here says that it is; empty if there is none."""
    if missing():
        return ""
    said = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE)
    return said.stdout.splitlines()[0]


class Serial:
    """What the guest says on its first serial port. One thread.

    A guest that nobody reads goes on; what it says then is lost at some point.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self.heard = b""

    def wait(self, text: bytes) -> None:
        """Wait until `text` has come at some time."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.heard:
            self._receive(deadline)

    def wait_more(self, count: int = 2) -> None:
        """Wait until the guest says `count` further bytes; the first may be one that it had not got rid of before."""
        self._drain()
        goal = len(self.heard) + count
        deadline = time.monotonic() + PATIENCE
        while len(self.heard) < goal:
            self._receive(deadline)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _drain(self) -> None:
        self._socket.setblocking(False)
        try:
            while data := self._socket.recv(CHUNK):
                self.heard += data
        except BlockingIOError:
            return

    def _receive(self, deadline: float) -> None:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self._socket.recv(CHUNK)
        except TimeoutError:
            raise TimeoutError(f"the guest says nothing more; it said {self.heard[-40:]!r}") from None
        if not data:
            raise EOFError("the serial port was closed")
        self.heard += data


class Qemu(Monitored):
    """A QEMU under TCG with little in it: RAM, the machine's own devices, a serial port, and a disk if it has a guest.

    `mib` is the size of RAM, `guest` a boot sector (`guests`), `firmware` what stands for the machine's own. `incoming`
    is a URI or "defer". A `stopped` one does not run before `cont`. `extra` goes to the end of the command line. The
    capability `events` is on, so that `wait_status` works; without `events` it is off.

    Use it as a context manager, or `close` it. What went wrong inside is in `log`.
    """

    def __init__(
        self,
        mib: int,
        *,
        machine: str = "pc",
        guest: bytes | None = None,
        firmware: bytes | None = None,
        incoming: str | None = None,
        stopped: bool = False,
        events: bool = True,
        extra: Sequence[str] = (),
    ) -> None:
        self.mib = mib
        self._closed = False
        self._last_log = ""
        self.dir = Path(tempfile.mkdtemp(prefix="whimbrel-qemu-"))
        monitor, monitors_end = socket.socketpair()
        serial, serials_end = socket.socketpair()
        try:
            self.command = [PROGRAM, "-accel", "tcg", "-machine", machine, "-m", f"{mib}M", "-nodefaults"]
            self.command += ["-display", "none", "-serial", "chardev:serial", "-mon", "chardev=monitor,mode=control"]
            self.command += ["-chardev", f"socket,id=monitor,fd={monitors_end.fileno()}"]
            self.command += ["-chardev", f"socket,id=serial,fd={serials_end.fileno()}"]
            self.command += ["-qmp", f"unix:{self._file('qmp')},server=on,wait=off"]
            if guest is not None:
                self.command += self._disk(guest)
            if firmware is not None:
                self._file("firmware").write_bytes(firmware)
                self.command += ["-bios", str(self._file("firmware"))]
            self.command += ["-incoming", incoming] if incoming is not None else []
            self.command += ["-S"] if stopped else []
            self.command += extra
            with self._file("log").open("wb") as log:
                self.process = subprocess.Popen(
                    [*_dying_with_us(), *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[monitors_end.fileno(), serials_end.fileno()],
                )
        except BaseException:
            monitor.close()
            serial.close()
            shutil.rmtree(self.dir, ignore_errors=True)
            raise
        finally:
            monitors_end.close()
            serials_end.close()
        self._time_limit = threading.Timer(TIME_LIMIT, self.process.kill)
        self._time_limit.daemon = True
        self._time_limit.start()
        self.serial = Serial(serial)
        self._connections = [monitor]
        try:
            self.qmp = Qmp(monitor)
            if events:
                self.switch_on("events")
        except BaseException as exc:
            self.close()
            exc.add_note(self.log())
            raise

    def _file(self, name: str) -> Path:
        return self.dir / name

    def _disk(self, guest: bytes) -> list[str]:
        disk = self._file("disk")
        disk.write_bytes(guest)
        os.truncate(disk, 1 << 20)  # a firmware may take a disk of a single sector for none
        return ["-drive", f"file={disk},format=raw,if=none,id=disk", "-device", "ide-hd,drive=disk"]

    def connect(self, *, negotiate: bool = True) -> Qmp:
        """Another client of the monitor, beside `qmp`; there is one at a time, until it is closed."""
        connected = socket.socket(socket.AF_UNIX)
        self._connections.append(connected)
        connected.connect(str(self._file("qmp")))
        return Qmp(connected, negotiate=negotiate)

    # -------------------------------------------------------------------------------------------------- the guest

    def wait_started(self) -> None:
        """Wait until the guest runs its own code, behind the firmware's."""
        self.serial.wait(b"A")

    def memory(self, address: int, size: int) -> bytes:
        """`size` bytes of physical memory from `address` on; of a guest that runs, not all of one moment."""
        dump = self._file("memory")
        self.execute("pmemsave", val=address, size=size, filename=str(dump))
        return dump.read_bytes()

    # ------------------------------------------------------------------------------------------------ the process

    def uri(self, name: str) -> str:
        """The migration URI of a unix socket in the folder of this QEMU, which goes when it is closed."""
        return f"unix:{self._file(name)}"

    def log(self) -> str:
        """What QEMU printed, which is where it says why a stream was refused."""
        return self._last_log if self._closed else self._file("log").read_text(errors="replace")

    def wait_exit(self) -> int:
        """Wait until the process ends by itself; its exit status."""
        return self.process.wait(PATIENCE)

    def report(self) -> str:
        """Everything that helps to see what went wrong."""
        status = self.process.poll()
        lines = [
            " ".join(self.command),
            f"pid {self.process.pid}, {'running' if status is None else f'exit status {status}'}",
            f"events: {', '.join(spell(self.qmp.events)) if hasattr(self, 'qmp') else 'none'}",
            f"serial: {self.serial.heard[-40:]!r}",
            self.log(),
        ]
        return "\n".join(lines)

    def close(self) -> None:
        """Kill the process and remove its folder; twice is fine. `log` and `report` still answer."""
        if self._closed:
            return
        self._time_limit.cancel()
        self.process.kill()
        self.process.wait()
        self._last_log = self.log()
        self._closed = True
        for each in self._connections:
            each.close()
        self.serial.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc is not None:
            exc.add_note(self.report())
        self.close()


def migrating(source: Qemu) -> socket.socket:
    """Begin to migrate `source`; what its stream comes out of."""
    path = source.dir / "capture"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(PATIENCE)
        listener.bind(str(path))
        listener.listen()
        source.migrate(f"unix:{path}")
        channel, _ = listener.accept()
    path.unlink()
    channel.settimeout(PATIENCE)
    return channel


def capture(source: Qemu) -> bytes:
    """Migrate `source` into memory: its whole stream, as long as it comes. It is postmigrate then.

    The stream goes over a unix socket and not through `exec:cat`, since QEMU tells that it has completed before the
    last bytes are in such a file. Without the capability `return-path` the two streams are the same.
    """
    taken = bytearray()
    with migrating(source) as channel:
        while data := channel.recv(CHUNK):
            taken += data
    if source.wait_status("completed", "failed") != "completed":
        raise AssertionError(f"no whole stream: {source.execute('query-migrate')}")
    source.wait_run_state("postmigrate")
    return bytes(taken)


def feed(destination: Qemu, stream: bytes) -> None:
    """Let `destination`, started with "defer", load a stream that was taken; returns when it has all bytes.

    One that refuses the stream may have hung up before. What becomes of it is left to the caller to wait for.
    """
    path = destination.dir / "fed"
    destination.execute("migrate-incoming", uri=f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as channel, suppress(BrokenPipeError, ConnectionResetError):
        channel.settimeout(PATIENCE)
        channel.connect(str(path))
        channel.sendall(stream)


def _dying_with_us() -> list[str]:
    """What starts a program so that it dies when the thread that started it does."""
    main = threading.current_thread() is threading.main_thread()
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if main and setpriv else []
