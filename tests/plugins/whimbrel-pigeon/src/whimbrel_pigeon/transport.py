"""`pigeon:FOLDER`: a loft with a door, and two named pipes for every pigeon.

::

    FOLDER/door           whoever connects writes 32 hexadecimal digits here: the pigeon's name
    FOLDER/NAME.there     from the end that connected to the end that listens; begins with one zero byte
    FOLDER/NAME.back      the other way

The end that connects makes its two pipes, opens `back`, and knocks. The end that listens opens `back` and then
`there`, so once `there` can be opened for writing both pipes are whole, and their names are removed. The zero byte
tells the listener that the pigeon did not die in between: a pipe nobody ever wrote to is silent, not at its end.
"""

from __future__ import annotations

import errno
import os
import re
import select
import stat
import uuid
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from pickle import PickleBuffer
from threading import Lock
from typing import TYPE_CHECKING, Final

from whimbrel.abc import Channel, Listener, Patience, Transport
from whimbrel.errors import ChannelClosed, ChannelLost, ConfigError, ConnectError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

__all__ = ["PigeonChannel", "PigeonListener", "PigeonTransport"]

_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE: Final = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
_NAME: Final = re.compile(rb"[0-9a-f]{32}")
_GREETING: Final = b"\0"
_GREETING_TIME: Final = 1.0  # seconds a pigeon has, from being let in to its first byte
_SLICE: Final = 0.05  # seconds between looks at the patience


