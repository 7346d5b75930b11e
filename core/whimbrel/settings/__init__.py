"""Capabilities, parameters and whimbrel's own settings: what there is, what it may be, and where it is read from.

::

    settings = Settings.load()                            # whimbrel.toml, WHIMBREL_…
    settings.capabilities.return_path = True
    settings.parameters.set("max-bandwidth", "1GiB")      # or: .max_bandwidth = 1 << 30
    settings.parameters.update({"downtime-limit": 50, "max-bandwidth": 0}, Dialect.QMP)

Names, units and defaults of capabilities and parameters are QEMU's, and so are the texts of their errors.
"""

from whimbrel.settings.capabilities import Capabilities
from whimbrel.settings.kinds import Dialect
from whimbrel.settings.loading import Settings
from whimbrel.settings.local import Backends, Limits, PluginChoices
from whimbrel.settings.parameters import Parameters
from whimbrel.settings.reference import reference
from whimbrel.settings.section import Section
from whimbrel.settings.security import Security

__all__ = [
    "Backends",
    "Capabilities",
    "Dialect",
    "Limits",
    "Parameters",
    "PluginChoices",
    "Section",
    "Security",
    "Settings",
    "reference",
]
