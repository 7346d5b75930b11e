"""Makes calls that may block for as long as some storage likes, and waits for them no longer than told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from whimbrel.abc import Patience
from whimbrel.errors import ConnectError, WitnessError

__all__ = ["Hand"]

T = TypeVar("T")

_SLICE = 0.05  # seconds


class _Call(threading.Thread, Generic[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__(name="whimbrel-witness", daemon=True)
        self._call = call
        self._result: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as exc:  # noqa: BLE001 - raised by `result`
            self._error = exc

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._result[0]


class Hand:
    """One call at a time, on a thread of its own. What nobody waits for any more goes on; the next waits for it first.

    A mount whose server is gone holds a process in the kernel, where nothing wakes it. So there is never more than one
    such thread, and it ends when the storage answers.
    """

    def __init__(self) -> None:
        self._last: threading.Thread | None = None

    def do(self, call: Callable[[], T], patience: Patience, what: str) -> T:
        """What `call` returns, or raise what it raised. WitnessError if it takes too long, MigrationCancelled."""
        if self._last is not None:
            self._wait(self._last, patience, what)
        self._check(patience, what)
        made = _Call(call)
        self._last = made
        made.start()
        self._wait(made, patience, what)
        return made.result()

    def _wait(self, made: threading.Thread, patience: Patience, what: str) -> None:
        while made.is_alive():
            made.join(_SLICE)
            if made.is_alive():
                self._check(patience, what)

    def _check(self, patience: Patience, what: str) -> None:
        try:
            patience.check(what)
        except ConnectError as exc:
            raise WitnessError(str(exc)) from exc
