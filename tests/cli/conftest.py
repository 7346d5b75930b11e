"""What the tests of the command line share: a runner, machines behind monitors, and real processes."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import click.testing
import pytest

import whimbrel
from whimbrel.cli.application import whimbrel as application
from whimbrel.monitor import MonitorServer

SIZE = 4 << 20
LONG = 60.0  # seconds that nothing here takes

APP = """
import whimbrel
from whimbrel_examples import records

def small():
    return records.machine(size=16 << 20, rate=5000)

def heeds(settings):
    return records.machine(size=16 << 20, rate=5000, settings=settings)

def breaks():
    machine = records.machine(size=1 << 20, rate=5000)
    def step():
        raise ValueError("the disk is on fire")
    machine.guest = whimbrel.LoopGuest(step)
    return machine

def never():
    machine = records.machine(size=1 << 20, rate=5000)
    def power_on():
        raise ValueError("the disk is on fire")
    machine.guest = whimbrel.LoopGuest(lambda: None, power_on=power_on)
    return machine

def refuses():
    raise ValueError("not today")

def nothing():
    return None

value = 3
"""


@pytest.fixture
def folder():
    """A folder whose name is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="whimbrel-") as name:
        yield Path(name)


@pytest.fixture
def app(folder):
    """A file of factories."""
    path = folder / "app.py"
    path.write_text(APP)
    return path


@pytest.fixture
def cli(monkeypatch):
    """Runs a command in this process; the result has exit_code, stdout and stderr."""
    monkeypatch.delenv("WHIMBREL_QMP", raising=False)

    def invoke(*arguments):
        return click.testing.CliRunner().invoke(application, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def complaint():
    """The one line that a failed command says, without what it begins with."""

    def judged(result):
        lines = [line for line in result.stderr.splitlines() if line.startswith("whimbrel: ")]
        assert len(lines) == 1, result.stderr
        assert "Traceback" not in result.stderr
        return lines[0].removeprefix("whimbrel: ")

    return judged


# ------------------------------------------------------------------------------------- machines in this process


@pytest.fixture
def machines():
    """Makes machines of one memory block; they are closed at the end."""
    with ExitStack() as stack:

        def make(**parameters):
            machine = stack.enter_context(whimbrel.Machine("small"))
            machine.ram.array("memory", SIZE, "uint8")[:] = 7
            machine.settings.parameters.update(parameters)
            return machine

        yield make


@pytest.fixture
def monitored(machines, folder):
    """Makes a running machine behind a monitor; returns it and the monitor's address."""
    with ExitStack() as stack:

        def make(**parameters):
            machine = machines(**parameters)
            server = stack.enter_context(MonitorServer(machine, f"unix:{folder}/{id(machine)}.qmp"))
            machine.start()
            return machine, server.address

        yield make


@pytest.fixture
def destination(machines):
    """A machine that waits for another, and what to call it."""
    return machines().incoming("tcp:127.0.0.1:0")


# ---------------------------------------------------------------------------------------------- real processes


class Process:
    """A `python -m …` whose lines can be waited for."""

    def __init__(self, *arguments, cwd=None, **options):
        self.process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
            **options,
        )
        self.stdout = self.stderr = ""
        self._lines = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._read_stdout), threading.Thread(target=self._read_stderr)]
        for thread in self._threads:
            thread.start()

    def _read_stdout(self):
        with self.process.stdout as stream:
            self.stdout = stream.read()

    def _read_stderr(self):
        with self.process.stderr as stream:
            for line in stream:
                self.stderr += line
                self._lines.put(line)
        self._lines.put(None)

    def wait_line(self, pattern):
        """The match of the first line of standard error, from those not seen yet, that `pattern` is found in."""
        while (line := self._lines.get(timeout=LONG)) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line has {pattern!r}; the process said: {self.stderr}")

    def interrupt(self, number=signal.SIGINT):
        self.process.send_signal(number)

    @property
    def exit_code(self):
        code = self.process.wait(LONG)
        for thread in self._threads:
            thread.join(LONG)
        return code

    @property
    def children(self):
        """The ids of its children."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def json(self):
        assert self.exit_code is not None
        return json.loads(self.stdout)

    def end(self):
        with suppress(ProcessLookupError):
            self.process.kill()
        assert self.exit_code is not None


@pytest.fixture
def start(folder):
    """Starts `python -m whimbrel …` (or another module) in `folder`; ended at the end."""
    started = []

    def begin(*arguments, module="whimbrel", **options):
        options.setdefault("env", {name: value for name, value in os.environ.items() if name != "WHIMBREL_QMP"})
        process = Process(module, *arguments, cwd=folder, **options)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.end()


# ---------------------------------------------------------------------------------------------- a link that fails


class CutAfterTheProof:
    """Joins a source to a destination until that has proved that it holds everything, and then cuts the link."""

    def __init__(self, uri, then=lambda: None):
        _, host, port = uri.split(":")
        self.then = then
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.far = (host, int(port))
        self.thread = threading.Thread(target=self.relay)

    def __enter__(self):
        self.thread.start()
        return f"tcp:127.0.0.1:{self.listener.getsockname()[1]}"

    def __exit__(self, *_):
        self.thread.join()
        self.listener.close()

    def relay(self):
        near, _ = self.listener.accept()
        with near, socket.create_connection(self.far) as far:
            proved = threading.Event()
            there = threading.Thread(target=self.pump, args=(near, far, proved))
            there.start()
            while b"whmb" not in (answer := far.recv(1 << 16)):
                near.sendall(answer)
            proved.set()
            near.sendall(answer)
            there.join()
        self.listener.close()  # or whoever asks again would wait for what nobody takes up
        self.then()

    def pump(self, near, far, proved):
        while data := near.recv(1 << 16):
            if proved.is_set():
                return
            far.sendall(data)


@pytest.fixture
def cut_after_the_proof():
    """A context manager that is given a destination's URI and yields one that leads there for too short a time.

    It may be given what to do then, as well.
    """
    return CutAfterTheProof
