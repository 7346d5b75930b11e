"""A host of test_ring.py, a process of its own (`python ring_host.py`); what its guest does, and what it holds.

It is told in lines of JSON, and answers each: `{"do": "run"}` makes a machine and starts it; `{"do": "receive"}` makes
one that waits, and says where; `{"do": "arrived"}` waits until it runs and its guest has appended, and says what;
`{"do": "leave", "uri": …}` moves it away and says how far its guest had come; `{"do": "held"}` says what the process
holds.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
import time
from pathlib import Path

from whimbrel import LoopGuest, Machine, PluginManager

MIB = 1 << 20
LONG = 60.0
REST = 0.0005  # seconds between two steps


class Host:
    """The machine that is here now, if any."""

    def __init__(self) -> None:
        self.plugins = PluginManager()  # found once: what is held must not depend on it

    def make(self) -> None:
        """A machine of 1 MiB whose guest appends to a log in its own memory, which goes round."""
        self.machine = machine = Machine("ring", plugins=self.plugins)
        machine.settings.parameters.announce_rounds = 0
        ram = machine.ram.add("ram", MIB).view.view("<u8")
        count, log = ram[:1], ram[512:]
        self.count, self.stepped = count, threading.Event()
        stepped = self.stepped

        def step() -> None:
            number = int(count[0])
            assert log[(number - 1) % len(log)] == number, "what was appended last is not there"
            log[number % len(log)] = number + 1
            count[0] = number + 1
            stepped.set()
            time.sleep(REST)

        def power_on() -> None:
            log[-1] = 0

        machine.guest = LoopGuest(step, power_on=power_on)

    def drop(self) -> None:
        """Nothing of the machine is left here."""
        self.machine.close()
        del self.machine, self.count, self.stepped

    def obey(self, order: dict[str, object]) -> dict[str, object]:
        match order:
            case {"do": "run"}:
                self.make()
                self.machine.start()
                return {"epoch": self.machine.epoch}
            case {"do": "receive"}:
                self.make()
                self.arriving = self.machine.incoming("tcp:127.0.0.1:0")
                return {"uri": self.arriving.uri}
            case {"do": "arrived"}:
                self.arriving.wait(LONG)
                del self.arriving
                assert self.stepped.wait(LONG), "the guest stands still"
                return {"epoch": self.machine.epoch, "count": int(self.count[0])}
            case {"do": "leave", "uri": uri}:
                info = self.machine.migrate(uri).wait(LONG)
                count = int(self.count[0])
                self.drop()
                return {"count": count, "ownership": info.ownership}
            case {"do": "held"}:
                gc.collect()  # what waits to be collected is not lost,
                ctypes.CDLL(None).malloc_trim(0)  # nor what the allocator keeps for the next machine
                return held()
        self.drop()
        return {}


def held() -> dict[str, int]:
    """What this process holds: descriptors, threads, mappings, and resident memory in KiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": int(status["Threads"]),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "resident": int(status["VmRSS"].split()[0]),
    }


def main() -> None:
    host = Host()
    for text in sys.stdin:
        try:
            answer = host.obey(json.loads(text))
        except Exception as exc:  # the test tells of it
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
