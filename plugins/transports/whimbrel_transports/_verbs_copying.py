"""Large writes into shared memory, done on a thread of their own: whoever posts one can look for the next meanwhile.

That is what an adapter does beside the processor. The rules it lives by:

* **One after the other, in the order in which they were posted**; whoever does something that must come behind them
  waits until there are none.
* The memory that is read stays registered until a write is over, whatever becomes of the connection.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Copying"]


class Copying:
    """Does jobs in their order; a job raises nothing. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()  # the first is being done
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, job: Callable[[], None]) -> None:
        """Have a job done behind those before. Not once it is closed."""
        with self._changed:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="whimbrel-verbs-copying", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until every job is done."""
        if self._jobs:
            with self._changed:
                self._changed.wait_for(lambda: not self._jobs)

    def close(self) -> None:
        """Wait until every job is done, and end the thread. Twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job = self._jobs[0]
            job()
            with self._changed:
                self._jobs.popleft()
                if not self._jobs:
                    self._changed.notify_all()
