"""Waits for one source at a URI and stores its machine in a file: what `whimbrel receive` does.

The file is complete and on the disk before the source hears that all is well. It holds each page once, in the form
that the stream came in, and loads in whatever loads such streams. Drives are not in it: they are in images of their
own, whole and on the disk by then too.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Final

import attrs

from whimbrel.abc import Patience
from whimbrel.capture.images import DriveReceipt, Images
from whimbrel.capture.machine import CapturedMachine
from whimbrel.capture.taking import Capture, CaptureUndecided, file_uri
from whimbrel.errors import (
    ChannelLost,
    ConfigError,
    HandoverUndecided,
    MigrationCancelled,
    MigrationError,
    Place,
    WhimbrelError,
)
from whimbrel.migration.lanes import Expected, accept
from whimbrel.migration.lanes.connecting import missing_lanes
from whimbrel.migration.machine import manager_for
from whimbrel.migration.statistics import TransferInfo
from whimbrel.migration.uri import resolve
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.wire import description

FOR_EVER: Final = float("inf")
OFFSET: Final = ",offset="  # what a file's URI has behind the path
_A_DAY: Final = 86400.0

_log = logging.getLogger("whimbrel")


@attrs.frozen(kw_only=True)
class Receipt:
    """What was received: sizes in bytes, times in seconds from the first byte.

    `told` says whether the source listened and was told that all is well. `guessed`: the devices were told apart
    without description and footers.
    """

    file: str
    machine: str
    ram: int
    blocks: int
    devices: int
    received: int
    stored: int
    seconds: float
    storing_seconds: float
    told: bool
    guessed: bool
    drives: tuple[DriveReceipt, ...] = ()


class Reception:
    """One wait for one machine; one use. `run` on the calling thread, the others from any.

    `file` must not be there, unless `replace`. `drives` are the images that drives go into, by the drives' names: they
    are there, and large enough, or made with `create`; they are locked until the end. A source that does not listen has
    let go when its last byte is written, and then the only copy is here: if it cannot be stored, `elsewhere` is asked
    for another path, until it has none. Raises ConfigError, ConnectError, and StateError for an image that is in use,
    with nothing left behind.
    """

    def __init__(
        self,
        uri: str,
        file: str | os.PathLike[str],
        *,
        drives: Mapping[str, str | os.PathLike[str]] = MappingProxyType({}),
        create: bool = False,
        max_ram: int | None = None,
        replace: bool = False,
        elsewhere: Callable[[MigrationError], str | os.PathLike[str] | None] = lambda _: None,
        settings: Settings | None = None,
        plugins: PluginManager | None = None,
    ) -> None:
        settings = settings if settings is not None else Settings()
        self._settings = _for_files(settings)
        self._plugins = plugins if plugins is not None else manager_for(self._settings)
        self._expected = Expected.of(settings, self._plugins)
        self._file, self._replace = Path(file), replace
        _check_file(self._file, replace=replace)
        self._file = self._file.absolute()  # whatever folder is the current one by then
        self._max_ram, self._elsewhere = max_ram, elsewhere
        self._patience = Patience(FOR_EVER)
        self._deciding = threading.Lock()  # a cancel and the file's name exclude each other
        self._decided = False
        self._capture: Capture | None = None
        self._peer: str | None = None
        self._storing = self._storing_seconds = 0.0
        self._stored = 0  # bytes of the file, once it is there
        self._described = False  # the file has the description
        source = resolve(uri, self._plugins)
        if self._expected is not None and (problems := missing_lanes(source)):
            raise ConfigError("; ".join(problems))
        self._several = source.spec.several
        self._images = Images(drives, create=create, settings=self._settings, plugins=self._plugins)
        try:
            self._listener = source.listen(settings)
        except BaseException:
            self._images.give_up()
            self._images.close()
            raise
        self.uri = self._listener.uri
        """Where the source connects to, with what the system chose filled in."""

    @property
    def received(self) -> int:
        """Bytes of the stream so far."""
        return 0 if self._capture is None else self._capture.received

    @property
    def peer(self) -> str | None:
        """Who the source is, once it has connected."""
        return self._peer

    @property
    def spoiled(self) -> list[str]:
        """The images that are marked as not whole now: whimbrel does not use them before they are loaded again."""
        return self._images.spoiled()

    @property
    def storing(self) -> bool:
        """Whether everything has come and is being stored."""
        return self._storing != 0.0

    @property
    def progress(self) -> tuple[int, int]:
        """While it is being stored: how many bytes of RAM are through, and how many there are."""
        machine = self._capture.machine if self._capture is not None else None
        attempt = machine.migration if machine is not None else None
        ram = attempt.info.ram if attempt is not None else TransferInfo()
        return ram.total - ram.remaining, ram.total

    def cancel(self) -> bool:
        """Give it up; a source that listens goes on. Returns at once.

        False where it is too late: all has come from a source that does not listen, and its machine is stored all the
        same; or the file is in its place, and a source that listens is being told so.
        """
        with self._deciding:
            if self._decided:
                return False
            self._patience.cancelled.set()
        if self._capture is None:
            return True
        self._capture.cancel()
        if self._capture.heard and self._capture.machine is not None:
            self._capture.machine.cancel_migration()  # that into the file
        return self._capture.heard or not self.storing

    def _decide(self) -> None:
        """It is stored, and is to have its name. Raises MigrationCancelled if that came first, and nothing is lost."""
        assert self._capture is not None, "stored before anything was taken"
        with self._deciding:
            if self._patience.cancelled.is_set() and self._capture.heard:
                raise MigrationCancelled("cancelled; a source that listens goes on")
            self._decided = True

    def run(self) -> Receipt:
        """Wait, take and store. Raises as `CapturedMachine.load`, MigrationCancelled, and what storing raises."""
        try:
            return self._run()
        except BaseException:
            self._images.give_up()
            raise
        finally:
            self._images.close()

    def _run(self) -> Receipt:
        gathered = accept(
            self._listener,
            self._patience,
            self._expected,
            uuid=None,
            limits=self._settings.limits,
            several=self._several,
        )
        began, self._peer = time.monotonic(), gathered.main.peer
        self._capture = Capture(
            gathered,
            settings=self._settings,
            plugins=self._plugins,
            max_ram=self._max_ram,
            images=self._images,
            keep=self._store,
        )
        if self._patience.cancelled.is_set():
            gathered.bundle().close()
            raise MigrationCancelled("cancelled; a source that listens goes on")
        machine = self._take(self._capture)
        try:
            self._describe(machine)
            return Receipt(
                file=os.fspath(self._file),
                machine=machine.name,
                ram=machine.ram.total,
                blocks=len(machine.ram),
                devices=len(machine.captured),
                received=self._capture.received,
                stored=self._stored,
                seconds=time.monotonic() - began,
                storing_seconds=self._storing_seconds,
                told=self._capture.told,
                guessed=machine.guessed,
                drives=self._images.receipts(),
            )
        finally:
            machine.close()

    def _take(self, capture: Capture) -> CapturedMachine:
        try:
            return capture.run()
        except CaptureUndecided as exc:
            exc.machine.close()  # what was stored stays
            exc.hint = f"ask the source: if it runs on, {str(self._file)!r} is a copy from its past and must not be run"
            raise
        except BaseException:
            if self._stored:  # and the source goes on
                self._file.unlink(missing_ok=True)
            raise

    def _store(self, machine: CapturedMachine) -> None:
        assert self._capture is not None, "stored before anything was taken"
        self._storing = time.monotonic()
        self._described = machine.form().text is not None
        asked, replace = self._file, self._replace
        while True:
            try:
                self._stored = _put(machine, self._file, replace=replace, before=self._decide)
                break
            except WhimbrelError as exc:
                problem = exc if isinstance(exc, MigrationError) else MigrationError(exc.message, hint=exc.hint)
                if self._capture.heard:
                    problem.hint = f"{problem.hint + '; ' if problem.hint else ''}its source goes on"
                another = None if self._capture.heard else self._elsewhere(problem)
                if another is None:
                    raise problem from exc
                self._file, replace = Path(another).absolute(), self._replace and Path(another) == asked
        self._storing_seconds = time.monotonic() - self._storing

    def _describe(self, machine: CapturedMachine) -> None:
        """Add a description that came after the machine was stored: the file is a valid stream before and after."""
        text = machine.form().text
        if text is None or self._described:
            return
        try:
            with self._file.open("r+b", buffering=0) as out:
                if out.seek(0, os.SEEK_END) != self._stored:
                    raise OSError(errno.ESTALE, "it is not what was stored")
                try:
                    _write_all(out, description.frame(text))
                    os.fsync(out.fileno())
                except OSError:
                    out.truncate(self._stored)
                    raise
                self._stored = out.tell()
        except OSError as exc:
            _log.warning("%s has the whole machine, but not its description: %s", self._file, exc.strerror)


def _write_all(out: io.RawIOBase, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[out.write(rest) or 0 :]


def _put(machine: CapturedMachine, file: Path, *, replace: bool, before: Callable[[], object]) -> int:
    """Store `machine` in `file`, which is there whole or not at all; replaces nothing that has come meanwhile, unasked.

    Returns the file's size. `before` is called when it is stored and has only to be given its name. Raises as `save`
    does, in words that speak of `file`, and what `before` raises.
    """
    _check_file(file, replace=replace)
    beside = file.with_name(f".whimbrel-{secrets.token_hex(8)}")
    try:
        save(machine, beside)
    except MigrationError as exc:
        raise _in_words(exc, beside, file) from exc
    try:
        stored = beside.stat().st_size
        before()
        _move(beside, file, replace=replace)
    except OSError as exc:
        machine.reclaim()
        if isinstance(exc, FileExistsError):
            raise ConfigError(f"{str(file)!r} is there already", hint="--force replaces it") from exc
        raise ChannelLost(f"{str(file)!r} cannot be made: {exc.strerror}") from exc
    finally:
        with suppress(OSError):
            beside.unlink()
    return stored


def _move(beside: Path, file: Path, *, replace: bool) -> None:
    """Give what is `beside` the name `file`, which nothing may have unless `replace`. Raises OSError."""
    try:
        if replace:
            beside.replace(file)
        else:
            os.link(beside, file)
    except FileExistsError:
        raise
    except OSError:
        if replace:
            raise
        if os.path.lexists(file):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        beside.rename(file)  # a file system without links
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError:
        file.unlink(missing_ok=True)
        raise
    finally:
        os.close(folder)


def _in_words(exc: MigrationError, beside: Path, file: Path) -> MigrationError:
    """What went wrong with the file itself, which is nothing that came from the source or went to a destination."""
    if isinstance(exc.__cause__, OSError) and not isinstance(exc, ChannelLost):
        return ChannelLost(f"{str(file)!r} cannot be made: {exc.__cause__.strerror}")
    exc.message, exc.place = exc.message.replace(file_uri(beside), repr(str(file))), Place()
    return exc


def save(machine: CapturedMachine, file: Path) -> None:
    """Store `machine`, which can be saved again if that fails. Raises MigrationError, ConfigError for the path."""
    migration = machine.migrate(file_uri(file))
    try:
        migration.wait()
    except HandoverUndecided as exc:
        machine.reclaim()
        raise (exc.__cause__ if isinstance(exc.__cause__, WhimbrelError) else exc) from exc


def _for_files(settings: Settings) -> Settings:
    """Settings for a machine whose next place is a file: as fast as it goes, however long the disk takes."""
    copy = settings.copy()
    copy.parameters.max_bandwidth = 0
    copy.capabilities.multifd = False
    copy.parameters.tls_creds = copy.parameters.tls_hostname = copy.parameters.tls_authz = ""  # a file has no other end
    copy.limits.handover_timeout = _A_DAY
    return copy


def _check_file(file: Path, *, replace: bool) -> None:
    """What is wrong with the place must be said before a source has let go of its machine."""
    if OFFSET in str(file):
        raise ConfigError(f"{str(file)!r} cannot be told from an offset into a file", hint="give it another name")
    try:
        found = os.lstat(file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as exc:  # ValueError of a NUL
        raise ConfigError(f"{str(file)!r} cannot be the path of a file: {exc}") from exc
    else:
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
            raise ConfigError(f"{str(file)!r} is {kind}, expected the path of a file")
        if not replace:
            raise ConfigError(f"{str(file)!r} is there already", hint="--force replaces it")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as exc:
        raise ConfigError(f"no file can be made in {str(file.parent)!r}: {exc.strerror}") from exc
