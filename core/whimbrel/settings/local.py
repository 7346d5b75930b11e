"""The settings that are whimbrel's own: backends, plugins and limits. None of them shows on the wire."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from whimbrel import units
from whimbrel.errors import ConfigError
from whimbrel.settings.kinds import Dialect, Kind, setting
from whimbrel.settings.section import Section, judged

__all__ = ["Backends", "Limits", "PluginChoices"]

_DIGITS: Final = re.compile(r"[0-9]{1,20}", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Own(Kind):
    """The base of these kinds: one sentence for whatever does not fit."""

    def unfit(self, name: str) -> ConfigError:
        return ConfigError(f"Setting '{name}' expects {self.expects}")


@attrs.frozen
class _Amount(_Own):
    """A whole number, or a size."""

    expects: str
    low: int
    high: int
    unit: str = ""

    def read(self, name: str, value: object, dialect: Dialect) -> int:
        if isinstance(value, str) and self.unit == "bytes":
            try:
                value = units.parse_size(value)
            except ConfigError as error:
                raise self.unfit(name) from error
        elif isinstance(value, str) and dialect is Dialect.TEXT and _DIGITS.fullmatch(value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise self.unfit(name)
        return value

    def show(self, value: Any) -> str:
        return f'"{units.format_size(value, exact=True).replace(" ", "")}"' if self.unit == "bytes" else str(value)


@attrs.frozen
class _Seconds(_Own):
    """A time in seconds."""

    expects: str
    low: float
    high: float = 86400.0
    unit: str = "s"

    def read(self, name: str, value: object, dialect: Dialect) -> float:  # noqa: ARG002 - times have units everywhere
        try:
            seconds = units.parse_seconds(value) if isinstance(value, str | int | float) else -1.0
        except ConfigError as error:
            raise self.unfit(name) from error
        if not self.low <= seconds <= self.high:
            raise self.unfit(name)
        return seconds

    def show(self, value: Any) -> str:
        return f"{value:g}"


class _Name(_Own):
    """The name of an offer."""

    expects = 'a name such as "auto"'

    def read(self, name: str, value: object, dialect: Dialect) -> str:  # noqa: ARG002 - names are names everywhere
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise self.unfit(name)
        return value

    def show(self, value: Any) -> str:
        return f'"{value}"'


class _Memory(_Own):
    """Where the memory of a machine comes from."""

    expects = '"anonymous", "memfd" or "file:PATH"'

    def read(self, name: str, value: object, dialect: Dialect) -> str:  # noqa: ARG002
        if isinstance(value, str) and (value in {"anonymous", "memfd"} or re.fullmatch(r"file:[^\0]+", value)):
            return value
        raise self.unfit(name)

    def show(self, value: Any) -> str:
        return f'"{value}"'


class _Witness(_Own):
    """A kind of witness and its place, or none."""

    expects = '"" for none, or KIND:PLACE such as "folder:/mnt/shared"'

    def read(self, name: str, value: object, dialect: Dialect) -> str:  # noqa: ARG002
        if isinstance(value, str) and (not value or re.fullmatch(rf"{_NAME.pattern}:[^\0-\x1f\x7f]+", value)):
            return value
        raise self.unfit(name)

    def show(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)


class _Names(_Own):
    """A list of names, each once; kept as a tuple, so that it changes as a whole or not at all."""

    expects = 'a list of names, each once, such as ["log"]'

    def read(self, name: str, value: object, dialect: Dialect) -> tuple[str, ...]:
        if dialect is Dialect.TEXT and isinstance(value, str):
            value = [item.strip() for item in value.split(",")] if value.strip() else []
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise self.unfit(name)
        if not all(isinstance(item, str) and _NAME.fullmatch(item) for item in value) or len(set(value)) != len(value):
            raise self.unfit(name)
        return tuple(value)

    def show(self, value: Any) -> str:
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"


class _Preferences(_Own):
    """A table of offer to plugin."""

    expects = 'a table of offers and plugins such as {tcp = "my-transports"}'

    def read(self, name: str, value: object, dialect: Dialect) -> dict[str, str]:
        if dialect is Dialect.TEXT and isinstance(value, str):
            pairs = [item.partition("=") for item in value.split(",")] if value.strip() else []
            value = {offer.strip(): plugin.strip() for offer, _, plugin in pairs}
            if len(value) != len(pairs):
                raise self.unfit(name)
        if not isinstance(value, Mapping):
            raise self.unfit(name)
        for item in (*value.keys(), *value.values()):
            if not isinstance(item, str) or not _NAME.fullmatch(item):
                raise self.unfit(name)
        return dict(value)

    def show(self, value: Any) -> str:
        return "{" + ", ".join(f'{offer} = "{plugin}"' for offer, plugin in value.items()) + "}"


def _seconds(expects: str, low: float = 0.001) -> _Seconds:
    return _Seconds(f'{expects}, such as 10 or "500ms"', low)


def _count(high: int) -> _Amount:
    return _Amount(f"a whole number from 1 to {high}", 1, high)


_SIZE: Final = _Amount('a size from "4KiB" to "4GiB", such as "16MiB"', 4096, 4 << 30, "bytes")
_WINDOW: Final = _Amount('a size from "1KiB" to "2GiB", such as "8MiB"', 1 << 10, 2 << 30, "bytes")


@attrs.define(kw_only=True, on_setattr=judged)
class Backends(Section):
    """What a machine is made of; counts when it is made."""

    dirty_tracker: str = setting(
        _Name(),
        "auto",
        'how writes to memory are noticed: the name of a dirty tracker, or "auto" for the best that works',
    )
    memory: str = setting(
        _Memory(),
        "anonymous",
        'where memory comes from: of this process alone, shareable with others ("memfd"), or a file',
    )
    verbs_provider: str = setting(
        _Name(),
        "auto",
        'what carries one-sided writes (rdma): the name of a verbs provider, or "auto" for the best that works',
    )
    witness: str = setting(
        _Witness(),
        "",
        'what decides who owns a machine when the link dies in its handover, such as "folder:/mnt/shared"; "" for none',
    )


@attrs.define(kw_only=True, on_setattr=judged)
class PluginChoices(Section):
    """Which plugins are heard. Installed makes a plugin available, named here makes it active."""

    notifiers: Sequence[str] = setting(_Names(), (), "plugins that are told of events")
    active: Sequence[str] = setting(
        _Names(), (), "plugins whose checks of a migration and whose choice of the switchover are heard"
    )
    savevm: Sequence[str] = setting(
        _Names(), ("ram", "block", "devices"), "the savevm handlers that make up a stream; both ends need the same"
    )
    disable: Sequence[str] = setting(_Names(), (), "plugins that are never loaded")
    prefer: Mapping[str, str] = setting(_Preferences(), dict, "whose offer is meant where two plugins offer one name")


@attrs.define(kw_only=True, on_setattr=judged)
class Limits(Section):
    """How long to wait and how much to take from a peer; counts from the start of a migration."""

    connect_timeout: float = setting(_seconds("a time up to a day"), 10.0, "how long a connection may take to be made")
    handshake_timeout: float = setting(
        _seconds("a time up to a day"), 10.0, "how long the handshake of TLS may take, on each connection"
    )
    keepalive: float = setting(
        _seconds("a time up to a day, or 0 for never", 0.0),
        10.0,
        "how long a TCP connection may be silent before the peer's host is asked whether it is there",
    )
    peer_timeout: float = setting(
        _seconds("a time up to a day, or 0 for what the system has", 0.0),
        60.0,
        "how long the peer's host may answer nothing, or its process take nothing, before a TCP connection is lost",
    )
    strangers: int = setting(
        _count(1000), 8, "connections that are not known yet, or are nobody's, which a destination bears at a time"
    )
    header_timeout: float = setting(
        _seconds("a time up to a day"), 10.0, "how long a peer that has connected may take to send the stream's header"
    )
    handover_timeout: float = setting(
        _seconds("a time up to a day", 0.0),
        0.0,
        "how long the source waits, with its guest stopped, for the destination to say that it has everything; "
        "0 for four times the downtime-limit and at least 2 s",
    )
    idle_timeout: float = setting(
        _seconds("a time up to a day", 0.0),
        30.0,
        "how long a source waits for a link that takes no byte and brings no answer; 0 for ever",
    )
    sections: int = setting(_count(1_000_000), 4096, "sections in one stream")
    blocks: int = setting(_count(1_000_000), 4096, "RAM blocks in one stream")
    description: int = setting(_SIZE, 16 << 20, "bytes of the description at the end of a stream")
    device_section: int = setting(_SIZE, 16 << 20, "bytes of one device's section, where a machine is captured")
    device_sections: int = setting(_SIZE, 64 << 20, "bytes of all device sections, where a machine is captured")
    zstd_window: int = setting(
        _WINDOW,
        8 << 20,
        "bytes that a peer may make each lane remember with multifd-compression zstd; level 20 of QEMU's wants 32 MiB",
    )
