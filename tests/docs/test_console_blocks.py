"""Commands in the pages are commands there are, with options there are; the tutorial's session is gone through."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import click
import pytest

from whimbrel.cli.application import whimbrel

PATIENCE = 60.0  # seconds, for a test that would hang


def commands(docs):
    for block in docs.all_blocks():
        if block.language == "console":
            for line in block.text.splitlines():
                if line.startswith("$ "):
                    yield block.where, line[2:]


def test_every_command_exists_with_its_options(docs):
    targets = set(re.findall(r"^([a-z-]+):.*##", (docs.root / "Makefile").read_text(), re.MULTILINE))
    seen = 0
    for where, line in commands(docs):
        words = shlex.split(line, comments=True)
        match words:
            case ["whimbrel", *arguments]:
                seen += 1
                try:
                    parse(arguments)
                except click.ClickException as exc:
                    raise AssertionError(f"{where}: {line}: {exc.format_message()}") from None
            case ["make", target, *_]:
                assert target in targets, f"{where}: {line}"
            case _:
                assert words[0] in {"echo", "cd", "git", "pip", "pytest", "qmp-shell", "source"}, f"{where}: {line}"
    assert seen


def parse(arguments):
    """Let click judge a command line without carrying it out."""
    name, command, rest = whimbrel.resolve_command(click.Context(whimbrel), list(arguments))
    with suppress(click.exceptions.Exit):  # --help
        command.make_context(name, list(rest))


def test_commands_in_the_text_exist(docs, page):
    """`whimbrel something` in backticks, as far as it goes."""
    for line in re.findall(r"`whimbrel ([a-z][^`]*)`", docs.prose(page)):
        name = shlex.split(line)[0]
        assert name in whimbrel.commands, f"{page.name}: whimbrel {line}"
        known = {option for parameter in whimbrel.commands[name].params for option in parameter.opts} | {"--help"}
        options = set(re.findall(r"--[a-z-]+", line))
        assert options <= known, f"{page.name}: whimbrel {line}"


# ------------------------------------------------------------------------------------------- the tutorial's session


class Terminal:
    """A command as the tutorial shows it; what it prints is collected as it comes."""

    def __init__(self, line, folder):
        self.monitor = line.split()[-1]
        self.lines = []
        self._changed = threading.Condition()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *shlex.split(line)],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
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

    def interrupt(self):
        self._process.send_signal(signal.SIGINT)

    def end(self):
        status = self._process.wait(PATIENCE)
        self._thread.join(PATIENCE)
        return 128 - status if status < 0 else status  # as a shell tells it of one that a signal has ended

    def kill(self):
        self._process.kill()
        self.end()


@pytest.mark.slow
def test_the_session_of_the_tutorial(docs, tmp_path):
    blocks = docs.blocks(docs.root / "docs" / "tutorial.md")
    (tmp_path / "heat.py").write_text(next(block.text for block in blocks if block.name == "heat.py"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        session = Session(docs, tmp_path, str(free.getsockname()[1]))
    try:
        for block, before in zip(blocks, [None, *blocks], strict=False):
            if block.language == "console":
                for line, output in shown(block.text):
                    session.enter(line, output)
            elif block.language == "text" and not (block.follows and before.language == "python"):
                for expected in block.text.splitlines():
                    session.hear(expected)
    finally:
        session.end()


class Session:
    """What a reader does, command by command; port 4444 is replaced by one that is free."""

    def __init__(self, docs, folder, port):
        self._docs, self._folder, self._port = docs, folder, port
        self._terminals = []
        self._status = 0
        self._heard = set()

    def enter(self, line, output):
        if line == "echo $?":
            assert output == [str(self._status)]
            return
        if line.startswith("whimbrel run"):
            for terminal in self._terminals:
                if line.split()[-1] == terminal.monitor:
                    terminal.end()  # one command at a time in a terminal
        deadline = time.monotonic() + PATIENCE
        while True:
            terminal = Terminal(line.replace("4444", self._port), self._folder)
            self._terminals.append(terminal)
            if line.startswith("whimbrel run"):
                for expected in output:
                    terminal.wait_for(self._like(expected))
                return
            if "^C" in output:
                terminal.wait_for(self._like(output[output.index("^C") - 1]))
                terminal.interrupt()
            self._status = terminal.end()
            missing = [e for e in output if e != "^C" and not any(map(self._like(e), terminal.lines))]
            if not missing:
                return
            # How a machine stands is asked again until it stands as the page says.
            assert line.startswith("whimbrel status"), (line, missing, terminal.lines)
            assert time.monotonic() < deadline, (line, missing, terminal.lines)

    def hear(self, expected):
        """Wait until some terminal has said so, once more than so far."""
        wanted, deadline = self._like(expected), time.monotonic() + PATIENCE
        while True:
            said = [(t, n) for t in self._terminals for n, line in enumerate(list(t.lines)) if wanted(line)]
            fresh = [(t, n) for t, n in said if (id(t), n) not in self._heard]
            if fresh:
                terminal, number = fresh[0]
                self._heard.add((id(terminal), number))
                return
            assert time.monotonic() < deadline, (expected, [terminal.lines for terminal in self._terminals])
            time.sleep(0.01)

    def end(self):
        for terminal in self._terminals:
            terminal.kill()

    def _like(self, expected):
        wanted = self._docs.comparable(expected.replace("/home/you/heat", str(self._folder)))
        return lambda line: self._docs.comparable(line).startswith(wanted)


def shown(text):
    """The commands of a block, each with the lines that follow it."""
    found = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line:
            found[-1][1].append(line)
    return found


def test_pages_show_no_folder_of_whoever_wrote_them(docs, page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"/tmp/|/root/|/home/(?!you/)", text)
    assert str(docs.root) not in text
