"""One client's conversation, without its connection: bytes in, replies out; commands are carried out in between.

A session negotiates first (`qmp_capabilities`, and nothing else is taken before), then takes commands one by one, in
order. Whatever comes in, out come replies: an exception never leaves this module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from whimbrel.errors import MonitorError, WhimbrelError
from whimbrel.monitor import protocol
from whimbrel.monitor.context import Context, Then
from whimbrel.monitor.schema import Command

__all__ = ["NEGOTIATION", "Answer", "Session"]

_log = logging.getLogger("whimbrel.monitor")

NEGOTIATION: Final = "qmp_capabilities"


@attrs.frozen
class Answer:
    """The line to send, then what to do behind it: call `then`, and hang up if `last`."""

    line: bytes
    then: Callable[[], object] | None = None
    last: bool = False


class Session:
    """The conversation with one client; used by one thread."""

    def __init__(self, context: Context, commands: Mapping[str, Command]) -> None:
        self._context, self._commands = context, commands
        self._framer = protocol.Framer()
        self.negotiated = False

    def receive(self, data: bytes, descriptors: Sequence[int] = ()) -> Iterator[Answer]:
        """Take bytes, and carry the commands in them out one by one as the answers are asked for.

        `descriptors` came with them, and belong to the session from here on.
        """
        if descriptors:
            self._context.descriptors.came(descriptors)
        try:
            for message in self._framer.feed(data):
                yield self._answer(message)
        except MonitorError as exc:
            yield Answer(protocol.encode(protocol.error(exc.message, exc.error_class)), last=True)

    def end(self) -> None:
        """The client is gone: close the descriptors that are left of it. Twice is fine."""
        self._context.descriptors.end()

    def _answer(self, message: bytes) -> Answer:
        ident: dict[str, Any] = {}
        try:
            value = protocol.parse(message)
            ident = protocol.identity(value)
            result = self._carry_out(protocol.request(value))
            then = result.action if isinstance(result, Then) else None
            result = result.reply if isinstance(result, Then) else result
            return Answer(protocol.encode({"return": result, **ident}), then)
        except MonitorError as exc:
            reply = protocol.error(str(exc), exc.error_class)
        except WhimbrelError as exc:
            reply = protocol.error(str(exc))
        except Exception as exc:  # noqa: BLE001 - a bug behind one command must not end the conversation
            _log.exception("a command failed unexpectedly")
            reply = protocol.error(f"unexpected {type(exc).__name__}: {exc}; this is a bug; the log has its place")
        # What does not even begin like QMP is no QMP client: a browser can be made to send HTTP to any port, and its
        # body must not be taken for commands.
        stranger = not self.negotiated and message[:1] not in (b"{", b"[")
        return Answer(protocol.encode({**reply, **ident}), last=stranger)

    def _carry_out(self, request: protocol.Request) -> Any:
        if not self.negotiated:
            return self._negotiate(request)
        command = self._commands.get(request.command)
        if command is None:
            raise MonitorError(
                f"The command {request.command} has not been found", error_class=protocol.COMMAND_NOT_FOUND
            )
        return command.handler(self._context, **command.read(request.arguments))

    def _negotiate(self, request: protocol.Request) -> dict[str, Any]:
        if request.command != NEGOTIATION:
            raise MonitorError(
                f"Expecting capabilities negotiation with '{NEGOTIATION}'", error_class=protocol.COMMAND_NOT_FOUND
            )
        wanted = self._commands[NEGOTIATION].read(request.arguments).get("enable")
        if wanted:
            raise MonitorError(f"Capability {', '.join(wanted)} not available")
        self.negotiated = True
        return {}
