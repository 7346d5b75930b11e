"""Opens a file that a stream is stored in: the `file` transport read from, in words that speak of a file."""

from __future__ import annotations

import os
import stat
from contextlib import closing
from os import PathLike
from typing import Final

from whimbrel.abc import Channel, Patience
from whimbrel.errors import ConfigError, ConnectError
from whimbrel.migration.uri import resolve
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings

_OFFSET: Final = ",offset="


def open_stream(path: str | PathLike[str], settings: Settings, plugins: PluginManager) -> Channel:
    """A channel that gives the bytes of a file; links are followed, as whoever reads a file expects.

    As in a file's URI, `PATH,offset=N` begins N bytes later. Raises ConfigError for a path that names no regular file,
    ConnectError for a file that is not there or cannot be read, and UnknownNameError where no plugin offers `file`;
    nothing is open then. Any thread.
    """
    text = os.fspath(path)
    name, comma, offset = text.partition(_OFFSET)
    _check(text, name if comma else "")
    source = resolve(f"file:{os.path.realpath(name)}{comma}{offset}", plugins)
    try:
        with closing(source.spec.create().listen(source.address)) as listener:
            return listener.accept(Patience(settings.limits.connect_timeout))
    except ConnectError as exc:
        raise _cannot(name, exc.__cause__) from exc


def _check(text: str, named: str) -> None:
    """`named` is the path where `text` is one with an offset behind it."""
    try:
        if named and os.path.lexists(text):
            raise ConfigError(f"{text!r} cannot be told from an offset into {named!r}", hint="rename the file")
        found = os.stat(named or text)  # noqa: PTH116 - a path as text: an empty one is none
    except OSError as exc:
        raise _cannot(named or text, exc) from exc
    except ValueError:  # a NUL, or half a character
        raise ConfigError(f"{text!r} names no file") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise ConfigError(f"{named or text!r} is {kind}, expected a file with a stream in it")


def _cannot(path: str, cause: BaseException | None) -> ConnectError:
    reason = cause.strerror if isinstance(cause, OSError) else None
    return ConnectError(f"{path!r} cannot be read: {reason or cause or 'it cannot be opened'}")
