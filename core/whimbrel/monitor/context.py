"""What the handlers of commands are given, and what they may give back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from whimbrel.migration import Machine

__all__ = ["Context", "Then"]


@attrs.frozen
class Context:
    """What handlers work on: a machine, and how to end the program around it, if that is possible."""

    machine: Machine
    quit: Callable[[], object] | None = None


@attrs.frozen
class Then:
    """A reply and what is to be done once it is on its way."""

    reply: dict[str, Any]
    action: Callable[[], object]
