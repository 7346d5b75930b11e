"""Reasons why a machine may not be migrated now, given by whoever knows them (QEMU's migration blockers)."""

from __future__ import annotations

import threading


class Blockers:
    """The reasons that stand; any thread. A reason added twice must be removed twice."""

    def __init__(self) -> None:
        self._reasons: list[str] = []
        self._lock = threading.Lock()

    def add(self, reason: str) -> None:
        """Refuse migrations with `reason` until it is removed. One that runs already is not touched."""
        with self._lock:
            self._reasons.append(reason)

    def remove(self, reason: str) -> None:
        """Take `reason` back. Raises KeyError if it does not stand."""
        with self._lock:
            if reason not in self._reasons:
                raise KeyError(reason)
            self._reasons.remove(reason)

    def reasons(self) -> tuple[str, ...]:
        """The reasons that stand, oldest first."""
        with self._lock:
            return tuple(self._reasons)
