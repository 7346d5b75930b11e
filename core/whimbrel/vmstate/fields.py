"""Fields: what one attribute of an object looks like in a section (wire format, section 7.1).

The rules:

* A field's name is the attribute's name. Nothing of it is on the wire: both sides know the order.
* There are three classes of field and no more: numbers, buffers of raw bytes, and structs described by another
  description. Users call the functions below; what these return is frozen and checked when it is made.
* An array has either a fixed `length` or a `count`: the name of an earlier integer field. A counted array must say
  its `maximum`, because a receiver takes sizes from its own description, never from the stream.
* `low` and `high` bound a value (each value of an array), both included. Without them a NaN is a value like any
  other; with them it is refused.
* `equal=True`: what arrives must be what the receiver has already (a port count, a model number).
* `since=K`: present in versions K and later of the description.

Where values live: numbers and bytes on plain attributes; arrays in a list or in a numpy array of the field's dtype and
of any shape; buffers in bytes, a bytearray or a uint8 numpy array. For a *counted* field a list, bytes or bytearray
holds exactly `count` elements and changes its length with it; a numpy array has room for `maximum`, of which the first
`count` (in C order) are transferred and the rest is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeGuard

import attrs

from whimbrel.errors import ConfigError
from whimbrel.vmstate.kinds import KINDS, Kind

if TYPE_CHECKING:
    from typing import Unpack

    from whimbrel.vmstate.description import VMStateDescription

__all__ = [
    "MAXIMUM_BODY",
    "MAXIMUM_ELEMENTS",
    "BufferField",
    "Field",
    "NumberField",
    "StructField",
    "bool_",
    "buffer",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "struct",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]

MAXIMUM_ELEMENTS = 65_536  # structs in one device's section: each costs the receiver objects, not just its bytes
MAXIMUM_BODY = 16 * 1024 * 1024  # bytes of one device's section: what a receiver is ready to hold of a peer's words
MAXIMUM_VERSION = 2**31 - 1  # QEMU keeps versions in an int


@attrs.frozen(kw_only=True)
class _Shape:
    """What all fields share: a name, a size that is fixed or counted, and the version that brought them."""

    name: str
    length: int | None = None
    count: str | None = None
    maximum: int | None = None
    since: int = 0

    def __attrs_post_init__(self) -> None:
        self._check_shape()

    @property
    def is_array(self) -> bool:
        """Whether there may be another number of elements than one."""
        return self.length is not None or self.count is not None

    @property
    def capacity(self) -> int:
        """The most elements there can be (bytes, for a buffer)."""
        if self.count is not None:
            return self.maximum or 0
        return 1 if self.length is None else self.length

    def wrong(self, what: str, hint: str) -> ConfigError:
        """A ConfigError about this field, to be raised."""
        return ConfigError(f"field {self.name!r}: {what}", hint=hint)

    def _check_shape(self) -> None:
        if not _is_attribute_name(self.name):
            raise self.wrong("the name is not that of an attribute", "use an ASCII Python identifier")
        if not is_whole(self.since) or not 0 <= self.since <= MAXIMUM_VERSION:
            raise self.wrong(f"since={self.since!r}", "give the version of the description, 0 or more, as an int")
        length = "size" if isinstance(self, BufferField) else "length"
        if self.length is not None and self.count is not None:
            raise self.wrong(f"both {length} and count", f"give {length} if it never changes, else count and maximum")
        if self.length is not None and not self._is_size(self.length):
            raise self.wrong(f"{length}={self.length!r}", f"give an int from 1 to {MAXIMUM_BODY}")
        if self.count is None and self.maximum is not None:
            raise self.wrong(
                "maximum without count", "maximum is the capacity of a counted array; for a range use high"
            )
        if self.count is not None and not isinstance(self.count, str):
            raise self.wrong(f"count={self.count!r}", "give the name of an earlier integer field, or a fixed length")
        if self.count is not None and not self._is_size(self.maximum):
            raise self.wrong(f"counted, with maximum={self.maximum!r}", f"give an int from 1 to {MAXIMUM_BODY}")

    @staticmethod
    def _is_size(value: object) -> bool:
        return is_whole(value) and 1 <= value <= MAXIMUM_BODY


@attrs.frozen(kw_only=True)
class NumberField(_Shape):
    """A number, or an array of numbers, of one `kind`."""

    kind: Kind
    low: float | None = None
    high: float | None = None
    equal: bool = False

    def __attrs_post_init__(self) -> None:
        self._check_shape()
        for name in ("low", "high"):
            bound = getattr(self, name)
            if bound is not None:
                # As a value on the wire would be rounded: 0.1 is within high=0.1, whatever a float32 makes of it.
                object.__setattr__(self, name, self._checked_bound(name, bound))
        if self.low is not None and self.high is not None and self.low > self.high:
            raise self.wrong(f"low={self.low!r} is above high={self.high!r}", "swap them")

    def _checked_bound(self, name: str, bound: object) -> float:
        kind = self.kind
        if kind.low is not None and kind.high is not None:
            if is_whole(bound) and kind.low <= bound <= kind.high:
                return bound
            raise self.wrong(f"{name}={bound!r}", f"give an int from {kind.low} to {kind.high}: it is {kind.name}")
        if kind.plain is bool:
            raise self.wrong(f"{name}={bound!r}", "a bool has no range; leave it out")
        if (isinstance(bound, float) or is_whole(bound)) and bound == bound:
            try:
                return kind.unpack(kind.pack(bound))
            except OverflowError:
                raise self.wrong(f"{name}={bound!r}", f"it is too large for a {kind.name}; leave it out") from None
        raise self.wrong(f"{name}={bound!r}", "give a number that is not NaN")


@attrs.frozen(kw_only=True)
class BufferField(_Shape):
    """Raw bytes; `length` is its fixed size."""

    equal: bool = False

    def __attrs_post_init__(self) -> None:
        self._check_shape()
        if not self.is_array:
            raise self.wrong("a buffer of no size", "give size=N, or count='field' and maximum=N")


@attrs.frozen(kw_only=True)
class StructField(_Shape):
    """An object of its own, or an array of them, described by `description`; see :func:`struct`."""

    description: VMStateDescription
    factory: Callable[[], Any] | None = None

    def __attrs_post_init__(self) -> None:
        self._check_shape()
        if self.factory is not None and not callable(self.factory):
            raise self.wrong(f"factory={self.factory!r}", "give a callable without arguments that makes one element")
        if self.factory is not None and not self.is_array:
            raise self.wrong("a factory for a single struct", "the object must have it already; leave factory out")


Field: TypeAlias = NumberField | BufferField | StructField


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_attribute_name(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isidentifier()


class _Options(TypedDict, total=False):
    length: int | None
    count: str | None
    maximum: int | None
    equal: bool
    since: int


class _Integer(_Options, total=False):
    low: int | None
    high: int | None


class _Float(_Options, total=False):
    low: float | None
    high: float | None


def uint8(name: str, **options: Unpack[_Integer]) -> NumberField:
    """Declare an unsigned 8-bit integer, or an array of them (for raw bytes rather use `buffer`)."""
    return NumberField(kind=KINDS["uint8"], name=name, **options)


def uint16(name: str, **options: Unpack[_Integer]) -> NumberField:
    """Declare an unsigned 16-bit integer, or an array of them."""
    return NumberField(kind=KINDS["uint16"], name=name, **options)


def uint32(name: str, **options: Unpack[_Integer]) -> NumberField:
    """Declare an unsigned 32-bit integer, or an array of them."""
    return NumberField(kind=KINDS["uint32"], name=name, **options)


def uint64(name: str, **options: Unpack[_Integer]) -> NumberField:
    """Declare an unsigned 64-bit integer, or an array of them."""
    return NumberField(kind=KINDS["uint64"], name=name, **options)


def int8(name: str, **options: Unpack[_Integer]) -> NumberField:
    """Declare a signed 8-bit integer, or an array of them."""
    return NumberField(kind=KINDS["int8"], name=name, **options)


def int16(name: str, **options: Unpack[_Integer]) -> NumberField:
    """Declare a signed 16-bit integer, or an array of them."""
    return NumberField(kind=KINDS["int16"], name=name, **options)


def int32(name: str, **options: Unpack[_Integer]) -> NumberField:
    """Declare a signed 32-bit integer, or an array of them."""
    return NumberField(kind=KINDS["int32"], name=name, **options)


def int64(name: str, **options: Unpack[_Integer]) -> NumberField:
    """Declare a signed 64-bit integer, or an array of them."""
    return NumberField(kind=KINDS["int64"], name=name, **options)


def bool_(name: str, **options: Unpack[_Options]) -> NumberField:
    """Declare a truth value, or an array of them: one byte each, 0 or 1 and nothing else."""
    return NumberField(kind=KINDS["bool"], name=name, **options)


def float32(name: str, **options: Unpack[_Float]) -> NumberField:
    """Declare a 32-bit float, or an array of them; a Python float is rounded to it, one too large is refused."""
    return NumberField(kind=KINDS["float32"], name=name, **options)


def float64(name: str, **options: Unpack[_Float]) -> NumberField:
    """Declare a 64-bit float, or an array of them; every bit travels, NaNs too."""
    return NumberField(kind=KINDS["float64"], name=name, **options)


def buffer(
    name: str,
    *,
    size: int | None = None,
    count: str | None = None,
    maximum: int | None = None,
    equal: bool = False,
    since: int = 0,
) -> BufferField:
    """Declare raw bytes: `size` of them, or as many as the earlier field `count` says, at most `maximum`."""
    return BufferField(name=name, length=size, count=count, maximum=maximum, equal=equal, since=since)


def struct(
    name: str,
    description: VMStateDescription,
    *,
    length: int | None = None,
    count: str | None = None,
    maximum: int | None = None,
    factory: Callable[[], Any] | None = None,
    since: int = 0,
) -> StructField:
    """Declare an object within the object, or an array of them.

    A struct has no version on the wire: it always has its description's. An array lives in a list. With `factory` (a
    callable that makes one element) the list is made as long as the sender's; without it the receiver's list must
    have enough elements already, and those past `count` are left alone.
    """
    return StructField(
        name=name, description=description, length=length, count=count, maximum=maximum, factory=factory, since=since
    )
