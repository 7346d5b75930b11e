"""What is installed, as rows for people and programs: `whimbrel plugins`.

Plain frozen values, made by :meth:`whimbrel.plugins.PluginManager.catalogue`; nothing here imports or asks a plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["KINDS", "Catalogue", "PluginRow", "State"]

State: TypeAlias = Literal["offered", "active", "broken", "disabled"]

KINDS: Final[Mapping[str, str]] = {
    "whimbrel_transports": "transport",
    "whimbrel_savevm_handlers": "savevm",
    "whimbrel_codecs": "codec",
    "whimbrel_dirty_trackers": "dirty tracker",
    "whimbrel_verbs_providers": "verbs provider",
    "whimbrel_witnesses": "witness",
    "whimbrel_check_migration": "check",
    "whimbrel_choose_switchover": "choice",
    "whimbrel_on_event": "notifier",
}
"""What kind of plugin the implementation of a hook makes."""


@attrs.frozen(kw_only=True)
class PluginRow:
    """One plugin: what it is, what it offers, where it is from and how it does.

    `kinds` follow from the hooks it implements and are empty while it could not be imported. `offers` are the names
    of what it offers; those of savevm handlers are missing, for they depend on a machine. `in_use` are
    those of them that are in use without being asked for: the provider of verbs. `reason` says why it is broken or
    disabled.
    """

    name: str
    kinds: tuple[str, ...]
    offers: tuple[str, ...]
    distribution: str
    version: str
    state: State
    reason: str = ""
    in_use: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The row's fields, ready for JSON."""
        columns = ("kinds", "offers", "in_use")
        return {**attrs.asdict(self), **{name: list(getattr(self, name)) for name in columns}}


@attrs.frozen
class Catalogue:
    """All plugins, sorted by name; two that claim one name are two rows, the second of them broken."""

    rows: tuple[PluginRow, ...]

    def __iter__(self) -> Iterator[PluginRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """``{"plugins": [row, …]}``, ready for JSON."""
        return {"plugins": [row.as_dict() for row in self.rows]}
