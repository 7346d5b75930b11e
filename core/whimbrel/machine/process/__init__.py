"""A guest in a process of its own, so that neither side's interpreter lock slows the other.

========= ==========================================================================================================
guest     `ProcessGuest`, the machine's side: starts the child, tells it what to do, hears how it fares
child     the child's side: maps the machine's RAM, makes the workload's guest, and does as it is told
link      the socket between them: letters of JSON, with descriptors
memory    `GuestMemory`, the machine's RAM as the workload sees it
========= ==========================================================================================================

Both sides map the same memfds. What the child writes is tracked from the machine's side
(`whimbrel.machine.dirty.remote`). There are two sockets: over one go orders, each with an answer; over the other the
child says that its guest has failed. The child ends when the machine's process does, however that comes about.
"""

from whimbrel.machine.process.guest import ProcessGuest
from whimbrel.machine.process.memory import GuestMemory

__all__ = ["GuestMemory", "ProcessGuest"]
