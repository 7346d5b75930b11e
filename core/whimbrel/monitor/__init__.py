"""The monitor: QEMU's QMP for a machine, and a client for it.

::

    with whimbrel.monitor.MonitorServer(machine, "unix:/run/heat.qmp"):
        ...

    with whimbrel.monitor.MonitorClient.connect("unix:/run/heat.qmp") as monitor:
        monitor.execute("migrate", uri="tcp:10.0.0.2:4444")

The `qemu.qmp` library, `qmp-shell` and scripts that were written for QEMU work unchanged. What there is, and where it
differs from QEMU, stands in docs/reference/qmp.md.
"""

from whimbrel.monitor.client import MonitorClient
from whimbrel.monitor.commands import COMMANDS
from whimbrel.monitor.schema import Argument, Command
from whimbrel.monitor.server import MonitorServer

__all__ = ["COMMANDS", "Argument", "Command", "MonitorClient", "MonitorServer"]
