"""Work on a thread of its own, so that the main thread can show how it goes and a signal can end it in order."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, TypeVar

from whimbrel.cli._signals import Signals

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

POLL: Final = 0.1  # seconds

T = TypeVar("T")


class Interruption:
    """The first SIGINT or SIGTERM; a context manager, entered by the main thread. The second ends the process at once.

    What it ends changes as a command goes on: `ends` says what it is from now on.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._lock = threading.Lock()
        self._end: Callable[[], object] = lambda: None
        self._signals = Signals(self._hear)

    def ends(self, end: Callable[[], object]) -> None:
        """Call `end` when the signal comes, on a thread of its own; now and here if it has come already."""
        with self._lock:
            self._end, came = end, self.number is not None
        if came:
            end()

    def status(self, otherwise: int) -> int:
        """What to exit with for something that was ended: as the signal says, `otherwise` if none came."""
        return otherwise if self.number is None else 128 + self.number

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._signals.__exit__(kind, exc, tb)

    def _hear(self, number: signal.Signals) -> None:
        with self._lock:
            self.number, end = number, self._end
        end()


def watched(work: Callable[[], T], look: Callable[[], object]) -> T:
    """Do `work` on a thread, and `look` every now and then on this one; returns what `work` does, or raises it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as exc:  # noqa: BLE001 - raised on the thread that waits
            errors.append(exc)

    thread = threading.Thread(target=run, name="whimbrel-work", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL)
        look()
    if errors:
        raise errors[0]
    return results[0]
