"""Control messages of RDMA: what one SEND has brought, and the places that it speaks of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from fuzz.target import MIB, Target, expect
from whimbrel.errors import ProtocolError
from whimbrel.wire import rdma
from whimbrel.wire.rdma import ControlType


class Control(Target):
    """A message whole; its first eight bytes also as private data. Every place it yields is inside of a block."""

    name = "rdma"
    longest = 4096
    sizes: ClassVar = (3 * MIB, MIB + 4096, 4096)

    def __init__(self) -> None:
        self._layout = rdma.Layout(self.sizes)
        self._places: dict[ControlType, Callable[[Any], Any]] = {
            ControlType.RAM_BLOCKS_RESULT: self._layout.check_told,
            ControlType.COMPRESS: lambda records: [part for part, _ in self._layout.compressed(records)],
            ControlType.REGISTER_REQUEST: self._layout.registered,
            ControlType.UNREGISTER_REQUEST: self._layout.unregistered,
        }

    def seeds(self) -> Iterable[bytes]:
        """A message of each kind."""
        yield rdma.private_data(pin_all=True) + bytes(8)
        yield rdma.message(ControlType.READY)
        yield rdma.header(ControlType.QEMU_FILE, 5) + b"bytes"
        yield rdma.message(ControlType.RAM_BLOCKS_RESULT, self._layout.told([1 << 40, 2 << 40, 3 << 40], [1, 2, 3]))
        compressed = np.array([(0, 0, 4096, 4096), (7, 1, 3 * MIB, MIB)], rdma.COMPRESSED)
        registered = np.array([(MIB, 0, 0, 1), (3 * MIB, 1, 0, 1)], rdma.REGISTERED)
        yield rdma.message(ControlType.COMPRESS, compressed)
        yield rdma.message(ControlType.REGISTER_REQUEST, registered)
        yield rdma.message(ControlType.REGISTER_RESULT, np.array([(1, 0, 1 << 40)], rdma.RESULT))
        yield rdma.message(ControlType.UNREGISTER_REQUEST, np.array([(1, 0, 0, 1)], rdma.REGISTERED))

    def try_one(self, data: bytes) -> str:
        """Parse it, and find its places."""
        with suppress(ProtocolError):
            rdma.parse_private_data(data[: rdma.PRIVATE_SIZE])
        try:
            message = rdma.parse_message(memoryview(data))
            find = self._places.get(message.kind)
            if find is None:
                return "parsed"
            for part in find(message.records()) or ():
                inside = 0 <= part.start < part.start + part.length <= self.sizes[part.block]
                expect(inside, "a place is outside of its block")
        except ProtocolError as exc:
            return exc.code
        return "placed"
