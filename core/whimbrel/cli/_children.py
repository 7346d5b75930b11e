"""Child processes that speak lines of JSON: `whimbrel demo` has two.

Each is the leader of a process group of its own, so that Ctrl-C in the terminal reaches this process alone, and each is
ended with its whole group when its context ends, whichever way. One that is asked nicely (its standard input ends) has
`GRACE` seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from whimbrel.errors import ConfigError, WhimbrelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from queue import SimpleQueue
    from types import TracebackType
    from typing import IO, Self, TypeAlias

    Event: TypeAlias = dict[str, Any]
    Inbox: TypeAlias = SimpleQueue[tuple["Child", Event]]

GRACE: Final = 3.0  # seconds

ENDED: Final = "process-ended"
"""The event that `Child` itself makes when the process has said its last word."""


class Child:
    """One child process, running `python -m` with `arguments`; a context manager, which ends it.

    What it says arrives in `inbox`, as it comes, with the child it came from. Used by one thread.
    """

    def __init__(self, name: str, arguments: Sequence[str], inbox: Inbox) -> None:
        self.name = name
        self._inbox = inbox
        self._last_words: deque[str] = deque(maxlen=20)
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin: IO[str] = self._process.stdin
        self._complaints = threading.Thread(target=self._listen_to_complaints, args=(self._process.stderr,))
        self._reports = threading.Thread(target=self._listen, args=(self._process.stdout,))
        self._complaints.start()
        self._reports.start()

    @property
    def pid(self) -> int:
        """The process's id, which is its group's as well."""
        return self._process.pid

    def tell(self, command: Mapping[str, object]) -> None:
        """Send a command. Raises nothing if the process is gone: its end is in the inbox."""
        with suppress(OSError):
            self._stdin.write(json.dumps(command) + "\n")
            self._stdin.flush()

    def fate(self) -> WhimbrelError:
        """Why it ended, to be raised after its last event has come."""
        self._complaints.join(GRACE)
        status, said = self._process.wait(), self._last_words[-1] if self._last_words else "it said nothing"
        if status == ConfigError.exit_code:
            return ConfigError(said)  # it was asked for wrongly, and so were we
        return WhimbrelError(f"the {self.name} process ended with status {status}: {said}")

    def close(self) -> None:
        """End the process and everything it has started; twice is fine."""
        with suppress(OSError):
            self._stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._kill()
        finally:
            self._kill()  # what it may have left in its group, and itself if this wait was cut short
            self._process.wait()
            self._reports.join()
            self._complaints.join()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _listen(self, stdout: IO[str]) -> None:
        with stdout:
            for line in stdout:
                self._inbox.put((self, json.loads(line)))
        self._inbox.put((self, {"event": ENDED}))

    def _listen_to_complaints(self, stderr: IO[str]) -> None:
        with stderr:
            self._last_words.extend(line.strip() for line in stderr if line.strip())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