class PigeonTransport(Transport):
    """Channels through named pipes."""

    def connect(self, address: str, patience: Patience) -> Channel:
        """Connect to whoever listens at the loft `address`; returns when it has accepted.

        Raises ConfigError, ConnectError and MigrationCancelled, leaving nothing behind.
        """
        loft, what = _loft(address), f"connecting to 'pigeon:{address}'"
        name = uuid.uuid4().hex
        there, back = loft / f"{name}.there", loft / f"{name}.back"
        patience.check(what)
        with _mapped(f"Failed to connect to 'pigeon:{address}'"), ExitStack() as always, ExitStack() as on_failure:
            door = _open_pipe(loft / "door", _WRITE)
            always.callback(os.close, door)
            for pipe in (there, back):
                os.mkfifo(pipe, 0o600)
                always.callback(pipe.unlink, missing_ok=True)
            reader = os.open(back, _READ)
            on_failure.callback(os.close, reader)
            while not _knock(door, name):
                _pause(door, patience, what)
            while (writer := _open_if_read(there)) is None:
                _pause(door, patience, what)
            on_failure.callback(os.close, writer)
            os.write(writer, _GREETING)
            channel = PigeonChannel(reader, writer, f"pigeon:{address}")
            on_failure.pop_all()
        return channel

    def listen(self, address: str) -> Listener:
        """Make the loft `address` and open its door. Raises ConfigError, ConnectError, leaving nothing behind."""
        loft = _loft(address).absolute()
        with _mapped(f"Failed to listen on 'pigeon:{address}'"), ExitStack() as on_failure:
            try:
                loft.mkdir(mode=0o700)
                on_failure.callback(loft.rmdir)
            except FileExistsError:
                if not loft.is_dir():
                    raise ConfigError(f"cannot listen on 'pigeon:{address}': it exists and is not a folder") from None
            _clear(loft / "door")
            os.mkfifo(loft / "door", 0o600)
            on_failure.callback((loft / "door").unlink)
            # Writable too, so that the door is not at its end whenever the last pigeon has let go of it.
            door = os.open(loft / "door", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            on_failure.callback(os.close, door)
            listener = PigeonListener(door, loft, f"pigeon:{address}")
            on_failure.pop_all()
        return listener


class PigeonListener(Listener):
    """An open door."""

    def __init__(self, door: int, loft: Path, uri: str) -> None:
        self.uri = uri
        self._door, self._loft = door, loft
        self._wake = os.eventfd(0)
        self._accepting, self._closing = Lock(), Lock()
        self._closed = False

    def accept(self, patience: Patience) -> Channel:
        """Wait for a pigeon. Raises MigrationCancelled and ConnectError, staying usable; ChannelClosed once closed."""
        with self._accepting, _mapped(f"waiting at {self.uri} failed"):
            while not self._closed:
                patience.check(f"waiting for a peer at {self.uri}")
                if not _readable(self._door, patience, self._wake):
                    continue
                with suppress(BlockingIOError):
                    channel = self._let_in(os.read(self._door, 32), patience)
                    if channel is not None:
                        return channel
        raise ChannelClosed(f"the listener at {self.uri} was closed")

    def close(self) -> None:
        """Wake a blocked `accept`, wait for it to leave, and take the door and the empty loft away."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
            with self._accepting:
                for remove in ((self._loft / "door").unlink, self._loft.rmdir):
                    with suppress(OSError):  # a pigeon on its way out takes its own pipes along
                        remove()
                os.close(self._door)
                os.close(self._wake)

    def _let_in(self, name: bytes, patience: Patience) -> Channel | None:
        if not _NAME.fullmatch(name):
            return None
        pigeon = self._loft / name.decode()
        with ExitStack() as on_failure:
            try:
                writer = _open_pipe(pigeon.with_suffix(".back"), _WRITE)
                on_failure.callback(os.close, writer)
                reader = _open_pipe(pigeon.with_suffix(".there"), _READ)
                on_failure.callback(os.close, reader)
            except OSError:
                return None  # it has flown
            greeting = Patience(_GREETING_TIME, patience.cancelled)
            while not self._closed and greeting.remaining() > 0 and patience.remaining() > 0:
                if _readable(reader, greeting, self._wake):
                    if os.read(reader, 1) != _GREETING:
                        return None
                    channel = PigeonChannel(reader, writer, self.uri)
                    on_failure.pop_all()
                    return channel
                if patience.cancelled.is_set():
                    break
        return None


class PigeonChannel(Channel):
    """Two pipes, both non-blocking; whoever waits for one also waits for the channel to be closed."""

    duplex = True

    def __init__(self, reader: int, writer: int, peer: str) -> None:
        self.peer = peer
        self._reader, self._writer = reader, writer
        self._wake = os.eventfd(0)
        self._reading, self._writing, self._closing = Lock(), Lock(), Lock()
        self._closed = self._ended = False

    def recv_into(self, buffer: Buffer) -> int:
        """Wait for at least one byte, as `Channel.recv_into` says."""
        with self._inside(self._reading):
            while True:
                # A pipe without writers is at its end for read(), but for poll() only once it has had one.
                self._wait(self._reader, select.POLLIN)
                with suppress(BlockingIOError):
                    return os.readv(self._reader, [buffer])

    def send(self, data: Buffer) -> None:
        """Send all of `data`, as `Channel.send` says."""
        with self._inside(self._writing):
            if self._ended:
                raise ChannelClosed(f"writing to {self.peer} was ended")
            rest = PickleBuffer(data).raw()  # as bytes, whatever its shape and items
            while rest:
                self._wait(self._writer, select.POLLOUT)
                with suppress(BlockingIOError):
                    rest = rest[os.write(self._writer, rest) :]

    def end_writing(self) -> None:
        """Close our pipe, as `Channel.end_writing` says."""
        with self._inside(self._writing):
            if not self._ended:
                self._ended = True
                os.close(self._writer)

    def close(self) -> None:
        """Wake whoever is blocked, wait for them to leave, and close both pipes."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
            with self._reading, self._writing:
                for descriptor in (self._reader, self._wake, *(() if self._ended else (self._writer,))):
                    os.close(descriptor)

    @contextmanager
    def _inside(self, lock: Lock) -> Iterator[None]:
        with lock:
            self._check()
            try:
                yield
            except OSError as error:  # and again at every later call: nobody can open these pipes any more
                raise ChannelLost(f"the pipes of {self.peer} broke: {error.strerror}") from error

    def _wait(self, descriptor: int, events: int) -> None:
        poller = select.poll()
        poller.register(descriptor, events)
        poller.register(self._wake, select.POLLIN)
        poller.poll()
        self._check()

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the pipes of {self.peer} were closed on this side")


def _loft(address: str) -> Path:
    if not address or "\0" in address:
        raise ConfigError(f"the loft is {address!r}; expected pigeon:FOLDER")
    return Path(address)


def _open_pipe(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags)
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is not a pipe")
    return descriptor


def _open_if_read(path: Path) -> int | None:
    """The pipe, if somebody has it open for reading."""
    try:
        return _open_pipe(path, _WRITE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _clear(door: Path) -> None:
    """Remove a door that nobody is behind. Raises OSError for one that is in use or no door."""
    if door.exists():
        behind = _open_if_read(door)
        if behind is not None:
            os.close(behind)
            raise OSError(errno.EADDRINUSE, "somebody listens there already")
        door.unlink()


def _knock(door: int, name: str) -> bool:
    try:
        os.write(door, name.encode())  # so short that a pipe takes all of it or nothing
    except BlockingIOError:
        return False  # many others knock
    return True


def _pause(door: int, patience: Patience, what: str) -> None:
    """A short wait while the listener is there. Raises ConnectError and MigrationCancelled."""
    patience.check(what)
    poller = select.poll()
    poller.register(door, 0)
    if poller.poll(0):
        raise ConnectError(f"nobody listens any more while {what}")
    patience.cancelled.wait(_SLICE / 20)


def _readable(descriptor: int, patience: Patience, wake: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    poller.register(wake, select.POLLIN)
    return any(ready == descriptor for ready, _ in poller.poll(min(_SLICE, patience.remaining()) * 1000))


@contextmanager
def _mapped(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "nobody listens there" if error.errno == errno.ENXIO else error.strerror
        raise ConnectError(f"{what}: {reason}") from error
