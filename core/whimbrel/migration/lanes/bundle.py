"""One channel that stands for several: whoever closes it, a deadline or a cancel, closes them all."""

from __future__ import annotations

import threading

from whimbrel.abc import Channel
from whimbrel.migration.quietly import quietly
from whimbrel.stream import ForwardingChannel


class Bundle(ForwardingChannel):
    """A migration's main channel, and its lanes, which are added as they come. Any thread may add and close."""

    def __init__(self, main: Channel) -> None:
        super().__init__(main)
        self._lanes: list[Channel] = []
        self._deciding = threading.Lock()
        self._closed = False

    def add(self, lane: Channel) -> None:
        """Close `lane` with the others; at once, if they are closed already."""
        with self._deciding:
            self._lanes.append(lane)
            late = self._closed
        if late:
            lane.close()

    def close(self) -> None:
        """Close all of them, the main one first: its end tells a peer more than a lane's."""
        with self._deciding:
            self._closed = True
            lanes = list(self._lanes)
        super().close()
        for lane in lanes:
            quietly(lane.close, "closing a lane")
