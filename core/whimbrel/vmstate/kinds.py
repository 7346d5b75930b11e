"""The eleven kinds of number that a field can hold, and how each looks on the wire (wire format, section 7.1).

Every number is big-endian and of its natural size, without alignment; bool is one byte, 0 or 1; floats are their
IEEE 754 bits. A kind's name is its JSON type and, but for `bool`, its numpy dtype.
"""

from __future__ import annotations

import struct
from typing import Any

import attrs
import numpy as np

__all__ = ["KINDS", "Kind"]


@attrs.frozen
class Kind:
    """One kind of number: `code` is the struct module's, `low` and `high` bound an integer's values."""

    name: str
    code: str
    low: int | None = None
    high: int | None = None
    dtype: np.dtype[Any] = attrs.field(init=False, repr=False)
    wire: np.dtype[Any] = attrs.field(init=False, repr=False)
    is_integer: bool = attrs.field(init=False, repr=False)
    plain: type[int | float | bool] = attrs.field(init=False, repr=False)

    @dtype.default
    def _native(self) -> np.dtype[Any]:
        return np.dtype(self.name)

    @wire.default
    def _big_endian(self) -> np.dtype[Any]:
        return np.dtype(self.name).newbyteorder(">")

    @is_integer.default
    def _has_bounds(self) -> bool:
        return self.low is not None

    @plain.default
    def _python_type(self) -> type[int | float | bool]:
        if self.is_integer:
            return int
        return bool if self.name == "bool" else float

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return self.dtype.itemsize

    def pack(self, value: float) -> bytes:
        """The wire bytes of a plain value. Raises OverflowError for a float that is too large."""
        return struct.pack(">" + self.code, value)

    def unpack(self, data: bytes | bytearray) -> int | float | bool:
        """The plain value of some wire bytes."""
        value: int | float | bool = struct.unpack(">" + self.code, data)[0]
        return value


def _integers() -> list[Kind]:
    kinds = []
    for bits, code in ((8, "b"), (16, "h"), (32, "i"), (64, "q")):
        kinds.append(Kind(f"uint{bits}", code.upper(), 0, 2**bits - 1))
        kinds.append(Kind(f"int{bits}", code, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    return kinds


KINDS = {kind.name: kind for kind in [*_integers(), Kind("bool", "?"), Kind("float32", "f"), Kind("float64", "d")]}
