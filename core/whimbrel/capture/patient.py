"""A channel whose reader can wait for a while only, and can give back what it has read too far."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from whimbrel.abc import Channel
from whimbrel.stream import ForwardingChannel

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LOOK: Final = 1 << 16  # bytes that one look may bring


class PatientChannel(ForwardingChannel):
    """`channel`, read by one thread. `close` from any thread; `rest` when nobody reads any more.

    A look that was given up waits on, on a thread of its own. What it brings is the next to be received, whoever asks:
    so there is never more than one reader inside of `channel`.
    """

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._ahead = memoryview(b"")
        self._look: _Look | None = None

    def wait(self, seconds: float) -> bool:
        """Whether something has come, or the end, or a failure, within `seconds`; it is there to be received then."""
        if len(self._ahead):
            return True
        if self._look is None:
            self._look = _Look(self.inner)
        return self._look.done(seconds)

    def hung_up(self) -> bool:
        """Whether it is known that nothing more comes, for an end or a failure. Returns at once; looks from now on."""
        if len(self._ahead):
            return False
        if self._look is None:
            self._look = _Look(self.inner)
        return self._look.in_vain()

    def give_back(self, data: Buffer) -> None:
        """Have `data`, the last that was received, received again."""
        self._ahead = memoryview(bytes(data) + bytes(self._ahead))

    def recv_into(self, buffer: Buffer) -> int:
        """Receive what is ahead, else from the channel."""
        view = memoryview(buffer).cast("B")
        if not len(self._ahead):
            look, self._look = self._look, None
            if look is None:
                return super().recv_into(view)
            self._ahead = look.result()
        count = min(len(view), len(self._ahead))
        view[:count], self._ahead = self._ahead[:count], self._ahead[count:]
        return count

    def close(self) -> None:
        """Close the channel; a look that waits in it ends soon."""
        super().close()

    def rest(self) -> None:
        """Wait until nobody is in the channel any more, which must be closed."""
        if self._look is not None:
            self._look.done(None)


class _Look:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._data = memoryview(bytearray(_LOOK))
        self._count = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._wait, name="whimbrel-look", daemon=True)
        self._thread.start()

    def done(self, seconds: float | None) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def in_vain(self) -> bool:
        """Whether it has brought nothing."""
        return self.done(0) and not self._count

    def result(self) -> memoryview:
        """What has come, empty at the end. Raises what the channel raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._data[: self._count]

    def _wait(self) -> None:
        try:
            self._count = self._channel.recv_into(self._data)
        except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
            self._error = exc
