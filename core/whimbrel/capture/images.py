"""The images that a captured machine's drives are loaded into: found and locked before anything comes.

A drive's data goes straight into its image, beside the file or the memory that the rest is kept in. The images are
drives of a machine that has nothing else, so they are loaded, marked and locked like those of any other. Where they
are whole, and the source is about to let go, the marks are taken away (`take_over`); if it does not let go after all,
they come back (`give_up`), for what is in the images belongs to nothing then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
from typing import Protocol, runtime_checkable

import attrs

from whimbrel.abc import SaveVMHandler, SectionKind, StreamReader
from whimbrel.capture.walk import BLOCK
from whimbrel.errors import ConfigError, IncompatibleError, MigrationError, Place, StateError
from whimbrel.machine import BareMachine, Drive
from whimbrel.machine.drives import CHUNK, MadeImage, RawImage
from whimbrel.migration.quietly import quietly
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.wire import block as wire


@runtime_checkable
class CountsChunks(Protocol):
    """A handler of drives that can tell how many chunks of a drive came; an ability, declared by having it."""

    def chunks_come(self, name: str) -> int:
        """How many chunks of drive `name` came so far, each counted once."""


@attrs.frozen
class DriveReceipt:
    """A drive that came: where it is kept, how large the image is, and how much of it came, in bytes.

    `made`: the image was not there before.
    """

    name: str
    image: str
    size: int
    came: int
    made: bool


class Images:
    """The images of some drives, by the drives' names; one use, one thread. `close` when everything is over.

    With `create` an image that is not there is made, as large as what comes. Raises ConfigError for one that cannot be
    opened or made, StateError for one that is in use; nothing is left then.
    """

    def __init__(
        self,
        paths: Mapping[str, str | PathLike[str]],
        *,
        create: bool,
        settings: Settings,
        plugins: PluginManager,
    ) -> None:
        self._machine = BareMachine("drives", settings=settings)
        self._plugins = plugins
        self._handler: SaveVMHandler | None = None
        self._handler_finished = False
        self._unmarked = False
        self._settled = False  # they stay as they are
        try:
            for name, path in paths.items():
                self._add(name, path, create=create)
            self._machine.expect_arrival()
        except BaseException:
            self._remove_made()
            self._machine.close()
            raise

    def __len__(self) -> int:
        return len(self._machine.drives)

    def _add(self, name: str, path: str | PathLike[str], *, create: bool) -> None:
        drives = self._machine.drives
        if create and not os.path.lexists(path):
            drive = drives.add(name, MadeImage(path))
        else:
            drive = drives.add(name, _there(path))
        drive.device.acquire()

    # -------------------------------------------------------------------------------------------- the stream

    def load(self, reader: StreamReader, kind: SectionKind, version_id: int) -> None:
        """Load one body of the section. Raises MigrationError."""
        if kind is SectionKind.START:
            if version_id != wire.VERSION_ID:
                raise IncompatibleError(f"the block section has version {version_id}, expected {wire.VERSION_ID}")
            self._handler = self._find_handler()
        assert self._handler is not None, "a PART without START"
        self._handler.load(reader, kind, version_id)

    def complete(self) -> None:
        """All of the stream is here: flush the images. Raises MigrationError for one that is not whole."""
        if not len(self):
            return
        if self._handler is None:
            names = ", ".join(repr(drive.name) for drive in self._machine.drives)
            raise IncompatibleError(
                f"the stream has no drives, and was to have {names}",
                hint="send them along at the source (blk, or the capability block)",
            )
        self._handler.commit()
        for drive in self._machine.drives:
            self._check_made(drive)
        self._handler_finished = True
        self._handler.finish()

    def take_over(self) -> None:
        """They are whole, and somebody's: take the marks away, durably. Raises MigrationError."""
        if self._handler is None:
            return
        try:
            self._machine.drives.take_over()
        except StateError as exc:
            raise MigrationError(exc.message, hint=exc.hint) from exc
        self._unmarked = True

    def settle(self) -> None:
        """From here on they may be the only ones: whatever happens, they stay as they are."""
        self._settled = True

    def give_up(self) -> None:
        """Nobody wants them: those that were written into are marked as not whole, those that were made go.

        Nothing happens to what is settled. Twice is fine.
        """
        if self._settled:
            return
        self._settled = True
        if self._handler is not None and not self._handler_finished:
            quietly(self._handler.rollback, "the rollback of the drives")
            quietly(self._handler.finish, "the end of the drives")
        for drive in self._machine.drives:
            if self._unmarked and self._came(drive):
                quietly(partial(_mark, drive), f"marking {drive.device.place!r}")
        self._remove_made()

    def receipts(self) -> tuple[DriveReceipt, ...]:
        """What came, once it is complete."""
        return tuple(
            DriveReceipt(
                drive.name,
                drive.device.place,
                drive.size,
                min(self._came(drive) * CHUNK, drive.size),
                isinstance(drive.device, MadeImage),
            )
            for drive in self._machine.drives
        )

    def spoiled(self) -> list[str]:
        """The images that are marked as not whole now."""
        return [drive.device.place for drive in self._machine.drives if drive.device.incomplete]

    def close(self) -> None:
        """Let go of the images. Twice is fine."""
        self._machine.close()

    # --------------------------------------------------------------------------------------------- internals

    def _find_handler(self) -> SaveVMHandler:
        specs = self._plugins.savevm_handlers(self._machine, self._machine.settings.plugins.savevm)
        for spec in specs:
            for handler in spec.create():
                if handler.idstr == BLOCK:
                    return handler
        raise IncompatibleError(
            "no plugin offers a savevm handler for drives", hint="[plugins] savevm says which are used"
        )

    def _came(self, drive: Drive) -> int:
        """Chunks of it that came."""
        if not isinstance(self._handler, CountsChunks):
            return 0
        return self._handler.chunks_come(drive.name)

    def _check_made(self, drive: Drive) -> None:
        """Nothing tells how large a drive is but what comes of it, so nothing of it may be missing."""
        if not isinstance(drive.device, MadeImage):
            return
        came, chunks = self._came(drive), drive.device.end // CHUNK
        if came < max(chunks, 1):
            raise IncompatibleError(
                f"only {came} of {chunks} chunks of drive {drive.name!r} came, and nothing else tells how large it is",
                hint="with inc only what is allocated comes: make the image yourself then, as large as the source's",
                place=Place(block=drive.name),
            )

    def _remove_made(self) -> None:
        for drive in self._machine.drives:
            if isinstance(drive.device, MadeImage):
                drive.device.remove()


