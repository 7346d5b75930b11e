"""QMP as bytes and values (the wire format, section 10.1): framing, parsing, requests, replies and events.

Rules of this module:

* It is pure: no socket, thread or clock. `Framer` cuts bytes into messages, `parse` makes values of them, `request`
  judges what was asked, and the rest writes what is sent.
* Whatever a peer sends is judged here, and what does not fit raises `MonitorError` with QEMU's class and text;
  nothing else is ever raised, for any bytes.
* A JSON object needs no line end behind it and may span several lines, as in QEMU: there are clients that send none.
  Anything else is one line. We end our lines with CR LF.
* Strings may be in single quotes, as QEMU allows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn

import attrs

from whimbrel.errors import MonitorError

__all__ = [
    "COMMAND_NOT_FOUND",
    "GENERIC_ERROR",
    "MAX_DEPTH",
    "MAX_IDENTITY",
    "MAX_MESSAGE",
    "Framer",
    "Request",
    "command",
    "encode",
    "error",
    "event",
    "greeting",
    "identity",
    "parse",
    "request",
    "version",
]

GENERIC_ERROR: Final = "GenericError"
COMMAND_NOT_FOUND: Final = "CommandNotFound"

MAX_MESSAGE: Final = 1 << 20  # bytes of one message; the longest sensible one has a few thousand
MAX_IDENTITY: Final = 4096  # characters of an `id`, as we write it
MAX_DEPTH: Final = 64  # brackets within brackets; the deepest sensible message has five

# The dialect we speak, not what we are: clients look at it to know which commands and texts there are.
DIALECT: Final[Mapping[str, int]] = {"major": 7, "minor": 2, "micro": 22}

_BACKSLASH: Final = ord("\\")
_SPACE: Final = re.compile(rb"[ \t\r\n]*")
# What may change the framing outside of strings. Control characters and 0xFE, 0xFF are never JSON, and QEMU's
# documentation tells clients to send one to get back to a known state.
_OUTSIDE: Final = re.compile(rb"[\"'{}\[\]\x00-\x08\x0b\x0c\x0e-\x1f\xfe\xff]")
_LINE_END: Final = re.compile(rb"[\n\x00-\x08\x0b\x0c\x0e-\x1f\xfe\xff]")
_INSIDE: Final = {
    ord(quote): re.compile(rb"(?:[^\x00-\x1f\xfe\xff\\" + quote + rb"]++|\\[^\x00-\x1f\xfe\xff])*+")
    for quote in (b'"', b"'")
}
# A string that does not end is matched too, to the end of the text: were it not, the search would begin anew at each
# quote within it, and take time quadratic in what anybody may send.
_STRING: Final = re.compile(
    r""""(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|'(?P<inner>(?:[^'\\]++|\\.)*+)(?:'|(?P<open>\\?\Z))""", re.DOTALL
)
_IN_QUOTES: Final = re.compile(r"""\\'|\\.|\"""", re.DOTALL)


