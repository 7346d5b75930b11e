"""Who is there: finds, imports, validates and registers plugins, and remembers what became of each."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import pluggy

from whimbrel import hookspecs
from whimbrel.errors import PluginRefused
from whimbrel.plugins import _discovery
from whimbrel.plugins._contract import HOOKS, find_fault
from whimbrel.plugins._records import Record, said

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["Registry"]

_log = logging.getLogger("whimbrel.plugins")


class Registry:
    """The plugins of one manager. Any thread: what is read without the lock is replaced, never changed."""

    def __init__(self, disable: frozenset[str], *, load_entry_points: bool) -> None:
        self.plugins: tuple[Record, ...] = ()
        self.owners: dict[str, Record] = {}  # name -> the first who came; only ever grows
        self._disable = disable
        self._discovered = self._loaded = not load_entry_points
        self._lock = threading.RLock()
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)

    def register(self, plugin: object, name: str, distribution: str) -> str:
        """Register a plugin of the program's own. Raises PluginRefused, leaving nothing behind."""
        with self._lock:
            # So that whether a name is taken does not depend on who asked first.
            self._discover()
            record = Record(name, distribution, "", by_program=True, disabled=name in self._disable)
            if name in self.owners:
                raise record.refused(_taken(self.owners[name]))
            if not record.disabled:
                self._admit(record, plugin)
            self._keep(record)
        return name

    def load(self) -> None:
        """Import and register every installed plugin that is not disabled, once. Raises nothing of theirs."""
        if self._loaded:
            return
        with self._lock:
            self._discover()
            for record in self.plugins:
                entry, record.entry = record.entry, None  # once, also if this is interrupted and called again
                if entry is not None and not record.disabled and not record.reason:
                    self._import(record, entry)
            self._loaded = True

    def _discover(self) -> None:
        if self._discovered:
            return
        for found in _discovery.find():
            record = Record(found.name, found.distribution, found.version, found.entry, reason=found.reason)
            record.disabled = found.name in self._disable
            if found.name in self.owners:
                record.reason = _taken(self.owners[found.name])
            self._keep(record)
        self._discovered = True

    def _import(self, record: Record, entry: EntryPoint) -> None:
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one broken plugin never stops the others
            record.cause, record.reason = error, f"importing {entry.value} failed: {said(error)}"
        else:
            try:
                self._admit(record, plugin)
            except PluginRefused as error:
                record.cause, record.reason = error, error.reason
        if record.reason:
            _log.warning("the %s is left out: %s", record, record.reason)

    def _admit(self, record: Record, plugin: object) -> None:
        try:
            fault = find_fault(plugin, self._pluggy)
            if fault is None:
                # The last step that can fail, and pluggy registers a plugin whole or not at all.
                self._pluggy.register(plugin, record.name)
        except Exception as error:
            raise record.refused(said(error)) from error
        if fault is not None:
            raise record.refused(fault)
        for caller in self._pluggy.get_hookcallers(plugin) or ():
            if caller.name in HOOKS:
                record.hooks[caller.name] = next(one for one in caller.get_hookimpls() if one.plugin is plugin)

    def _keep(self, record: Record) -> None:
        self.plugins = (*self.plugins, record)
        self.owners.setdefault(record.name, record)


def _taken(owner: Record) -> str:
    return f"the name is taken by the {owner}"
