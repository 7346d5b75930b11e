"""Finds another place for a machine whose only copy is in the memory of this process.

Somebody at a terminal is asked. Otherwise the folders for temporary files are tried, and then everything again, every
few seconds, until there is room somewhere: the machine is not given up unless somebody says so.
"""

from __future__ import annotations

import os
import select
import sys
import tempfile
import threading
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from whimbrel.cli._output import note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from whimbrel.errors import WhimbrelError

AGAIN: Final = 5.0  # seconds between two rounds through the places
POLL: Final = 0.1  # seconds
LINE: Final = 1 << 16  # bytes; a terminal gives no longer line


class Elsewhere:
    """Asked on the thread that stores (`__call__`), answered on the main thread, which calls `answer` now and then.

    `problem` is why the machine could not be stored where it was to be; None as long as nobody has asked.
    """

    def __init__(self, file: str) -> None:
        self.problem: WhimbrelError | None = None
        self._file = file
        self._questions: SimpleQueue[WhimbrelError] = SimpleQueue()
        self._answers: SimpleQueue[str | None] = SimpleQueue()
        self._given_up = threading.Event()
        self._somebody = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
        self._places = _spare()
        self._rounds = 0

    @property
    def somebody(self) -> bool:
        """Whether there is somebody at a terminal, who has chosen the place then."""
        return self._somebody

    @property
    def given_up(self) -> bool:
        """Whether somebody has said that the machine may be lost."""
        return self._given_up.is_set()

    def give_up(self) -> bool:
        """Lose the machine, if it is without a place; returns whether it is. Any thread."""
        if self.problem is not None:
            self._given_up.set()
        return self.given_up

    def hang_up(self) -> None:
        """The terminal is gone, and whoever was at it. Any thread."""
        self._somebody = False

    def __call__(self, exc: WhimbrelError) -> str | None:
        """Another path, after `exc`; None to give up. On the thread that stores."""
        self._questions.put(exc)
        return self._answers.get()

    def answer(self, attention: Callable[[], object]) -> None:
        """Answer the question, if there is one, after `attention`. On the main thread; takes as long as it takes."""
        with suppress(Empty):
            exc = self._questions.get_nowait()
            attention()
            if not self._rounds:
                note(f"{exc}")
            if self.problem is None:
                note("the source has let go of its machine: it is in the memory of this process and nowhere else")
                self.problem = exc
            path = self._ask() or self._next()
            self._answers.put(None if self.given_up else path)

    def _ask(self) -> str | None:
        """What somebody at the terminal says; None if there is nobody, or the machine is given up."""
        if self._somebody:
            note(f"Where to store it? (Enter tries {self._file} again, Ctrl-C gives the machine up)")
        while self._somebody and not self.given_up:
            if select.select([sys.stdin], [], [], POLL)[0]:
                if line := _read():
                    return os.fsdecode(line).strip() or self._file
                self._somebody = False
        return None

    def _next(self) -> str | None:
        """The next place, after a while if all were tried; None if the machine is given up meanwhile."""
        for path in self._places:
            if not self._rounds:
                note(f"trying {path}")
            return path
        if not self._rounds:
            note(f"trying all of them again every {AGAIN:g} s, until there is room; Ctrl-C gives the machine up")
        self._rounds += 1
        self._given_up.wait(AGAIN)
        self._places = _spare()
        return self._file


def _read() -> bytes:
    """A line; nothing at the end, or when the terminal is gone."""
    try:
        return os.read(sys.stdin.fileno(), LINE)
    except OSError:
        return b""


def _spare() -> Iterator[str]:
    """Paths in folders for temporary files, at which nothing is."""
    with suppress(FileNotFoundError):  # none can be written into
        path = os.path.join(tempfile.gettempdir(), f"whimbrel-{os.getpid()}.stream")  # noqa: PTH118 - a path as text
        if not os.path.lexists(path):
            yield path