class Framer:
    """Cuts a stream of bytes into messages; what is within one is `parse`'s business. One thread."""

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._at = 0  # all before is looked at
        self._depth = 0
        self._quote = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take the next bytes and yield the messages that are complete.

        Raises MonitorError for a message that exceeds a bound; then the stream has no known state any more.
        """
        self._buffer += data
        while (message := self._next()) is not None:
            if len(message) > self._limit:
                break
            yield message
        else:
            if len(self._buffer) <= self._limit:
                return
        raise MonitorError(f"JSON token size limit exceeded: a message may have {self._limit} bytes")

    def _next(self) -> bytes | None:
        if not self._depth:
            if not self._at:
                blank = _SPACE.match(self._buffer)
                del self._buffer[: blank.end() if blank else 0]
            if not self._buffer:
                return None
            if self._buffer[0] not in b"{[":
                return self._rest_of_line()
            self._depth = self._at = 1
        while True:
            if self._quote:
                inside = _INSIDE[self._quote].match(self._buffer, self._at)
                self._at = inside.end() if inside else self._at
                left = len(self._buffer) - self._at
                if not left or (left == 1 and self._buffer[self._at] == _BACKSLASH):
                    return None
                self._at += 1
                if self._buffer[self._at - 1] != self._quote:
                    return self._take()
                self._quote = 0
            found = _OUTSIDE.search(self._buffer, self._at)
            if found is None:
                self._at = len(self._buffer)
                return None
            self._at = found.end()
            if self._ends_at(self._buffer[self._at - 1]):
                return self._take()

    def _ends_at(self, byte: int) -> bool:
        """Count brackets and quotes; whether the message ends here."""
        if byte in b"\"'":
            self._quote = byte
            return False
        if byte in b"{[":
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise MonitorError(f"JSON nesting depth limit exceeded: brackets may be {MAX_DEPTH} deep")
            return False
        if byte in b"}]":
            self._depth -= 1
            return not self._depth
        return True

    def _rest_of_line(self) -> bytes | None:
        end = _LINE_END.search(self._buffer, self._at)
        self._at = end.end() if end else len(self._buffer)
        return self._take() if end else None

    def _take(self) -> bytes:
        message = bytes(self._buffer[: self._at])
        del self._buffer[: self._at]
        self._at = self._depth = self._quote = 0
        return message


def parse(message: bytes) -> Any:
    """Make a value of a message. Raises MonitorError ("JSON parse error, …") for whatever is not JSON."""
    try:
        text = message.decode()
        if "'" in text:
            text = _STRING.sub(_double_quoted, text)
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_number)
        if "\\u" in text:
            # Half a surrogate pair can be written, but never encoded again.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as exc:
        raise MonitorError(f"JSON parse error, {exc.msg[0].lower()}{exc.msg[1:]} at character {exc.pos}") from exc
    except (ValueError, RecursionError) as exc:
        raise MonitorError(f"JSON parse error, {exc}") from exc
    return value


def _double_quoted(string: re.Match[str]) -> str:
    """A string in single quotes as JSON has it."""
    inner = string["inner"]
    if inner is None or string["open"] is not None:
        return string[0]
    spelled = {"\\'": "'", '"': '\\"'}
    return '"' + _IN_QUOTES.sub(lambda part: spelled.get(part[0], part[0]), inner) + '"'


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"invalid keyword '{text}'")


@attrs.frozen
class Request:
    """What a client asks for; its arguments are not judged yet."""

    command: str
    arguments: Mapping[str, Any]


def request(value: object) -> Request:
    """Take a parsed message as a request. Raises MonitorError with QEMU's text for what is none."""
    if not isinstance(value, dict):
        raise MonitorError("QMP input must be a JSON object")
    for member, content in value.items():
        if member == "execute":
            if not isinstance(content, str):
                raise MonitorError("QMP input member 'execute' must be a string")
        elif member == "arguments":
            if not isinstance(content, dict):
                raise MonitorError("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise MonitorError(f"QMP input member '{member}' is unexpected")
    if "execute" not in value:
        raise MonitorError("QMP input lacks member 'execute'")
    return Request(value["execute"], value.get("arguments", {}))


def identity(value: object) -> dict[str, Any]:
    """The member by which the client knows the reply to its message again; empty if it gave none.

    Raises MonitorError for one that is too long to be sent back.
    """
    if not isinstance(value, dict) or "id" not in value:
        return {}
    if len(json.dumps(value["id"])) > MAX_IDENTITY:
        raise MonitorError(f"QMP input member 'id' is too long: it may have {MAX_IDENTITY} characters")
    return {"id": value["id"]}


def encode(message: Mapping[str, Any]) -> bytes:
    """Write one line. Raises ValueError for what JSON cannot say."""
    return json.dumps(message, allow_nan=False).encode() + b"\r\n"


def command(name: str, arguments: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What a client sends; `number` is its id."""
    return {"execute": name, **({"arguments": dict(arguments)} if arguments else {}), "id": number}


def error(text: str, error_class: str = GENERIC_ERROR) -> dict[str, Any]:
    """The reply to a command that failed, without its id."""
    return {"error": {"class": error_class, "desc": text}}


def event(name: str, timestamp: float, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An event; `timestamp` is wall-clock seconds since the epoch."""
    seconds, fraction = divmod(timestamp, 1)
    when = {"seconds": int(seconds), "microseconds": int(fraction * 1_000_000)}
    return {"timestamp": when, "event": name, **({} if data is None else {"data": dict(data)})}


def version() -> dict[str, Any]:
    """The QMP dialect that is spoken, and whose program speaks it (query-version)."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        package = f"whimbrel {version('whimbrel')}"
    except PackageNotFoundError:
        package = "whimbrel"
    return {"qemu": dict(DIALECT), "package": package}


def greeting() -> dict[str, Any]:
    """What a server says first. There is no out-of-band execution, so it is not offered."""
    return {"QMP": {"version": version(), "capabilities": []}}
