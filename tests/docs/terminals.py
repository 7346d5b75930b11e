"""Terminals in which the commands of a page are typed, and the session of a whole page.

A command that waits for something (`LASTING`) stays in its terminal once it has printed what the page shows. Any other
ends, with what the page shows among its lines and with status 0, unless the page asks for another (`echo $?`); `…` is
what the page leaves out. A `text` block of its own is what some terminal says by then.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from itertools import pairwise

PATIENCE = 60.0  # seconds, for a test that would hang
POLL = 0.01
LASTING = ("whimbrel run ", "whimbrel receive tcp:", "qemu-system-x86_64 ")


class Terminal:
    """A command as a page shows it; what it prints is collected as it comes."""

    def __init__(self, line, folder, starter=()):
        words = shlex.split(line)
        self.monitor, self.lines = monitor(words), []
        self._changed = threading.Condition()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
        command = [sys.executable, "-m", *words] if words[0] == "whimbrel" else [*starter, *words]
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self):
        with self._process.stdout as stdout:
            for line in stdout:
                with self._changed:
                    self.lines.append(line.rstrip("\n"))
                    self._changed.notify_all()

    def wait_for(self, wanted):
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(wanted, self.lines)), PATIENCE), self.lines

    def wait_for_monitor(self, folder):
        """Wait until a QEMU has answered a question: whatever its command line asks for has been done by then."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                try:
                    client.connect(f"{folder}/{self.monitor.removeprefix('unix:')}")
                except OSError:
                    assert time.monotonic() < deadline, self.lines
                    assert self._process.poll() is None, self.lines
                    time.sleep(POLL)
                    continue
                with client.makefile("rw") as spoken:
                    spoken.readline()
                    spoken.write('{"execute": "qmp_capabilities"}\n')
                    spoken.flush()
                    assert "return" in spoken.readline()
                return

    def interrupt(self):
        self._process.send_signal(signal.SIGINT)

    def end(self):
        """Wait until it ends; its status, as a shell tells it."""
        status = self._process.wait(PATIENCE)
        self._thread.join(PATIENCE)
        return 128 - status if status < 0 else status

    def kill(self):
        self._process.kill()
        self.end()


def monitor(words):
    """The address of the monitor that a command serves or speaks to; None without one."""
    named = [after for option, after in pairwise(words) if option.endswith("-qmp")]
    return named[0].partition(",")[0] if named else None


class Session:
    """What a reader does, block by block, in `folder`.

    `like(expected)` makes a judge of lines. `ports` are those that the page shows, which are replaced by free ones.
    `python` carries out the block it is given; `starter` is what programs other than whimbrel are started with.
    """

    def __init__(self, folder, like, *, ports, python=None, starter=()):
        self.terminals = []
        self._folder, self._like, self._python, self._starter = folder, like, python, starter
        self._status = 0
        self._heard = set()
        with ExitStack() as stack:  # all at once, so that all are different
            free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in ports]
            self._ports = {port: str(one.getsockname()[1]) for port, one in zip(ports, free, strict=True)}

    def go_through(self, blocks):
        """Do what the blocks of a page say."""
        for block, before in zip(blocks, [None, *blocks], strict=False):
            printed = block.language == "text" and block.follows and before.language == "python"
            if block.language == "console":
                commands = shown(block.text)
                for (line, output), (after, _) in zip(commands, [*commands[1:], ("", [])], strict=True):
                    self.enter(line, output)
                    assert after == "echo $?" or self._status == 0, (line, self._status, self.terminals[-1].lines)
            elif block.language == "python" and self._python is not None:
                self._python(block, self.with_free_ports(block.text))
            elif block.language == "text" and not printed:
                for expected in block.text.splitlines():
                    self.hear(expected)

    def enter(self, line, output):
        if line == "echo $?":
            assert output == [str(self._status)], self.terminals[-1].lines
            self._status = 0
            return
        lasting = line.startswith(LASTING)
        if lasting and (wanted := monitor(shlex.split(line))) is not None:
            for earlier in self.terminals:
                if earlier.monitor == wanted:
                    earlier.end()  # one command at a time in a terminal
        deadline = time.monotonic() + PATIENCE
        while True:
            terminal = Terminal(self.with_free_ports(line), self._folder, self._starter)
            self.terminals.append(terminal)
            if lasting:
                self._status = 0
                for expected in output:
                    terminal.wait_for(self._like(expected))
                if line.startswith("qemu"):
                    terminal.wait_for_monitor(self._folder)
                return
            if "^C" in output:
                terminal.wait_for(self._like(output[output.index("^C") - 1]))
                terminal.interrupt()
            self._status = terminal.end()
            missing = [e for e in output if e not in ("^C", "…") and not any(map(self._like(e), terminal.lines))]
            if not missing:
                return
            # How a machine stands is asked again until it stands as the page says.
            assert line.startswith("whimbrel status"), (line, missing, terminal.lines)
            assert time.monotonic() < deadline, (line, missing, terminal.lines)

    def hear(self, expected):
        """Wait until some terminal has said so, once more than so far."""
        wanted, deadline = self._like(expected), time.monotonic() + PATIENCE
        while True:
            said = [(t, n) for t in self.terminals for n, line in enumerate(list(t.lines)) if wanted(line)]
            fresh = [(t, n) for t, n in said if (id(t), n) not in self._heard]
            if fresh:
                terminal, number = fresh[0]
                self._heard.add((id(terminal), number))
                return
            assert time.monotonic() < deadline, (expected, [terminal.lines for terminal in self.terminals])
            time.sleep(POLL)

    def with_free_ports(self, text):
        for port, free in self._ports.items():
            text = text.replace(port, free)
        return text

    def end(self):
        for terminal in self.terminals:
            terminal.kill()


def shown(text):
    """The commands of a block, each with the lines that follow it; one that ends in a backslash goes on below."""
    found = []
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line:
            found[-1][1].append(line)
    return found
