"""What a target is, and what every input must keep to whatever it is.

An input is parsed, or refused with an error of ours; nothing else leaves a target. It takes no more than a second for
each 64 KiB, by the processor's clock; what it may allocate is bounded by who runs the target: by the address space
(`fuzz.run`), or byte by byte (`tests/hostile/test_structured.py`). After a refusal nothing is as it was not before,
which each target sees to by itself. A finding is an exception.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Final

UNIT: Final = 1 << 16  # bytes of input for each of which a second may pass
MIB: Final = 1 << 20


class Broken(Exception):
    """An input that was not dealt with as every input must be."""


class Target(ABC):
    """One kind of bytes. One thread; an instance lives for many inputs, none of which may change it."""

    name: ClassVar[str]
    longest: ClassVar[int] = 8192
    """Bytes of the longest input worth trying."""
    room: ClassVar[int] = 4 * MIB
    """Bytes that an input may make us take, besides 64 for each of its own: buffers of a fixed size."""

    @abstractmethod
    def seeds(self) -> Iterable[bytes]:
        """Inputs that are right, or nearly so: what everything begins with."""

    @abstractmethod
    def try_one(self, data: bytes) -> str:
        """Try one input, and return a word for what came of it. Raises Broken, and whatever else is a finding."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Release what the instance holds."""


def judge(target: Target, data: bytes) -> str:
    """Try one input within its time; returns what came of it. Raises Broken if it took longer."""
    began = time.process_time()
    outcome = target.try_one(data)
    taken, allowed = time.process_time() - began, 1.0 + len(data) / UNIT
    if taken > allowed:
        raise Broken(f"{len(data)} bytes took {taken:.1f} s, and may take {allowed:.1f} s")
    return outcome


def expect(fact: bool, words: str) -> None:
    """Raise Broken with `words` unless it is so."""
    if not fact:
        raise Broken(words)
