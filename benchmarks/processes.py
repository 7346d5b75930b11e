"""Processes of the benchmark that talk in lines of JSON, and end when they are told to or when we do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from benchmarks.work import RunFailed

ROOT: Final = Path(__file__).resolve().parent.parent
PATIENCE: Final = 30.0  # seconds for a process to end by itself


class Role:
    """`python -m benchmarks.MODULE …`: lines of JSON go in and out. A context manager, which ends the process.

    The end of its standard input ends it, so that none outlives us, whatever becomes of us.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.pid = self._process.pid
        self._errors: list[str] = []
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def tell(self, **values: Any) -> None:
        """Say a line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def hear(self, seconds: float) -> dict[str, Any]:
        """Wait for its next line. Raises RunFailed if it ends, or says nothing for so long."""
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise self._gone()
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self, seconds: float, **values: Any) -> dict[str, Any]:
        """Say a line and wait for the next one."""
        self.tell(**values)
        return self.hear(seconds)

    def close(self) -> None:
        """Let it end; kill it if it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(PATIENCE)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as errors:
            self._errors.extend(errors)

    def _gone(self) -> RunFailed:
        self._process.kill()
        status = self._process.wait()
        self._listening.join(PATIENCE)
        last = self._errors[-1].strip() if self._errors else f"exit status {status}"
        return RunFailed(f"{' '.join(map(str, self._process.args[2:4]))}: {last}")  # type: ignore[index]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc is not None:
            self._process.kill()
        self.close()
