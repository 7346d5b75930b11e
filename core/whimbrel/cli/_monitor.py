"""What the commands ask of a monitor, whimbrel's or a QEMU's (which knows less, and is asked for what it knows)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from whimbrel.errors import ConfigError, MonitorError, WhimbrelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import TypeAlias

    from whimbrel.monitor import MonitorClient

    Info: TypeAlias = dict[str, Any]
    """A migration as `MigrationInfo.as_dict` and `x-whimbrel-info` tell it."""

ENDS: Final = frozenset({"none", "completed", "failed", "cancelled"})
"""Migration statuses in which none runs."""


@contextmanager
def connected(address: str) -> Iterator[MonitorClient]:
    """A client of the monitor at `address`. Raises MonitorError or ConfigError."""
    from whimbrel.monitor import MonitorClient

    client = MonitorClient.connect(address)
    try:
        yield client
    finally:
        client.close()


def info_of(client: MonitorClient) -> Info:
    """How the machine's migration stands; `status` is always there. Raises MonitorError."""
    try:
        info: Info = client.execute("x-whimbrel-info")
    except MonitorError as exc:
        if exc.error_class != "CommandNotFound":
            raise
        info = {
            **client.execute("query-migrate"),
            "run-state": client.execute("query-status").get("status", ""),
            "name": client.execute("query-name").get("name", ""),
        }
    info.setdefault("status", "none")
    return info


def exit_status(info: Info) -> int:
    """What to exit with for a migration that has ended as `info` says."""
    if info["status"] == "completed":
        return 0
    status = _classes().get(info.get("error-code") or info["status"], WhimbrelError).exit_code
    # Settings have been set and a migration has begun, so this is not the status that says nothing has changed.
    return WhimbrelError.exit_code if status == ConfigError.exit_code else status


def counters(info: Info) -> Mapping[str, Any]:
    """The counters of RAM, which are missing before a migration has begun in earnest and after it failed."""
    ram = info.get("ram", {})
    assert isinstance(ram, dict)
    return ram


def _classes() -> dict[str, type[WhimbrelError]]:
    found, known = [WhimbrelError], {}
    for kind in found:
        known[kind.code] = kind
        found += kind.__subclasses__()
    return known
