"""What people and programs beside a migration send: URIs and other words, and the monitor's JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

from fuzz import machines
from fuzz.target import Target, expect
from whimbrel import Settings, units
from whimbrel.errors import ConfigError, MonitorError
from whimbrel.migration.uri import resolve
from whimbrel.monitor import COMMANDS, Command
from whimbrel.monitor.addresses import parse_address
from whimbrel.monitor.context import Context
from whimbrel.monitor.protocol import MAX_MESSAGE, Framer
from whimbrel.monitor.session import Session
from whimbrel.plugins import PluginManager
from whimbrel_transports import _words, fd, file, unix
from whimbrel_transports._hosts import parse_host_and_port


class Uris(Target):
    """Text: as a URI with its address, an address of a monitor, a command line, and a size or time."""

    name = "uri"
    longest = 512

    def __init__(self) -> None:
        self._plugins = PluginManager()
        # Those that read an address without going there.
        self._addresses: dict[str, Callable[[str], object]] = {
            "tcp": lambda text: parse_host_and_port(text, "TCP"),
            "unix": unix._check, "fd": fd._parse, "file": file._parse, "exec": _words.split,
        }  # fmt: skip

    def seeds(self) -> Iterable[bytes]:
        """One of each kind, and what is not quite one."""
        for text in (
            "tcp:127.0.0.1:4444", "tcp:[::1]:0", "tcp:localhost:1,to=3", "unix:/run/w.sock", "fd:7",
            "file:/tmp/w,offset=0x10",
            "file:w,offset=1MiB", "exec:cat 'a b' \"c\\\"d\" e\\ f", "exec:A=1 b", "pigeon:x", "tcp:", ":", "unix:\0",
            "16MiB", "1.5GiB", "500ms", "2 s", "10Gbit/s", "fd:99999999999", "tcp:1.2.3.4:65536", "tcp:a b:1",
        ):  # fmt: skip
            yield text.encode()

    def try_one(self, data: bytes) -> str:
        """Read it in every way."""
        text = data.decode("utf-8", "surrogateescape")
        for parse in (parse_address, units.parse_size, units.parse_rate, units.parse_seconds, units.parse_milliseconds):
            self._try(lambda parse=parse: parse(text))  # type: ignore[misc]
        try:
            destination = resolve(text, self._plugins)
        except ConfigError as exc:
            return exc.code
        parse_here = self._addresses.get(destination.spec.name)
        if parse_here is None:
            return "resolved"
        return self._try(lambda: parse_here(destination.address))

    @staticmethod
    def _try(action: Callable[[], object]) -> str:
        try:
            action()
        except ConfigError as exc:
            expect(len(str(exc)) < 8192, "an error says too much")
            return exc.code
        return "parsed"


# Those that touch nothing but the machine; of the others the arguments are judged, and nothing is done.
_DONE: Final = frozenset({"qmp_capabilities", "migrate-set-parameters", "migrate-set-capabilities"})


def _harmless() -> Mapping[str, Command]:
    def nothing(context: Context, **arguments: Any) -> dict[str, Any]:  # noqa: ARG001 - any will do
        return {}

    return {
        name: command if name in _DONE or name.startswith("query-") else attrs.evolve(command, handler=nothing)
        for name, command in COMMANDS.items()
    }


class Monitor(Target):
    """A client's side of a conversation with a monitor."""

    name = "qmp"
    longest = 4096

    def __init__(self) -> None:
        self._machine = machines.build(Settings(), machines.plugins())
        self._commands = _harmless()

    def seeds(self) -> Iterable[bytes]:
        """A negotiation, and a command each."""
        hello = b'{"execute": "qmp_capabilities"}\n'
        yield hello
        for name in COMMANDS:
            yield hello + json.dumps({"execute": name, "arguments": {}, "id": 7}).encode() + b"\r\n"
        yield hello + b"{'execute': 'migrate', 'arguments': {'uri': 'tcp:127.0.0.1:1', 'blk': true}}"
        yield hello + b'{"execute": "migrate-set-parameters", "arguments": {"downtime-limit": 300}}'
        yield hello + (
            b'{"execute": "migrate-set-capabilities", "arguments": '
            b'{"capabilities": [{"capability": "xbzrle", "state": true}]}}'
        )
        yield hello + b'[1, "\\ud800", {"a": 1e999}]\n\xff{"execute": 1}'

    def try_one(self, data: bytes) -> str:
        """Say it, and frame it whole and byte by byte."""
        session = Session(Context(self._machine), self._commands)
        answers = [answer for part in (data[:100], data[100:]) for answer in session.receive(part)]
        session.end()
        for answer in answers:
            expect(len(answer.line) < 1 << 18, "an answer is too long")
            reply = json.loads(answer.line)
            expect(("return" in reply) != ("error" in reply), "an answer is neither a return nor an error")
        expect(self._framed([data]) == self._framed([data[at : at + 1] for at in range(len(data))]), "frames differ")
        return "negotiated" if session.negotiated else "stranger"

    @staticmethod
    def _framed(parts: list[bytes]) -> list[bytes | str]:
        framer, messages = Framer(MAX_MESSAGE), list[bytes | str]()
        try:
            for part in parts:
                messages += framer.feed(part)
        except MonitorError as exc:
            messages.append(str(exc))
        return messages

    def close(self) -> None:
        """Close the machine."""
        self._machine.close()
