"""Progress on a terminal: one line that is kept up to date."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys

from whimbrel.units import parse_size


class Terminal:
    """The screen's end of a pseudo terminal."""

    def __init__(self):
        self.screen, self.end = pty.openpty()
        self.seen = ""

    def wait(self, pattern):
        """Read until `pattern` is found in what has come; returns the match."""
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.screen], [], [], 60)
            assert ready, self.seen
            self.seen += os.read(self.screen, 1 << 16).decode()
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.screen)


def test_a_line_is_kept_up_to_date_on_a_terminal(monitored, destination):
    machine, qmp = monitored(max_bandwidth=1 << 20)
    with Terminal() as terminal:
        command = [sys.executable, "-m", "whimbrel", "migrate", destination.uri, "--qmp", qmp]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "24"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=terminal.end, stdin=subprocess.DEVNULL, env=environment, text=True
        ) as migrate:
            os.close(terminal.end)
            first = parse_size(terminal.wait(r"round 1, ([0-9.]+ \w+) left")[1])
            terminal.seen = ""
            # The same line again, further on: the cursor went back, and no line was ended in between.
            later = terminal.wait(r"round 1, ([0-9.]+ \w+) left")
            assert "\n" not in terminal.seen[: later.start()]
            assert re.search(r"\r|\x1b\[", terminal.seen[: later.start()])
            while parse_size(later[1]) == first:
                terminal.seen = terminal.seen[later.end() :]
                later = terminal.wait(r"round 1, ([0-9.]+ \w+) left")
            assert parse_size(later[1]) < first
            machine.settings.parameters.max_bandwidth = 0
            table, _ = migrate.communicate(timeout=60)
        assert migrate.returncode == 0
    assert "\x1b" not in table
    assert re.search(r"^migration +completed", table)
