"""What the handlers of commands are given, and what they may give back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from whimbrel.migration import Machine
from whimbrel.monitor.descriptors import Descriptors

__all__ = ["Context", "Then"]


@attrs.frozen
class Context:
    """What handlers work on: a machine, and how to end the program around it, if that is possible.

    `allow_exec` says whether a client may have a program run (`TransportSpec.runs_programs`); `descriptors` are those
    that this client has passed.
    """

    machine: Machine
    quit: Callable[[], object] | None = None
    allow_exec: bool = False
    descriptors: Descriptors = attrs.field(factory=Descriptors)


@attrs.frozen
class Then:
    """A reply and what is to be done once it is on its way."""

    reply: dict[str, Any]
    action: Callable[[], object]
