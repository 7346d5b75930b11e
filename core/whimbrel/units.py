"""Sizes, rates and times as people write them, both ways.

Rules of this module:

* Sizes are binary, as in QEMU: ``K`` is 1024 bytes and ``128M`` is 128 MiB. ``KiB`` says the same; ``KB``, which some
  read as 1000, is refused. The case of a suffix does not matter.
* A number without a suffix is in the unit that the function's name or docstring says.
* Text is refused unless all of it is understood. Nothing is negative, and nothing exceeds 64 bits.
* What is parsed is exact (no binary fractions on the way); what is formatted for people is rounded, and says so by
  showing a fraction.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from whimbrel.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "format_rate",
    "format_seconds",
    "format_size",
    "parse_milliseconds",
    "parse_rate",
    "parse_seconds",
    "parse_size",
]

_PREFIXES: Final = "KMGTPE"
_SIZES: Final[Mapping[str, int]] = {
    "": 1,
    "b": 1,
    **{suffix: 1024**power for power, k in enumerate("kmgtpe", 1) for suffix in (k, f"{k}i", f"{k}ib")},
}
_TIMES: Final[Mapping[str, Decimal]] = {
    "us": Decimal("0.000001"),
    "µs": Decimal("0.000001"),
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
    "h": Decimal(3600),
}

_LARGEST_SIZE: Final = 2**64 - 1
_LONGEST_TIME: Final = Decimal(10) ** 9  # seconds; some thirty years

# Digits are bounded so that no text, however long, costs time.
_NUMBER: Final = re.compile(r"(?P<number>[0-9]{1,20}(?:\.[0-9]{1,20})?)[ ]*(?P<suffix>[A-Za-zµ]*)")


def parse_size(text: str | int) -> int:
    """Read a size such as ``"1GiB"``, ``"64 MiB"``, ``"128M"`` or ``4096``, in bytes.

    A fraction is rounded to the nearest byte. Raises ConfigError.
    """
    return _binary(text, "a size in bytes", 'such as 4096, "64KiB" or "1.5GiB"')


def parse_rate(text: str | int) -> int:
    """Read a rate such as ``"1GiB"``, ``"1GiB/s"`` or ``125000000``, in bytes per second.

    Bits are refused: a line of 1 Gbit/s carries 125000000 bytes per second. Raises ConfigError.
    """
    bare = text[:-2] if isinstance(text, str) and text.endswith("/s") else text
    return _binary(bare, "a rate in bytes per second", 'such as 125000000, "64MiB" or "1GiB/s"', came=text)


def parse_seconds(text: str | float) -> float:
    """Read a time such as ``"300ms"``, ``"2s"``, ``"1m"`` or ``1.5``; a bare number is in seconds.

    Raises ConfigError.
    """
    return float(_duration(text, Decimal(1), "a time in seconds", 'such as 10, "500ms", "2s" or "1m"'))


def parse_milliseconds(text: str | int) -> int:
    """Read a time such as ``"300ms"``, ``"2s"`` or ``300``; a bare number is in milliseconds.

    Raises ConfigError, also where it is not a whole number of milliseconds.
    """
    expected, examples = "a time in whole milliseconds", 'such as 300, "300ms" or "2s"'
    thousandths = _duration(text, _TIMES["ms"], expected, examples) * 1000
    if thousandths != int(thousandths):
        raise _unfit(text, expected, examples)
    return int(thousandths)


def format_size(count: int, *, exact: bool = False) -> str:
    """Write a size for people: ``"1.5 GiB"``, ``"64 MiB"``, ``"512 B"``.

    A fraction means that it was rounded, to one digit; with `exact` it is written in the largest unit that leaves no
    remainder. `parse_size` reads either.
    """
    if exact:
        power = next((p for p in range(len(_PREFIXES), 0, -1) if count and count % 1024**p == 0), 0)
        return f"{count // 1024**power} {_unit(power)}"
    power = min(max(0, (abs(count).bit_length() - 1) // 10), len(_PREFIXES))
    if count % 1024**power == 0:
        return f"{count // 1024**power} {_unit(power)}"
    shown = f"{count / 1024**power:.1f}"
    if abs(float(shown)) >= 1024 and power < len(_PREFIXES):
        power, shown = power + 1, "1.0" if count > 0 else "-1.0"
    return f"{shown} {_unit(power)}"


def format_rate(bytes_per_second: float) -> str:
    """Write a rate for people: ``"118.2 MiB/s"``."""
    return f"{format_size(round(bytes_per_second))}/s"


def format_seconds(seconds: float) -> str:
    """Write a time for people, to about three digits: ``"812 µs"``, ``"4.2 ms"``, ``"2.5 s"``, ``"1 min 5 s"``."""
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _unit(power: int) -> str:
    return f"{_PREFIXES[power - 1]}iB" if power else "B"


def _unfit(came: object, expected: str, examples: str) -> ConfigError:
    # An integer of thousands of digits cannot even be written.
    shown = "a huge number" if isinstance(came, int) and came.bit_length() > 128 else repr(came)[:60]
    return ConfigError(f"{shown} is not {expected}", hint=f"write it {examples}")


def _binary(text: str | int, expected: str, examples: str, came: object = None) -> int:
    came = text if came is None else came
    if isinstance(text, int) and not isinstance(text, bool):
        number, suffix = Decimal(text), ""
    elif isinstance(text, str) and (found := _NUMBER.fullmatch(text.strip())):
        number, suffix = Decimal(found["number"]), found["suffix"].lower()
    else:
        raise _unfit(came, expected, examples)
    if suffix not in _SIZES or (_SIZES[suffix] == 1 and number != int(number)):
        raise _unfit(came, expected, examples)
    size = int((number * _SIZES[suffix]).to_integral_value())
    if not 0 <= size <= _LARGEST_SIZE:
        raise _unfit(came, expected, examples)
    return size


def _duration(text: str | float, bare: Decimal, expected: str, examples: str) -> Decimal:
    if isinstance(text, int) and not isinstance(text, bool):
        duration = Decimal(text) * bare
    elif isinstance(text, float) and math.isfinite(text):
        duration = Decimal(repr(text)) * bare  # 0.3 as it was written, not as it is stored
    elif isinstance(text, str) and (found := _NUMBER.fullmatch(text.strip())):
        suffix = found["suffix"].lower()
        if suffix and suffix not in _TIMES:
            raise _unfit(text, expected, examples)
        duration = Decimal(found["number"]) * (_TIMES[suffix] if suffix else bare)
    else:
        raise _unfit(text, expected, examples)
    if not 0 <= duration <= _LONGEST_TIME:
        raise _unfit(text, expected, examples)
    return duration
