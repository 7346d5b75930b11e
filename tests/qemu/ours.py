"""A machine of whimbrel's with a monitor, in this process, which is asked and told what a `Qemu` is."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

import whimbrel
from whimbrel.monitor import MonitorServer

from .qmp import Monitored, Qmp

SIZE = 1 << 20


class Ours(Monitored):
    """A small machine whose guest writes now and then. Close it, or use it as a context manager."""

    def __init__(self, *, events: bool = True, on_quit: Callable[[], object] | None = None) -> None:
        with ExitStack() as stack:
            self.dir = Path(tempfile.mkdtemp(prefix="whimbrel-ours-"))
            stack.callback(shutil.rmtree, self.dir, ignore_errors=True)
            self.machine = stack.enter_context(whimbrel.Machine("heat"))
            plate = self.machine.ram.array("plate", (SIZE,), "uint8")
            pause = threading.Event()

            def power_on() -> None:
                plate[:] = np.random.default_rng(1).integers(0, 256, SIZE, "uint8")

            def step() -> None:
                plate[0] = (int(plate[0]) + 1) % 256
                pause.wait(0.001)

            self.machine.guest = whimbrel.LoopGuest(step, power_on=power_on)
            server = stack.enter_context(MonitorServer(self.machine, f"unix:{self.dir}/qmp", on_quit=on_quit))
            self._path = server.address.removeprefix("unix:")
            self._connections = stack.enter_context(ExitStack())
            self.qmp = self.connect()
            if events:
                self.switch_on("events")
            self._stack = stack.pop_all()

    def connect(self, *, negotiate: bool = True) -> Qmp:
        """Another client, which is closed with the machine."""
        connected = self._connections.enter_context(socket.socket(socket.AF_UNIX))
        connected.connect(self._path)
        return Qmp(connected, negotiate=negotiate)

    def uri(self, name: str) -> str:
        """The migration URI of a unix socket in the folder of this machine."""
        return f"unix:{self.dir / name}"

    def close(self) -> None:
        """Close monitor and machine; twice is fine."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