@contextmanager
def leaving(paths: Mapping[str, str | PathLike[str]], *, any_size: bool) -> Iterator[dict[str, RawImage]]:
    """Images that are to be sent, by their drives' names: open and locked, so that they stay what they are.

    Raises ConfigError for one that cannot be opened, or that a QEMU 7.2 does not take unless `any_size`; StateError for
    one that is in use or not whole.
    """
    with ExitStack() as stack:
        found: dict[str, RawImage] = {}
        for name, path in paths.items():
            image = found[name] = RawImage(path)
            stack.callback(image.close)
            image.acquire()
            if image.incomplete:
                raise StateError(
                    f"the image {image.place!r} of drive {name!r} is not whole: a load into it has not ended",
                    hint="load it again, or remove the marker file beside it if you know that it is whole",
                )
            if not any_size:
                _refuse_odd(name, image)
        yield found


def _refuse_odd(name: str, image: RawImage) -> None:
    """A QEMU 7.2 writes the last MiB of a drive whole, also where it is a part of one, and fails; zeros it does not."""
    rest = image.size % CHUNK
    tail = bytearray(rest)
    image.read_into(image.size - rest, tail)
    if any(tail):
        raise ConfigError(
            f"the image {image.place!r} of drive {name!r} has {image.size} bytes, which is no multiple of 1 MiB, and "
            "its last part is not zero: a QEMU 7.2 fails to load that",
            hint=f"enlarge it here and there (`truncate -s {image.size - rest + CHUNK}`); --force sends it to others",
        )


def _there(path: str | PathLike[str]) -> str | PathLike[str]:
    if not os.path.lexists(path):
        raise ConfigError(
            f"there is no image {os.fspath(path)!r}", hint="make it as large as the source's, or let --create do it"
        )
    return path


def _mark(drive: Drive) -> None:
    drive.device.acquire()
    drive.begin_load()
