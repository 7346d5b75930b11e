"""`WHIMBREL_TRACE_PLUGINS=1`: every hook call, who is asked and what each answers, on stderr through logging."""

from __future__ import annotations

import logging
import os
import reprlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Trace", "trace_from_environment"]

_VARIABLE: Final = "WHIMBREL_TRACE_PLUGINS"
_LOGGER: Final = "whimbrel.plugins.trace"

# Its fallback for a repr that raises is why this is not plain repr().
_short = reprlib.Repr()
_short.maxother = _short.maxstring = 300
_short.maxlist = _short.maxtuple = 20


class Trace:
    """Writes down hook calls. Any thread."""

    def __init__(self) -> None:
        self._log = logging.getLogger(_LOGGER)
        if not self._log.handlers:  # one for the process, however many managers there are
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("whimbrel plugins: %(message)s"))
            self._log.addHandler(handler)
            self._log.setLevel(logging.DEBUG)
            self._log.propagate = False

    def call(self, hook: str, arguments: Mapping[str, object], plugins: Iterable[str]) -> None:
        """A hook is about to be called on `plugins`."""
        given = ", ".join(f"{name}={_short.repr(value)}" for name, value in arguments.items())
        self._log.debug("%s(%s) asks %s", hook, given, ", ".join(plugins) or "nobody")

    def result(self, hook: str, plugin: str, result: object) -> None:
        """One implementation has answered."""
        self._log.debug("%s: %s -> %s", hook, plugin, _short.repr(result))

    def error(self, hook: str, plugin: str, error: BaseException) -> None:
        """One implementation has raised."""
        self._log.debug("%s: %s raised %s", hook, plugin, _short.repr(error))


def trace_from_environment() -> Trace | None:
    """A trace where the environment asks for it."""
    return Trace() if os.environ.get(_VARIABLE, "0") not in {"", "0"} else None
