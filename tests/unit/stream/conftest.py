"""A channel whose other side is a script."""

import ctypes
import itertools

import hypothesis
import numpy as np
import pytest

from whimbrel.abc import Channel
from whimbrel.errors import ChannelLost

hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")


class ScriptedChannel(Channel):
    """Gives `data` in pieces of `sizes` (in turn, for ever) and keeps what is sent; breaks when told to."""

    peer = "script:1"
    duplex = True

    def __init__(self, data=b"", sizes=(1 << 30,), *, end="quiet"):
        self.data, self.end = memoryview(data), end
        self.received = 0
        self.largest = 0  # the largest buffer that was offered
        self._sizes = itertools.cycle(sizes)
        self.sent = []
        self.addresses = []
        self.breaks_after = None
        self.failure = ChannelLost("the line went dead")

    def recv_into(self, buffer):
        view = memoryview(buffer)
        assert not view.readonly
        assert len(view) > 0, "an empty buffer must not be offered"
        self.largest = max(self.largest, len(view))
        if self.received == len(self.data) and self.end == "break":
            raise self.failure
        count = min(len(view), next(self._sizes), len(self.data) - self.received)
        view[:count] = self.data[self.received : self.received + count]
        self.received += count
        return count

    def send(self, data):
        view = memoryview(data)
        if self.breaks_after is not None and sum(map(len, self.sent)) + len(view) > self.breaks_after:
            raise self.failure
        self.sent.append(bytes(view))
        self.addresses.append(np.frombuffer(view, np.uint8).ctypes.data if len(view) else None)

    def end_writing(self):
        raise AssertionError("not the writer's business")

    def close(self):
        raise AssertionError("not the reader's or writer's business")


class GatheringScript(ScriptedChannel):
    """One that takes memory by address as well, and spoils the list as it is allowed to."""

    def send_gathered(self, vectors):
        assert vectors.dtype == np.uint64
        assert vectors.shape[1:] == (2,)
        self.send(b"".join(ctypes.string_at(address, length) for address, length in vectors.tolist()))
        vectors[:] = 0


@pytest.fixture(scope="session")
def scripted():
    return ScriptedChannel


@pytest.fixture(scope="session")
def gathering():
    return GatheringScript
