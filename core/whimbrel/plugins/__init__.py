"""The plugin manager and the catalogue of what is offered. No plugin is known here by name."""

from __future__ import annotations

from whimbrel.plugins.catalogue import Catalogue, PluginRow
from whimbrel.plugins.manager import Failure, PluginManager

__all__ = ["Catalogue", "Failure", "PluginManager", "PluginRow"]
