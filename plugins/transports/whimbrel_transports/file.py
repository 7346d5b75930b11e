"""`file:PATH[,offset=N]`: a regular file that takes the stream, or gives it.

Connecting writes a new file and puts it at PATH when it is whole and on the disk; until then what was at PATH stays as
it was. With an offset the new file begins with the first N bytes of the old one, and the stream follows. Listening
reads from N on, to the end. N is a size as everywhere (`4KiB`, `512`), or hexadecimal behind `0x`.

A file knows no answer, so there is no proof. Links are not followed, and a device or a pipe at PATH is left alone.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from whimbrel.abc import Channel, Listener, Patience, Transport, TransportSpec
from whimbrel.errors import ConfigError
from whimbrel.hookspecs import hookimpl
from whimbrel.units import parse_size
from whimbrel_transports._files import FileReader, FileWriter, Place
from whimbrel_transports._one_way import OnceListener
from whimbrel_transports._sockets import connecting, listening

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FileTransport", "whimbrel_transports"]

LARGEST_OFFSET: Final = (1 << 63) - 1
_HEXADECIMAL: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}")
_EXPECTED: Final = "expected file:PATH or file:PATH,offset=N"


@hookimpl
def whimbrel_transports() -> Sequence[TransportSpec]:
    """Offer `file:`."""
    return [
        TransportSpec(name="file", summary="a regular file, file:PATH[,offset=N]", create=FileTransport, duplex=False)
    ]


class FileTransport(Transport):
    """Channels to and from regular files."""

    def connect(self, address: str, patience: Patience) -> Channel:
        """Begin a file that will be at `address`. Raises ConfigError, ConnectError and MigrationCancelled."""
        path, offset = _parse(address)
        patience.check(f"making '{address}'")
        with connecting(address):
            return FileWriter(path, offset, patience, f"file:{address}")

    def listen(self, address: str) -> Listener:
        """Open the file at `address`. Raises ConfigError and ConnectError, leaving nothing open."""
        path, offset = _parse(address)
        with listening(address):
            descriptor = _opened(path, offset)
        uri = f"file:{address}"
        return OnceListener(uri, lambda _: True, lambda: FileReader(descriptor, uri), lambda: os.close(descriptor))


def _opened(path: str, offset: int) -> int:
    place = Place(path)
    try:
        descriptor = place.open()
    finally:
        place.close()
    size = os.fstat(descriptor).st_size
    if offset > size:
        os.close(descriptor)
        raise ConfigError(f"{path!r} has {size} bytes, so there is nothing at offset {offset}")
    os.lseek(descriptor, offset, os.SEEK_SET)
    return descriptor


def _parse(address: str) -> tuple[str, int]:
    path, comma, text = address.partition(",offset=")
    name = path.rpartition("/")[2]
    try:
        encodable = os.fsencode(path)
    except UnicodeError:
        encodable = b"\0"
    if name in {"", ".", ".."} or b"\0" in encodable:
        raise ConfigError(f"{address!r} names no file; {_EXPECTED}")
    return path, _offset(text, address) if comma else 0


def _offset(text: str, address: str) -> int:
    try:
        offset = int(text, 16) if _HEXADECIMAL.fullmatch(text) else parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"file URI has bad offset {text!r} in {address!r}: {error.message}") from error
    if offset > LARGEST_OFFSET:
        raise ConfigError(f"file URI has bad offset {text!r} in {address!r}: no file is so large")
    return offset
