"""The one order that a prepared destination waits for, from wherever it comes first."""

from __future__ import annotations

import threading

from whimbrel.wire.handover import WordKind


class Orders:
    """COMMIT or ABORT, or that nobody waits any more; any thread. The first counts, and the rest find it given."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._order: WordKind | None = None
        self._given = False

    def give(self, order: WordKind | None) -> WordKind | None:
        """Give an order, or None for "wait no longer"; returns the one that counts."""
        with self._changed:
            if not self._given:
                self._order, self._given = order, True
                self._changed.notify_all()
            return self._order

    def wait(self) -> WordKind | None:
        """Wait for the order, for as long as it takes; None if nobody is to wait any longer."""
        with self._changed:
            self._changed.wait_for(lambda: self._given)
            return self._order
